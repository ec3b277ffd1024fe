"""The hidden states that `forward` gives back are those that enter the layers, however the layers run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from quire.backends.stablehlo_lint import lint
from quire.models.checkpoint import load_params
from quire.models.config import ModelConfig
from quire.models.decoder import ForwardOutput, KVCache, LayerInfo, forward, norm
from quire.models.params import Layer, Params, abstract_params
from quire.models.registry import load_config
from tests.models.helpers import dense_attend, quick_jit, random_ids
from tests.models.test_decoder import CONFIGS, LLAMA, params_of
from tests.models.tiny import load_in_transformers, make_checkpoint

NUM_TOKENS = 9


def run(params: Params, config: ModelConfig, captured_layers: tuple[int, ...]) -> ForwardOutput:
    ids = jnp.asarray(random_ids(config.vocab_size, NUM_TOKENS))
    positions = jnp.arange(NUM_TOKENS, dtype=jnp.int32)

    def compute(params: Params) -> ForwardOutput:
        return forward(params, config, ids, positions, None, dense_attend(config), captured_layers=captured_layers)

    return quick_jit(compute)(params)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_captured_hidden_states_are_those_of_transformers(name: str, stacked: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="transformers needs torch to be compared with")
    folder = make_checkpoint(name, tmp_path, seed=1)
    config = load_config(folder)
    ids = random_ids(config.vocab_size, NUM_TOKENS)
    with torch.no_grad():
        model = load_in_transformers(folder)
        states = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True).hidden_states
    layers = tuple(range(config.num_layers))
    params = load_params(folder, config, np.float32, stacked=stacked)
    output = run(params, config, (*layers, config.num_layers))
    *entered, left = jnp.split(output.captured, config.num_layers + 1, axis=1)
    assert len(states) == len(layers) + 1
    for layer_idx in layers:
        np.testing.assert_allclose(entered[layer_idx], states[layer_idx][0], atol=1e-4, err_msg=str(layer_idx))
    # transformers has the last one after the final norm.
    np.testing.assert_allclose(norm(left, params["norm"], config), states[-1][0], atol=1e-4)
    np.testing.assert_allclose(output.hidden, states[-1][0], atol=1e-4)


@pytest.mark.parametrize("captured_layers", [(0,), (1, 2), (3, 1), (0, 1, 2, 3)])
@pytest.mark.parametrize("name", CONFIGS)
def test_scanned_layers_capture_what_unrolled_ones_do(name: str, captured_layers: tuple[int, ...]) -> None:
    config = CONFIGS[name]
    unrolled, scanned = (run(params_of(name, stacked=stacked), config, captured_layers) for stacked in (False, True))
    assert unrolled.captured is not None
    assert unrolled.captured.shape == (NUM_TOKENS, len(captured_layers) * config.hidden_size)
    np.testing.assert_allclose(scanned.captured, unrolled.captured, atol=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_capturing_changes_nothing_else(stacked: bool) -> None:
    params = params_of("llama", stacked=stacked)
    plain, capturing = run(params, LLAMA, ()), run(params, LLAMA, (1, 2))
    assert plain.captured is None
    np.testing.assert_array_equal(capturing.hidden, plain.hidden)


def test_captured_hidden_states_stand_in_the_order_asked_for() -> None:
    params = params_of("llama", stacked=True)
    ascending, asked = (run(params, LLAMA, layers).captured for layers in ((1, 2, 3), (3, 1, 1)))
    assert ascending is not None
    first, _, third = jnp.split(ascending, 3, axis=1)
    np.testing.assert_array_equal(asked, jnp.concatenate([third, first, first], axis=1))


def test_a_fused_layer_s_input_is_captured_too() -> None:
    def run_layer(
        layer: Layer, x: Array, rope: tuple[Array, Array], kv_cache: KVCache, info: LayerInfo
    ) -> tuple[Array, KVCache]:
        return jnp.full_like(x, info.layer_idx + 1), kv_cache

    ids = jnp.arange(4, dtype=jnp.int32)
    params = params_of("llama", stacked=False)
    output = forward(params, LLAMA, ids, ids, None, dense_attend(LLAMA), run_layer, captured_layers=(0, 1, 3))
    assert output.captured is not None
    embeddings, *others = jnp.split(output.captured, 3, axis=1)
    np.testing.assert_array_equal(embeddings, params["embed_tokens"][:4])
    assert [np.unique(x).tolist() for x in others] == [[1], [3]]


def test_layers_that_are_not_captured_are_not_kept() -> None:
    """A scan that gave back every layer's hidden states would hold [L, T, D]."""
    num_layers, num_tokens, width = LLAMA.num_layers, 7, LLAMA.hidden_size
    params = abstract_params(LLAMA, np.float32, stacked=True)
    ids = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)

    def compute(params: Params, ids: Array) -> Array | None:
        return forward(params, LLAMA, ids, ids, None, dense_attend(LLAMA), captured_layers=(1, 3)).captured

    program = jax.jit(compute).lower(params, ids)
    text = program.as_text()
    assert f"tensor<{num_tokens}x{width}xf32>" in text
    assert f"tensor<{num_layers}x{num_tokens}x{width}xf32>" not in text
    assert [finding.describe() for finding in lint(program).errors] == []


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_the_model_does_not_have_is_refused(layer: int) -> None:
    with pytest.raises(AssertionError, match=f"{layer},.* of 3 layers"):
        run(params_of("llama", stacked=True), LLAMA, (layer,))
