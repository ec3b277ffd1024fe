"""How many tokens to draft in a decode step: what is learned of acceptance and of costs, and the choice made from both.

The tokens that a step brings, divided by the seconds it takes, is its throughput; K drafts are worth what that quotient gains.

    tokens(K)   sum over the batch's rows of 1 + expected accepted drafts, from `Acceptance`
    seconds(K)  learned while serving for each K and batch size, in `StepCosts`

`DraftController` picks the K with the highest quotient, and now and then another one, to learn what it would bring. Nothing
here is random and no clock is read: the same calls in the same order give the same choices. No jax, no numpy.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, pairwise

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


class StepCosts:
    """Seconds that a decode step takes, by the number of rows in powers of two and by number of drafts.

    A cell is the lower median of its last steps, so that single slow steps count for nothing.
    """

    WINDOW = 9
    # Steps of the engine after which a cell's samples are no longer compared with new ones: only their median stays.
    STALE_AFTER = 256
    # Times what more drafts cost, beyond which a cell is taken to be wrong: noise stays below.
    CONTRADICTED = 1.1
    # What each draft adds to a step until something was measured, as a fraction of a step without drafts.
    ASSUMED_PER_DRAFT = 0.1

    def __init__(self, draft_counts: Sequence[int]) -> None:
        self._draft_counts = tuple(draft_counts)
        self._assumed = tuple(1.0 + self.ASSUMED_PER_DRAFT * count for count in draft_counts)
        self._samples: dict[tuple[int, int], deque[float]] = {}
        self._medians: dict[int, list[float | None]] = {}
        self._measured_at: dict[tuple[int, int], int] = {}
        self._num_steps = 0

    @staticmethod
    def bucket(num_rows: int) -> int:
        """Buckets end at powers of two: 1, 2, 3 to 4, 5 to 8 rows and so on are 0, 1, 2, 3."""
        return max(num_rows - 1, 0).bit_length()

    def observe(self, num_rows: int, arm: int, seconds: float) -> float:
        """A step with `draft_counts[arm]` drafts took so long; returns what such a step is now taken to cost."""
        self._num_steps += 1
        bucket = self.bucket(num_rows)
        samples = self._samples.setdefault((bucket, arm), deque(maxlen=self.WINDOW))
        medians = self._medians.setdefault(bucket, [None] * len(self._draft_counts))
        median = medians[arm]
        if median is not None and self.age(bucket, arm) > self.STALE_AFTER:
            samples.clear()
            samples.append(median)
        samples.append(seconds)
        self._measured_at[bucket, arm] = self._num_steps
        median = sorted(samples)[(len(samples) - 1) // 2]
        medians[arm] = median
        return median

    def age(self, bucket: int, arm: int) -> float:
        """Steps of the engine since this was measured last; infinite if it never was."""
        return self._num_steps - self._measured_at.get((bucket, arm), -math.inf)

    def is_sure(self, bucket: int, arm: int, estimate: float) -> bool:
        """Whether more than a single step is known of this, and it is not contradicted by what more drafts cost."""
        if len(self._samples.get((bucket, arm), ())) < 2:
            return False
        median = self._medians[bucket][arm]
        return median is not None and median <= self.CONTRADICTED * estimate

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


class _Probe:
    """A step with more drafts than seem best, until its rounds have come back."""

    __slots__ = ("age", "more_than", "num_accepted", "num_needed", "num_rounds", "price", "seconds_per_token")

    def __init__(self, more_than: int, num_needed: float, price: float, seconds_per_token: float) -> None:
        self.more_than = more_than
        self.num_needed = num_needed
        self.price = price
        self.seconds_per_token = seconds_per_token
        self.num_rounds = 0
        self.num_accepted = 0
        self.age = 0


class DraftController:
    """Chooses K for each decode step from a fixed ascending set that contains 0.

    The first steps try every K once, and again those that are not far behind. After that the best K by the estimates is
    taken, and a *probe* is a step with another:

    * A larger K that would win if all drafts were accepted. At first `MIN_INTERVAL` steps apart; each that did not pay for
      itself doubles the interval up to `MAX_INTERVAL`, one that did halves it and is followed by another at once. So text that
      has become predictable is tried within MAX_INTERVAL steps, or as many as it takes to save for a probe if that is longer.
    * Any other K, for its cost alone, when that was measured less than twice, or not for `REMEASURE_AFTER` steps, or lies
      above what more drafts cost: then the machine was slower when it was measured.

    Each probe is paid from a budget, `EXPLORATION_SHARE` of the time served: the time by which it is expected to fall behind the
    best K, corrected once its tokens are known. Among several, the one is taken for which age by price is largest, which gives
    each the same share. New requests change nothing in this: they begin at the engine's rate and are probed with the rest.
    """

    EXPLORATION_SHARE = 0.02
    # Cheap probes are not held back to MAX_INTERVAL: this share of the time may go to them in any case.
    BACKED_OFF_SHARE = 0.01
    # The budget saves no more than the share of so many steps.
    MAX_SAVED_STEPS = 512
    # In steps.
    MIN_INTERVAL = 8
    MAX_INTERVAL = 64
    REMEASURE_AFTER = 512
    # After a choice of no drafts, steps for which it holds unseen: on small models the host's time to choose counts, and what led to it
    # changes slowly.
    REST = 7
    # Steps after which a probe's results are not waited for: its requests were aborted, say.
    MAX_PROBE_AGE = 8

    def __init__(self, draft_counts: Sequence[int]) -> None:
        """`draft_counts` are the compiled numbers of drafts, ascending from 0."""
        assert draft_counts, "no number of drafts"
        assert draft_counts[0] == 0, draft_counts
        assert all(fewer < more for fewer, more in pairwise(draft_counts)), draft_counts
        self.draft_counts = tuple(draft_counts)
        self._arms = {count: arm for arm, count in enumerate(draft_counts)}
        self._curve = AcceptanceCurve(self.draft_counts[-1])
        self._costs = StepCosts(self.draft_counts)
        self.acceptance = Acceptance(self._curve)
        self._num_trials = [0] * len(self.draft_counts)
        self._budget = 0.0
        self._interval = self.MIN_INTERVAL
        self._steps_since_probe = 0
        self._probe: _Probe | None = None
        self._rest = 0

    def new_acceptance(self) -> Acceptance:
        """For a new request."""
        return Acceptance(self._curve, self.acceptance)

    def rests(self) -> bool:
        """Whether the next step goes without drafts, whatever its rows; else `choose` is to be asked."""
        if not self._rest:
            return False
        self._rest -= 1
        self._steps_since_probe += 1
        return True

    def choose(self, num_rows: int, rows: Sequence[Acceptance], limits: Sequence[int]) -> int:
        """K for a step with these decode rows. `limits[i]` is the most drafts row i may have, 0 if it does not speculate.

        `num_rows` is the number of rows that the step's cost is known by, as `observe_step` is given it. The result is at most
        the largest limit. A row for which the host knows that there is no proposal has limit 0.
        """
        most = max(limits, default=0)
        num_arms = sum(count <= most for count in self.draft_counts)
        if num_arms <= 1:
            self._rest = self.REST if self._probe is None else 0
            return 0
        bucket = self._costs.bucket(num_rows)
        seconds = self._costs.estimates(bucket)
        tokens = self._expected_tokens(num_arms, rows, limits)
        rates = [tokens[arm] / seconds[arm] for arm in range(num_arms)]
        best = rates.index(max(rates))
        arm = self._next_trial(rates)
        if arm is None:
            self._judge_probe()
            self._steps_since_probe += 1
            arm = best
            if self._probe is None and self._budget > 0.0:
                arm, price = self._pick_probe(bucket, best, tokens, seconds, sum(limits))
                if arm != best:
                    self._budget -= price
                    self._steps_since_probe = 0
                if arm > best:
                    num_needed = rates[best] * seconds[arm] - len(rows) - self._accepted_anyway(best, rows, limits)
                    self._probe = _Probe(self.draft_counts[best], num_needed, price, 1 / rates[best])
            if arm == 0 == best and self._probe is None:
                self._rest = self.REST
        return self.draft_counts[arm]

    def observe_step(self, num_rows: int, num_drafts: int, seconds: float) -> None:
        """A decode step (one round) with K = `num_drafts` took so long, from the end of the step before it to its own end.

        Steps that also computed prompts are not comparable and are not reported.
        """
        cost = self._costs.observe(num_rows, self._arms[num_drafts], seconds)
        saved = self._budget + self.EXPLORATION_SHARE * cost
        self._budget = min(saved, self.EXPLORATION_SHARE * self.MAX_SAVED_STEPS * cost)
        self._curve.refresh()

    def observe_round(self, acceptance: Acceptance, num_drafts: int, num_accepted: int) -> None:
        """A row had its drafts verified. `num_drafts` is what it was asked for, min(K, its limit), even if less was proposed.

        The rounds of a step are reported together, before the next choice after them.
        """
        if num_drafts:
            self._curve.observe(acceptance.rate, num_drafts, num_accepted)
            acceptance.observe(num_drafts, num_accepted)
            self.acceptance.observe(num_drafts, num_accepted)
            if self._probe is not None and num_drafts > self._probe.more_than:
                self._probe.num_rounds += 1
                self._probe.num_accepted += num_accepted

    def cost(self, num_rows: int, num_drafts: int) -> float | None:
        """Learned seconds of a decode step, None where none was measured."""
        return self._costs.measured(self._costs.bucket(num_rows))[self._arms[num_drafts]]

    def _expected_tokens(self, num_arms: int, rows: Sequence[Acceptance], limits: Sequence[int]) -> list[float]:
        """Tokens that a step is expected to bring, by arm."""
        table = self._curve.tokens_by_level
        curves = [table[row.level] for row in rows]
        least = min(limits)
        tokens = [float(len(rows))]
        for count in self.draft_counts[1:num_arms]:
            if count <= least:
                tokens.append(sum([curve[count] for curve in curves]))
            else:
                pairs = zip(curves, limits, strict=True)
                tokens.append(sum([curve[limit if limit < count else count] for curve, limit in pairs]))
        return tokens

    def _next_trial(self, rates: Sequence[float]) -> int | None:
        """The arm to try in the first steps: each once, then again those with half the throughput of the best."""
        for num_before in (0, 1):
            for arm, rate in enumerate(rates):
                if self._num_trials[arm] == num_before and (num_before == 0 or 2 * rate >= max(rates)):
                    self._num_trials[arm] += 1
                    return arm
        return None

    def _pick_probe(
        self, bucket: int, best: int, tokens: Sequence[float], seconds: Sequence[float], sum_limits: int
    ) -> tuple[int, float]:
        """The arm of the probe that is due and can be paid, and its price in seconds; `best` and 0 if there is none."""
        best_rate = tokens[best] / seconds[best]
        chosen, price, highest_score = best, 0.0, 0.0
        for arm, count in enumerate(self.draft_counts[: len(tokens)]):
            if arm == best:
                continue
            age = self._costs.age(bucket, arm)
            loss = max(seconds[arm] - tokens[arm] / best_rate, 0.01 * seconds[arm])
            is_old = age > self.REMEASURE_AFTER or not self._costs.is_sure(bucket, arm, seconds[arm])
            most_tokens = tokens[0] + min(sum_limits, count * tokens[0])
            if is_old or (arm > best and most_tokens > best_rate * seconds[arm]):
                score = min(age, self.REMEASURE_AFTER) / loss
                if score > highest_score:
                    chosen, price, highest_score = arm, loss, score
        wait = min(self._interval, price / (self.BACKED_OFF_SHARE * seconds[best]))
        if price > self._budget or self._steps_since_probe < wait:
            return best, 0.0
        return chosen, price

    def _accepted_anyway(self, best: int, rows: Sequence[Acceptance], limits: Sequence[int]) -> float:
        """Drafts expected to be accepted of rows whose limits a wider step than the best does not reach."""
        count = self.draft_counts[best]
        narrow = [row.expected_tokens(limit) - 1.0 for row, limit in zip(rows, limits, strict=True) if limit <= count]
        return sum(narrow)

    def _judge_probe(self) -> None:
        """Sets when to probe next, once the rounds of the last probe are there."""
        probe = self._probe
        if probe is None:
            return
        probe.age += 1
        if probe.num_rounds:
            self._probe = None
            gain = probe.num_accepted - probe.num_needed
            self._budget += probe.price + gain * probe.seconds_per_token
            if gain >= 0.0:
                self._interval = max(self._interval // 2, self.MIN_INTERVAL)
                self._steps_since_probe = self.MAX_INTERVAL
            else:
                self._interval = min(2 * self._interval, self.MAX_INTERVAL)
        elif probe.age > self.MAX_PROBE_AGE:
            self._probe = None
