"""What is learned while serving of how often drafts are accepted.

No jax, no numpy; no clock is read, and nothing is random.
"""

from __future__ import annotations

import math
from itertools import accumulate

# Rates are rounded to this many steps, so that a batch's expected tokens are looked up rather than computed.
NUM_LEVELS = 40
HIGHEST_RATE = 0.995
LOG_RATES = [math.log(min(level / NUM_LEVELS, HIGHEST_RATE)) for level in range(1, NUM_LEVELS + 1)]
# What drafts are hoped to do before any was verified.
START_RATE = 0.7


class AcceptanceCurve:
    """How a row's rate of acceptance turns into the chance that its first j drafts are all accepted; one for the engine.

    A row is described by one number, its rate q: accepted drafts by tested ones, weighted by position, where a draft is tested
    when all before it were accepted. Positions differ, so the chance that draft i is accepted after the ones before it is
    q ** h[i], and that the first j are, q ** (h[1] + ... + h[j]): the proportional hazards model in grouped time (Prentice and
    Gloeckler, Biometrics 1978). h is learned from all rows at once. It compares what was accepted at a position with the rates
    that the rows tested there had before, so it corrects for good rows reaching later positions more often, and for rates that
    are uncertain: over the engine's rows, expectations agree with what happens.
    """

    # Tested drafts after which an observation at a position counts 1/e: the shape changes slowly.
    MEMORY = 1000.0
    # Tested drafts that the prior of each position is worth: h = 1 for the first; after an accepted draft the next one is hoped to
    # be as likely as the one before it and no less than START_RATE, or deep positions would not be tried where
    # first ones are seldom accepted.
    PRIOR_TRIALS = 4.0
    EXPONENTS = (0.02, 20.0)
    # Relative change of an exponent for which the table is computed anew, which takes longer than all else.
    TOLERANCE = 0.05

    def __init__(self, max_drafts: int) -> None:
        self.max_drafts = max_drafts
        # By accepted drafts of a round: rounds and the sum of rates, of all and of those that ended with a rejection.
        self._rounds = [0] * (max_drafts + 1)
        self._rates = [0.0] * (max_drafts + 1)
        self._rejected_rounds = [0] * (max_drafts + 1)
        self._rejected_rates = [0.0] * (max_drafts + 1)
        # By position, from 0: tested drafts, those accepted, and the sum of the rates of their rows. Old ones fade.
        self._tested = [0.0] * max_drafts
        self._accepted = [0.0] * max_drafts
        self._expected = [0.0] * max_drafts
        self.exponents = [1.0] * max_drafts
        self.weights = self._accumulate_weights()
        self.tokens_by_level = self._tabulate()

    def observe(self, rate: float, num_drafts: int, num_accepted: int, times: int = 1) -> None:
        """So many like rounds of a row whose rate was `rate` before them; they count at the next `refresh`."""
        self._rounds[num_accepted] += times
        self._rates[num_accepted] += times * rate
        if num_accepted < num_drafts:
            self._rejected_rounds[num_accepted] += times
            self._rejected_rates[num_accepted] += times * rate

    def refresh(self) -> None:
        """Works the rounds observed since the last call into the table."""
        if any(self._rounds):
            self._fold()
            exponents = self._estimate_exponents()
            if any(abs(new - old) > self.TOLERANCE * old for new, old in zip(exponents, self.exponents, strict=True)):
                self.exponents = exponents
                self.weights = self._accumulate_weights()
                self.tokens_by_level = self._tabulate()

    def _fold(self) -> None:
        """Moves the counts by accepted drafts into those by position."""
        num_accepted, rates = 0, 0.0
        for position in reversed(range(self.max_drafts)):
            num_accepted += self._rounds[position + 1]
            rates += self._rates[position + 1]
            num_tested = num_accepted + self._rejected_rounds[position]
            kept = math.exp(-num_tested / self.MEMORY)
            self._tested[position] = self._tested[position] * kept + num_tested
            self._accepted[position] = self._accepted[position] * kept + num_accepted
            self._expected[position] = self._expected[position] * kept + rates + self._rejected_rates[position]
        for counts in (self._rounds, self._rejected_rounds):
            counts[:] = [0] * len(counts)
        for sums in (self._rates, self._rejected_rates):
            sums[:] = [0.0] * len(sums)

    def _estimate_exponents(self) -> list[float]:
        exponents: list[float] = []
        rate, exponent = START_RATE, 1.0
        for tested, accepted, expected in zip(self._tested, self._accepted, self._expected, strict=True):
            if tested:
                rate = min(max(expected / tested, 0.001), HIGHEST_RATE)
            prior = max(rate**exponent, START_RATE) if exponents else rate
            mean = (accepted + self.PRIOR_TRIALS * prior) / (tested + self.PRIOR_TRIALS)
            lowest, highest = self.EXPONENTS
            exponent = min(max(math.log(min(mean, HIGHEST_RATE)) / math.log(rate), lowest), highest)
            exponents.append(exponent)
        return exponents

    def _accumulate_weights(self) -> list[float]:
        """What the first j positions say of a row's rate, by j: a position at which rows hardly fail says little of them."""
        first = self.exponents[0] if self.exponents else 1.0
        return [0.0, *accumulate(min(max(exponent / first, 0.05), 1.0) for exponent in self.exponents)]

    def _tabulate(self) -> list[list[float]]:
        """Expected tokens of a round by level of the rate and number of drafts; no draft is expected to pass at level 0."""
        hazards = list(accumulate(self.exponents))
        table = [[1.0] * (self.max_drafts + 1)]
        for log_rate in LOG_RATES:
            table.append([*accumulate([math.exp(log_rate * hazard) for hazard in hazards], initial=1.0)])
        return table


class Acceptance:
    """How often drafts are accepted: exponentially forgetting, with a prior. One per request, and one for the engine.

    A request's prior is the engine's rate at the time, so a new one is taken to be like the others until it shows otherwise;
    the engine's own is optimistic, so that it begins by drafting.

    A round counts with the drafts that were *asked for*: a position for which the source proposed nothing is
    a rejected one, since the step was as wide as for a proposal. A row that seldom has a proposal thereby has a low rate.
    """

    # Tested drafts after which one counts 1/e. By drafts and not by rounds, or long runs of accepted ones would outweigh
    # rejections for as many rounds as they are long.
    ROW_MEMORY = 48.0
    ENGINE_MEMORY = 400.0
    # Tested drafts that the prior is worth.
    ROW_PRIOR_TRIALS = 10.0
    ENGINE_PRIOR_TRIALS = 3.0

    __slots__ = (
        "_accepted",
        "_curve",
        "_memory",
        "_new_accepted",
        "_new_tested",
        "_prior",
        "_prior_trials",
        "_tested",
        "level",
        "rate",
    )

    rate: float
    level: int

    def __init__(self, curve: AcceptanceCurve, prior: Acceptance | None = None) -> None:
        """`prior` is the engine's acceptance; without one this is the engine's."""
        self._curve = curve
        self._prior = prior
        self._prior_trials = self.ENGINE_PRIOR_TRIALS if prior is None else self.ROW_PRIOR_TRIALS
        self._memory = self.ENGINE_MEMORY if prior is None else self.ROW_MEMORY
        self._accepted = 0.0
        self._tested = 0.0
        # Since the last `refresh`.
        self._new_accepted = 0.0
        self._new_tested = 0.0
        self.rate = START_RATE if prior is None else prior.rate
        self.level = round(self.rate * NUM_LEVELS)

    def observe(self, num_drafts: int, num_accepted: int, times: int = 1) -> None:
        """So many rounds that asked for `num_drafts`, of which the first `num_accepted` were accepted; they count at the next `refresh`."""
        assert 0 <= num_accepted <= num_drafts > 0, (num_drafts, num_accepted)
        weights = self._curve.weights
        self._new_tested += times * weights[min(num_accepted + 1, num_drafts)]
        self._new_accepted += times * weights[num_accepted]

    def refresh(self) -> None:
        """Works the rounds observed since the last call into the rate."""
        kept = math.exp(-self._new_tested / self._memory)
        self._accepted = self._accepted * kept + self._new_accepted
        self._tested = self._tested * kept + self._new_tested
        self._new_accepted = self._new_tested = 0.0
        prior_rate = START_RATE if self._prior is None else self._prior.rate
        trials = self._prior_trials
        self.rate = (self._accepted + trials * prior_rate) / (self._tested + trials)
        self.level = round(self.rate * NUM_LEVELS)

    def expected_tokens(self, num_drafts: int) -> float:
        """Tokens that a round with so many drafts is expected to bring: 1, and the expected number of accepted drafts."""
        return self._curve.tokens_by_level[self.level][min(num_drafts, self._curve.max_drafts)]
