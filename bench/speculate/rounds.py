"""The measurement: in a round each contender answers the same requests, in turns with the one that it is compared with."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from quire.bench.peers.quiet import LoadMeter
from quire.bench.peers.report import Figure
from quire.bench.speculate.contenders import Contender, Experience
from quire.bench.speculate.forced import seeds_of
from quire.engine import LLM, SamplingParams
from quire.engine.request import EngineCoreRequest
from quire.engine.step_data import DraftRound, EngineCoreOutput

Record = dict[str, Any]
Tokens = list[list[int]]


NUM_LEARNING_STEPS = 1000
"""Of an adaptive contender, before it is measured: what is of interest is how it serves, not how it finds out what serves best."""

TURN_SECONDS = 0.03
TURN_STEPS = 8


@dataclass(frozen=True)
class Case:
    """So many requests of a kind at once. `acceptance` is how often drafts are accepted where that is forced."""

    kind: str
    batch_size: int
    temperature: float
    acceptance: float | None = None

    @property
    def title(self) -> str:
        """For people."""
        forced = "" if self.acceptance is None else f", acceptance {self.acceptance:g}"
        return f"{self.kind}{forced}, temperature {self.temperature:g}, batch {self.batch_size}"


@dataclass(frozen=True)
class Workload:
    """The prompts by kind, at least as many as the largest batch; `acceptances` are those that are forced, if any."""

    prompts: dict[str, list[list[int]]]
    max_tokens: int
    acceptances: tuple[float, ...] = ()

    def requests(self, case: Case, round_idx: int) -> tuple[list[list[int]], list[SamplingParams]]:
        """The requests of a case: all are there at once, and all end after `max_tokens`. Each round has seeds of its own."""
        num_seeds = (round_idx + 1) * case.batch_size
        seeds = list(range(num_seeds))
        if case.acceptance is not None:
            seeds = seeds_of(self.acceptances.index(case.acceptance), len(self.acceptances), num_seeds)
        params = [
            SamplingParams(
                temperature=case.temperature, max_tokens=self.max_tokens, seed=seed, ignore_eos=True, detokenize=False
            )
            for seed in seeds[-case.batch_size :]
        ]
        return self.prompts[case.kind][: case.batch_size], params

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its output."""
        return max(len(prompt) for prompts in self.prompts.values() for prompt in prompts) + self.max_tokens


@dataclass(frozen=True)
class Run:
    """A contender's answer to the requests of a case.

    What is measured ends with the first request: from then on the batch is a smaller one, with speculation, whose rows differ, long before
    the last ends. A server gives the place to the next request.
    """

    seconds: float
    num_tokens: int
    num_steps: int
    tokens: Tokens
    """All of them."""
    rounds: tuple[DraftRound, ...]
    """Of all requests; those without drafts are left out."""

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


class Measurement:
    """A case while it is measured: what each contender has done so far, with all the engines that were made for it."""

    def __init__(self, case: Case, workload: Workload) -> None:
        self.case = case
        self._workload = workload
        self._experiences: dict[str, Experience | None] = {}
        self._runs: dict[str, list[Run]] = {}
        self._base_runs: dict[str, list[Run]] = {}
        self._other_loads: list[float | None] = []

    def measure(self, contenders: Sequence[Contender], rounds: range, say: Callable[[str], None]) -> None:
        """So many rounds more; the first contender is the one that the others are compared with.

        In each round every other contender serves the requests beside it, the two in turns. Each time a contender begins to learn anew:
        what one has learned by chance should not decide about all its rounds.
        """
        base, *others = contenders
        for contender in contenders:
            self._experiences[contender.name] = contender.new_experience()
            self._runs.setdefault(contender.name, [])
            self._base_runs.setdefault(contender.name, [])
            num_steps = self._serve(contender, rounds.stop).finish().num_steps
            while contender.num_drafts is None and num_steps < NUM_LEARNING_STEPS:
                num_steps += self._serve(contender, rounds.stop).finish().num_steps
        load = OtherLoad()
        for idx in rounds:
            for contender in others:
                pair = self._serve(base, idx), self._serve(contender, idx)
                # Nobody always begins.
                take_turns(pair if idx % 2 == 0 else pair[::-1])
                self._base_runs[contender.name].append(pair[0].finish())
                self._runs[contender.name].append(pair[1].finish())
            self._runs[base.name].append(self._base_runs[others[0].name][-1])
            self._base_runs[base.name].append(self._runs[base.name][-1])
        self._other_loads.append(load.so_far())
        rates = ", ".join(
            f"{name} {statistics.median(one.tokens_per_s for one in found):.4g}" for name, found in self._runs.items()
        )
        say(f"{self.case.title}: {rates} tokens/s")

    def records(self, contenders: Sequence[Contender]) -> list[Record]:
        """What came of it, one for each contender."""
        loads = [load for load in self._other_loads if load is not None]
        return [
            {
                "benchmark": "speculate",
                **asdict(self.case),
                "name": contender.name,
                "method": contender.method,
                "num_drafts": contender.num_drafts,
                "other_load": round(statistics.fmean(loads), 3) if loads else None,
                "num_engines": len(self._other_loads),
                **figures(self._runs[contender.name], self._base_runs[contender.name]),
            }
            for contender in contenders
        ]

    def _serve(self, contender: Contender, round_idx: int) -> Serving:
        # Contenders may share an engine, but for the first.
        contender.use(self._experiences[contender.name])
        return Serving(contender.llm, *self._workload.requests(self.case, round_idx))


class OtherLoad:
    """The share of all processors that others keep busy, from now on."""

    def __init__(self) -> None:
        self._meter = LoadMeter()
        self._begin = self._meter.read()

    def so_far(self) -> float | None:
        """None where it cannot be known."""
        now = self._meter.read()
        return None if now is None or self._begin is None else round(now.other_load(self._begin), 3)


class Serving:
    """An engine that answers the requests of a case, all there at once and none found in a cache, in as many turns as one likes."""

    def __init__(self, llm: LLM, prompts: Tokens, params: Sequence[SamplingParams]) -> None:
        add_requests(llm, prompts, params)
        self._llm = llm
        self._tokens: Tokens = [[] for _ in prompts]
        self._rounds: list[DraftRound] = []
        self._seconds = 0.0
        self._begin_steps = llm.stats().num_steps
        self._measured: tuple[float, int, int] | None = None

    @property
    def is_measured(self) -> bool:
        """Whether a request has ended."""
        return self._measured is not None

    def take_turn(self, seconds: float, num_steps: int) -> None:
        """Launches steps for so long and so many at least, unless a request ends before, and waits for the last of them."""
        begin, so_far = time.perf_counter(), self._seconds
        for idx in count(1):
            is_last = idx > num_steps and self._seconds - so_far >= seconds
            outputs = self._llm.core.drain() if is_last else self._llm.core.step()
            self._seconds = so_far + time.perf_counter() - begin
            self._take(outputs)
            if is_last or self.is_measured:
                break

    def finish(self) -> Run:
        """Serves what is left, and says what came of it all."""
        if not self.is_measured:
            self.take_turn(math.inf, 0)
        while self._llm.core.has_work:
            self._take(self._llm.core.step())
        assert self._measured is not None
        return Run(*self._measured, self._tokens, tuple(self._rounds))

    def _take(self, outputs: Sequence[EngineCoreOutput]) -> None:
        for output in outputs:
            self._tokens[int(output.request_id)] += output.new_token_ids
            self._rounds += [one for one in output.rounds if one.num_drafts]
        if self._measured is None and any(output.finish_reason is not None for output in outputs):
            num_steps = self._llm.stats().num_steps - self._begin_steps
            self._measured = self._seconds, sum(map(len, self._tokens)), num_steps


def take_turns(servings: Sequence[Serving]) -> None:
    """Has them serve in turns until each is measured.

    The machine's speed changes from one half second to the next by more than what is to be seen: turns are short beside that, and long
    beside a step, since no step is launched during the last of a turn.
    """
    while not all(serving.is_measured for serving in servings):
        for serving in servings:
            if not serving.is_measured:
                serving.take_turn(TURN_SECONDS, TURN_STEPS)


def add_requests(llm: LLM, prompts: Tokens, params: Sequence[SamplingParams]) -> None:
    """Queues requests whose ids are their numbers, in an engine that is idle and then knows no prompt any more."""
    assert not llm.core.has_work
    llm.core.scheduler.kv_cache.forget_prefixes()
    for idx, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        llm.core.add_request(EngineCoreRequest(str(idx), tuple(prompt), wanted, arrival_time=time.monotonic()))


def figures(runs: Sequence[Run], base: Sequence[Run]) -> Record:
    """What a contender's runs come to, beside the runs of the same rounds without speculation.

    `tokens_per_round` is what a row's drafts brought it with the token that follows them; `tokens_per_step` counts steps of prompts and
    rounds without drafts as well.
    """
    rounds = [one for each in runs for one in each.rounds]
    num_tokens = sum(one.num_tokens for one in runs)
    num_row_steps = sum(one.num_steps * len(one.tokens) for one in runs)
    ratios = [mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in zip(runs, base, strict=True)]
    return {
        "tokens_per_s": asdict(Figure.of([one.tokens_per_s for one in runs])),
        "ratio": asdict(Figure.of(ratios)),
        "rounds": len(rounds),
        "drafts_per_round": statistics.fmean(one.num_drafts for one in rounds) if rounds else 0.0,
        "tokens_per_round": statistics.fmean(one.num_accepted + 1 for one in rounds) if rounds else 1.0,
        "accepted_per_pos": accepted_per_pos(rounds),
        "tokens_per_step": num_tokens / num_row_steps,
        **equality([one.tokens for one in runs], [one.tokens for one in base]),
    }


def accepted_per_pos(rounds: Sequence[DraftRound]) -> list[float]:
    """For each position, of the rounds that drafted so far, the share that accepted so far."""
    shares = []
    for position in range(max((one.num_drafts for one in rounds), default=0)):
        reaching = [one for one in rounds if one.num_drafts > position]
        shares.append(sum(one.num_accepted > position for one in reaching) / len(reaching))
    return shares


def equality(mine: Sequence[Tokens], base: Sequence[Tokens]) -> Record:
    """The share of tokens that are those without speculation, and the request and the place of the first that is not, of any round."""
    num_equal = num_tokens = 0
    first: list[int] | None = None
    for rows, expected in zip(mine, base, strict=True):
        for request, (row, wanted) in enumerate(zip(rows, expected, strict=True)):
            places = [
                place
                for place in range(max(len(row), len(wanted)))
                if row[place : place + 1] != wanted[place : place + 1]
            ]
            num_tokens += max(len(row), len(wanted))
            num_equal += max(len(row), len(wanted)) - len(places)
            if places and first is None:
                first = [request, places[0]]
    return {"equal_share": num_equal / num_tokens, "first_difference": first}
