"""Counter-based Gumbel noise: the noise of (seed, position, token id) depends on those three numbers alone.

No row, batch, schedule or device generator has a part in it, so a draw is the same alone and in any batch, and a draft
model and its target see the same noise at the same position.

Mixing is a Feistel network with the round function of the SIMON ciphers (Beaulieu et al., "The SIMON and SPECK Families
of Lightweight Block Ciphers", 2013, https://eprint.iacr.org/2013/404): and, xor and rotations of 32-bit words only.
Integer additions and multiplications are avoided because Neuron's vector engine may pass them through float32.
It is a statistical mixer, not a cipher: nothing here is meant to resist an attacker.

Shapes: R rows of logits, V tokens of the vocabulary, k token ids named per row.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The fractional digits of pi in hexadecimal: round constants without a choice in them.
_PI_WORDS = (
    0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0, 0x082EFA98, 0xEC4E6C89, 0x452821E6,
    0x38D01377, 0xBE5466CF, 0x34E90C6C, 0xC0AC29B7, 0xC97C50DD, 0x3F84D5B5, 0xB5470917, 0x9216D5D9, 0x8979FB1B,
)  # fmt: skip

# After `spread`, a flipped bit flips every output bit with probability 0.5 from the sixth round on (measured as in
# tests/kernels/test_noise.py, 20,000 samples); the rest is margin. A position is mixed once per row, so its rounds are
# free; the token's are most of the cost of a random draw.
_NUM_POSITION_ROUNDS = 18
_NUM_TOKEN_ROUNDS = 8


def seed_key(seed: int) -> np.ndarray:
    """The [2] uint32 key of a request's seed, on the host. Any Python integer, negative or huge, has its own key."""
    num_bytes = seed.bit_length() // 8 + 1
    digest = hashlib.blake2b(seed.to_bytes(num_bytes, "little", signed=True), digest_size=8).digest()
    return np.frombuffer(digest, dtype="<u4").astype(np.uint32)


def position_key(key: jax.Array, position: jax.Array) -> jax.Array:
    """The key of one position: key [..., 2] uint32 of a seed, position [...] int32 -> [..., 2] uint32.

    For a fixed seed the keys of all positions differ, since a Feistel network is a bijection.
    """
    key0, key1 = key[..., 0], key[..., 1]
    spread0, spread1 = spread(lax.bitcast_convert_type(position, jnp.uint32))
    left, right = _mix(key0 ^ spread0, key1 ^ spread1, key0, key1, _NUM_POSITION_ROUNDS)
    return jnp.stack([left, right], axis=-1)


def gumbel(key: jax.Array, token_ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise of every token: key [R, 2] uint32 from `position_key`, token_ids [V] or [R, k] int32 ->
    [R, V] or [R, k] float32, finite, between -2.9 and 16.7. The same (key, token id) has the same noise in any shape.
    """
    return gumbel_of_bits(token_bits(key, token_ids))


def gumbel_of_bits(bits: jax.Array) -> jax.Array:
    """The Gumbel value of each uint32, from its top 24 bits: -log(-log(u)) with u a multiple of 2**-24 inside (0, 1)."""
    # 24 bits are exact in float32. Zero shares the value of one, which keeps both logarithms finite.
    numerator = lax.bitcast_convert_type(bits >> np.uint32(8), jnp.int32).astype(jnp.float32)
    uniform = jnp.maximum(numerator, np.float32(1)) * np.float32(2.0**-24)
    return -jnp.log(-jnp.log(uniform))


def token_bits(key: jax.Array, token_ids: jax.Array) -> jax.Array:
    """32 mixed bits of (key, token id), the source of `gumbel`: key [R, 2] uint32, token_ids [V] or [R, k] int32 ->
    [R, V] or [R, k] uint32."""
    ids = token_ids if token_ids.ndim == 2 else token_ids[None, :]
    spread0, spread1 = spread(lax.bitcast_convert_type(ids, jnp.uint32))
    shape = (key.shape[0], ids.shape[1])
    key0 = jnp.broadcast_to(key[:, :1], shape)  # [R, V]
    key1 = jnp.broadcast_to(key[:, 1:], shape)
    left = key0 ^ jnp.broadcast_to(spread0, shape)
    right = key1 ^ jnp.broadcast_to(spread1, shape)
    return _mix(left, right, key0, key1, _NUM_TOKEN_ROUNDS)[0]


def _rotate_left(word: jax.Array, num_bits: int) -> jax.Array:
    return (word << np.uint32(num_bits)) | (word >> np.uint32(32 - num_bits))


def spread(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Spread a small number linearly over 64 bits, so that counting up changes many bits before the first round."""
    once = word ^ _rotate_left(word, 8) ^ _rotate_left(word, 14)
    twice = once ^ _rotate_left(once, 5)
    return twice, _rotate_left(twice, 19) ^ _rotate_left(once, 21)


def _mix(
    left: jax.Array, right: jax.Array, key0: jax.Array, key1: jax.Array, num_rounds: int
) -> tuple[jax.Array, jax.Array]:
    """`num_rounds` rounds of SIMON64's round function over the state (left, right), all uint32 of one shape."""
    for round_idx in range(num_rounds):
        round_key = (key1 if round_idx % 2 else key0) ^ np.uint32(_PI_WORDS[round_idx])
        nonlinear = _rotate_left(left, 1) & _rotate_left(left, 8)
        left, right = right ^ nonlinear ^ _rotate_left(left, 2) ^ round_key, left
    return left, right
