"""The sampler in C++ gives the reference's tokens, the same ones in any batch and with any number of threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.kernels.native.library import load_library
from quire.kernels.ops import REFERENCE
from quire.kernels.sampling import SampleOutput, SamplingMode, SamplingRows, gumbel, position_key, seed_key
from tests.kernels.sampling_implementations import NATIVE, compiled
from tests.kernels.sampling_oracle import Params, pack

FULL, RANDOM, GREEDY = SamplingMode.FULL, SamplingMode.RANDOM, SamplingMode.GREEDY
# A row is cut into pieces of 8,192 tokens: three here, the last neither whole nor a whole number of vectors.
SEVERAL_PIECES = 20_001
NUM_LOGPROBS = 6

pytestmark = pytest.mark.skipif(not NATIVE, reason="the library is not built, or not for this machine")
every_native = pytest.mark.parametrize("op", NATIVE)


def some_params(seed: int, vocab_size: int) -> Params:
    """Parameters that are each on in some of the rows only, so that every way through the sampler is taken."""
    rng = np.random.default_rng(seed)

    def on(share: float) -> bool:
        return bool(rng.random() < share)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab_size, rng.integers(0, most + 1)).tolist())

    return Params(
        temperature=float(rng.uniform(0.2, 3)) if on(0.85) else 0.0,
        seed=seed,
        top_k=int(rng.choice([-1, 1, 5, 50, rng.integers(1, vocab_size + 20)])) if on(0.6) else 0,
        top_p=float(rng.uniform(0.02, 1)) if on(0.5) else 1.0,
        min_p=float(rng.uniform(0.001, 0.9)) if on(0.3) else 0.0,
        repetition_penalty=float(rng.uniform(0.5, 2)) if on(0.4) else 1.0,
        presence_penalty=float(rng.uniform(-2, 2)) if on(0.3) else 0.0,
        frequency_penalty=float(rng.uniform(-2, 2)) if on(0.3) else 0.0,
        prompt=(3, *tokens(10)),
        output=tokens(12),
        logit_bias={token: float(rng.uniform(-5, 5)) for token in tokens(4)} if on(0.3) else {},
        allowed=tuple(sorted({0, *tokens(vocab_size)})) if on(0.2) else None,
        min_tokens=int(rng.integers(0, 12)),
        stop_ids=tokens(3),
        bad_words=tuple((*tokens(2), 7) for _ in range(3)) if on(0.3) else (),
    )


def some_rows(first_seed: int, num_rows: int, vocab_size: int) -> SamplingRows:
    params = [some_params(first_seed + i, vocab_size) for i in range(num_rows)]
    return pack(params, vocab_size, positions=[(first_seed + i) * 7 % 5000 for i in range(num_rows)])


def some_logits(seed: int, num_rows: int, vocab_size: int) -> np.ndarray:
    """From nearly flat to one token far ahead; every third with many equal values."""
    spread = (0.01, 1.0, 2.0, 5.0, 20.0)[seed % 5]
    logits = np.random.default_rng(seed).normal(0, spread, (num_rows, vocab_size)).astype(np.float32)
    # There is one zero only: XLA's top_k tells 0 from -0.
    return np.round(logits) + np.float32(0) if seed % 3 == 2 else logits


def random_only(rows: SamplingRows) -> SamplingRows:
    return SamplingRows(rows.temperature, rows.key, rows.position)


def draw(op: str, logits: np.ndarray, rows: SamplingRows, mode: SamplingMode, num_logprobs: int = 0) -> SampleOutput:
    given = {GREEDY: None, RANDOM: random_only(rows), FULL: rows}[mode]
    output: SampleOutput = compiled(op)(jnp.asarray(logits), given, mode=mode, num_logprobs=num_logprobs)
    return output


def leaves(output: SampleOutput) -> list[np.ndarray]:
    """Floats as their bits."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(output)]
    return [array.view(np.int32) for array in arrays]


@contextmanager
def threads(op: str, count: int) -> Iterator[None]:
    library = load_library(op.removeprefix("native_"))
    library.set_max_threads(count)
    try:
        yield
    finally:
        library.set_max_threads(0)


@every_native
@pytest.mark.parametrize(("num_batches", "num_rows", "vocab_size"), [(15, 256, 1000), (5, 48, SEVERAL_PIECES)])
def test_the_tokens_are_those_of_the_reference(op: str, num_batches: int, num_rows: int, vocab_size: int) -> None:
    for batch in range(num_batches):
        rows, logits = some_rows(1000 * batch, num_rows, vocab_size), some_logits(batch, num_rows, vocab_size)
        for mode in SamplingMode:
            expected, found = draw(REFERENCE, logits, rows, mode), draw(op, logits, rows, mode)
            assert np.array_equal(found.token_ids, expected.token_ids)


@every_native
@pytest.mark.parametrize("vocab_size", [7, 1000, SEVERAL_PIECES])
def test_the_logprobs_are_those_of_the_reference(op: str, vocab_size: int) -> None:
    for batch in range(5):
        rows, logits = some_rows(batch, 16, vocab_size), some_logits(batch, 16, vocab_size)
        expected = draw(REFERENCE, logits, rows, FULL, NUM_LOGPROBS).logprobs
        found = draw(op, logits, rows, FULL, NUM_LOGPROBS).logprobs
        assert expected is not None
        assert found is not None
        assert np.array_equal(found.top_ids, expected.top_ids)
        assert np.array_equal(found.token_ranks, expected.token_ranks)
        # A float32 sum of 20,000 weights is good for about 1e-5.
        np.testing.assert_allclose(found.token_logprobs, expected.token_logprobs, rtol=1e-6, atol=2e-5)
        np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, rtol=1e-6, atol=2e-5)


@every_native
@pytest.mark.parametrize("mode", list(SamplingMode))
def test_a_row_is_the_same_bits_in_any_batch_and_with_any_number_of_threads(op: str, mode: SamplingMode) -> None:
    rows, logits = some_rows(5, 24, SEVERAL_PIECES), some_logits(1, 24, SEVERAL_PIECES)
    num_logprobs = NUM_LOGPROBS if mode == FULL else 0
    with threads(op, 1):
        expected = leaves(draw(op, logits, rows, mode, num_logprobs))
    for count in (0, 2, 3):
        with threads(op, count):
            together = leaves(draw(op, logits, rows, mode, num_logprobs))
            assert all(np.array_equal(a, b) for a, b in zip(together, expected, strict=True))
            for i in range(24):
                row = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], rows)
                alone = leaves(draw(op, logits[i : i + 1], row, mode, num_logprobs))
                assert all(np.array_equal(a[0], b[i]) for a, b in zip(alone, expected, strict=True))


@every_native
def test_every_instruction_set_gives_the_same_tokens(op: str) -> None:
    rows, logits = some_rows(9, 64, 1000), some_logits(3, 64, 1000)
    for mode in SamplingMode:
        assert np.array_equal(draw(op, logits, rows, mode).token_ids, draw(NATIVE[-1], logits, rows, mode).token_ids)


@every_native
def test_the_noise_is_that_of_the_reference(op: str) -> None:
    # Between equal logits the noise alone decides: one wrong bit in it would show in many rows.
    num_rows, vocab_size = 2048, 999
    key = np.stack([seed_key(seed) for seed in range(num_rows)])
    position = np.random.default_rng(0).integers(0, 2**31 - 1, num_rows).astype(np.int32)
    rows = SamplingRows(jnp.ones(num_rows), jnp.asarray(key), jnp.asarray(position))
    noise = jax.jit(lambda k, p: gumbel(position_key(k, p), jnp.arange(vocab_size, dtype=jnp.int32)))(key, position)
    found = draw(op, np.zeros((num_rows, vocab_size), np.float32), rows, RANDOM)
    assert np.array_equal(found.token_ids, np.asarray(noise).argmax(axis=1))


@every_native
def test_a_logit_of_minus_infinity_is_never_drawn_before_another(op: str) -> None:
    rows, logits = some_rows(40, 64, 1000), some_logits(1, 64, 1000)
    logits[::2, 5:500] = -np.inf
    logits[1::4] = -np.inf
    for mode in SamplingMode:
        assert np.array_equal(draw(op, logits, rows, mode).token_ids, draw(REFERENCE, logits, rows, mode).token_ids)


@every_native
@pytest.mark.parametrize("vocab_size", [5, 1000, SEVERAL_PIECES])
def test_a_row_with_a_nan_gives_the_last_token_in_every_mode(op: str, vocab_size: int) -> None:
    # The reference says the same, but XLA's maximum loses a NaN now and then.
    params = [Params(), Params(temperature=0.0), Params(top_k=3), Params(top_p=0.5), Params(min_p=0.1, top_k=2)]
    rows = pack(params, vocab_size)
    logits = some_logits(1, 5, vocab_size)
    logits[:, 2] = np.nan
    for mode in SamplingMode:
        assert (np.asarray(draw(op, logits, rows, mode).token_ids) == vocab_size - 1).all()
    logprobs = draw(op, logits, rows, FULL, 3).logprobs
    assert logprobs is not None
    assert np.array_equal(logprobs.top_ids, [[0, 1, 2]] * 5)
