"""The reference and the C++ kernels of every instruction set pass the linear op's suite; the suite fails for wrong products."""

from functools import partial

import numpy as np
import pytest

from quire.kernels.linear import cpu, reference
from tests.kernels.linear_suite import SHAPES, LinearConformance
from tests.kernels.native import needs


class TestReference(LinearConformance):
    prepare = staticmethod(reference.prepare)
    takes_mixed_dtypes = False


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
