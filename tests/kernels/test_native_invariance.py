"""A row's result is the same bits whatever else is in the batch, wherever it stands there, and however many threads run.

On this rests that batched = alone, chunked = whole and speculation = none hold on the CPU in every dtype.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.kernels.linear import cpu as linear_cpu
from quire.kernels.linear.contract import matmul
from quire.kernels.paged_attention import cpu as attention_cpu
from tests.kernels.linear_suite import DTYPES, FORMATS, activations, bits, product, quantization, source
from tests.kernels.native import EACH_INSTRUCTION_SET, at_most_threads
from tests.kernels.paged_attention_suite import Case, Problem, make_problem, places
from tests.kernels.tiny_steps import NUM_SEQUENCES, Rectangle, Row, TinyModel

SIZES = (2, 3, 5, 8, 13, 40)
THREADS = (1, 2, 0)
RNG = np.random.default_rng(7)
# Every size, of rows at random places.
BATCHES = [RNG.permutation(40)[:size] for size in SIZES] + [np.arange(40), np.arange(40)[::-1]]

pytestmark = pytest.mark.parametrize("instruction_set", EACH_INSTRUCTION_SET)


@pytest.fixture(params=THREADS, ids=lambda count: f"threads_{count}")
def threads(request, instruction_set: str) -> Iterator[int]:
    with at_most_threads(instruction_set, request.param):
        yield request.param


# Linear ----------------------------------------------------------------------------------------------------------------


@cache
def alone_products(instruction_set: str, format: str, dtype: str) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """A weight, 40 rows of very different sizes, and the product of each by itself on one thread."""
    weight = linear_cpu.prepare(instruction_set, source(format, (250, 101)), quantization(format))
    scales = np.exp2(RNG.integers(-40, 40, (40, 1))).astype(DTYPES[dtype])
    x = activations(dtype, (40, 250)) * scales
    x[3], x[11, 5], x[17, 0] = 0, np.inf, np.nan
    x[23] *= DTYPES[dtype](1e-38) / scales[23]  # so small that some processors count some of it as zero
    with at_most_threads(instruction_set, 1):
        alone = np.concatenate([bits(product(jnp.asarray(x[row : row + 1]), weight)) for row in range(40)])
    return weight, x, alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_product_does_not_depend_on_the_other_rows(instruction_set, threads, format: str, dtype: str) -> None:
    weight, x, alone = alone_products(instruction_set, format, dtype)
    for batch in [*BATCHES, np.tile(np.arange(40), 5)]:
        found = bits(product(jnp.asarray(x[batch]), weight))
        np.testing.assert_array_equal(found, alone[batch], err_msg=f"{len(batch)} rows")


# Attention -------------------------------------------------------------------------------------------------------------

ATTENTION = {
    "plain": Case("plain", ()),
    "group_of_8": Case("group_of_8", (), num_heads=8, num_kv_heads=1, head_dim=24),
    "window": Case("window", (), sliding_window=65, head_dim=10, num_heads=9, num_kv_heads=3),
    "soft_cap": Case("soft_cap", (), soft_cap=2.0, num_heads=2, head_dim=72, block_size=5),
}


@cache
def case_of(name: str, dtype: str, rows: tuple[tuple[int, int], ...]) -> tuple[Case, Problem]:
    shape = {key: value for key, value in vars(ATTENTION[name]).items() if key not in ("rows", "dtype", "cache_dtype")}
    case = Case(**shape, rows=rows, dtype=dtype)
    return case, make_problem(case)


@cache
def attention(instruction_set: str, name: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    case = ATTENTION[name]

    @jax.jit
    def run(q, k, v, cache, where, tables, seq_lens, query_lens):
        flat = (-1, *k.shape[2:])
        cache = attention_cpu.write_kv(instruction_set, cache, k.reshape(flat), v.reshape(flat), where)
        out = attention_cpu.paged_attention(
            instruction_set,
            q,
            cache,
            tables,
            seq_lens,
            query_lens,
            scale=case.head_dim**-0.5,
            sliding_window=case.sliding_window,
            soft_cap=case.soft_cap,
        )
        return out, cache

    return run


def attend(
    instruction_set: str, case: Case, problem: Problem, cache: jax.Array | None = None
) -> tuple[np.ndarray, jax.Array]:
    """The output's bits, and the cache."""
    dtype = jnp.dtype(case.dtype)
    if cache is None:
        cache = jnp.asarray(problem.cache).astype(dtype)
        if case.dtype == "bfloat16":
            cache = jax.lax.bitcast_convert_type(cache, jnp.uint16)
    arrays = (jnp.asarray(x).astype(dtype) for x in (problem.q, problem.k, problem.v))
    out, cache = attention(instruction_set, case.name)(
        *arrays, cache, places(case, problem), problem.tables, problem.seq_lens, problem.query_lens
    )
    return bits(out), cache


def some_rows(problem: Problem, rows: np.ndarray) -> Problem:
    fields = (problem.q, problem.k, problem.v, problem.tables, problem.seq_lens, problem.query_lens)
    q, k, v, tables, seq_lens, query_lens = (field[rows] for field in fields)
    return Problem(q, k, v, problem.cache, tables, seq_lens, query_lens, [])


def some_tokens(problem: Problem, first: int, end: int) -> Problem:
    """The one row of a problem cut down to some of its new tokens, as if those before were written already."""
    part, old = slice(first, end), problem.seq_lens - problem.query_lens
    return Problem(
        problem.q[:, part],
        problem.k[:, part],
        problem.v[:, part],
        problem.cache,
        problem.tables,
        old + np.int32(end),
        np.full(1, end - first, np.int32),
        [],
    )


@cache
def alone_attention(instruction_set: str, name: str, dtype: str) -> tuple[Case, Problem, np.ndarray]:
    """40 decode rows with histories of all lengths, and the output of each by itself on one thread."""
    lengths = [0, 62, 63, 64, 127, 128, *np.random.default_rng(3).integers(0, 200, 34).tolist()]
    case, problem = case_of(name, dtype, tuple((length, 1) for length in sorted(lengths)))
    with at_most_threads(instruction_set, 1):
        outputs = [attend(instruction_set, case, some_rows(problem, np.array([row])))[0] for row in range(40)]
    return case, problem, np.concatenate(outputs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_does_not_depend_on_the_other_rows(instruction_set, threads, name: str, dtype: str) -> None:
    case, problem, alone = alone_attention(instruction_set, name, dtype)
    with at_most_threads(instruction_set, threads):
        for batch in BATCHES:
            found, _ = attend(instruction_set, case, some_rows(problem, batch))
            np.testing.assert_array_equal(found, alone[batch], err_msg=f"{len(batch)} rows")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(("old", "count"), [(60, 5), (0, 5), (126, 5), (190, 5), (40, 100)])
def test_attention_of_several_tokens_at_once_equals_one_after_the_other(
    instruction_set, name: str, dtype: str, old: int, count: int
) -> None:
    """A verification row equals decode rows, and a prefill row equals both."""
    case, problem = case_of(name, dtype, ((old, count),))
    together, cache_together = attend(instruction_set, case, problem)
    cache = None
    for w in range(count):
        out, cache = attend(instruction_set, case, some_tokens(problem, w, w + 1), cache)
        np.testing.assert_array_equal(out[0, 0], together[0, w], err_msg=f"token {w}")
    np.testing.assert_array_equal(bits(cache), bits(cache_together))


# Layers ----------------------------------------------------------------------------------------------------------------

# Between them all that differs: windows, biases, norms of queries and keys, soft caps, norms after, activations, experts.
MODELS = ("llama3-tied-biased", "gemma2", "qwen3-biased", "qwen3-moe")
FAST = {("llama3-tied-biased", "float32"), ("gemma2", "bfloat16"), ("qwen3-biased", "int8"), ("qwen3-moe", "int8")}
LAYERS = [
    pytest.param(name, format, marks=() if (name, format) in FAST else pytest.mark.slow)
    for name in MODELS
    for format in FORMATS
]
LENGTHS = tuple(int(n) for n in np.concatenate([[0, 63, 64, 127, 128], RNG.integers(0, 150, NUM_SEQUENCES - 5)]))


@cache
def model(instruction_set: str, name: str, format: str) -> TinyModel:
    return TinyModel(name, format, instruction_set)


def decode(model: TinyModel, sequences: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """One new token for each of the sequences: the bits of its hidden state, and of its keys and values in every layer."""
    rows = tuple(Row(int(sequence), LENGTHS[sequence]) for sequence in sequences)
    hidden, caches = model.step([Rectangle(1, rows)], model.caches(LENGTHS))
    return [(bits(out), bits(model.written(caches, row))) for out, row in zip(hidden, rows, strict=True)]


@cache
def alone_layers(instruction_set: str, name: str, format: str) -> list[tuple[np.ndarray, np.ndarray]]:
    one = model(instruction_set, name, format)
    with at_most_threads(instruction_set, 1):
        return [decode(one, np.array([sequence]))[0] for sequence in range(NUM_SEQUENCES)]


@pytest.mark.parametrize(("name", "format"), LAYERS)
def test_layers_do_not_depend_on_the_other_rows(instruction_set, name: str, format: str) -> None:
    alone = alone_layers(instruction_set, name, format)
    for count in THREADS:
        with at_most_threads(instruction_set, count):
            for batch in BATCHES[::2]:
                for sequence, found in zip(batch, decode(model(instruction_set, name, format), batch), strict=True):
                    for mine, theirs in zip(found, alone[sequence], strict=True):
                        np.testing.assert_array_equal(mine, theirs, err_msg=f"{len(batch)} rows, {count} threads")


@pytest.mark.parametrize(("name", "format"), LAYERS)
def test_layers_do_not_depend_on_how_tokens_are_cut_into_rows(instruction_set, name: str, format: str) -> None:
    """Decode rows one after the other, verification rows, tiles, one long row, beside others or not: the same bits."""
    one = model(instruction_set, name, format)
    start, count = 50, 40  # over the border of the first tile of 64 keys
    lengths = (start, 20, 3)
    expected, caches = [], one.caches(lengths)
    for position in range(start, start + count):
        hidden, caches = one.step([Rectangle(1, (Row(0, position),))], caches)
        expected.append(hidden[0])
    expected = bits(np.concatenate(expected))
    expected_cache = bits(one.written(caches, Row(0, start, count)))

    def pieces(width: int) -> tuple[Row, ...]:
        ends = range(start, start + count, width)
        return tuple(Row(0, first, min(width, start + count - first)) for first in ends)

    steps = {
        "verification rows": [[Rectangle(5, (row,))] for row in pieces(5)],
        "one row": [[Rectangle(count, pieces(count))]],
        "tiles": [[Rectangle(16, pieces(16))]],
        "tiles beside others": [[Rectangle(1, (Row(1, 20), Row(2, 3))), Rectangle(16, (*pieces(16), Row(3, 0, 9)))]],
        "chunks": [[Rectangle(16, (row, Row(4, row.start - start, 7)))] for row in pieces(16)],
    }
    for count_of_threads in (1, 0):
        with at_most_threads(instruction_set, count_of_threads):
            for what, several in steps.items():
                found, caches = [], one.caches(lengths)
                for rectangles in several:
                    hidden, caches = one.step(rectangles, caches)
                    rows = [row for rectangle in rectangles for row in rectangle.rows]
                    found += [out for out, row in zip(hidden, rows, strict=True) if row.sequence == 0]
                np.testing.assert_array_equal(bits(np.concatenate(found)), expected, err_msg=what)
                np.testing.assert_array_equal(
                    bits(one.written(caches, Row(0, start, count))), expected_cache, err_msg=what
                )


# Several programs at once ----------------------------------------------------------------------------------------------


def test_programs_that_run_at_the_same_time_give_right_results_and_end(instruction_set) -> None:
    """The threads that help belong to the process; two programs must neither mix up their work nor wait for each other."""
    num_programs, num_runs = 3, 40
    weight = linear_cpu.prepare(instruction_set, source("float32", (300, 700)), "none")
    back = linear_cpu.prepare(instruction_set, source("float32", (700, 300)), "none")

    @partial(jax.jit, static_argnames="depth")
    def program(x: jax.Array, depth: int) -> jax.Array:
        for _ in range(depth):
            x = jnp.tanh(matmul(jnp.tanh(matmul(x, weight)), back))
        return x

    def inputs(idx: int) -> jax.Array:
        return jnp.asarray(activations("float32", (17 + 30 * idx, 300), seed=idx))

    expected = [bits(program(inputs(idx), depth=3 + idx)) for idx in range(num_programs)]
    results: queue.Queue[str | None] = queue.Queue()

    def work(idx: int) -> None:
        x, wrong = inputs(idx), 0
        for _ in range(num_runs):
            wrong += not np.array_equal(bits(program(x, depth=3 + idx)), expected[idx])
        results.put(f"program {idx} was wrong {wrong} times" if wrong else None)

    # Daemons, so that a deadlock fails this test and does not keep the process from ending.
    workers = [threading.Thread(target=work, args=(idx,), daemon=True) for idx in range(num_programs)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [None] * num_programs
    for worker in workers:
        worker.join(timeout=60)
