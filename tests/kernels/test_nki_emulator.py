"""The emulator's instructions against numpy, its views, its memory, and its costs.

Kernels here are closures over what they compute with; `run` gives what a tile of SBUF or PSUM holds at the end.
"""

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quire.kernels.errors import NkiError
from quire.kernels.nki import isa as nisa
from quire.kernels.nki import language as nl
from quire.kernels.nki import load_emulated, official_nki, simulate
from quire.kernels.nki.tensor import NkiTensor

BF16 = ml_dtypes.bfloat16
RNG = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32).astype(dtype)


def load(x: NkiTensor) -> NkiTensor:
    tile = nl.ndarray(x.shape, x.dtype)
    nisa.dma_copy(dst=tile, src=x)
    return tile


def tile(*shape: int, dtype: str = nl.float32, buffer: str = nl.sbuf) -> NkiTensor:
    return nl.ndarray(shape, dtype, buffer=buffer)


def run(compute: Callable[..., NkiTensor], *arrays: Any, generation: str = "gen2") -> np.ndarray:
    """Loads the arrays, computes a tile, and stores it."""

    def kernel(*inputs: Any) -> NkiTensor:
        result = compute(*(load(x) for x in inputs))
        if result.buffer == nl.psum:
            in_sbuf = tile(*result.shape, dtype=result.dtype)
            nisa.tensor_copy(dst=in_sbuf, src=result)
            result = in_sbuf
        out = nl.ndarray(result.shape, result.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=result)
        return out

    return simulate(kernel, *arrays, generation=generation).output


def into(dtype: str, operation: Callable[..., Any], *shape: int, buffer: str = nl.sbuf) -> Callable[..., NkiTensor]:
    """A kernel that has `operation(dst, *tiles)` write a tile."""

    def compute(*tiles: NkiTensor) -> NkiTensor:
        dst = tile(*(shape or tiles[0].shape), dtype=dtype, buffer=buffer)
        operation(dst, *tiles)
        return dst

    return compute


# Numbers


def test_results_are_rounded_to_nearest_even_in_bfloat16() -> None:
    halfway = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1e30, 3.4e38]], np.float32)
    expected = np.array([[1, 1 + 2**-6, -1, BF16(1e30), BF16(3.4e38)]], BF16)
    np.testing.assert_array_equal(run(into(nl.bfloat16, nisa.tensor_copy), halfway), expected)


def test_arithmetic_is_float32_whatever_the_operands_are() -> None:
    a, b = normal(8, 16, dtype=BF16), normal(8, 16, dtype=np.float16)
    out = run(into(nl.float32, lambda dst, x, y: nisa.tensor_tensor(dst, x, y, nl.multiply)), a, b)
    np.testing.assert_array_equal(out, a.astype(np.float32) * b.astype(np.float32))


def test_copies_between_equal_dtypes_keep_every_bit() -> None:
    x = np.array([[np.nan, np.inf, -0.0, 1e-45]], np.float32)
    out = run(into(nl.float32, nisa.tensor_copy), x)
    np.testing.assert_array_equal(out.view(np.uint32), x.view(np.uint32))
    big = np.array([[2**31 - 1, -(2**31), 2**24 + 1]], np.int32)
    np.testing.assert_array_equal(run(into(nl.int32, nisa.tensor_copy), big), big)


def test_32_bit_integers_are_exact_on_gpsimd() -> None:
    a, b = (RNG.integers(-(2**30), 2**30, (4, 8), dtype=np.int32) for _ in range(2))
    np.testing.assert_array_equal(run(into(nl.int32, lambda d, x, y: nisa.tensor_tensor(d, x, y, nl.add)), a, b), a + b)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (nl.add, np.add),
        (nl.subtract, np.subtract),
        (nl.multiply, np.multiply),
        (nl.maximum, np.maximum),
        (nl.minimum, np.minimum),
        (nl.abs_max, lambda a, b: np.maximum(abs(a), abs(b))),
        (nl.less, np.less),
        (nl.greater_equal, np.greater_equal),
        (nl.not_equal, np.not_equal),
    ],
    ids=lambda op: getattr(op, "name", ""),
)
def test_tensor_tensor(op: Any, expected: Callable[..., np.ndarray]) -> None:
    a, b = normal(8, 16), normal(8, 16)
    out = run(into(nl.float32, lambda dst, x, y: nisa.tensor_tensor(dst, x, y, op)), a, b)
    np.testing.assert_array_equal(out, expected(a, b).astype(np.float32))


def test_tensor_scalar_applies_two_operators_with_numbers_or_one_number_per_partition() -> None:
    x, s = normal(8, 16), normal(8, 1)

    def compute(dst: NkiTensor, data: NkiTensor, operand: NkiTensor) -> None:
        nisa.tensor_scalar(dst, data, nl.subtract, operand, True, nl.maximum, 0.25)

    np.testing.assert_array_equal(run(into(nl.float32, compute), x, s), np.maximum(s - x, np.float32(0.25)))


def test_bitwise_operators_see_bits() -> None:
    x = RNG.integers(0, 2**32, (4, 8), dtype=np.uint32)

    def compute(dst: NkiTensor, data: NkiTensor) -> None:
        nisa.tensor_scalar(dst, data, nl.right_shift, 3, op1=nl.bitwise_and, operand1=0xFFFF)

    np.testing.assert_array_equal(run(into(nl.uint32, compute), x), (x >> 3) & 0xFFFF)


def test_scalar_tensor_tensor_is_the_step_of_an_online_softmax() -> None:
    acc, correction, new = normal(8, 16), normal(8, 1), normal(8, 16)

    def compute(dst: NkiTensor, a: NkiTensor, c: NkiTensor, n: NkiTensor) -> None:
        nisa.scalar_tensor_tensor(dst, a, nl.multiply, c, nl.add, n)

    np.testing.assert_array_equal(run(into(nl.float32, compute), acc, correction, new), acc * correction + new)


def test_tensor_reduce_over_the_last_axes_and_negated() -> None:
    x = normal(8, 3, 5)
    rows = into(nl.float32, lambda dst, d: nisa.tensor_reduce(dst, nl.maximum, d, axis=2, negate=True), 8, 3)
    np.testing.assert_array_equal(run(rows, x), -x.max(axis=2))
    whole = into(nl.float32, lambda dst, d: nisa.tensor_reduce(dst, nl.add, d, axis=(1, 2)), 8, 1)
    np.testing.assert_allclose(run(whole, x)[:, 0], x.sum(axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nl.copy, lambda x: x),
        (nl.exp, np.exp),
        (nl.square, np.square),
        (nl.tanh, np.tanh),
        (nl.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
        (nl.silu, lambda x: x / (1 + np.exp(-x))),
        (nl.relu, lambda x: np.maximum(x, 0)),
        (nl.sin, np.sin),
        (nl.softplus, lambda x: np.log1p(np.exp(x))),
        (nl.gelu, lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2),
    ],
    ids=lambda f: getattr(f, "name", ""),
)
def test_activation_of_scaled_and_biased_data(function: Any, expected: Callable[..., np.ndarray]) -> None:
    x, scale, bias = normal(8, 16), normal(8, 1) * 0.5, normal(8, 1) * 0.25
    x = np.clip(x, -2, 2)

    def compute(dst: NkiTensor, data: NkiTensor, s: NkiTensor, b: NkiTensor) -> None:
        nisa.activation(dst, function, data, bias=b, scale=s)

    expected_values = expected(x.astype(np.float64) * scale + bias)
    np.testing.assert_allclose(run(into(nl.float32, compute), x, scale, bias), expected_values, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("function", [nl.sqrt, nl.rsqrt, nl.log], ids=lambda f: f.name)
def test_functions_of_positive_numbers(function: Any) -> None:
    x = np.exp(normal(8, 16))
    expected = {"sqrt": np.sqrt, "rsqrt": lambda v: v**-0.5, "log": np.log}[function.name](x)
    out = run(into(nl.float32, lambda dst, d: nisa.activation(dst, function, d)), x)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_activation_gives_the_sums_of_its_rows_before_they_are_rounded() -> None:
    x = normal(8, 64)

    def compute(data: NkiTensor) -> NkiTensor:
        sums = tile(8, 1)
        nisa.activation_reduce(tile(8, 64, dtype=nl.bfloat16), nl.exp, data, nl.add, sums)
        return sums

    np.testing.assert_allclose(run(compute, x)[:, 0], np.exp(x).sum(axis=1), rtol=1e-6)


def test_reciprocal() -> None:
    x = normal(8, 16)
    np.testing.assert_allclose(run(into(nl.float32, nisa.reciprocal), x), 1 / x, rtol=1e-6)


def test_iota_and_affine_select_make_a_causal_mask() -> None:
    def positions(dst: NkiTensor) -> None:
        nisa.iota(dst, [[100, 3], [1, 4]], offset=7, channel_multiplier=1000)

    expected = 7 + 1000 * np.arange(5)[:, None, None] + 100 * np.arange(3)[:, None] + np.arange(4)
    np.testing.assert_array_equal(run(into(nl.int32, positions, 5, 3, 4)), expected)
    scores = normal(8, 8)

    def mask(dst: NkiTensor, s: NkiTensor) -> None:
        nisa.affine_select(dst, [[-1, 8]], 1, s, -30000.0, cmp_op=nl.greater_equal)  # query - key >= 0

    causal = np.tril(np.ones((8, 8), bool))
    np.testing.assert_array_equal(run(into(nl.float32, mask), scores), np.where(causal, scores, -30000))


def test_a_predicated_copy_leaves_the_rest() -> None:
    dst, src, predicate = normal(8, 16), normal(8, 16), RNG.integers(0, 2, (8, 16)).astype(np.uint8)

    def compute(d: NkiTensor, s: NkiTensor, p: NkiTensor) -> NkiTensor:
        nisa.tensor_copy_predicated(d, s, p)
        return d

    np.testing.assert_array_equal(run(compute, dst, src, predicate), np.where(predicate, src, dst))


# TensorE


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
def test_matmul_contracts_partitions_and_sums_in_float32(dtype: Any) -> None:
    a, b = normal(128, 64, dtype=dtype), normal(128, 512, dtype=dtype)
    out = run(into(nl.float32, nisa.nc_matmul, 64, 512, buffer=nl.psum), a, b)
    np.testing.assert_allclose(out, a.astype(np.float64).T @ b.astype(np.float64), atol=1e-4)


def test_matmul_adds_to_an_earlier_result_unless_told_to_overwrite() -> None:
    a, b = normal(16, 8), normal(16, 32)
    product = a.T @ b

    def times(*accumulates: bool | None) -> Callable[..., NkiTensor]:
        def compute(x: NkiTensor, y: NkiTensor) -> NkiTensor:
            dst = tile(8, 32, buffer=nl.psum)
            for accumulate in accumulates:
                nisa.nc_matmul(dst, x, y, accumulate=accumulate)
            return dst

        return compute

    np.testing.assert_allclose(run(times(None, None, None), a, b), 3 * product, rtol=1e-5)
    np.testing.assert_allclose(run(times(False, True), a, b), 2 * product, rtol=1e-5)
    np.testing.assert_allclose(run(times(None, False), a, b), product, rtol=1e-5)


@pytest.mark.parametrize(("generation", "out"), [("gen2", nl.float32), ("gen3", nl.bfloat16), ("gen4", nl.bfloat16)])
def test_transposes(generation: str, out: str) -> None:
    x = normal(128, 4, 16, dtype=BF16)
    transposed = run(into(out, nisa.nc_transpose, 64, 128, buffer=nl.psum), x, generation=generation)
    np.testing.assert_array_equal(transposed.astype(BF16), x.reshape(128, 64).T)


def test_a_nan_spreads_through_a_transpose_on_gen2_only() -> None:
    x = np.ones((4, 8), np.float32)
    x[2, 3] = np.nan
    transpose = into(nl.float32, nisa.nc_transpose, 8, 4, buffer=nl.psum)
    assert np.isnan(run(transpose, x)[3]).all(), "0 * NaN is summed into the column's other rows"
    assert np.isnan(run(transpose, x, generation="gen3")).sum() == 1


def test_small_transposes_on_vector_engine() -> None:
    x = normal(32, 16, dtype=BF16)
    out = run(into(nl.bfloat16, lambda d, s: nisa.nc_transpose(d, s, engine=nisa.engine.vector), 16, 32), x)
    np.testing.assert_array_equal(out, x.T)


# DMA


def table_kernel(compute: Callable[..., Any]) -> Callable[..., NkiTensor]:
    """A kernel over a table in HBM and indices in SBUF that returns the table or a tile."""

    def kernel(table: NkiTensor, index: NkiTensor, *others: Any) -> NkiTensor:
        result = compute(table, load(index), *others)
        if result is table:
            return table
        out = nl.ndarray(result.shape, result.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=result)
        return out

    return kernel


def test_a_gather_fetches_rows_by_index_and_skips_those_out_of_bounds() -> None:
    table, index = normal(10, 6, dtype=BF16), np.array([[7], [0], [10], [7]], np.int32)

    def gather(t: NkiTensor, i: NkiTensor) -> NkiTensor:
        dst = nl.zeros((4, 6), t.dtype)
        rows = t.ap([[6, 4], [1, 6]], vector_offset=i, indirect_dim=0)
        nisa.dma_copy(dst=dst, src=rows, oob_mode=nisa.oob_mode.skip)
        return dst

    expected = np.concatenate([table, np.zeros((1, 6), BF16)])[index[:, 0]]
    np.testing.assert_array_equal(simulate(table_kernel(gather), table, index).output, expected)


def test_a_gather_may_fetch_part_of_each_row() -> None:
    table, index = normal(10, 6), np.array([[3], [1]], np.int32)

    def gather(t: NkiTensor, i: NkiTensor) -> NkiTensor:
        dst = tile(2, 2)
        nisa.dma_copy(dst=dst, src=t.ap([[6, 2], [1, 2]], offset=4, vector_offset=i))
        return dst

    np.testing.assert_array_equal(simulate(table_kernel(gather), table, index).output, table[index[:, 0], 4:6])


def test_a_scatter_writes_the_input_that_is_returned_and_not_the_callers_array() -> None:
    table, index, rows = normal(10, 6), np.array([[3], [10], [9]], np.int32), normal(3, 6)
    before = table.copy()

    def scatter(t: NkiTensor, i: NkiTensor, r: NkiTensor) -> NkiTensor:
        places = t.ap([[6, 3], [1, 6]], vector_offset=i)
        nisa.dma_copy(dst=places, src=load(r), oob_mode=nisa.oob_mode.skip)
        return t

    expected = before.copy()
    expected[[3, 9]] = rows[[0, 2]]
    np.testing.assert_array_equal(simulate(table_kernel(scatter), table, index, rows).output, expected)
    np.testing.assert_array_equal(table, before)


def test_a_scalar_offset_moves_a_whole_pattern() -> None:
    table, index = normal(10, 4, 3), np.array([[6]], np.int32)

    def fetch(t: NkiTensor, i: NkiTensor) -> NkiTensor:
        dst = tile(4, 3)
        nisa.dma_copy(dst=dst, src=t.ap([[3, 4], [1, 3]], scalar_offset=i, indirect_dim=0))
        return dst

    np.testing.assert_array_equal(simulate(table_kernel(fetch), table, index).output, table[6])


def test_dma_broadcasts_rows_by_a_step_of_zero_and_converts() -> None:
    row = normal(1, 8)

    def kernel(x: NkiTensor) -> NkiTensor:
        spread = tile(16, 8, dtype=nl.bfloat16)
        nisa.dma_copy(dst=spread, src=x.ap([[0, 16], [1, 8]]))
        out = nl.ndarray((16, 8), nl.bfloat16, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=spread)
        return out

    np.testing.assert_array_equal(simulate(kernel, row).output, np.repeat(row.astype(BF16), 16, axis=0))


def test_dma_transpose() -> None:
    x = normal(6, 4, dtype=BF16)
    out = run(into(nl.bfloat16, nisa.dma_transpose, 4, 6), x)
    np.testing.assert_array_equal(out, x.T)


# Views


def test_views_share_their_storage_and_index_as_numpy_does() -> None:
    x = normal(8, 4, 6)

    def compute(t: NkiTensor) -> NkiTensor:
        assert t[0].shape == (1, 4, 6), "an integer keeps the partition axis on chip"
        assert t[:, 1, 2].shape == (8, 1), "two axes remain on chip"
        assert t.permute((0, 2, 1)).shape == (8, 6, 4)
        assert t.reshape((8, 24)).shape == t.flatten_dims(1, 2).shape == (8, 24)
        assert t.reshape_dim(2, (2, 3)).shape == (8, 4, 2, 3)
        assert t.select(1, 2).get_pattern() == [[24, 8], [1, 6]]
        assert t[:, 1, nl.ds(2, 3)].offset == 8
        nisa.memset(t.slice(1, 1, 4, 2), 0.0)
        return t

    expected = x.copy()
    expected[:, 1:4:2] = 0
    np.testing.assert_array_equal(run(compute, x), expected)


def test_an_access_pattern_reads_the_storage_in_its_own_order() -> None:
    x = normal(8, 12)
    out = run(
        into(nl.float32, lambda dst, t: nisa.tensor_copy(dst, t.ap([[12, 8], [1, 3], [3, 4]])), 8, 3, 4),
        x,
    )
    np.testing.assert_array_equal(out, x.reshape(8, 4, 3).transpose(0, 2, 1))


# Memory and cores


def test_memory_is_free_again_when_the_kernel_lets_go_of_a_tensor() -> None:
    def kernel(x: NkiTensor) -> NkiTensor:
        for _ in range(50):
            load(x.broadcast(0, 128))
        return x

    costs = simulate(kernel, np.ones((1, 8192), np.float32)).costs
    assert costs.peak_sbuf_bytes == 8192 * 4


def test_two_programs_share_what_lies_in_shared_hbm() -> None:
    def kernel(x: NkiTensor) -> NkiTensor:
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        half = x.shape[0] // nl.num_programs(0)
        rows = nl.ds(nl.program_id(0) * half, half)
        nisa.dma_copy(dst=out[rows], src=x[rows])
        return out

    x = normal(8, 4)
    for lnc in (1, 2):
        np.testing.assert_array_equal(simulate(kernel, x, generation="gen3", lnc=lnc).output, x)


# Costs


def test_costs_follow_the_documented_numbers() -> None:
    def kernel(x: NkiTensor) -> NkiTensor:
        a = load(x)  # [128, 256] bfloat16: 128 rows of 512 B
        p = tile(128, 256, buffer=nl.psum)
        nisa.nc_matmul(p, a[:, 0:128], a)  # 256 columns
        nisa.nc_matmul(p[:, 0:16], a[:, 0:128], a[:, 0:16], accumulate=False)  # fewer than 64
        b = tile(128, 256)
        nisa.tensor_copy(b, p)  # 256 elements per partition
        nisa.activation(b, nl.exp, b)
        nisa.iota(tile(128, 8), [[1, 8]])
        return x

    simulation = simulate(kernel, normal(128, 256, dtype=BF16))
    costs = simulation.costs
    assert (costs.dma_bytes, costs.dma_descriptors) == (128 * 512, 128)
    assert dict(costs.cycles) == {"tensor": 256 + 64, "vector": 256, "scalar": 256, "gpsimd": 64 + 150}
    assert dict(costs.instructions) == {"dma": 1, "tensor": 2, "vector": 1, "scalar": 1, "gpsimd": 1}
    least, most = simulation.least_seconds(), simulation.most_seconds()
    assert least is not None
    assert most is not None
    assert least < most


def test_float32_passes_tensor_engine_four_times() -> None:
    cycles = [
        simulate(
            lambda x: nisa.nc_matmul(tile(8, 512, buffer=nl.psum), load(x)[:, 0:8], load(x)) or x,
            normal(16, 512, dtype=dtype),
        ).costs.cycles["tensor"]
        for dtype in (np.float32, BF16)
    ]
    assert cycles == [2048, 512]


def test_rows_shorter_than_512_bytes_cost_as_much_as_those() -> None:
    def columns(x: NkiTensor) -> NkiTensor:
        load(x[:, 0:4])
        return x

    costs = simulate(columns, normal(128, 64)).costs
    assert (costs.dma_bytes, costs.dma_descriptors, costs.dma_row_bytes) == (2048, 128, 128 * 512)


def test_there_is_no_time_where_clocks_are_not_public() -> None:
    simulation = simulate(lambda x: x, normal(4, 4), generation="gen4")
    assert simulation.least_seconds() is None
    assert simulation.most_seconds() is None


# One source for the emulator and for AWS's package

EXAMPLE = "tests.kernels.nki_example"


def on_emulator(kernel: str, *arrays: np.ndarray) -> np.ndarray:
    return simulate(getattr(load_emulated(EXAMPLE), kernel), *arrays).output


def on_official(kernel: str, *arrays: np.ndarray) -> np.ndarray:
    nki, why = official_nki()
    if nki is None:
        pytest.skip(why)
    import importlib

    return nki.simulate(nki.jit(getattr(importlib.import_module(EXAMPLE), kernel)))(*arrays)


@pytest.mark.parametrize("run_on", [on_emulator, on_official])
def test_a_kernel_is_written_once_for_both_simulators(run_on: Callable[..., np.ndarray]) -> None:
    x, w = normal(64, 32), normal(64, 256)
    expected = np.exp(x.T @ w)
    np.testing.assert_allclose(run_on("exp_of_product", x, w), expected, rtol=1e-4)


def test_loading_kernels_leaves_no_stand_in_behind() -> None:
    import sys

    load_emulated(EXAMPLE)
    assert "nki" not in sys.modules or official_nki()[0] is not None


def test_a_refusal_names_the_line_of_the_kernels_own_file() -> None:
    with pytest.raises(NkiError) as caught:
        on_emulator("exp_of_product", normal(64, 32), normal(64, 513))
    path, _, line = caught.value.place.rpartition(":")
    assert path.endswith("nki_example.py")
    with open(path, encoding="utf-8") as source:
        assert "nc_matmul" in source.read().splitlines()[int(line) - 1]
