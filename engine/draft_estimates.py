"""What is learned while serving of drafts and of steps: how often drafts are accepted, and what a step takes.

No jax, no numpy; no clock is read, and nothing is random.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
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

    def observe(self, rate: float, num_drafts: int, num_accepted: int) -> None:
        """A round of a row whose rate was `rate` before it; counts at the next `refresh`."""
        self._rounds[num_accepted] += 1
        self._rates[num_accepted] += rate
        if num_accepted < num_drafts:
            self._rejected_rounds[num_accepted] += 1
            self._rejected_rates[num_accepted] += rate

    def refresh(self) -> None:
        """Works the rounds observed since the last call into the table; microseconds, once a step."""
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

    __slots__ = ("_accepted", "_curve", "_memory", "_prior", "_prior_trials", "_tested", "level", "rate")

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
        self.rate = START_RATE if prior is None else prior.rate
        self.level = round(self.rate * NUM_LEVELS)

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """A round that asked for `num_drafts`, of which the first `num_accepted` were accepted; of 0 it learns nothing."""
        assert 0 <= num_accepted <= num_drafts, (num_drafts, num_accepted)
        if num_drafts:
            weights = self._curve.weights
            tested = weights[min(num_accepted + 1, num_drafts)]
            kept = math.exp(-tested / self._memory)
            self._accepted = self._accepted * kept + weights[num_accepted]
            self._tested = self._tested * kept + tested
            prior_rate = START_RATE if self._prior is None else self._prior.rate
            trials = self._prior_trials
            self.rate = (self._accepted + trials * prior_rate) / (self._tested + trials)
            self.level = round(self.rate * NUM_LEVELS)

    def expected_tokens(self, num_drafts: int) -> float:
        """Tokens that a round with so many drafts is expected to bring: 1, and the expected number of accepted drafts."""
        return self._curve.tokens_by_level[self.level][min(num_drafts, self._curve.max_drafts)]


class _Usual:
    """The number of drafts that most steps of a bucket have: its samples since a gap, up to a few, and those of others since its last.

    Also what such a step took when the others were last in proportion to it, 0 for unknown, and when that was; and when there was any
    sample last."""

    __slots__ = ("arm", "num_fresh", "num_others", "seconds", "seen_any_at", "seen_at")

    def __init__(self, arm: int) -> None:
        self.arm = arm
        self.num_fresh = self.num_others = self.seen_at = self.seen_any_at = 0
        self.seconds = 0.0


class StepCosts:
    """Seconds that a decode step takes, by the number of rows in powers of two and by number of drafts.

    The host's work for a step is partly done while the device is at the next, so a step after one with more drafts takes longer
    than it would among its like, and one after fewer drafts less; and a kind takes some steps to be as fast as in the long run. So a
    sample is a step that follows one of its own kind, in the later half of those seen at once; or, of a single one within steps of
    fewer drafts, what it and the step after it took together, less what that one costs. A cell is the lower median of its last samples,
    so that single slow steps count for nothing.

    What makes the usual step slower, others who use the machine or longer contexts, makes those with other numbers of drafts slower
    too, which are seldom measured: so they are taken to follow it, up and down alike, also over a time in which there were no such
    batches. Usual is, among the steps with so many rows, what was taken more often of late than a probe lasts.
    """

    WINDOW = 9
    # Samples of other numbers of drafts, none of the usual one among them, after which one of those is usual: more than a probe's.
    TAKES_OVER = 12
    # Steps of the engine after which a cell's samples are no longer compared with new ones: only their median stays.
    STALE_AFTER = 512
    # Times its estimate, beyond which a cell is taken to be wrong: noise stays below.
    CONTRADICTED = 1.1
    # Of the usual step's cost, the change that others do not follow yet.
    UNNOTICED = 0.01
    # What each draft adds to a step until something was measured, as a fraction of a step without drafts.
    ASSUMED_PER_DRAFT = 0.1

    def __init__(self, draft_counts: Sequence[int]) -> None:
        self._draft_counts = tuple(draft_counts)
        self._assumed = tuple(1.0 + self.ASSUMED_PER_DRAFT * count for count in draft_counts)
        # Each with the step of the engine that it was taken at.
        self._samples: dict[tuple[int, int], deque[tuple[float, int]]] = {}
        self._medians: dict[int, list[float | None]] = {}
        self._measured_at: dict[tuple[int, int], int] = {}
        self._num_steps = 0
        # Of the last two steps, and what the last one took.
        self._cells: tuple[tuple[int, int] | None, tuple[int, int] | None] = (None, None)
        self._seconds = 0.0
        self._usual: dict[int, _Usual] = {}

    @staticmethod
    def bucket(num_rows: int) -> int:
        """Buckets end at powers of two: 1, 2, 3 to 4, 5 to 8 rows and so on are 0, 1, 2, 3."""
        return max(num_rows - 1, 0).bit_length()

    def observe(self, num_rows: int, arm: int, steps: Sequence[float]) -> float:
        """Steps with `draft_counts[arm]` drafts, each after the other, took so many seconds; what such a step is now taken to cost."""
        cell = (self.bucket(num_rows), arm)
        (before, last), last_seconds = self._cells, self._seconds
        self._cells, self._seconds = (last if len(steps) == 1 else cell, cell), steps[-1]
        medians = self._medians.setdefault(cell[0], [None] * len(self._draft_counts))
        if cell != last:
            num_unsettled = (len(steps) + 1) // 2
            first, steps = steps[0], steps[num_unsettled:]
            self._num_steps += num_unsettled
            known = medians[arm]
            if before == cell and last is not None and cell < last and known is not None:
                self._add(last, [max(last_seconds + first - known, known)])
            if not self._samples.get(cell):  # better than nothing, until there is one
                medians[arm] = first if known is None else (known + first) / 2
                self._measured_at[cell] = self._num_steps
        if steps:
            usual = self._usual_of(cell, len(steps))
            self._num_steps += len(steps)
            self._add(cell, steps)
            usual.seen_any_at = self._num_steps
            if usual.arm == arm and usual.num_fresh > self.WINDOW // 2:
                self._follow(cell)
        return medians[arm] or self._seconds

    def interrupt(self, num_rows: int, arm: int | None) -> None:
        """A step that cannot be compared came in between; the next is like it where both have this many rows and this arm."""
        self._cells = (None, None if arm is None else (self.bucket(num_rows), arm))

    def _usual_of(self, cell: tuple[int, int], num_samples: int) -> _Usual:
        """Of the cell's bucket, once it has so many samples more."""
        bucket, arm = cell
        usual = self._usual.get(bucket)
        if usual is None:
            usual = self._usual[bucket] = _Usual(arm)
        elif self._num_steps - usual.seen_any_at > self.WINDOW:
            # Not for a while were there so many rows. What comes first now is taken to be to the others as it was before.
            usual.arm, usual.num_fresh = arm, 0
            usual.seconds, usual.seen_at = self._medians[bucket][arm] or 0.0, usual.seen_any_at
        elif usual.arm != arm and usual.num_others + num_samples > self.TAKES_OVER:
            usual.arm, usual.num_fresh, usual.seconds = arm, 0, 0.0
        if usual.arm == arm:
            usual.num_fresh, usual.num_others = min(usual.num_fresh + num_samples, self.WINDOW), 0
        else:
            usual.num_others += num_samples
        return usual

    def _follow(self, cell: tuple[int, int]) -> None:
        """What changed the cost of the usual step changes that of others alike; what was measured in the meantime, by what came after."""
        bucket, arm = cell
        usual, medians = self._usual[bucket], self._medians[bucket]
        now = medians[arm]
        assert now is not None, "the usual step has samples"
        before, seen_at = usual.seconds or now, usual.seen_at
        usual.seen_at = self._num_steps
        if usual.seconds and abs(now - before) <= self.UNNOTICED * before:
            return
        usual.seconds = now
        factor = now / before
        num_steps = max(self._num_steps - seen_at, 1)

        def changed(seconds: float, at: int) -> float:
            return seconds * math.pow(factor, min((self._num_steps - at) / num_steps, 1.0))

        for other, median in enumerate(medians):
            if other == arm or median is None:
                continue
            samples = self._samples.get((bucket, other))
            if samples:
                for idx, (seconds, at) in enumerate(samples):
                    samples[idx] = changed(seconds, at), at
                medians[other] = self._median(samples)
            else:
                medians[other] = changed(median, self._measured_at[bucket, other])

    @staticmethod
    def _median(samples: Iterable[tuple[float, int]]) -> float:
        """The lower one, of seconds."""
        ascending = sorted(samples)
        return ascending[(len(ascending) - 1) // 2][0]

    def _add(self, cell: tuple[int, int], steps: Sequence[float]) -> None:
        """More samples of a cell."""
        bucket, arm = cell
        samples, medians = self._samples.setdefault(cell, deque(maxlen=self.WINDOW)), self._medians[bucket]
        median = medians[arm]
        if samples and median is not None:
            if any(more is not None and median > self.CONTRADICTED * more for more in medians[arm + 1 :]):
                samples.clear()  # taken in a bad moment: nothing to average with
            elif self.age(bucket, arm) > self.STALE_AFTER:
                samples.clear()
                samples.append((median, self._measured_at[cell]))
        samples.extend([(seconds, self._num_steps) for seconds in steps])
        self._measured_at[cell] = self._num_steps
        medians[arm] = self._median(samples)

    def age(self, bucket: int, arm: int) -> float:
        """Steps of the engine since this was measured last; infinite if it never was."""
        return self._num_steps - self._measured_at.get((bucket, arm), -math.inf)

    def is_sure(self, bucket: int, arm: int, estimate: float) -> bool:
        """Whether more than a single step is known of this, and it is not contradicted."""
        return len(self._samples.get((bucket, arm), ())) >= 2 and not self.is_contradicted(bucket, arm, estimate)

    def is_contradicted(self, bucket: int, arm: int, estimate: float) -> bool:
        """Whether it lies above its estimate, which is what other numbers of drafts say of it."""
        median = self.measured(bucket)[arm]
        return median is not None and median > self.CONTRADICTED * estimate

    def measured(self, bucket: int) -> Sequence[float | None]:
        """Seconds by arm, None where never measured."""
        return self._medians.get(bucket, [None] * len(self._draft_counts))

    def estimates(self, bucket: int) -> list[float]:
        """Seconds by arm, never fewer for more drafts.

        What was not measured comes from other batch sizes, and where nothing is known follows `ASSUMED_PER_DRAFT`. K drafts are
        taken to cost no more than K + 1 steps without: at that price they are never chosen, and a slow first
        sample does not make it too dear to take another.
        """
        own = self._medians.get(bucket)
        if own is None:
            if not self._medians:
                return list(self._assumed)
            bucket = min(self._medians, key=lambda other: (abs(other - bucket), -other))
            own = self._medians[bucket]
        estimates = [self._guess(bucket, own, arm) if seconds is None else seconds for arm, seconds in enumerate(own)]
        for arm in range(len(own) - 2, -1, -1):
            estimates[arm] = min(estimates[arm], estimates[arm + 1])
        for arm, count in enumerate(self._draft_counts):
            estimates[arm] = min(estimates[arm], (count + 1) * estimates[0])
        return estimates

    def _guess(self, bucket: int, own: Sequence[float | None], arm: int) -> float:
        """A cell by the nearest measured arm of its bucket, times the ratio that the two have in the nearest bucket with both."""
        known = {other: seconds for other, seconds in enumerate(own) if seconds is not None}
        nearest_first = sorted(known, key=lambda other: abs(other - arm))
        for other_bucket in sorted(self._medians, key=lambda other: (abs(other - bucket), -other)):
            theirs = self._medians[other_bucket]
            wanted = theirs[arm]
            if wanted is None:
                continue
            for reference in nearest_first:
                base = theirs[reference]
                if base is not None:
                    return known[reference] * wanted / base
        reference = nearest_first[0]
        return known[reference] * self._assumed[arm] / self._assumed[reference]
