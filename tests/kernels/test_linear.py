"""The reference and the C++ kernels of every instruction set pass the linear op's suite; the suite fails for wrong products."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.kernels.errors import KernelUnavailableError
from quire.kernels.linear import cpu, reference
from quire.kernels.linear.quantize import quantize_weight
from quire.kernels.native.library import INSTRUCTION_SETS, refuses
from quire.kernels.op import OpContext
from quire.kernels.ops import choose_ops
from tests.kernels.linear_suite import (
    DTYPES,
    SHAPES,
    TOLERANCE,
    LinearConformance,
    Shape,
    activations,
    product,
    source,
)
from tests.kernels.native import CONTEXT, needs


class TestReference(LinearConformance):
    prepare = staticmethod(reference.prepare)
    takes_mixed_dtypes = False


class TestWeightOnly(LinearConformance):
    """For devices without products of integers; activations stay as they are."""

    prepare = staticmethod(reference.prepare_weight_only)
    takes_mixed_dtypes = False

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_an_int8_product_is_the_references_bit_for_bit(self, dtype: str, shape: Shape) -> None:
        """In its place: the product with the matrix that the int8 values and scales stand for, but for float32 sums."""
        matrix, x = source("int8", (shape.k, shape.n)), activations(dtype, (shape.t, shape.k))
        values, scales = quantize_weight(matrix)
        exact_x, exact_w = x.astype(np.float64), values.astype(np.float64) * scales.astype(np.float64)
        found = np.asarray(product(jnp.asarray(x), self.weight(matrix, "int8")), np.float64)
        error = np.abs(found - exact_x @ exact_w)
        assert (error <= TOLERANCE * (np.abs(exact_x) @ np.abs(exact_w))).all()


@pytest.mark.parametrize(
    ("platform", "quantization", "name"),
    [
        ("neuron", "int8", "weight_only"),
        ("neuron", "none", "reference"),
        ("tpu", "int8", "reference"),
        ("cpu", "int8", "reference"),
    ],
)
@pytest.mark.parametrize("has_experts", [False, True])
def test_int8_is_multiplied_in_integers_where_there_are_products_of_them(
    platform: str, quantization: str, name: str, has_experts: bool
) -> None:
    context = OpContext(
        platform, "", "bfloat16", 8, 2, 64, 16, quantization=quantization, has_experts=has_experts, scan_layers=True
    )
    assert choose_ops(context).linear.name == name


def test_a_program_of_one_form_is_never_taken_for_another() -> None:
    """Programs are found by the structure of what they are given, and hashes alone may meet."""
    prepares = [reference.prepare, reference.prepare_weight_only]
    prepares += [partial(cpu.prepare, name) for name in INSTRUCTION_SETS if not refuses(name, CONTEXT)]
    structures = [jax.tree.structure(prepare(source("int8", (70, 36)), "int8")) for prepare in prepares]
    for idx, structure in enumerate(structures):
        assert structure not in structures[:idx]


def test_int8_products_that_a_device_lacks_are_refused_by_name() -> None:
    neuron, cpu = (
        OpContext(platform, "", "bfloat16", 8, 2, 64, 16, quantization="int8") for platform in ("neuron", "cpu")
    )
    with pytest.raises(KernelUnavailableError, match="reference: neuron has no products of integers"):
        choose_ops(neuron, {"linear": "reference"})
    with pytest.raises(KernelUnavailableError, match="weight_only: for devices without products of integers"):
        choose_ops(cpu, {"linear": "weight_only"})


@needs("avx512bf16")
class TestAvx512Bf16(LinearConformance):
    prepare = staticmethod(partial(cpu.prepare, "avx512bf16"))


@needs("avx512")
class TestAvx512(LinearConformance):
    prepare = staticmethod(partial(cpu.prepare, "avx512"))


@needs("avx2")
class TestAvx2(LinearConformance):
    prepare = staticmethod(partial(cpu.prepare, "avx2"))


@needs("portable")
class TestPortable(LinearConformance):
    prepare = staticmethod(partial(cpu.prepare, "portable"))


def _last_row_lost(matrix: np.ndarray, quantization: str):
    matrix = matrix.copy()
    matrix[-1] = 0
    return reference.prepare(matrix, quantization)


def _too_large(matrix: np.ndarray, quantization: str):
    return reference.prepare((matrix.astype(np.float32) * 1.01).astype(matrix.dtype), quantization)


@pytest.mark.parametrize("wrong", [_last_row_lost, _too_large])
@pytest.mark.parametrize("format", ["float32", "int8"])
def test_the_suite_catches_wrong_products(wrong, format: str) -> None:
    class Broken(TestReference):
        prepare = staticmethod(wrong)

    suite, shape = Broken(), SHAPES[-1]
    if format == "int8":
        check = partial(suite.test_an_int8_product_is_the_references_bit_for_bit, "float32", shape)
    else:
        check = partial(suite.test_a_product_is_the_exact_one_but_for_float32_sums, format, format, shape)
    with pytest.raises(AssertionError):
        check()
