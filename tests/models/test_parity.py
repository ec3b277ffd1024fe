"""Every architecture gives the log-probabilities that transformers gives, whichever way its layers are laid out."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from quire.models.checkpoint import load_params
from quire.models.registry import SUPPORTED_ARCHITECTURES, load_config
from tests.models.helpers import all_logprobs, random_ids
from tests.models.tiny import TINY, make_checkpoint, transformers_logprobs

pytest.importorskip("torch", reason="transformers needs torch to be compared with")

SCANNED_TOO = ("gemma3", "phi3-longrope", "qwen2-windows", "qwen3-moe")
"""Between them all that differs between the layouts; the others would only compile the same program again."""
NUM_TOKENS = 23  # longer than every window, shorter than the longrope models' original context


@pytest.mark.parametrize("name", TINY)
def test_logprobs_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(name, tmp_path, seed=1)
    config = load_config(folder, max_model_len=64)
    ids = random_ids(config.vocab_size, NUM_TOKENS)
    expected = transformers_logprobs(folder, ids)
    assert expected.std() > 0.1, "logits without contrast would agree with anything"

    for stacked in (False, True) if name in SCANNED_TOO else (False,):
        logprobs = all_logprobs(load_params(folder, config, jnp.float32, stacked=stacked), config, ids)
        np.testing.assert_allclose(logprobs, expected, atol=1e-4, rtol=0)  # measured: at most 1e-5
        np.testing.assert_array_equal(logprobs.argmax(-1), expected.argmax(-1))


def test_a_longrope_model_beyond_its_original_context_equals_transformers(tmp_path: Path) -> None:
    folder = make_checkpoint("phi3-longrope", tmp_path, seed=1)
    ids = random_ids(101, 70)  # transformers turns to the long factors beyond 64
    long, short = load_config(folder), load_config(folder, max_model_len=64)
    params = load_params(folder, long, jnp.float32, stacked=True)
    expected = transformers_logprobs(folder, ids)
    np.testing.assert_allclose(all_logprobs(params, long, ids), expected, atol=1e-4, rtol=0)
    assert np.abs(all_logprobs(params, short, ids) - expected).max() > 1e-2


def test_every_supported_architecture_has_a_tiny_model() -> None:
    from transformers import AutoModelForCausalLM

    classes = {AutoModelForCausalLM._model_mapping[type(make())].__name__ for make in TINY.values()}
    assert classes == set(SUPPORTED_ARCHITECTURES)


def test_layers_in_half_precision_stay_near_float32(tmp_path: Path) -> None:
    folder = make_checkpoint("gemma3", tmp_path, seed=1)
    config = load_config(folder)
    ids = random_ids(config.vocab_size, NUM_TOKENS)
    expected = all_logprobs(load_params(folder, config, jnp.float32, stacked=True), config, ids)
    for dtype in (jnp.bfloat16, jnp.float16):
        params = load_params(folder, config, dtype, stacked=True)
        assert params["layers"]["q_proj"].dtype == dtype
        np.testing.assert_allclose(all_logprobs(params, config, ids), expected, atol=0.3, rtol=0)
