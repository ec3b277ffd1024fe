"""The host's half of speculation: how many tokens are drafted for which rows, and whose draft cache has to be made ready first.

Knows neither the device nor where drafts come from, and nothing it decides can change a token. No jax.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from quire.engine.kv_cache_manager import KVCacheManager
from quire.engine.request import Request
from quire.engine.step_data import CatchUp, DraftRound, EngineCoreOutput, SchedulerOutput

MAX_DRAFT_LAG = 4
"""Newest tokens of a row that its draft model takes in as it begins to draft: after a round that was accepted as a whole there are two,
and a step without drafts adds one. What lags further behind has to catch up first."""


class DraftPolicy(Protocol):
    """How many tokens to draft. `quire.engine.draft_controller.DraftController` learns it."""

    def new_acceptance(self) -> Any:
        """What is remembered of a request."""
        ...

    def rests(self) -> bool:
        """Whether the next step goes without drafts, whatever its rows: `choose` is then not asked."""
        ...

    def choose(self, num_rows: int, rows: Sequence[Any], limits: Sequence[int]) -> int:
        """For a step of these rows; `limits[i]` is the most drafts row i may have. One of the compiled numbers."""
        ...

    def observe_step(self, num_rows: int, num_drafts: int, seconds: float, num_rounds: int = 1) -> None:
        """A step of so many rounds took so long."""
        ...

    def observe_other_step(self, num_rows: int, num_drafts: int | None, num_rounds: int = 1) -> None:
        """A step that `observe_step` is not told of, since it did more; None where that was prompts."""
        ...

    def observe_wake(self, num_rows: int, seconds: float, num_rounds: int = 1) -> None:
        """A step of so many rounds that woke a head took so long."""
        ...

    def observe_round(self, acceptance: Any, num_drafts: int, num_accepted: int) -> None:
        """A row had so many drafts verified, or asked for in vain."""
        ...

    def cost(self, num_rows: int, num_drafts: int) -> float | None:
        """Seconds that a round takes, as far as known; None also where that does not matter."""
        ...


class FixedDrafts:
    """Always the same number."""

    def __init__(self, num_drafts: int) -> None:
        self._num_drafts = num_drafts

    def new_acceptance(self) -> None:
        return None

    def rests(self) -> bool:
        return False

    def choose(self, num_rows: int, rows: Sequence[Any], limits: Sequence[int]) -> int:
        return self._num_drafts if any(limits) else 0

    def observe_step(self, num_rows: int, num_drafts: int, seconds: float, num_rounds: int = 1) -> None:
        pass

    def observe_other_step(self, num_rows: int, num_drafts: int | None, num_rounds: int = 1) -> None:
        pass

    def observe_wake(self, num_rows: int, seconds: float, num_rounds: int = 1) -> None:
        pass

    def observe_round(self, acceptance: Any, num_drafts: int, num_accepted: int) -> None:
        pass

    def cost(self, num_rows: int, num_drafts: int) -> float | None:
        return None


class CatchUpAccount:
    """Whether draft models may catch up, and heads be woken: what that costs is to be earned again by the steps that it makes faster.

    A prompt that is long beside its answer can cost a draft model more than it saves, and nobody knows the length of an answer
    before. So what steps with drafts save is put into an account, what they lose is taken out, and a row catches up when there is enough
    for that. A small share of the steps served is credited besides, so that it is tried again; first for those who have just
    come and lag by their prompts alone, as they are cheapest. Where drafts gain next to nothing, catching up again and
    again would cost more than that: `DOUBT` of what they bring counts for nothing.

    It counts in steps without drafts, of the same batch, so that it means the same to a model of a millisecond a step and to one of thirty.
    """

    # Beside what trying other numbers of drafts may cost (`DraftController.EXPLORATION_SHARE`).
    SHARE = 0.005
    # Good times do not pay for long bad ones: so much is kept, and what else was saved was saved.
    MOST_STEPS = 64.0
    # What drafts lost does not weigh for ever either: what steps seemed to cost may have been the machine's bad moment. Whoever chooses
    # their number soon gives up what loses. What catching up cost is owed in full.
    MOST_OWED_STEPS = 8.0
    # What a step without drafts would take is known only so well.
    DOUBT = 0.05
    # Lent at the start, when nothing is known of what drafts save: what is lost by trying would take long to be credited.
    LENT_STEPS = 32.0
    # Of catching up, the last times of which the usual one counts: one slow step would empty the account.
    WINDOW = 9

    def __init__(self) -> None:
        self.steps = self.LENT_STEPS
        # Of a tile, in steps without drafts: the last ones, and the lower median of them, 0 as long as there are none.
        self._tile_costs: deque[float] = deque(maxlen=self.WINDOW)
        self._tile_cost = 0.0

    @property
    def credit(self) -> float:
        """Steps that catching up may cost now; more than can ever be saved is lent to those who have saved all they can."""
        return self.steps if self.steps < self.MOST_STEPS else math.inf

    def cost(self, num_tiles: int) -> float:
        """Of catching up with so many tiles, in steps; 0 as long as that is not known."""
        return num_tiles * self._tile_cost

    def caught_up(self, num_tiles: int, steps: float) -> None:
        """It took as long as so many steps; what it usually takes is taken out."""
        self._tile_costs.append(steps / num_tiles)
        self._tile_cost = sorted(self._tile_costs)[(len(self._tile_costs) - 1) // 2]
        self.steps -= self.cost(num_tiles)

    def served(self, steps: float) -> None:
        """So many steps of any kind."""
        self.steps = min(self.steps + self.SHARE * steps, self.MOST_STEPS)

    def drafted(self, tokens_per_row: float, steps: float) -> None:
        """A step with drafts brought each row so many tokens, and took, without catching up, as long as so many steps without."""
        least = -self.MOST_OWED_STEPS if self.steps >= -self.MOST_OWED_STEPS else -math.inf
        gain = (1.0 - self.DOUBT) * tokens_per_row - steps
        self.steps = min(max(self.steps + gain, least), self.MOST_STEPS)


@dataclass
class DraftCounters:
    """Counts since the start; only ever grow. Position i counts rounds whose first i + 1 drafts were accepted."""

    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_per_pos: list[int] = field(default_factory=list)
    num_catch_up_tokens: int = 0


class DraftScheduler:
    """Decides about drafts step by step; the scheduler asks.

    A draft model's cache lags behind a row with each round without drafts; up to `MAX_DRAFT_LAG` that does not matter, and then it has to
    catch up. A head passes over what steps without drafts compute, unless they compute prompts too, and cannot draft in the
    first step after: that one is made as narrow as any with drafts, to wake it, and what was chosen is done in the next.
    """

    # Steps for which it is not asked again whether anybody may draft, unless somebody comes: small models lose by asking.
    CLOSED_FOR = 32
    # Rounds after which the account is told of them, or sooner if another kind follows: small models lose by telling it of each.
    SETTLE_AFTER = 8

    def __init__(
        self,
        kv_cache: KVCacheManager,
        policy: DraftPolicy,
        *,
        method: str,
        draft_counts: Sequence[int],
        tile_size: int,
        max_tiles: int,
    ) -> None:
        """`method` is that of a `SpeculativeConfig`, `draft_counts` the compiled numbers of drafts above 0.

        A draft model's cache catches up in steps of at most `max_tiles` tiles.
        """
        max_drafts = max(draft_counts)
        self.policy = policy
        self.max_drafts = max_drafts
        self.counters = DraftCounters(num_accepted_per_pos=[0] * max_drafts)
        self.num_drafts = 0
        """Of the step that was planned last."""
        self.concerns_rows = False
        """Whether a row of that step drafts, catches up or is woken: only then there is anything to do for each."""
        self.wakes_head = False
        """Whether the head of a row of that step is woken."""
        self._kv_cache = kv_cache
        self._has_draft_model = method == "draft_model"
        self._has_head = method == "eagle3"
        self._keeps_cache = method != "ngram"
        # How far a row's cache may lag for it to draft.
        self._most_lag = 0 if self._has_head else MAX_DRAFT_LAG
        self._least_drafts = min(draft_counts)
        self._tile_size = tile_size
        self._max_tiles = max_tiles
        self.account = CatchUpAccount()
        # Rounds so far of which a draft cache may lack something: each brings a row a token at least, which a draft model lacks unless
        # it drafts, and a head if nobody does. Counted here and not for each row, which would cost time in every step without drafts.
        self._num_rounds = 0
        # Whether the last step was given to the head.
        self._is_given = False
        # What was chosen for a step that had to wake the head first; 0 for nothing.
        self._postponed = 0
        # Steps for which nobody may draft who is here now.
        self._num_closed = 0
        # What the account does not know of yet: how many rounds there were, how many of them with drafts, and how many tokens
        # these brought; and how many rows and drafts these have.
        self._num_unsettled = self._num_unsettled_drafts = self._num_unsettled_tokens = 0
        self._unsettled_kind = (0, 0)
        # Of the step that is being planned: who is drafted for, and how many tiles each catches up with.
        self._ready: set[str] = set()
        self._num_tiles: dict[str, int] = {}
        self._catch_ups: list[CatchUp] = []

    def go_by(self, policy: DraftPolicy, account: CatchUpAccount) -> None:
        """Decides with these from now on, which may have learned something elsewhere. There must be no requests."""
        self.policy, self.account = policy, account
        self._num_unsettled = self._num_unsettled_drafts = self._num_unsettled_tokens = 0
        self._num_closed = self._postponed = 0

    def passes_over(self, num_steps: int) -> bool:
        """Whether the next step, of `num_steps` rounds of decode rows and nothing else, goes without drafts whoever they are.

        There is nothing more to do for it then. Small models lose by all that is done in every step.
        """
        if self.concerns_rows or self._is_given:
            return False  # something of the last step is to be put away
        if not self._rests():
            return False
        self._num_rounds += num_steps
        self.num_drafts = 0
        return True

    def begin_step(self, decoding: Iterable[Request], most_rows: int, *, may_draft: bool) -> int:
        """How many tokens to draft in a step whose decode rows are the first of `decoding`, which is looked at only where it matters."""
        self.num_drafts = 0
        if self.concerns_rows:
            self._ready.clear()
            self._num_tiles.clear()
            self.concerns_rows = self.wakes_head = False
        if not may_draft or (not self._postponed and self._rests()):
            return 0
        if self._num_unsettled >= self.SETTLE_AFTER:
            self._settle()
        requests = list(islice(decoding, most_rows))
        if not requests:
            return 0
        limits = self._limits(requests)
        if not any(limits):
            # They do not speculate, or wait for the account.
            self._num_closed = self.CLOSED_FOR
            return 0
        wanted, self._postponed = self._postponed, 0
        if not 0 < wanted <= max(limits):
            wanted = self.policy.choose(len(requests), [request.draft_acceptance for request in requests], limits)
        if wanted:
            tiles_left = self._max_tiles
            for request, limit in zip(requests, limits, strict=True):
                if limit:
                    tiles_left = self._make_ready(request, tiles_left)
            self.concerns_rows = bool(self._ready or self._num_tiles or self.wakes_head)
        # Rows that only catch up need no wider step.
        self.num_drafts = wanted if self._ready else 0
        if self.wakes_head:
            self.num_drafts, self._postponed = self._least_drafts, wanted
        return self.num_drafts

    def _rests(self) -> bool:
        if not self._num_closed:
            return self.policy.rests()
        self._num_closed -= 1
        return True

    def _make_ready(self, request: Request, tiles_left: int) -> int:
        """Lets a row draft, or be woken first, or catch up as far as there are tiles; how many are left."""
        if self._has_head and self._lag(request):
            self.wakes_head = True
            return tiles_left
        num_tiles = self._num_tiles_behind(request)
        num_taken = min(num_tiles, tiles_left)
        if num_taken:
            self._num_tiles[request.request_id] = num_taken
        if num_taken == num_tiles:
            self._ready.add(request.request_id)
        return tiles_left - num_taken

    def num_drafts_for(self, request: Request) -> int:
        """Most tokens to draft for a row of the step: fewer where it may not have as many, will end before, or is not ready."""
        if request.request_id not in self._ready:
            return 0
        # The last token that may come is sampled, not drafted.
        return min(self.num_drafts, request.max_drafts, max(request.max_total_tokens - request.least_tokens - 1, 0))

    def admitted(self, request: Request) -> None:
        """The request took its place; its first blocks may be others' too."""
        self._num_closed = 0
        request.is_catching_up = False
        request.num_drafted = self._kv_cache.num_drafted(request, 0) if self._keeps_cache else 0
        self._set_lag(request, len(request.token_ids) - request.num_drafted)
        if self._has_head:
            # All that is not cached will be given to the head.
            first, end = (
                num_tokens // self._kv_cache.block_size
                for num_tokens in (request.num_drafted, request.num_computed_tokens)
            )
            request.draft_hole = (first, end - first)
            request.num_in_place = request.max_total_tokens
            self._set_lag(request, 0)

    def planned(self, request: Request, num_drafts: int, num_steps: int) -> None:
        """The request's row is part of the step, with so many drafts in each of its `num_steps` rounds.

        To be called before the tokens of the step count as in flight, and only where the step `concerns_rows`.
        """
        if self._has_head:
            self._set_lag(request, 0)
        if not self._has_draft_model:
            return
        num_tiles = self._num_tiles.get(request.request_id, 0)
        if num_tiles:
            self._catch_ups.append(self._catch_up(request, num_tiles))
        if num_drafts:
            assert self._lag(request) <= MAX_DRAFT_LAG, request
            self._set_lag(request, 2 - num_steps)

    def end_step(self, num_steps: int) -> list[CatchUp]:
        """The step has decode rows, which are all planned, and `num_steps` rounds. What has to be computed before it."""
        if self._has_head:
            return []
        self._num_rounds += num_steps
        catch_ups, self._catch_ups = self._catch_ups, []
        return catch_ups

    def sampled(self, request: Request) -> None:
        """A prompt's end was computed, and brings a token."""
        if self._has_draft_model:
            request.drafted_until -= 1

    def give_to_head(self, running: Iterable[Request], num_steps: int, *, has_prompts: bool) -> None:
        """The step is planned as a whole, its decode rows among `running`: what it computes is given to a head, or passed over."""
        if not self._has_head:
            return
        was_given, self._is_given = self._is_given, has_prompts or self.num_drafts > 0
        if self._is_given:
            return
        self._num_rounds += num_steps
        if was_given:
            for request in running:
                # It had so many tokens at least before this step. Their entries are not moved by what comes.
                request.num_in_place = min(request.num_in_place, request.least_tokens - num_steps - 1)

    def _limits(self, requests: Sequence[Request]) -> list[int]:
        """Most drafts of each row: 0 where it asks for none, and where it would have to catch up first and that is not paid for."""
        limits = [request.max_drafts for request in requests]
        if not self._keeps_cache:
            return limits
        credit = self.account.credit
        for idx, request in enumerate(requests):
            if not limits[idx] or self._lag(request) <= self._most_lag:
                continue
            cost = self.account.cost(self._num_tiles_behind(request))
            if cost <= credit or request.is_catching_up:  # who has begun comes to the end
                credit -= cost
            else:
                limits[idx] = 0
        return limits

    def _lag(self, request: Request) -> int:
        """At most so many of the newest tokens are missing in the draft cache; others may have filled a model's shared blocks meanwhile."""
        lag = self._num_rounds - request.drafted_until
        if lag > MAX_DRAFT_LAG and self._has_draft_model:
            start = self._kv_cache.num_drafted(request, request.num_drafted)
            if start > request.num_drafted:
                self._advance(request, start)
        return lag

    def _set_lag(self, request: Request, lag: int) -> None:
        request.drafted_until = self._num_rounds - lag

    def _num_tiles_behind(self, request: Request) -> int:
        if not self._has_draft_model or self._lag(request) <= MAX_DRAFT_LAG:
            return 0
        # One at least: it tells the device what others have computed.
        return max(-(-(request.most_tokens - 1 - request.num_drafted) // self._tile_size), 1)

    def _catch_up(self, request: Request, num_tiles: int) -> CatchUp:
        start, end = request.num_drafted, request.most_tokens - 1
        # What is surely there afterwards: as far as the tiles reach, of the tokens that there surely are and that are known.
        reached = min(request.least_tokens - 1, len(request.token_ids), start + num_tiles * self._tile_size)
        self.counters.num_catch_up_tokens += max(reached - start, 0)
        self._advance(request, reached)
        request.is_catching_up = request.request_id not in self._ready
        if not request.is_catching_up:
            self._set_lag(request, 1)
        return CatchUp(request.slot, start, end + 1, num_tiles)

    def observe_step(self, step: SchedulerOutput, seconds: float, outputs: Sequence[EngineCoreOutput]) -> None:
        """A step took so long, catching up included, and brought this."""
        num_rows, num_rounds = len(step.decode), step.num_decode_steps
        self._num_unsettled += num_rounds
        if step.prefill:
            self.policy.observe_other_step(num_rows, None)
        elif step.wakes_head:
            self.policy.observe_wake(num_rows, seconds, num_rounds)
        elif step.catch_up:  # its cost is in the account, and in no round's
            self.policy.observe_other_step(num_rows, step.num_drafts, num_rounds)
        else:
            self.policy.observe_step(num_rows, step.num_drafts, seconds, num_rounds)
        if not self._keeps_cache or step.prefill or not (step.num_drafts or step.catch_up):
            return
        kind = (num_rows, step.num_drafts)
        if step.catch_up or kind != self._unsettled_kind:
            self._settle()
            self._unsettled_kind = kind
        costs = self._costs(*kind) if step.catch_up else None
        if costs is not None:
            plain_cost, cost = costs
            num_tiles = sum(row.num_tiles for row in step.catch_up)
            self.account.caught_up(num_tiles, max(seconds - num_rounds * cost, 0.0) / plain_cost)
        self._num_unsettled_drafts += num_rounds
        self._num_unsettled_tokens += sum(len(output.new_token_ids) for output in outputs)

    def _settle(self) -> None:
        """Puts into the account what steps brought since it was last called. Their usual cost counts: one slow step would empty it."""
        num_rounds, self._num_unsettled = self._num_unsettled, 0
        num_drafting, self._num_unsettled_drafts = self._num_unsettled_drafts, 0
        num_tokens, self._num_unsettled_tokens = self._num_unsettled_tokens, 0
        if not self._keeps_cache:
            return
        self.account.served(num_rounds)
        costs = self._costs(*self._unsettled_kind) if num_drafting else None
        if costs is not None:
            plain_cost, cost = costs
            self.account.drafted(num_tokens / self._unsettled_kind[0], num_drafting * cost / plain_cost)

    def _costs(self, num_rows: int, num_drafts: int) -> tuple[float, float] | None:
        """Seconds of a round without drafts and with so many, once both are known."""
        plain_cost, cost = self.policy.cost(num_rows, 0), self.policy.cost(num_rows, num_drafts)
        return None if plain_cost is None or cost is None else (plain_cost, cost)

    def observe(self, request: Request, rounds: Sequence[DraftRound], num_asked: int) -> None:
        """What came of a row's rounds, for each of which `num_asked` drafts were asked for; its tokens are those after them."""
        for num_drafts, num_accepted in rounds:
            if not num_drafts:
                if num_asked and not self._keeps_cache:
                    # Nothing to propose: the row's share of the wider step was for nothing.
                    self.policy.observe_round(request.draft_acceptance, num_asked, 0)
                continue
            self.counters.num_rounds += 1
            self.counters.num_draft_tokens += num_drafts
            self.counters.num_accepted_tokens += num_accepted
            for position in range(num_accepted):
                self.counters.num_accepted_per_pos[position] += 1
            self.policy.observe_round(request.draft_acceptance, num_drafts, num_accepted)
        if self._has_draft_model and request.slot >= 0 and rounds and rounds[-1].num_drafts:
            num_drafts, num_accepted = rounds[-1]
            # The draft model has read all of the row's tokens but those of the last round, and of these its own but the last.
            before = len(request.token_ids) - num_accepted - 1
            self._advance(request, before + min(num_drafts - 1, num_accepted))

    def _advance(self, request: Request, num_drafted: int) -> None:
        if num_drafted > request.num_drafted:
            self._kv_cache.publish_drafted(request, request.num_drafted, num_drafted)
            request.num_drafted = num_drafted
