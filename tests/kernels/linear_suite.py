"""The conformance suite of the linear op: shapes, the exact product in numpy, and what every implementation must give.

An implementation's test class subclasses `LinearConformance` and says how it prepares a weight. T rows, K values each, N columns.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from quire.kernels.linear import reference
from quire.kernels.linear.contract import PrepareWeight, Weight, matmul
from quire.kernels.linear.quantize import quantize_weight
from tests.models.helpers import quick_jit

FORMATS = ("float32", "bfloat16", "int8")  # of the weight
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}  # of activations, and of the source of a weight


@dataclass(frozen=True)
class Shape:
    """A product [T, K] x [K, N]."""

    t: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"{self.t}x{self.k}x{self.n}"


# K that fill no word, no vector, exactly one; N on either side of a panel of 32; T that tiles of 12, 8, 4, 2 and 1 rows make up.
SHAPES = [
    Shape(1, 1, 1),
    Shape(1, 36, 90),
    Shape(2, 3, 31),
    Shape(3, 31, 32),
    Shape(5, 50, 33),
    Shape(7, 64, 64),
    Shape(8, 2, 65),
    Shape(11, 97, 5),
    Shape(12, 128, 32),
    Shape(13, 250, 101),
    Shape(40, 33, 7),
    Shape(97, 66, 40),
    Shape(200, 35, 36),
]
# Of float32 sums, relative to the sum of the products' sizes: measured 2.6e-7 at most, for 97x66x40.
TOLERANCE = 1e-6


def quantization(format: str) -> str:
    """What a weight in this format is asked for by."""
    return "int8" if format == "int8" else "none"


def source(format: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A random matrix as a checkpoint has it: int8 is made from bfloat16."""
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return values.astype(np.float32 if format == "float32" else ml_dtypes.bfloat16)


def activations(dtype: str, shape: tuple[int, int], seed: int = 1) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(DTYPES[dtype])


def bits(array: Any) -> np.ndarray:
    """For equality that tells 0 from -0, and finds a NaN equal to itself."""
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.itemsize])


@quick_jit
def product(x: jax.Array, weight: Any) -> jax.Array:
    return matmul(x, weight)


class LinearConformance:
    """Subclass, and set the op."""

    prepare: PrepareWeight
    takes_mixed_dtypes = True

    def weight(self, matrix: np.ndarray, format: str) -> jax.Array | Weight:
        return type(self).prepare(matrix, quantization(format))

    def skip_unless_taken(self, format: str, dtype: str) -> None:
        if format not in ("int8", dtype) and not self.takes_mixed_dtypes:
            pytest.skip("models do not mix dtypes, and this implementation does not either")

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("format", ["float32", "bfloat16"])
    def test_a_product_is_the_exact_one_but_for_float32_sums(self, format: str, dtype: str, shape: Shape) -> None:
        self.skip_unless_taken(format, dtype)
        matrix, x = source(format, (shape.k, shape.n)), activations(dtype, (shape.t, shape.k))
        found = product(jnp.asarray(x), self.weight(matrix, format))
        assert (found.shape, found.dtype) == ((shape.t, shape.n), jnp.float32)
        # Activations meet a weight in its own format.
        exact_x, exact_w = x.astype(DTYPES[format]).astype(np.float64), matrix.astype(np.float64)
        error = np.abs(np.asarray(found, np.float64) - exact_x @ exact_w)
        assert (error / (np.abs(exact_x) @ np.abs(exact_w))).max() < TOLERANCE

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_an_int8_product_is_the_references_bit_for_bit(self, dtype: str, shape: Shape) -> None:
        """Integers are exact, and what scales them is one expression."""
        matrix, x = source("int8", (shape.k, shape.n)), jnp.asarray(activations(dtype, (shape.t, shape.k)))
        expected = product(x, reference.prepare(matrix, "int8"))
        np.testing.assert_array_equal(bits(product(x, self.weight(matrix, "int8"))), bits(expected))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_an_int8_product_is_near_the_exact_one(self, dtype: str) -> None:
        matrix, x = source("int8", (256, 48)), activations(dtype, (9, 256))
        found = np.asarray(product(jnp.asarray(x), self.weight(matrix, "int8")), np.float64)
        exact = x.astype(np.float64) @ matrix.astype(np.float64)
        # Two factors rounded to steps of 1/127 of the largest of 256 normals, about 3: measured 0.011 of the deviation.
        assert np.sqrt(np.mean((found - exact) ** 2)) < 0.02 * exact.std()

    @pytest.mark.parametrize("format", FORMATS)
    def test_the_memory_order_of_the_source_does_not_matter(self, format: str) -> None:
        big = source(format, (90, 80))
        views = {
            "transposed": np.ascontiguousarray(big.T).T,
            "rows of a larger one": np.concatenate([big, big])[90:],
            "every other row": np.repeat(big, 2, axis=0)[::2],
            "columns of a larger one": np.concatenate([big, big], axis=1)[:, 80:],
            "every third column": np.repeat(big, 3, axis=1)[:, ::3],
            "rows backwards": np.ascontiguousarray(big[::-1])[::-1],
            "transposed, backwards": np.ascontiguousarray(big.T[::-1])[::-1].T,
        }
        expected = jax.tree.leaves(self.weight(big, format))
        for name, view in views.items():
            np.testing.assert_array_equal(view, big)
            for mine, theirs in zip(jax.tree.leaves(self.weight(view, format)), expected, strict=True):
                np.testing.assert_array_equal(mine, theirs, err_msg=name)

    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("k", [33, 64])
    def test_zeros_give_zero(self, format: str, k: int) -> None:
        matrix, x = source(format, (k, 40)), activations(self.own_dtype(format), (6, k))
        matrix[:, [0, 31, 39]] = 0
        x[[0, 5]] = 0
        found = np.asarray(product(jnp.asarray(x), self.weight(matrix, format)))
        assert (found[:, [0, 31, 39]] == 0).all()
        assert (found[[0, 5]] == 0).all()
        assert (np.delete(found[1:5], [0, 31, 39], axis=1) != 0).all()

    @pytest.mark.parametrize("format", FORMATS)
    def test_huge_and_tiny_numbers_are_numbers_like_others(self, format: str) -> None:
        """Powers of two scale a product exactly, however far from one it lies."""
        dtype = self.own_dtype(format)
        matrix, x = source(format, (70, 36)), activations(dtype, (5, 70))
        plain = np.asarray(product(jnp.asarray(x), self.weight(matrix, format)))
        for of_x, of_w in ((90, 30), (30, 90), (-90, 30), (30, -90), (-50, -50)):
            scaled_x, scaled_w = x * DTYPES[dtype](2.0**of_x), matrix * matrix.dtype.type(2.0**of_w)
            found = np.asarray(product(jnp.asarray(scaled_x), self.weight(scaled_w, format)))
            np.testing.assert_array_equal(found, plain * np.float32(2.0 ** (of_x + of_w)))

    @pytest.mark.parametrize("format", FORMATS)
    def test_a_row_that_is_no_number_harms_no_other(self, format: str) -> None:
        matrix, x = source(format, (70, 36)), activations(self.own_dtype(format), (5, 70))
        weight = self.weight(matrix, format)
        plain = product(jnp.asarray(x), weight)
        for value in (np.nan, np.inf, -np.inf):
            x[2, 7] = value
            found = product(jnp.asarray(x), weight)
            np.testing.assert_array_equal(np.delete(bits(found), 2, axis=0), np.delete(bits(plain), 2, axis=0))
            assert not np.isfinite(found[2]).any(), "and hides nowhere"

    @pytest.mark.parametrize("used", [(), (0,), (96,), (1, 2, 50), tuple(range(0, 97, 2)), tuple(range(97))], ids=len)
    @pytest.mark.parametrize("format", FORMATS)
    def test_used_rows_are_computed_as_if_there_were_no_others(self, format: str, used: tuple[int, ...]) -> None:
        matrix, x = source(format, (70, 36)), activations(self.own_dtype(format), (97, 70))
        weight = self.weight(matrix, format)
        is_used = np.isin(np.arange(97), used)
        x[~is_used] = np.nan
        found = quick_jit(matmul)(jnp.asarray(x), weight, jnp.asarray(is_used))
        assert found.shape == (97, 36)
        # The reference may sum in another order for other numbers of rows, so it is compared with all of them.
        expected = product(jnp.asarray(x), weight)
        np.testing.assert_array_equal(bits(found)[is_used], bits(expected)[is_used])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("format", FORMATS)
    def test_columns_are_the_matrixs_columns(self, format: str, dtype: str) -> None:
        """int8: what the quantized matrix stands for. Ids out of range are clipped."""
        for k, n in ((33, 70), (6, 31), (1, 1)):
            matrix = source(format, (k, n))
            weight = self.weight(matrix, format)
            if isinstance(weight, jax.Array):
                pytest.skip("a plain array is indexed by its user")
            ids = np.array([0, n - 1, n // 2, -1, n, 10**6, -(10**6), 0], np.int32)
            found = quick_jit(lambda ids, weight=weight: weight.columns(ids, jnp.dtype(dtype)))(jnp.asarray(ids))
            if format == "int8":
                values, scales = quantize_weight(matrix)
                matrix = values.astype(np.float32) * scales[None, :]
            expected = matrix[:, np.clip(ids, 0, n - 1)].T.astype(DTYPES[dtype])
            np.testing.assert_array_equal(bits(found), bits(expected))

    def own_dtype(self, format: str) -> str:
        """The dtype of activations that a format is multiplied with in a model."""
        return "bfloat16" if format == "int8" else format
