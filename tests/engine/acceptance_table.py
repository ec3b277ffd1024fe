"""How often drafts are accepted: `python -m tests.engine.acceptance_table` prints what was measured beside what theory has.

Draft and target sample with the same Gumbel noise, p the target's distribution and q the draft's, d their total variation distance. They
agree at least (1 - d) / (1 + d) of the time (Daliri et al. 2024, "Coupling without communication and drafter-invariant speculative
decoding"); no scheme whatever does better than 1 - d, and one that does is no longer free of the draft.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from quire.kernels.sampling import seed_key
from quire.kernels.sampling.reference import sample
from quire.kernels.sampling.rows import SamplingMode, SamplingRows

VOCAB_SIZE = 12
NUM_SEEDS = 50
NUM_POSITIONS = 800
NUM_DRAWS = NUM_SEEDS * NUM_POSITIONS

_sample = jax.jit(sample, static_argnames=("mode", "num_logprobs"))


@dataclass(frozen=True)
class Agreement:
    """What came of drafting from `q` for a target `p`, both float64 [V]."""

    p: np.ndarray
    q: np.ndarray
    drafted: np.ndarray
    """[NUM_DRAWS] int32."""
    emitted: np.ndarray
    """[NUM_DRAWS] int32: the draft where it was accepted, else the target's own."""
    accepted: np.ndarray
    """[NUM_DRAWS] bool."""

    @property
    def distance(self) -> float:
        """Total variation."""
        return float(np.abs(self.p - self.q).sum() / 2)

    @property
    def bound(self) -> float:
        """The least that is promised of the rate."""
        return (1 - self.distance) / (1 + self.distance)

    @property
    def optimum(self) -> float:
        """The most that any coupling has."""
        return 1 - self.distance

    @property
    def rate(self) -> float:
        """Measured."""
        return float(self.accepted.mean())

    @property
    def standard_error(self) -> float:
        """Of the rate, were it what theory has."""
        return float(np.sqrt(max(self.rate * (1 - self.rate), 1 / NUM_DRAWS) / NUM_DRAWS))


def draw(probabilities: np.ndarray, first_seed: int) -> np.ndarray:
    """Tokens [NUM_DRAWS] int32 as the engine draws them, for NUM_SEEDS requests at NUM_POSITIONS positions each."""
    keys = np.stack([seed_key(first_seed + idx) for idx in range(NUM_SEEDS)])
    rows = SamplingRows(
        temperature=np.ones(NUM_DRAWS, np.float32),
        key=np.repeat(keys, NUM_POSITIONS, axis=0),
        position=np.tile(np.arange(NUM_POSITIONS, dtype=np.int32), NUM_SEEDS),
    )
    logits = np.broadcast_to(np.log(np.maximum(probabilities, 1e-30)).astype(np.float32), (NUM_DRAWS, VOCAB_SIZE))
    return np.asarray(_sample(logits, rows, mode=SamplingMode.RANDOM, num_logprobs=0).token_ids)


def agreement(p: np.ndarray, q: np.ndarray, first_seed: int) -> Agreement:
    """Drafts from q and verifies with p."""
    drafted, target = draw(q, first_seed), draw(p, first_seed)
    accepted = drafted == target
    return Agreement(p, q, drafted, np.where(accepted, drafted, target), accepted)


def pairs() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Pairs of distributions, near and far: what they are, p and q."""
    rng = np.random.default_rng(31)
    for sharpness in (0.3, 1.0, 5.0):
        p, other = (rng.dirichlet(np.full(VOCAB_SIZE, sharpness)) for _ in range(2))
        for share in (0.0, 0.05, 0.3, 1.0):
            yield f"dirichlet {sharpness}, {share:.0%} of another", p, (1 - share) * p + share * other
    flat, point = np.full(VOCAB_SIZE, 1 / VOCAB_SIZE), np.eye(VOCAB_SIZE)[4]
    yield "flat, of one token", flat, point
    yield "of one token, flat", point, flat
    halves = np.repeat([2.0, 0.0], VOCAB_SIZE // 2) / VOCAB_SIZE
    yield "nothing in common", halves, halves[::-1]


def main() -> None:
    """Prints the table."""
    print(f"{'p, q':40} {'distance':>8} {'bound':>8} {'measured':>8} {'optimum':>8}")
    for idx, (name, p, q) in enumerate(pairs()):
        found = agreement(p, q, first_seed=1000 * idx)
        print(f"{name:40} {found.distance:8.4f} {found.bound:8.4f} {found.rate:8.4f} {found.optimum:8.4f}")


if __name__ == "__main__":
    main()
