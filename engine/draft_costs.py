"""What is learned while serving of what decode steps take, by their rows and by their numbers of drafts.

No jax, no numpy; no clock is read, and nothing is random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


class _CostFilter:
    """Of steps with about as many rows: what one without drafts takes now, and how many times as long those with drafts take.

    A Kalman filter (Kalman 1960) over logarithms. What slows every step, others who use the machine or longer contexts, comes and
    goes within some steps; what drafts add to a step hardly changes. So the first number walks at random and the others next to not at
    all, and what a step took tells of both, by how much each was in doubt: of one that was measured beside its like, of the machine, and
    of one that was never measured, of the drafts. Each number of drafts is thereby compared with what came just before and after, and
    many comparisons, each of them far off where steps take a millisecond, become one that is not.
    """

    # Variances of the logarithm: what a single step adds to the usual one by chance,
    WHITE = 0.06
    # what the machine changes from one step to the next, and at most, however many there were between,
    WALK = 0.0015
    MOST_WALK = 1.0
    # what drafts add, from one step to the next,
    DRIFT = 2e-5
    # and before anything was measured, of a step, and of what it takes more than one with the next smaller number of drafts.
    UNKNOWN = 4.0
    UNKNOWN_MORE = 1.0
    # Standard deviations by which a sample counts as off at most: what is further off may be chance. Or something has changed, so that as
    # much more is in doubt: the next sample decides.
    MOST_OFF = 2.5
    # The share of that doubt which is of how these drafts compare with others, and not of how fast the machine is.
    DOUBT_OF_DRAFTS = 0.5
    # Changes that the mean of what one costs is about: what single steps are off by cancels out. Some are taken to have cost nothing.
    CHANGES = 32
    ASSUMED_CHANGES = 8

    def __init__(self, logs: Sequence[float]) -> None:
        """`logs[arm]` is the logarithm of what is assumed of a step with that many drafts, of which nothing was measured."""
        arms = range(len(logs))
        # Of a step without drafts; then, by arm, what drafts add.
        self._mean = [logs[0], *(log - logs[0] for log in logs[1:])]
        self._covariance = [[self.UNKNOWN_MORE * min(row, column) for column in arms] for row in arms]
        self._covariance[0][0] = self.UNKNOWN
        self._seen_at = 0
        self.seconds = [math.exp(log) for log in logs]
        """Of a step, as far as known, by arm."""
        self.num_samples = [0] * len(logs)
        """By arm."""
        self.was_off = [False] * len(logs)
        """Whether the last one of an arm was off by more than chance."""
        self.num_changes = 0
        self.change_seconds = 0.0

    def log_seconds(self, arm: int) -> float:
        """Of a step, as far as known."""
        return self._mean[0] + self._mean[arm] if arm else self._mean[0]

    def doubt(self, arm: int, variance: float) -> None:
        """So much is in doubt of how a step of this arm compares with others, and nothing about those."""
        if arm:
            self._covariance[arm][arm] += variance
            return
        for idx, row in enumerate(self._covariance):
            for column in range(len(row)):
                row[column] += variance if bool(idx) == bool(column) else -variance

    def observe_change(self, arm: int, seconds: float) -> None:
        """The steps before and after a change to this number of drafts took so much longer together than others."""
        self.num_changes = min(self.num_changes + 1, self.CHANGES - self.ASSUMED_CHANGES)
        most = self.seconds[arm]
        off = min(max(seconds - self.change_seconds, -most), most)
        self.change_seconds += off / (self.num_changes + self.ASSUMED_CHANGES)

    def observe(self, arm: int, log_seconds: float, variance: float, now: int) -> None:
        """A sample, taken at step `now` of the engine."""
        mean, covariance = self._mean, self._covariance
        num_steps, self._seen_at = now - self._seen_at, now
        covariance[0][0] += min(num_steps * self.WALK, self.MOST_WALK)
        for idx in range(1, len(mean)):
            covariance[idx][idx] += num_steps * self.DRIFT
        along = [row[0] + row[arm] for row in covariance] if arm else [row[0] for row in covariance]
        total = variance + along[0] + (along[arm] if arm else 0.0)
        if not any(self.num_samples):
            mean[0] += log_seconds - self.log_seconds(arm)
        off, most = log_seconds - self.log_seconds(arm), self.MOST_OFF * math.sqrt(total)
        believed = min(max(off, -most), most)
        if believed != off and self.num_samples[arm] and not self.was_off[arm]:
            self.was_off[arm] = True  # by chance, as others use the machine too, unless the next is off as well
            self.num_samples[arm] += 1
            return
        for idx, row in enumerate(covariance):
            gain = along[idx] / total
            mean[idx] += gain * believed
            for column, value in enumerate(along):
                row[column] -= gain * value
        self.seconds = [math.exp(mean[0])] + [math.exp(mean[0] + added) for added in mean[1:]]
        self.was_off[arm] = believed != off
        if believed != off:
            excess = min((off - believed) ** 2, self.UNKNOWN)
            covariance[0][0] += (1.0 - self.DOUBT_OF_DRAFTS) * excess
            self.doubt(arm, self.DOUBT_OF_DRAFTS * excess)
        self.num_samples[arm] += 1


class StepCosts:
    """Seconds that a decode step takes, by the number of rows in powers of two and by number of drafts.

    The host's work for a step is partly done while the device is at the next, so a step after one with more drafts takes longer
    than it would among its like, and one after fewer drafts less; and a kind takes some steps to be as fast as in the long run. The last
    step before one of another kind takes longer too: that one is launched during it. So a sample is made of steps that follow their own
    kind, in the later half of those seen at once, and are followed by it; or, of a single one within steps of fewer drafts, of
    what it and the step after it took together, less what that one costs.
    """

    # Steps that one sample is the mean of, where as many follow each other: when a step is seen to end is a matter of chance on small
    # models, and one looks long and the next short. Of more, the last: what was before says little of the machine now, and takes time.
    SPAN = 12
    # Times the median of those in a span, beyond which a step does not count.
    OUTLIER = 2.0
    # Times the variance of a single step: of one that is known from two, and of one that nobody knows whether it is like those that follow.
    PAIRED = 3.0
    UNSETTLED = 4.0
    # Times its estimate, beyond which what was measured is taken to be wrong: noise stays below.
    CONTRADICTED = 1.1
    CONTRADICTED_LOG = math.log(CONTRADICTED)
    # Variance of its logarithm that is added then.
    CONTRADICTION = 2.0
    # What each draft adds to a step until something was measured, as a fraction of a step without drafts.
    ASSUMED_PER_DRAFT = 0.1
    # No step takes less, whatever it seems.
    LEAST_SECONDS = 1e-9

    def __init__(self, draft_counts: Sequence[int]) -> None:
        self._draft_counts = tuple(draft_counts)
        self._assumed = tuple(1.0 + self.ASSUMED_PER_DRAFT * count for count in draft_counts)
        # By bucket.
        self._filters: dict[int, _CostFilter] = {}
        self._measured_at: dict[tuple[int, int], int] = {}
        self._num_steps = 0
        # Of the last two steps, and what the last one took.
        self._cells: tuple[tuple[int, int] | None, tuple[int, int] | None] = (None, None)
        self._seconds = 0.0
        # Whether steps of the run that they are of were taken for a sample.
        self._is_run_known = False
        # By how much the last step took longer than its like, if another kind follows.
        self._excess = 0.0

    @staticmethod
    def bucket(num_rows: int) -> int:
        """Buckets end at powers of two: 1, 2, 3 to 4, 5 to 8 rows and so on are 0, 1, 2, 3."""
        return max(num_rows - 1, 0).bit_length()

    def observe(self, num_rows: int, arm: int, steps: Sequence[float], *, is_run_over: bool = False) -> float:
        """Steps with `draft_counts[arm]` drafts, each after the other, took so many seconds; what such a step is now taken to cost.

        `is_run_over` when the next step is of another kind.
        """
        cell = (self.bucket(num_rows), arm)
        (before, last), last_seconds = self._cells, self._seconds
        self._cells, self._seconds = (last if len(steps) == 1 else cell, cell), steps[-1]
        costs = self._filter(cell[0])
        excess, self._excess = self._excess, 0.0
        if cell != last:
            self._is_run_known = False
            num_unsettled = max((len(steps) - 1) // 2, 1)
            if last is not None and last[0] == cell[0] and costs.num_samples[arm]:
                costs.observe_change(arm, excess + sum(steps[:num_unsettled]) - num_unsettled * costs.seconds[arm])
            first, steps = steps[0], steps[num_unsettled:]
            self._num_steps += num_unsettled
            if not costs.num_samples[arm]:
                self._add(cell, [first], self.UNSETTLED)  # better than nothing
            elif before == cell and last is not None and cell < last:
                known = costs.seconds[arm]
                self._add(last, [max(last_seconds + first - known, known)], self.PAIRED)
        self._num_steps += len(steps)
        is_only_one = len(steps) == 1 and not self._is_run_known
        if is_run_over and steps and not is_only_one:
            self._excess = steps[-1] - costs.seconds[arm]
            steps = steps[:-1]
        if steps:
            self._add(cell, steps[-self.SPAN :], self.UNSETTLED if is_run_over and is_only_one else 1.0)
            self._is_run_known = True
        return costs.seconds[arm]

    def _filter(self, bucket: int) -> _CostFilter:
        if bucket not in self._filters:
            self._filters[bucket] = _CostFilter([math.log(seconds) for seconds in self._known(bucket)])
        return self._filters[bucket]

    def _add(self, cell: tuple[int, int], span: Sequence[float], times: float = 1.0) -> None:
        """A sample of a cell, with so many times the variance of one that is sure to be of its kind."""
        bucket, arm = cell
        costs = self._filters[bucket]
        most = self.OUTLIER * sorted(span)[len(span) // 2]
        usual = [step for step in span if step <= most]
        seconds = sum(usual) / len(usual)
        excess = costs.log_seconds(arm) - math.log(self.estimates(bucket)[arm])
        if costs.num_samples[arm] and excess > self.CONTRADICTED_LOG:
            costs.doubt(arm, self.CONTRADICTION * excess * excess)
        # While these were measured, the machine's speed went on to wander.
        variance = times * costs.WHITE / len(span) + costs.WALK * len(span) / 3
        costs.observe(arm, math.log(max(seconds, self.LEAST_SECONDS)), variance, self._num_steps)
        self._measured_at[cell] = self._num_steps

    def interrupt(self, num_rows: int, arm: int | None) -> None:
        """A step that cannot be compared came in between; the next is like it where both have this many rows and this arm."""
        self._cells = (None, None if arm is None else (self.bucket(num_rows), arm))

    def observe_wake(self, num_rows: int, seconds: float) -> None:
        """A step between one without drafts and the first with some, of which it is a part of what the change costs."""
        bucket = self.bucket(num_rows)
        costs = self._filters.get(bucket)
        self.interrupt(num_rows, 0)
        self._excess += max(seconds - costs.seconds[0], 0.0) if costs is not None else 0.0

    def change(self, bucket: int) -> float:
        """Seconds of a round that a change of the number of drafts costs, in the steps around it."""
        costs = self._filters.get(bucket)
        return max(costs.change_seconds, 0.0) if costs is not None else 0.0

    def age(self, bucket: int, arm: int) -> float:
        """Steps of the engine since this was measured last; infinite if it never was."""
        return self._num_steps - self._measured_at.get((bucket, arm), -math.inf)

    def is_sure(self, bucket: int, arm: int, estimate: float) -> bool:
        """Whether more than a single step is known of this, the last was no surprise, and it is not contradicted."""
        costs = self._filters.get(bucket)
        if costs is None or costs.num_samples[arm] < 2 or costs.was_off[arm]:
            return False
        return not self.is_contradicted(bucket, arm, estimate)

    def is_contradicted(self, bucket: int, arm: int, estimate: float) -> bool:
        """Whether it lies above its estimate, which is what other numbers of drafts say of it."""
        costs = self._filters.get(bucket)
        if costs is None or not costs.num_samples[arm]:
            return False
        return costs.seconds[arm] > self.CONTRADICTED * estimate

    def measured(self, bucket: int) -> list[float | None]:
        """Seconds by arm, None where never measured."""
        costs = self._filters.get(bucket)
        if costs is None:
            return [None] * len(self._draft_counts)
        return [seconds if num else None for seconds, num in zip(costs.seconds, costs.num_samples, strict=True)]

    def _known(self, bucket: int) -> list[float]:
        """Seconds by arm; what was not measured is as many times as long as one that was as it is in the nearest batch size."""
        if not self._filters:
            return list(self._assumed)
        costs = self._filters[min(self._filters, key=lambda other: (abs(other - bucket), -other))]
        return list(costs.seconds)

    def estimates(self, bucket: int) -> list[float]:
        """Seconds by arm, never fewer for more drafts.

        What was not measured comes from other batch sizes, and where nothing is known follows `ASSUMED_PER_DRAFT`. K drafts are
        taken to cost no more than K + 1 steps without: at that price they are never chosen, and a slow first
        sample does not make it too dear to take another.
        """
        estimates = self._known(bucket)
        for arm in range(len(estimates) - 2, -1, -1):
            estimates[arm] = min(estimates[arm], estimates[arm + 1])
        for arm, count in enumerate(self._draft_counts):
            estimates[arm] = min(estimates[arm], (count + 1) * estimates[0])
        return estimates
