"""The compiled sampling programs hold nothing that a device of ours cannot run."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from quire.kernels.sampling import SamplingMode, SamplingRows, position_key, sample
from quire.kernels.sampling.noise import token_bits
from tests.kernels.sampling_oracle import Params, pack

NUM_ROWS, VOCAB_SIZE = 4, 256


@functools.cache
def lowered(mode: SamplingMode, num_logprobs: int = 0) -> str:
    rows: SamplingRows | None = pack([Params()] * NUM_ROWS, VOCAB_SIZE)
    if mode == SamplingMode.GREEDY:
        rows = None
    elif mode == SamplingMode.RANDOM:
        assert rows is not None
        rows = SamplingRows(rows.temperature, rows.key, rows.position)
    logits = jnp.zeros((NUM_ROWS, VOCAB_SIZE), jnp.float32)
    step = jax.jit(sample, static_argnames=("mode", "num_logprobs"))
    return step.lower(logits, rows, mode=mode, num_logprobs=num_logprobs).as_text()


FORBIDDEN = {
    "a sort": r"stablehlo\.sort|top_k",
    "a reduce of several values": r"stablehlo\.reduce\([^)]*\)\s*,",
    "control flow by value": r"stablehlo\.(if|case)\b",
    "a generator of the device": r"stablehlo\.rng|threefry",
    "a dot": r"stablehlo\.(dot|convolution)",
    "a callback": r"stablehlo\.custom_call|callback",
    "64-bit numbers": r"tensor<(\d+x)*(ui|i|f)64>",
    "division of integers": r"stablehlo\.(divide|remainder) .*tensor<(\d+x)*(ui|i)32>",
}
MODES = [SamplingMode.GREEDY, SamplingMode.RANDOM, SamplingMode.FULL]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_program_holds(mode: SamplingMode, what: str) -> None:
    assert not re.search(FORBIDDEN[what], lowered(mode))


@pytest.mark.parametrize("what", FORBIDDEN)
def test_each_forbidden_thing_is_recognised(what: str) -> None:
    samples = {
        "a sort": lambda x, i: jnp.sort(x),
        "a reduce of several values": lambda x, i: jnp.argmax(x),
        "control flow by value": lambda x, i: jax.lax.cond(x[0] > 0, lambda: x, lambda: -x),
        "a generator of the device": lambda x, i: jax.random.uniform(jax.random.key(0)),
        "a dot": lambda x, i: x @ x,
        "a callback": lambda x, i: jax.pure_callback(lambda v: v, x, x),
        "64-bit numbers": lambda x, i: x,
        "division of integers": lambda x, i: i // i,
    }
    arguments = (jnp.ones(4, jnp.float32), jnp.ones(4, jnp.int32))
    text = jax.jit(samples[what], keep_unused=True).lower(*arguments).as_text()
    if what == "64-bit numbers":
        text = "%0 = stablehlo.constant dense<0> : tensor<4xi64>"
    assert re.search(FORBIDDEN[what], text)


@pytest.mark.parametrize("mode", MODES)
def test_every_loop_counts_to_a_constant(mode: SamplingMode) -> None:
    text = lowered(mode)
    conditions = re.findall(r"cond \{(.*?)\} do", text, flags=re.DOTALL)
    assert len(conditions) == text.count("stablehlo.while") == (2 if mode == SamplingMode.FULL else 0)
    for condition in conditions:
        assert re.search(
            r"%\w+ = stablehlo\.constant dense<\d+> : tensor<i32>\s+%\w+ = stablehlo\.compare\s+LT", condition
        )


def test_the_noise_mixes_with_bitwise_operations_alone() -> None:
    # Integer additions and multiplications may pass through float32, which holds 24 bits.
    key, ids = jnp.zeros((NUM_ROWS, 2), jnp.uint32), jnp.zeros(VOCAB_SIZE, jnp.int32)
    text = jax.jit(lambda k, p, i: token_bits(position_key(k, p), i)).lower(key, ids[:NUM_ROWS], ids).as_text()
    used = set(re.findall(r"stablehlo\.(\w+)", text))
    moves = {"constant", "slice", "reshape", "broadcast_in_dim", "concatenate", "bitcast_convert", "convert"}
    assert used - moves == {"and", "or", "xor", "shift_left", "shift_right_logical"}


def test_only_logprobs_use_a_top_k_and_only_a_small_one() -> None:
    text = lowered(SamplingMode.FULL, num_logprobs=5)
    assert re.findall(r"chlo\.top_k\([^)]*k = (\d+)", text) == ["5"]
    assert not re.search(r"stablehlo\.sort", text)
