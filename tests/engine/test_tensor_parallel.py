"""A model spread over several devices gives the tokens of one, and holds on each of them what it should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quire.engine import LLM
from quire.kernels.errors import BackendError, InvalidConfigError
from quire.models.parallel import check_divisible, held_shape, read_held
from quire.models.params import param_specs
from quire.models.registry import load_config
from tests.engine.engines import FewShapesBackend, tiny_folder

ROOT = Path(__file__).parents[2]
# The repository's root must stay off sys.path, where transformers would take kernels/ for the package of that name.
START = f"""
import sys, types
tests = types.ModuleType("tests"); tests.__path__ = [{str(ROOT / "tests")!r}]; sys.modules["tests"] = tests
from tests.engine.spread_engines import main
main()
"""
CASES = {
    "dense": ("dense:1:scanned", "dense:2:scanned", "dense:4:scanned", "dense:4:unrolled"),
    "fewer key/value heads than devices": (
        "two_kv_heads:1:scanned",
        "two_kv_heads:4:scanned",
        "two_kv_heads:8:scanned",
        "two_kv_heads:4:scanned:model",
    ),
    "kernels of the TPU": ("two_kv_heads:1:scanned", "two_kv_heads:2:pallas"),
    "read from files": ("one_kv_head:1:scanned", "from_files:1:unrolled", "from_files:4:scanned"),
    "experts": ("qk_norm_experts:1:scanned", "qk_norm_experts:2:scanned", "qk_norm_experts:4:unrolled"),
}

SLOW_CASES = {
    "one key/value head": ("one_kv_head:1:scanned", "one_kv_head:8:scanned"),
    "biases and a tied embedding": ("biases_tied:1:scanned", "biases_tied:2:scanned", "biases_tied:4:unrolled"),
    "experts that cannot be shared out": ("experts_in_parts:1:scanned", "experts_in_parts:2:scanned"),
    "drafts on more devices": (
        "two_kv_heads:1:scanned",
        "two_kv_heads:1:unrolled:model",
        "two_kv_heads:2:scanned:model",
        "two_kv_heads:4:unrolled:model",
        "two_kv_heads:4:scanned:ngram",
    ),
    "drafts by kernels of the TPU": ("two_kv_heads:1:scanned", "two_kv_heads:2:pallas:model"),
    "drafts of one key/value head": ("one_kv_head:1:scanned", "one_kv_head:8:scanned:model"),
    "drafts of experts": ("qk_norm_experts:1:scanned", "qk_norm_experts:2:scanned:model"),
}


# Each case starts two to four engines, which takes a minute on two slow cores: the others run with the slow tests.
FAST_CASES = ("kernels of the TPU",)


@pytest.mark.parametrize(
    "name", [name if name in FAST_CASES else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_tensor_parallel_equals_one_device(name: str) -> None:
    assert_equal_to_the_first(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_tensor_parallel_with_drafts_equals_one_device_without(name: str) -> None:
    assert_equal_to_the_first(SLOW_CASES[name])


def assert_equal_to_the_first(cases: tuple[str, ...]) -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", START, *cases], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    alone, *spread = json.loads(done.stdout.splitlines()[-1]).items()
    for case, (tokens, logprobs) in spread:
        assert tokens == alone[1][0], case
        # Sums over devices are added in another order; 1e-6 seen.
        np.testing.assert_allclose(logprobs, alone[1][1], atol=2e-5, err_msg=case)


def config_of(**changes):
    return load_config(tiny_folder(**changes), max_model_len=64)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_parts_that_devices_read_make_the_whole(size: int) -> None:
    """Key/value heads are repeated in place, a vocabulary is padded with zeros, everything else is as it was."""
    config = config_of(num_attention_heads=6, num_key_value_heads=3 if size != 2 else 2, head_dim=10)
    rng = np.random.default_rng(0)
    for spec in param_specs(config).values():
        tensor = rng.normal(size=spec.shape).astype(np.float32)
        shape = held_shape(spec, config, size, tensor.shape)
        whole = read_held(tensor, spec, config, size, tuple(slice(None) for _ in shape))
        assert whole.shape == shape
        for axis in range(len(shape)):
            if shape[axis] % size == 0:
                step = shape[axis] // size
                index = [slice(None)] * len(shape)
                parts = []
                for first in range(0, shape[axis], step):
                    index[axis] = slice(first, first + step)
                    parts.append(read_held(tensor, spec, config, size, tuple(index)))
                np.testing.assert_array_equal(np.concatenate(parts, axis), whole, err_msg=f"{spec.name} {axis}")
        if "kv_heads" in spec.axes and size > config.num_kv_heads:
            heads = whole.reshape(*whole.shape[:-1], size, config.head_dim)
            own = tensor.reshape(*tensor.shape[:-1], config.num_kv_heads, config.head_dim)
            for head in range(size):
                np.testing.assert_array_equal(heads[..., head, :], own[..., head * config.num_kv_heads // size, :])
        elif "vocab" in spec.axes:
            index = tuple(slice(0, length) for length in tensor.shape)
            np.testing.assert_array_equal(whole[index], tensor)
            assert whole.sum() == pytest.approx(tensor.sum(), abs=1e-3)
        else:
            np.testing.assert_array_equal(whole, tensor)


@pytest.mark.parametrize(
    ("changes", "size", "reason"),
    [
        ({}, 2, r"num_attention_heads=9 is not a multiple of it; sizes that fit: 1"),
        ({"intermediate_size": 51}, 9, r"intermediate_size=51 is not a multiple"),
        (
            {"hidden_size": 48, "num_attention_heads": 24, "num_key_value_heads": 6, "intermediate_size": 64},
            4,
            r"num_key_value_heads=6 neither divides it nor is a multiple of it; sizes that fit: 1, 2",
        ),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_sizes_that_fit(changes, size: int, reason: str) -> None:
    with pytest.raises(InvalidConfigError, match=reason):
        check_divisible(config_of(**changes), size)


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(BackendError, match="all cores are one device here; leave it at 1"):
        LLM(str(tiny_folder()), backend=FewShapesBackend(), load_format="dummy", tensor_parallel_size=3)
