"""The noise: a function of (seed, position, token id) alone, uniform, independent, Gumbel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from quire.kernels.sampling import gumbel, position_key, seed_key
from quire.kernels.sampling.noise import gumbel_of_bits, spread, token_bits

# One chance in ten thousand per check; the draws are fixed, so a check that passes once always passes.
MIN_P_VALUE = 1e-4
NUM_IDS = 4096
GOLDEN_KEYS = [[3379744746, 329432305], [4052241894, 1428196967]]
GOLDEN_BITS = [[4128695278, 3325152788, 1178023190]]

bits_of = jax.jit(token_bits)
key_of = jax.jit(position_key)


def keys(seeds: list[int], position: int = 0) -> jax.Array:
    return key_of(np.stack([seed_key(seed) for seed in seeds]), np.full(len(seeds), position, np.int32))


def ids(num_ids: int = NUM_IDS, start: int = 0) -> np.ndarray:
    return np.arange(start, start + num_ids, dtype=np.int32)


def uniforms(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits) >> 8) / 2**24


def assert_every_bit_flips_half_the_time(changed: np.ndarray) -> None:
    """`changed` [..., N] uint32 holds the output bits that changed in each of N samples."""
    flipped = (changed[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    rate = flipped.mean(axis=-2)
    # Five and a half standard deviations: about one false alarm in 25 million bits.
    assert np.abs(rate - 0.5).max() < 5.5 * 0.5 / np.sqrt(changed.shape[-1])


def test_the_noise_of_a_seed_never_changes() -> None:
    # Recorded once: a request's seed must mean the same tokens in every version.
    assert np.asarray(keys([0, -1], position=5)).tolist() == GOLDEN_KEYS
    assert np.asarray(bits_of(keys([0], position=5), ids(3, start=1000))).tolist() == GOLDEN_BITS


def test_every_integer_is_a_seed_with_its_own_key() -> None:
    seeds = [*range(-300, 300), 2**31, 2**32, 2**32 + 1, 2**63, 2**64, -(2**64), 2**64 + 1, 10**40]
    assert len({tuple(seed_key(seed).tolist()) for seed in seeds}) == len(seeds)
    assert seed_key(7).dtype == np.uint32
    assert seed_key(7).shape == (2,)


def test_positions_of_a_seed_never_share_a_key() -> None:
    num_positions = 1 << 18
    found = np.asarray(key_of(np.tile(seed_key(3), (num_positions, 1)), ids(num_positions)))
    assert len(np.unique(found.view(np.uint64))) == num_positions


def test_a_key_has_any_number_of_positions() -> None:
    grid = np.arange(12, dtype=np.int32).reshape(3, 4)
    key = np.stack([seed_key(seed) for seed in range(3)])
    together = position_key(jnp.asarray(key)[:, None, :], jnp.asarray(grid))
    alone = [[position_key(jnp.asarray(key[i]), jnp.int32(grid[i, j])) for j in range(4)] for i in range(3)]
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("num_ids", [1, 5, 97, 1000])
def test_the_noise_of_a_token_depends_on_no_other_token_or_row(num_ids: int) -> None:
    key = keys(list(range(6)))
    whole = np.asarray(jax.jit(gumbel)(key, ids(1000)))
    picked = np.random.default_rng(num_ids).integers(0, 1000, (6, num_ids)).astype(np.int32)
    assert np.array_equal(jax.jit(gumbel)(key, picked), np.take_along_axis(whole, picked, axis=1))
    assert np.array_equal(jax.jit(gumbel)(key[3:4], picked[3]), np.take_along_axis(whole, picked, axis=1)[3:4])


def test_the_noise_is_finite_whatever_the_bits() -> None:
    bits = np.array([0, 1, 255, 256, 511, 512, 2**31, 2**32 - 513, 2**32 - 257, 2**32 - 256, 2**32 - 1], np.uint32)
    noise = np.asarray(gumbel_of_bits(jnp.asarray(bits)))
    assert np.isfinite(noise).all()
    assert (np.diff(noise) >= 0).all()
    assert noise[0] == pytest.approx(-np.log(24 * np.log(2)), rel=1e-5)
    assert noise[-1] == pytest.approx(24 * np.log(2), rel=1e-5)


@pytest.mark.parametrize("shift", [8, 12, 18, 24])
def test_bits_fall_evenly_into_buckets(shift: int) -> None:
    bits = np.asarray(bits_of(keys(list(range(64))), ids()))
    counts = np.bincount(((bits >> shift) & 255).ravel(), minlength=256)
    assert stats.chisquare(counts).pvalue > MIN_P_VALUE


def test_bits_of_one_token_over_seeds_and_over_positions_fall_evenly_into_buckets() -> None:
    num_draws = 1 << 14
    seeds = np.stack([seed_key(seed) for seed in range(num_draws)])
    one_seed = np.tile(seed_key(11), (num_draws, 1))
    for key in (key_of(seeds, np.zeros(num_draws, np.int32)), key_of(one_seed, ids(num_draws))):
        bits = np.asarray(bits_of(key, ids(8)))
        for token in range(8):
            assert stats.chisquare(np.bincount(bits[:, token] >> 24, minlength=256)).pvalue > MIN_P_VALUE


def test_the_noise_is_gumbel() -> None:
    noise = np.asarray(gumbel(keys(list(range(32))), ids())).ravel()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=5 * np.pi / np.sqrt(6 * noise.size))
    # The fourth central moment of a Gumbel is 5.4 times its squared variance.
    assert noise.var() == pytest.approx(np.pi**2 / 6, rel=5 * np.sqrt(4.4 / noise.size))
    assert stats.kstest(noise, stats.gumbel_r.cdf).pvalue > MIN_P_VALUE


def test_flipping_a_bit_of_the_token_id_flips_every_output_bit_half_the_time() -> None:
    key = keys(list(range(64)))
    base = np.asarray(bits_of(key, ids(256, start=9000)))
    for bit in range(20):
        flipped = np.asarray(bits_of(key, ids(256, start=9000) ^ np.int32(1 << bit)))
        assert_every_bit_flips_half_the_time((base ^ flipped).reshape(1, -1))


def test_flipping_a_bit_of_the_position_flips_every_output_bit_half_the_time() -> None:
    num_seeds = 64
    seeds = np.stack([seed_key(seed) for seed in range(num_seeds)])
    base = np.asarray(bits_of(key_of(seeds, np.full(num_seeds, 1234, np.int32)), ids(256)))
    for bit in range(24):
        flipped = np.asarray(bits_of(key_of(seeds, np.full(num_seeds, 1234 ^ (1 << bit), np.int32)), ids(256)))
        assert_every_bit_flips_half_the_time((base ^ flipped).reshape(1, -1))


def test_flipping_a_bit_of_the_position_flips_every_bit_of_its_key_half_the_time() -> None:
    num_seeds = 8192
    seeds = np.random.default_rng(0).integers(0, 2**32, (num_seeds, 2), dtype=np.uint32)
    base = np.asarray(key_of(seeds, np.full(num_seeds, 1234, np.int32)))
    for bit in range(0, 31, 2):
        flipped = np.asarray(key_of(seeds, np.full(num_seeds, 1234 ^ (1 << bit), np.int32)))
        assert_every_bit_flips_half_the_time((base ^ flipped).T)


def test_flipping_a_bit_of_the_seed_or_of_its_key_flips_every_output_bit_half_the_time() -> None:
    seeds = list(range(1000, 1064))
    base = np.asarray(bits_of(keys(seeds), ids(256)))
    for bit in range(0, 64, 3):
        flipped = np.asarray(bits_of(keys([seed ^ (1 << bit) for seed in seeds]), ids(256)))
        assert_every_bit_flips_half_the_time((base ^ flipped).reshape(1, -1))
    raw = np.stack([seed_key(seed) for seed in seeds])
    for bit in range(0, 64, 3):
        mask = np.array([1 << bit & 0xFFFFFFFF, 1 << bit >> 32], np.uint32)
        flipped = np.asarray(bits_of(key_of(raw ^ mask, np.zeros(len(seeds), np.int32)), ids(256)))
        assert_every_bit_flips_half_the_time((base ^ flipped).reshape(1, -1))


def neighbours() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs of uniforms whose seed, position or token id are one apart."""
    by_seed = uniforms(bits_of(keys(list(range(65))), ids(2048)))
    by_position = uniforms(bits_of(key_of(np.tile(seed_key(5), (65, 1)), ids(65)), ids(2048)))
    return {
        "seed": (by_seed[:-1], by_seed[1:]),
        "position": (by_position[:-1], by_position[1:]),
        "token id": (by_seed[:, :-1], by_seed[:, 1:]),
        "token id and position": (by_position[:-1, 1:], by_position[1:, :-1]),
    }


@pytest.mark.parametrize("name", ["seed", "position", "token id", "token id and position"])
def test_neighbours_are_independent(name: str) -> None:
    first, second = (values.ravel() for values in neighbours()[name])
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(first.size)
    # Any dependence of the joint distribution, not only a linear one.
    counts = np.bincount((first * 16).astype(int) * 16 + (second * 16).astype(int), minlength=256)
    assert stats.chisquare(counts).pvalue > MIN_P_VALUE


def test_two_keys_and_two_tokens_share_nothing() -> None:
    # A mixer of low degree passes every test of pairs and fails here: the four corners would cancel.
    bits = np.asarray(bits_of(keys(list(range(64))), ids()))
    corners = bits[:-1, :-1] ^ bits[1:, :-1] ^ bits[:-1, 1:] ^ bits[1:, 1:]
    assert_every_bit_flips_half_the_time(corners.reshape(1, -1))
    assert stats.chisquare(np.bincount((corners >> 24).ravel(), minlength=256)).pvalue > MIN_P_VALUE


def test_no_two_token_ids_start_from_the_same_state() -> None:
    # The spread is linear over bits, so it is one to one when only zero goes to zero: rank 32 of its columns.
    left, right = spread(jnp.asarray(np.uint32(1) << np.arange(32, dtype=np.uint32)))
    columns = [(int(a) << 32) | int(b) for a, b in zip(np.asarray(left), np.asarray(right), strict=True)]
    rank = 0
    while any(columns):
        pivot = max(columns)
        columns = [c ^ pivot if c.bit_length() == pivot.bit_length() else c for c in columns]
        rank += 1
    assert rank == 32
