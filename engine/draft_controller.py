"""How many tokens to draft in a decode step: the choice, from what was learned of acceptance and of costs.

The tokens that a step brings, divided by the seconds it takes, is its throughput; K drafts are worth what that quotient gains.

    tokens(K)   sum over the batch's rows of 1 + expected accepted drafts, from `Acceptance`
    seconds(K)  learned while serving for each K and batch size, in `StepCosts`

`DraftController` picks the K with the highest quotient, and now and then another one, to learn what it would bring. Nothing
here is random and no clock is read: the same calls in the same order give the same choices. No jax, no numpy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from quire.engine.draft_costs import StepCosts
from quire.engine.draft_estimates import Acceptance, AcceptanceCurve


class _Standing:
    """Of a batch size: the best arm and what was best before, after how many steps that is measured again, and what probes may cost.

    A probe for cost is so many steps more with the arm held, however many others come in between.
    """

    __slots__ = ("best", "budget", "check_after", "held", "num_held", "rival", "steps_since_probe")

    def __init__(self, check_after: int) -> None:
        self.best = self.rival = self.held = self.num_held = self.steps_since_probe = 0
        self.check_after = check_after
        self.budget = 0.0


class _Probe:
    """Steps with more drafts than seem best, until their rounds have come back. Prices and needs are of one round."""

    __slots__ = (
        "age",
        "length",
        "more_than",
        "num_accepted",
        "num_needed",
        "num_rounds",
        "num_steps",
        "paid",
        "seconds_per_token",
        "standing",
    )

    def __init__(
        self,
        standing: _Standing,
        more_than: int,
        length: int,
        num_needed: float,
        paid: float,
        seconds_per_token: float,
    ) -> None:
        self.standing = standing
        self.more_than = more_than
        self.length = length
        self.num_needed = num_needed
        self.paid = paid
        self.seconds_per_token = seconds_per_token
        self.num_steps = 0
        self.num_rounds = 0
        self.num_accepted = 0
        self.age = 0


class DraftController:
    """Chooses K for each decode step from a fixed ascending set that contains 0.

    The first steps try every K once, and some times in a row those that are not far behind. After that the best K by the estimates is
    taken, and a *probe* is a step or a few with another:

    * A larger K that would win if all drafts were accepted. At first `MIN_INTERVAL` steps apart; each that did not pay for
      itself doubles the interval up to `MAX_INTERVAL`, one that did halves it and is followed by another at once. So text that
      has become predictable is tried within MAX_INTERVAL steps, or as many as it takes to save for a probe if that is longer.
    * Any other K, for its cost alone, when that was measured less than twice, or not for `REMEASURE_AFTER` steps, or lies
      above what more drafts cost: then the machine was slower when it was measured. What was best before is measured again sooner:
      if it only looked worse in a bad moment, that is found out.

    Each probe is paid from a budget, `EXPLORATION_SHARE` of the time served with about as many rows, `BACKED_OFF_SHARE` while they
    fail: the time by which it is expected to fall behind the best K, corrected once its tokens are known, and what the changes to it
    and back cost. Among several, the one is taken for which age by price is largest, which gives each the same share, but first what
    lies above the cost of more drafts: it may hide the best. New requests change nothing in this: they begin at the engine's rate
    and are probed with the rest.
    """

    EXPLORATION_SHARE = 0.015
    # What is saved for probes once those that failed are MAX_INTERVAL apart. Cheap ones are not held back to that: so much of the time
    # may go to them in any case.
    BACKED_OFF_SHARE = 0.0075
    # The budget saves no more than the share of so many steps.
    MAX_SAVED_STEPS = 512
    # In steps.
    MIN_INTERVAL = 8
    MAX_INTERVAL = 64
    REMEASURE_AFTER = 256
    # After a change of what is best, for what was best before; doubles with each measurement.
    MIN_CHECK = 16
    # After a choice of no drafts, steps for which it holds unseen: on small models the host's time to choose counts, and what led to it
    # changes slowly. Longer, unless the batch changes, where no probe can be due before, and half as long as that where it is far away,
    # as by then another may be due.
    REST = 7
    LONG_REST = 31
    LONGEST_REST = 127
    # After a choice of some drafts that is no trial: so many more steps go by it, or as many as end within so many seconds, but never more
    # than the longest. What they took and brought is looked at as it is made anew, which takes about as long for one step as for several.
    REPEAT = 3
    REPEAT_SECONDS = 0.012
    LONGEST_REPEAT = 7
    # What another number must gain to take the place of the best: this share. More drafts must gain besides, within so many steps, what a
    # change costs, and fewer need gain so much less: where changes cost much, drafts that hardly pay lose by the changes around them.
    GAIN = 0.02
    GAIN_STEPS = 32
    # Steps after which a probe's results are not waited for: its requests were aborted, say.
    MAX_PROBE_AGE = 16
    # Steps of a second trial, and least ones of a probe for the cost of fewer drafts that may win: the first and the last do not count.
    TRIAL_LENGTH = 4
    # Steps of a probe for cost where these are cheap: so many that those of before and the first ones do not count any more. In a few steps
    # among others a number of drafts looks slower than it is, and what is hardly worse would never be given up.
    MAX_LENGTH = 12
    # Of the best throughput, what one of fewer drafts has at least if more than two steps are spent to learn its cost.
    CLOSE = 0.75
    # Of what more drafts cost, the share that may come to nothing.
    RISK = 0.25

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
        self._interval = self.MIN_INTERVAL
        self._probe: _Probe | None = None
        self._rest = 0
        self._standings: dict[int, _Standing] = {}
        # Of the batch size of the last choice.
        self._standing = self._standing_of(0)
        # Of the last step.
        self._rounds_per_step = 1
        # The last choice, for how many rows it was made, which is 0 before the first, and for how many steps it holds.
        self._last = self._last_rows = self._repeat = 0
        # Seconds of a round in the steps that nobody has looked at yet, and what they have in common: rows, drafts and rounds.
        self._unseen: list[float] = []
        self._unseen_kind = (0, 0, 0)
        # And their rows' rounds: whose, drafts asked for, and accepted.
        self._unseen_rounds: list[tuple[Acceptance, int, int]] = []
        # Steps of a probe for the cost of drafts where there were none: if the first has to catch up, it says nothing of the cost, and is
        # dear enough for a whole trial.
        self._first_drafts = 1

    def _standing_of(self, num_rows: int) -> _Standing:
        bucket = self._costs.bucket(num_rows)
        if bucket not in self._standings:
            self._standings[bucket] = _Standing(self.REMEASURE_AFTER)
        return self._standings[bucket]

    def new_acceptance(self) -> Acceptance:
        """For a new request."""
        return Acceptance(self._curve, self.acceptance)

    def rests(self) -> bool:
        """Whether the next step goes without drafts, whatever its rows; else `choose` is to be asked."""
        if not self._rest:
            return False
        self._rest -= 1
        self._last = 0
        self._standing.steps_since_probe += 1
        return True

    def choose(self, num_rows: int, rows: Sequence[Acceptance], limits: Sequence[int]) -> int:
        """K for a step with these decode rows. `limits[i]` is the most drafts row i may have, 0 if it does not speculate.

        `num_rows` is the number of rows that the step's cost is known by, as `observe_step` is given it. The result is at most
        the largest limit. A row for which the host knows that there is no proposal has limit 0.
        """
        most = max(limits, default=0)
        if self._repeat and num_rows == self._last_rows and self._last <= most:
            self._repeat -= 1
            self._standing.steps_since_probe += 1
            return self._last
        self._repeat = 0
        # The step under way, which nobody has measured yet, goes by the last choice.
        self._look_back(is_run_over=self._last_rows > 0 and self._last != self._unseen_kind[1])
        num_arms = sum(count <= most for count in self.draft_counts)
        if num_arms <= 1:
            self._rest = self.REST if self._probe is None else 0
            self._last, self._last_rows = 0, num_rows
            return 0
        bucket = self._costs.bucket(num_rows)
        seconds = self._costs.estimates(bucket)
        tokens = self._expected_tokens(num_arms, rows, limits)
        rates = [tokens[arm] / seconds[arm] for arm in range(num_arms)]
        best = rates.index(max(rates))
        standing = self._standing = self._standing_of(num_rows)
        if standing.best < num_arms:
            change = self._costs.change(bucket) / (self.GAIN_STEPS * seconds[standing.best])
            gain = self.GAIN + change if best > standing.best else max(self.GAIN - change, 0.0)
            if rates[best] < (1.0 + gain) * rates[standing.best]:
                best = standing.best
        if best != standing.best:
            standing.best, standing.rival, standing.check_after = best, standing.best, self.MIN_CHECK
        arm = self._held(standing, num_arms)
        if arm is None:
            arm = self._next_trial(bucket, rates, seconds)
        if arm is None:
            self._judge_probe()
            standing.steps_since_probe += 1
            arm, due = best, 0.0
            if self._probe is None and standing.budget > 0.0:
                arm, length, price, due = self._pick_probe(bucket, best, tokens, seconds, sum(limits))
                paid = length * self._rounds_per_step * price
                if arm != best:
                    self._hold(standing, arm, length - 1)
                    standing.budget -= paid + 2.0 * self._rounds_per_step * self._costs.change(bucket)
                    standing.steps_since_probe = 0
                if arm == standing.rival:
                    standing.check_after = min(2 * standing.check_after, self.REMEASURE_AFTER)
                if arm > best:
                    num_needed = rates[best] * seconds[arm] - len(rows) - self._accepted_anyway(best, rows, limits)
                    self._probe = _Probe(standing, self.draft_counts[best], length, num_needed, paid, 1 / rates[best])
                    if length == 1 and not best:
                        self._rest = 1  # the step that is planned before this one's rounds are there
            if arm == best and self._probe is None:
                if arm:
                    num_steps = int(self.REPEAT_SECONDS / (self._rounds_per_step * seconds[arm]))
                    self._repeat = min(max(num_steps, self.REPEAT), self.LONGEST_REPEAT)
                else:
                    self._rest = max(min(int(due), self.LONG_REST), min(int(due) // 2, self.LONGEST_REST), self.REST)
        self._last, self._last_rows = self.draft_counts[arm], num_rows
        return self._last

    def _hold(self, standing: _Standing, arm: int, num_steps: int) -> None:
        """Has so many steps more go by this arm, as soon as its batch size is there; without drafts at once, as in the long run."""
        if arm:
            standing.held, standing.num_held = arm, num_steps
        else:
            self._rest = num_steps

    def _held(self, standing: _Standing, num_arms: int) -> int | None:
        """The arm that is to be taken again, if rows may have as many drafts."""
        if not standing.num_held:
            return None
        if standing.held < num_arms:
            self._repeat = min(standing.num_held - 1, self.REPEAT)
        standing.num_held -= 1 + self._repeat
        return standing.held if standing.held < num_arms else None

    def observe_step(self, num_rows: int, num_drafts: int, seconds: float, num_rounds: int = 1) -> None:
        """A decode step with K = `num_drafts` took so long, from the end of the step before it to its own end.

        Steps that also computed prompts are not comparable and are not reported.
        """
        kind = (num_rows, num_drafts, num_rounds)
        if kind != self._unseen_kind or len(self._unseen) > self.LONGEST_REST:
            if num_rows != self._unseen_kind[0] or num_rounds != self._unseen_kind[2]:
                self._rest = min(self._rest, self.REST)
            self._look_back(is_run_over=kind != self._unseen_kind)
            self._unseen_kind = kind
        self._unseen.append(seconds / num_rounds)

    @property
    def _share(self) -> float:
        """Of the time, what is saved for probes now."""
        return self.EXPLORATION_SHARE if self._interval < self.MAX_INTERVAL else self.BACKED_OFF_SHARE

    def _look_back(self, *, is_run_over: bool = False) -> None:
        """At the steps since it was last called: small models lose more by a look at each than by one at several.

        `is_run_over` when the next step is of another kind.
        """
        if self._unseen_rounds:
            self._look_back_at_rounds()
        if not self._unseen:
            return
        steps, self._unseen = self._unseen, []
        num_rows, num_drafts, num_rounds = self._unseen_kind
        cost = num_rounds * self._costs.observe(num_rows, self._arms[num_drafts], steps, is_run_over=is_run_over)
        standing = self._standing_of(num_rows)
        saved = standing.budget + self._share * len(steps) * cost
        standing.budget = min(saved, self.EXPLORATION_SHARE * self.MAX_SAVED_STEPS * cost)
        self._count_probe(num_drafts, num_rounds, len(steps))

    def _look_back_at_rounds(self) -> None:
        rounds, self._unseen_rounds = self._unseen_rounds, []
        probe = self._probe
        for (acceptance, num_drafts, num_accepted), times in Counter(rounds).items():
            self._curve.observe(acceptance.rate, num_drafts, num_accepted, times)
            acceptance.observe(num_drafts, num_accepted, times)
            self.acceptance.observe(num_drafts, num_accepted, times)
            if probe is not None and num_drafts > probe.more_than:
                probe.num_accepted += times * num_accepted
        self._curve.refresh()
        self.acceptance.refresh()
        for row in dict.fromkeys(acceptance for acceptance, _, _ in rounds):
            row.refresh()

    def observe_other_step(self, num_rows: int, num_drafts: int | None, num_rounds: int = 1) -> None:
        """A step that cannot be compared, as it did more: caught up before its drafts, or computed prompts, and then `num_drafts` is None.

        What the host does for prompts may be seen in the next step.
        """
        self._look_back(is_run_over=True)
        self._costs.interrupt(num_rows, None if num_drafts is None else self._arms[num_drafts])
        if num_drafts is not None:
            self._first_drafts = 1 + self.TRIAL_LENGTH
            self._count_probe(num_drafts, num_rounds, 1)

    def observe_wake(self, num_rows: int, seconds: float, num_rounds: int = 1) -> None:
        """A step in which a head took in what it had missed. What it took longer than one without drafts is of the change to them."""
        self._look_back(is_run_over=True)
        self._costs.observe_wake(num_rows, seconds / num_rounds)

    def _count_probe(self, num_drafts: int, num_rounds: int, num_steps: int) -> None:
        """Steps whose rounds are known."""
        self._rounds_per_step = num_rounds
        if self._probe is not None and num_drafts > self._probe.more_than:
            self._probe.num_steps += num_steps
            self._probe.num_rounds += num_steps * num_rounds

    def observe_round(self, acceptance: Acceptance, num_drafts: int, num_accepted: int) -> None:
        """A row had its drafts verified. `num_drafts` is what it was asked for, min(K, its limit), even if less was proposed.

        The rounds of a step are reported together, before the next choice after them.
        """
        if num_drafts:
            self._unseen_rounds.append((acceptance, num_drafts, num_accepted))

    def cost(self, num_rows: int, num_drafts: int) -> float | None:
        """Learned seconds of a round, of the steps before the last choice, no more than with more drafts; None where none was measured."""
        bucket, arm = self._costs.bucket(num_rows), self._arms[num_drafts]
        measured = self._costs.measured(bucket)[arm:]
        if measured[0] is None and self._unseen:
            self._look_back()
            measured = self._costs.measured(bucket)[arm:]
        return None if measured[0] is None else min(seconds for seconds in measured if seconds is not None)

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

    def _next_trial(self, bucket: int, rates: Sequence[float], seconds: Sequence[float]) -> int | None:
        """The arm to try in the first steps.

        Each once; then those with half the throughput of the best, and those of which nothing can be said, some times in a row.
        """
        for arm in range(len(rates)):
            if not self._num_trials[arm]:
                self._num_trials[arm] = 1
                return arm
        for arm, rate in enumerate(rates):
            if self._num_trials[arm] > 1:
                continue
            if 2 * rate >= max(rates) or self._costs.is_contradicted(bucket, arm, seconds[arm]):
                self._num_trials[arm] = 2
                self._hold(self._standing, arm, self.TRIAL_LENGTH - 1)
                return arm
        return None

    def _pick_probe(
        self, bucket: int, best: int, tokens: Sequence[float], seconds: Sequence[float], sum_limits: int
    ) -> tuple[int, int, float, float]:
        """The probe that is due and can be paid: arm, length, price of a step in seconds, and 0.

        If there is none `best`, 0, 0 and in how many steps there may be one.
        """
        best_rate, standing = tokens[best] / seconds[best], self._standing
        chosen, price, highest_score, for_cost = best, 0.0, 0.0, False
        for arm, count in enumerate(self.draft_counts[: len(tokens)]):
            if arm == best:
                continue
            age = self._costs.age(bucket, arm)
            loss = max(seconds[arm] - tokens[arm] / best_rate, 0.01 * seconds[arm])
            holds_for = standing.check_after if arm == standing.rival else self.REMEASURE_AFTER
            is_old = age > holds_for or not self._costs.is_sure(bucket, arm, seconds[arm])
            most_tokens = tokens[0] + min(sum_limits, count * tokens[0])
            if is_old or (arm > best and most_tokens > best_rate * seconds[arm]):
                score = min(age, self.REMEASURE_AFTER) / loss
                if self._costs.is_contradicted(bucket, arm, seconds[arm]):
                    score = math.inf  # what is surely wrong comes first: it may hide the best
                if score > highest_score:
                    chosen, price, highest_score, for_cost = arm, loss, score, is_old
        if chosen == best:
            return best, 0, 0.0, 0.0
        # Drafts are tested by one step, costs by those that follow their own kind: as many as cost no more than a step of the best. More
        # drafts may bring less than is thought.
        is_open = self._costs.is_contradicted(bucket, chosen, seconds[chosen])
        may_win = is_open or tokens[chosen] > self.CLOSE * best_rate * seconds[chosen]
        if chosen > best:
            least = 1 if best else self._first_drafts
        else:
            least = self.TRIAL_LENGTH if may_win else 2
        risk = max(price, self.RISK * (seconds[chosen] - seconds[best]))
        if not for_cost:
            length = 1
        elif chosen > best and tokens[chosen] <= (1.0 + self.GAIN) * tokens[best]:
            length = least  # it would not win if it cost nothing
        else:
            length = min(max(int(seconds[best] / risk), least), self.MAX_LENGTH)
        cost = length * price + 2.0 * self._costs.change(bucket)
        wait = min(self._interval, cost / (self.BACKED_OFF_SHARE * seconds[best]))
        steps_to_save = (cost - standing.budget / self._rounds_per_step) / (self._share * seconds[best])
        due = max(steps_to_save, wait - standing.steps_since_probe)
        return (best, 0, 0.0, due) if due > 0.0 else (chosen, length, price, 0.0)

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
        if probe.num_steps >= probe.length:
            self._probe = None
            gain = probe.num_accepted - probe.num_rounds * probe.num_needed
            probe.standing.budget += probe.paid + gain * probe.seconds_per_token
            if gain >= 0.0:
                self._interval = max(self._interval // 2, self.MIN_INTERVAL)
                probe.standing.steps_since_probe = self.MAX_INTERVAL
            else:
                self._interval = min(2 * self._interval, self.MAX_INTERVAL)
        elif probe.age > self.MAX_PROBE_AGE:
            self._probe = None
