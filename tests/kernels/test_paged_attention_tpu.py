"""The Pallas kernels pass the suite of paged attention, run on the CPU by Pallas's interpreter of TPU kernels.

It emulates the copies between memories and their semaphores, carries a copy out as late as the kernel allows, fills fresh memory with
NaN and reports races. Beside the suite's own cases: what a kernel that works on tiles of keys, groups of tokens and lanes could get
wrong. test_tpu_compile.py has the same sources compiled for real chips.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from quire.kernels.errors import KernelUnavailableError
from quire.kernels.op import OpContext
from quire.kernels.ops import PALLAS_TPU, REFERENCE, choose_ops
from quire.kernels.paged_attention import tpu
from quire.kernels.paged_attention.contract import RowsOfTokens, StepPlaces
from quire.kernels.paged_attention.tpu_attention import Tuning, tunings
from quire.kernels.paged_attention.tpu_format import parts_of_rows, rows_of_tokens
from tests.kernels.paged_attention_suite import Case, PagedAttentionConformance, make_problem

SMALL_TILES = Tuning(keys_per_tile=128, buffer_mib=1, max_buffers=3, queries_per_product=16, vmem_limit_mib=32)
"""So that short rows have several tiles, and a few queries several parts."""
CONTEXT = OpContext("tpu", "TPU v5 lite", "bfloat16", num_heads=4, num_kv_heads=2, head_dim=64, block_size=16)
# The interpreter of jax 0.7 takes an aliased argument for another one where scalars are prefetched. Pallas's plain one serves there: it
# gives the same results, and looks for no races.
INTERPRETED: Any = pltpu.InterpretParams(detect_races=True) if jax.__version_info__ >= (0, 10) else True
LONG = (
    (300, 3),
    (0, 0),
    (127, 1),
    (128, 2),
    (255, 3),
    (5, 0),
    (0, 70),
)  # beyond, up to, at and across ends of tiles; padding between
BF16 = {"dtype": "bfloat16"}

CASES = [
    Case("several_tiles", LONG, block_size=16),
    Case("several_tiles_bfloat16", LONG, block_size=16, **BF16),
    Case("several_tiles_of_short_rows", ((3, 1), (0, 1), (0, 0), (0, 0), (15, 1), (140, 1), (0, 1)), block_size=16),
    Case("head_dim_64", ((140, 2), (5, 1)), head_dim=64, block_size=32, **BF16),
    Case("head_dim_80", ((140, 2), (5, 1)), head_dim=80, block_size=32, **BF16),
    Case("head_dim_96_group_of_3", ((140, 2), (5, 1)), head_dim=96, num_heads=6, block_size=64),
    Case("head_dim_128_group_of_4", ((140, 1), (5, 1)), head_dim=128, num_heads=8, block_size=16, **BF16),
    Case("head_dim_256_group_of_8", ((140, 1), (5, 1)), head_dim=256, num_heads=8, num_kv_heads=1, **BF16),
    Case("blocks_of_128", ((140, 3), (5, 1)), block_size=128, **BF16),
    Case("blocks_of_24", ((140, 3), (5, 1)), block_size=24),
    Case("width_8", ((130, 8), (62, 8), (0, 8)), block_size=16, **BF16),
    Case("many_kv_heads", ((20, 2),), num_heads=20, num_kv_heads=20, **BF16),
    Case("window_over_tiles", LONG, block_size=16, sliding_window=130),
    Case("window_within_a_tile", LONG, block_size=16, sliding_window=5, **BF16),
    Case("window_and_soft_cap_over_tiles", LONG, block_size=16, sliding_window=129, soft_cap=3.0),
]
MORE_CASES = [
    *(
        Case(f"head_dim_{h}_{dtype}", ((140, 2), (5, 1)), head_dim=h, block_size=16, dtype=dtype)
        for h in (8, 16, 24, 40, 64, 72, 80, 96, 112, 128, 136, 192, 256)
        for dtype in ("float32", "bfloat16")
    ),
    *(Case(f"group_of_{g}", ((140, 2), (0, 5)), num_heads=2 * g, block_size=16, **BF16) for g in (1, 2, 3, 4, 5, 8)),
    *(Case(f"width_{w}", ((130, w), (62, w), (0, w)), block_size=16, **BF16) for w in range(1, 9)),
    *(Case(f"blocks_of_{b}", LONG, block_size=b, **BF16) for b in (8, 16, 32, 48, 64, 128)),
    *(Case(f"window_of_{s}", LONG, block_size=16, sliding_window=s) for s in (1, 63, 127, 128, 129, 256)),
]


class PallasConformance(PagedAttentionConformance):
    """The suite on a `HeadMajor` cache; a subclass says how kernels are interpreted."""

    writes_padding = False

    def refuses(self, case: Case) -> str | None:
        if case.cache_dtype is not None:
            return f"a cache of {case.cache_dtype} is for the CPU"
        return tpu.refuses(
            replace(
                CONTEXT,
                dtype=case.dtype,
                num_heads=case.num_heads,
                num_kv_heads=case.num_kv_heads,
                head_dim=case.head_dim,
                block_size=case.block_size,
            )
        )

    def to_format(self, token_major: np.ndarray) -> np.ndarray:
        k, v = (jnp.asarray(token_major[:, :, half::2]) for half in range(2))
        rows = np.array(rows_of_tokens(k, v))  # [num_blocks, block_size, P, 128]
        rows[np.isnan(token_major).any(axis=(2, 3))] = (
            np.nan
        )  # lanes of padding, too, hold what they like where nothing was written
        return rows.transpose(0, 2, 1, 3)

    def to_token_major(self, cache: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        num_blocks, block_size, num_heads_twice, head_dim = shape
        rows = cache.transpose(0, 2, 1, 3).reshape(num_blocks, block_size, num_heads_twice, -1)
        return rows[..., :head_dim]


def _interpreted(params: Any, tuning: Tuning = SMALL_TILES) -> dict[str, Any]:
    return {
        "write_kv": staticmethod(partial(tpu.write_kv, interpret=params)),
        "attention": staticmethod(partial(tpu.paged_attention, interpret=params, tuning=tuning)),
    }


def _assert_nothing_was_reported(capfd: pytest.CaptureFixture[str]) -> None:
    printed = capfd.readouterr().out
    assert "RACE" not in printed, printed
    assert "non-zero count" not in printed, printed


class TestPallas(PallasConformance):
    """With the emulation of copies, and every access looked at for races."""

    locals().update(_interpreted(INTERPRETED))

    @pytest.fixture(autouse=True)
    def _nothing_to_report(self, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
        """The interpreter prints what races it finds, and semaphores that are left with a count, and goes on."""
        yield
        _assert_nothing_was_reported(capfd)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_attends_right_where_tiles_groups_and_lanes_end(self, case: Case) -> None:
        self.test_attends_to_the_rows_history_and_writes_only_the_new_tokens(case)

    @pytest.mark.slow
    @pytest.mark.parametrize("case", MORE_CASES, ids=lambda case: case.name)
    def test_attends_right_with_every_shape(self, case: Case) -> None:
        self.test_attends_to_the_rows_history_and_writes_only_the_new_tokens(case)


@pytest.mark.parametrize(("width", "dtype"), [(1, "float32"), (5, "bfloat16"), (20, "float32")])
def test_tokens_of_many_rows_are_written_where_they_belong(
    width: int, dtype: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """More groups than the ring has slots; requests cut into rows of any length, so that neighbours share groups, with padding between."""
    rng = np.random.default_rng(width)
    block_size, num_blocks, num_rows = 16, 64, 30
    cache = rng.normal(size=(num_blocks, 2, block_size, 128)).astype(dtype)
    k, v = (rng.normal(size=(num_rows * width, 2, 64)).astype(dtype) for _ in range(2))
    free, tables, lens = list(rng.permutation(num_blocks - 1) + 1), np.zeros((num_rows, 8), np.int32), []
    expected = cache.copy()
    while len(lens) < num_rows:
        table, position = [free.pop() for _ in range(3)], int(rng.integers(0, 20))
        for _ in range(1 if width == 1 else int(rng.integers(1, 4))):
            if len(lens) == num_rows:
                break
            row, query_len = len(lens), int(rng.integers(0, width + 1)) if position + width < 48 else 0
            tables[row, :3] = table
            for token in range(row * width, row * width + query_len):
                place = table[position // block_size], slice(None), position % block_size
                expected[place] = np.concatenate([k[token], v[token]], axis=1)
                position += 1
            lens.append((position, query_len))
        if len(free) < 3:
            lens += [(0, 0)] * (num_rows - len(lens))
    seq_lens, query_lens = np.array(lens, np.int32).T
    rows = RowsOfTokens(*map(jnp.asarray, (tables, seq_lens, query_lens)), width=width)
    written = tpu.write_kv(*map(jnp.asarray, (cache, k, v)), StepPlaces(None, None, [rows]), interpret=INTERPRETED)
    np.testing.assert_array_equal(np.asarray(written), expected)
    _assert_nothing_was_reported(capfd)


def test_a_window_given_as_an_array_equals_the_static_one() -> None:
    case = Case("window", ((140, 3), (20, 1)), block_size=16)
    problem = make_problem(case)
    cache = TestPallas().to_format(np.nan_to_num(problem.cache))
    arrays = [jnp.asarray(x) for x in (problem.q, cache, problem.tables, problem.seq_lens, problem.query_lens)]
    attention = partial(tpu.paged_attention, *arrays, scale=0.25, tuning=SMALL_TILES, interpret=True)
    np.testing.assert_array_equal(attention(sliding_window=5), attention(sliding_window=jnp.int32(5)))


def test_rows_whose_block_tables_are_too_large_for_scalar_memory_go_into_several_calls() -> None:
    assert parts_of_rows(64, 2048) == [slice(0, 64)]
    assert parts_of_rows(64, 8192) == [slice(first, first + 16) for first in (0, 16, 32, 48)]
    assert parts_of_rows(3, 10**6) == [slice(0, 1), slice(1, 2), slice(2, 3)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "neuron"}, "needs a TPU"),
        ({"dtype": "float16"}, "float16"),
        ({"block_size": 20}, "block size that is a multiple of 8, not 20"),
        ({"head_dim": 264}, "head_dim"),
        ({"head_dim": 20}, "head_dim"),
    ],
)
def test_a_context_that_the_kernels_cannot_serve_gets_the_reference_and_the_reason(change: Any, reason: str) -> None:
    ops = choose_ops(replace(CONTEXT, **change))
    for choice in (ops.kv_cache, ops.write_kv, ops.paged_attention):
        assert choice.name == REFERENCE
        assert reason in dict(choice.passed_over)[PALLAS_TPU]


def test_on_a_tpu_the_kernels_are_chosen_together() -> None:
    ops = choose_ops(CONTEXT)
    assert {ops.kv_cache.name, ops.write_kv.name, ops.paged_attention.name} == {PALLAS_TPU}


@pytest.mark.parametrize("op", ["kv_cache", "write_kv", "paged_attention"])
def test_one_op_asked_for_by_name_brings_the_others_to_its_format(op: str) -> None:
    ops = choose_ops(CONTEXT, {op: REFERENCE})
    others = [choice for choice in (ops.kv_cache, ops.write_kv, ops.paged_attention) if choice.op != op]
    for choice in others:
        assert choice.name == REFERENCE
        assert f"{op}=reference holds keys and values in another format" in choice.describe()
    with pytest.raises(KernelUnavailableError, match="different formats"):
        choose_ops(CONTEXT, {op: REFERENCE, others[0].op: PALLAS_TPU})
    with pytest.raises(KernelUnavailableError, match="needs a TPU"):
        choose_ops(replace(CONTEXT, platform="cpu"), {op: PALLAS_TPU})


def test_the_tuning_of_every_chip_can_be_read() -> None:
    assert "default" in tunings()
    assert all(tuning.keys_per_tile % 128 == 0 and tuning.max_buffers >= 2 for tuning in tunings().values())
