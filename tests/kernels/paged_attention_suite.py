"""The conformance suite of paged attention: named shapes, a plain numpy oracle, and the checks every implementation must pass.

An implementation's test module subclasses `PagedAttentionConformance` and says how to call it.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.kernels.paged_attention.contract import PagedAttention, RowsOfTokens, StepPlaces, TokenMajor, WriteKV


@dataclass(frozen=True)
class Case:
    """One named shape. `rows` are (tokens in the cache before, new tokens) per row; W is the widest row plus `padding`."""

    name: str
    rows: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 8
    padding: int = 0
    sliding_window: int | None = None
    soft_cap: float | None = None
    dtype: str = "float32"
    cache_dtype: str | None = None  # where it is not `dtype`


CASES = [
    Case("decode", ((5, 1), (0, 1), (17, 1))),
    Case("decode_padding_rows", ((5, 1), (0, 0), (23, 1), (0, 0))),
    Case("verify_width", ((6, 3), (16, 3), (1, 2)), padding=1),
    Case("prefill", ((0, 16), (0, 7), (9, 5))),
    Case("one_token_in_a_tile", ((8, 1), (0, 9)), padding=7),
    Case("odd_heads", ((11, 4), (3, 2)), num_heads=9, num_kv_heads=3, head_dim=24),
    Case("multi_query", ((20, 2),), num_heads=6, num_kv_heads=1, head_dim=40),
    Case("multi_head", ((4, 3), (12, 3)), num_heads=3, num_kv_heads=3),
    Case("large_head", ((9, 2),), num_heads=2, num_kv_heads=1, head_dim=256),
    Case("block_of_one", ((3, 2), (0, 4)), block_size=1),
    Case("large_block", ((30, 4), (64, 1)), block_size=64),
    Case("window", ((20, 4), (0, 12), (3, 1)), sliding_window=5),
    Case("window_of_one", ((9, 3),), sliding_window=1),
    Case("soft_cap", ((14, 3), (0, 5)), soft_cap=2.5),
    Case("window_and_soft_cap", ((14, 3), (0, 9)), sliding_window=6, soft_cap=5.0),
    Case("bfloat16", ((14, 3), (0, 9)), dtype="bfloat16"),
    Case("bfloat16_as_bits", ((14, 3), (0, 9)), dtype="bfloat16", cache_dtype="uint16"),
]
# float32 differs by the order of sums; bfloat16 has 8 bits of mantissa, and outputs here are averages of unit normals.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


@dataclass
class Problem:
    """Arrays for one case, and each row's whole history of keys and values."""

    q: np.ndarray  # [R, W, N, H]
    k: np.ndarray  # [R, W, K, H]
    v: np.ndarray
    cache: np.ndarray  # [num_blocks, block_size, 2K, H]
    tables: np.ndarray  # [R, M]
    seq_lens: np.ndarray
    query_lens: np.ndarray
    histories: list[tuple[np.ndarray, np.ndarray]]


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Random tokens scattered over shuffled blocks; every place that belongs to nobody holds NaN."""
    rng = np.random.default_rng(seed)
    width = max(new for _, new in case.rows) + case.padding
    num_rows, heads = len(case.rows), (case.num_kv_heads, case.head_dim)
    blocks_per_row = max(-(-(old + new) // case.block_size) for old, new in case.rows) + 1
    num_blocks = 1 + num_rows * blocks_per_row + 2
    cache = np.full(TokenMajor().shape(num_blocks, case.block_size, *heads), np.nan, np.float32)
    free = list(rng.permutation(np.arange(1, num_blocks)))
    tables = np.zeros((num_rows, blocks_per_row), np.int32)
    q = rng.normal(size=(num_rows, width, case.num_heads, case.head_dim)).astype(np.float32)
    k, v = (rng.normal(size=(num_rows, width, *heads)).astype(np.float32) for _ in range(2))
    histories = []
    for row, (old, new) in enumerate(case.rows):
        for idx in range(-(-(old + new) // case.block_size)):
            tables[row, idx] = free.pop()
        keys, values = (rng.normal(size=(old, *heads)).astype(np.float32) for _ in range(2))
        for position in range(old):
            place = (tables[row, position // case.block_size], position % case.block_size)
            cache[place][0::2], cache[place][1::2] = keys[position], values[position]
        histories.append((np.concatenate([keys, k[row, :new]]), np.concatenate([values, v[row, :new]])))
    lens = np.array(case.rows, np.int32)
    return Problem(q, k, v, cache, tables, lens.sum(axis=1).astype(np.int32), lens[:, 1].copy(), histories)


def places(case: Case, problem: Problem) -> StepPlaces:
    """Where every new token goes; padding goes to the null block."""
    position = (problem.seq_lens - problem.query_lens)[:, None] + np.arange(problem.q.shape[1])[None, :]
    is_real = position < problem.seq_lens[:, None]
    position = np.where(is_real, position, 0)
    blocks = np.take_along_axis(problem.tables, position // case.block_size, axis=1)
    blocks, offsets = np.where(is_real, blocks, 0), np.where(is_real, position % case.block_size, 0)
    rows = RowsOfTokens(
        *map(jnp.asarray, (problem.tables, problem.seq_lens, problem.query_lens)), width=position.shape[1]
    )
    flat = (jnp.asarray(x.reshape(-1).astype(np.int32)) for x in (blocks, offsets))
    return StepPlaces(*flat, [rows])


def expected_output(case: Case, problem: Problem, row: int, scale: float) -> np.ndarray:
    """[new tokens, N, H] in float64 by the definition: one query, one head at a time."""
    old, new = case.rows[row]
    keys, values = (x.astype(np.float64) for x in problem.histories[row])
    group = case.num_heads // case.num_kv_heads
    out = np.zeros((new, case.num_heads, case.head_dim))
    for w in range(new):
        position = old + w
        first = 0 if case.sliding_window is None else max(position - case.sliding_window + 1, 0)
        for head in range(case.num_heads):
            scores = keys[first : position + 1, head // group] @ problem.q[row, w, head].astype(np.float64) * scale
            if case.soft_cap is not None:
                scores = case.soft_cap * np.tanh(scores / case.soft_cap)
            weights = np.exp(scores - scores.max())
            out[w, head] = weights / weights.sum() @ values[first : position + 1, head // group]
    return out


class PagedAttentionConformance:
    """Subclass, and set the two ops; where they hold the cache in a format of their own, the two that convert it as well."""

    write_kv: WriteKV
    attention: PagedAttention
    writes_padding = True
    """Whether tokens of padding are written to the null block, or not at all."""

    def refuses(self, case: Case) -> str | None:
        """Why the implementation would not be chosen for a case."""
        return None

    def to_format(self, token_major: np.ndarray) -> np.ndarray:
        """A `TokenMajor` cache in the implementation's format."""
        return token_major

    def to_token_major(self, cache: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The way back, to the given shape."""
        return cache

    def run(self, case: Case, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
        if reason := self.refuses(case):
            pytest.skip(reason)
        dtype = jnp.dtype(case.dtype)
        cache = jnp.asarray(self.to_format(problem.cache)).astype(dtype)
        if case.cache_dtype == "uint16":
            cache = jax.lax.bitcast_convert_type(cache, jnp.uint16)
        where = places(case, problem)

        def call(q, k, v, cache):
            cache = type(self).write_kv(cache, k, v, where)
            out = type(self).attention(
                q,
                cache,
                jnp.asarray(problem.tables),
                jnp.asarray(problem.seq_lens),
                jnp.asarray(problem.query_lens),
                scale=case.head_dim**-0.5,
                sliding_window=case.sliding_window,
                soft_cap=case.soft_cap,
            )
            return out, cache

        q, k, v = (jnp.asarray(x).astype(dtype) for x in (problem.q, problem.k, problem.v))
        flat = (-1, *k.shape[2:])
        out, cache = jax.jit(call, donate_argnums=3)(q, k.reshape(flat), v.reshape(flat), cache)
        if case.cache_dtype == "uint16":
            cache = jax.lax.bitcast_convert_type(cache, jnp.bfloat16)
        return np.asarray(out, np.float32), self.to_token_major(np.asarray(cache, np.float32), problem.cache.shape)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_attends_to_the_rows_history_and_writes_only_the_new_tokens(self, case: Case) -> None:
        problem = make_problem(case)
        out, cache = self.run(case, problem)
        self.check_output(case, problem, out)
        self.check_cache(case, problem, cache)

    def check_output(self, case: Case, problem: Problem, out: np.ndarray) -> None:
        for row, (_, new) in enumerate(case.rows):
            expected = expected_output(case, problem, row, case.head_dim**-0.5)
            np.testing.assert_allclose(out[row, :new], expected, atol=TOLERANCE[case.dtype], rtol=TOLERANCE[case.dtype])

    def check_cache(self, case: Case, problem: Problem, cache: np.ndarray) -> None:
        expected = np.array(jnp.asarray(problem.cache).astype(case.dtype), np.float32)
        for row, (old, new) in enumerate(case.rows):
            for w in range(new):
                place = (problem.tables[row, (old + w) // case.block_size], (old + w) % case.block_size)
                for kv, x in enumerate((problem.k, problem.v)):
                    expected[place][kv::2] = np.asarray(jnp.asarray(x[row, w]).astype(case.dtype), np.float32)
        np.testing.assert_array_equal(cache[1:], expected[1:])  # block 0 is where padding is written

    def test_padding_rows_and_tokens_give_finite_output(self) -> None:
        case = Case("padding", ((5, 2), (0, 0)), padding=3)
        problem = make_problem(case)
        out, cache = self.run(case, problem)
        assert np.isfinite(out).all()
        assert not self.writes_padding or np.isfinite(cache[0]).any(), "padding has a place to be written to"

    def test_a_row_does_not_see_its_neighbours(self) -> None:
        case = next(case for case in CASES if case.name == "prefill")
        problem = make_problem(case)
        together, _ = self.run(case, problem)
        for row, (_, new) in enumerate(case.rows):
            alone = replace(case, rows=(case.rows[row],), padding=problem.q.shape[1] - new)
            part = slice(row, row + 1)
            one = Problem(
                problem.q[part],
                problem.k[part],
                problem.v[part],
                problem.cache,
                problem.tables[part],
                problem.seq_lens[part],
                problem.query_lens[part],
                problem.histories[part],
            )
            out, _ = self.run(alone, one)
            np.testing.assert_allclose(out[0, :new], together[row, :new], atol=1e-6)

    def test_pieces_of_one_request_in_several_rows_equal_one_long_row(self) -> None:
        """The tiles of a prompt share a block table; each must see what the others write in the same call."""
        whole = Case("whole", ((3, 24),))
        problem = make_problem(whole)
        expected, expected_cache = self.run(whole, problem)
        tiles = Case("tiles", ((3, 8), (11, 8), (19, 8)))
        cut = Problem(
            problem.q.reshape(3, 8, *problem.q.shape[2:]),
            problem.k.reshape(3, 8, *problem.k.shape[2:]),
            problem.v.reshape(3, 8, *problem.v.shape[2:]),
            problem.cache,
            np.repeat(problem.tables, 3, axis=0),
            np.array([11, 19, 27], np.int32),
            np.array([8, 8, 8], np.int32),
            [],
        )
        out, cache = self.run(tiles, cut)
        np.testing.assert_allclose(out.reshape(expected.shape), expected, atol=1e-6)
        np.testing.assert_array_equal(cache, expected_cache)
