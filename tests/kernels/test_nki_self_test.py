"""The self-test lets the kernels pass where they are right, and gives the reason where they are not; the emulator is the device."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from quire.kernels.nki import official_nki
from quire.kernels.op import OpContext
from quire.kernels.paged_attention import nki
from quire.kernels.paged_attention.nki_self_test import self_test

CONTEXT = OpContext("neuron", "NC_v2", "bfloat16", num_heads=4, num_kv_heads=2, head_dim=64, block_size=16)
EMULATED = nki.on_emulator("gen2")


@pytest.mark.parametrize("changes", [{}, {"dtype": "float32", "num_heads": 3, "num_kv_heads": 1, "head_dim": 80}])
def test_right_kernels_pass(changes: dict) -> None:
    assert self_test(replace(CONTEXT, **changes), 32, EMULATED) is None


def test_a_kernel_that_attends_wrongly_is_found_with_the_row() -> None:
    def launch(name: str, result: jax.ShapeDtypeStruct, arguments: tuple[Any, ...]) -> jax.Array:
        out = EMULATED(name, result, arguments)
        return out if name == "write_kv" else out * jnp.asarray(1.1, out.dtype)

    reason = self_test(CONTEXT, 32, launch)
    assert reason is not None
    assert "with 1 tokens a row" in reason
    assert "row 0 of 1 tokens differs by" in reason


def test_a_kernel_that_writes_elsewhere_is_found_with_the_place() -> None:
    def launch(name: str, result: jax.ShapeDtypeStruct, arguments: tuple[Any, ...]) -> jax.Array:
        if name == "write_kv":
            cache, rows, slots = arguments
            arguments = (cache, rows, jnp.where(slots < 12 * 16, slots - 1, slots))
        return EMULATED(name, result, arguments)

    assert "tokens of the cache differ, the first in block" in str(self_test(CONTEXT, 32, launch))


def test_a_kernel_of_nothing_but_nan_is_found() -> None:
    def launch(name: str, result: jax.ShapeDtypeStruct, arguments: tuple[Any, ...]) -> jax.Array:
        out = EMULATED(name, result, arguments)
        return out if name == "write_kv" else jnp.full_like(out, jnp.nan)

    assert "differs by nan" in str(self_test(CONTEXT, 32, launch))


def test_a_kernel_that_does_not_compile_is_told_in_its_compilers_words() -> None:
    def launch(name: str, result: jax.ShapeDtypeStruct, arguments: tuple[Any, ...]) -> jax.Array:
        raise RuntimeError(f"[NCC_EHCA005] unknown custom call\nin {name}")

    reason = self_test(CONTEXT, 32, launch)
    assert "they fail: RuntimeError: [NCC_EHCA005] unknown custom call in write_kv" in str(reason)


@pytest.mark.skipif(official_nki()[0] is not None, reason="AWS's nki is installed")
def test_without_awss_package_that_is_the_reason() -> None:
    assert "ModuleNotFoundError: No module named 'nki'" in str(self_test(CONTEXT, 32))
