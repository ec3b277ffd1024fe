"""The run: engine after engine, round after round, each figure written down as it is taken."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.bench.peers.engines import Contender
from quire.bench.peers.quiet import LoadMeter, Quiet
from quire.bench.peers.session import PeerFailedError, Session
from quire.bench.peers.shapes import Shape
from quire.bench.peers.workload import Case, Requests, check_lengths, max_model_len, max_num_seqs, num_kv_tokens

Record = dict[str, Any]
# An engine is ready when it has answered this: what each of them does at its first request counts too.
SHORT_REQUEST = Requests(((5, 6, 7, 8),), (4,))


@dataclass(frozen=True)
class Plan:
    """What is run. `quiet_load` is the share of all processors that others may keep busy when a measurement starts."""

    shape_name: str
    shape: Shape
    cases: tuple[Case, ...]
    rounds: int
    threads: int
    quiet_load: float
    quiet_limit: float
    time_limit: float
    folder: Path

    def settings(self, contender: Contender) -> Record:
        """What a driver is told when it is to load."""
        return {
            "op": "load",
            "model": str(contender.model),
            "threads": self.threads,
            "max_model_len": max_model_len(self.cases, self.shape.shortened),
            "max_num_seqs": max_num_seqs(self.cases),
            "num_kv_tokens": num_kv_tokens(self.cases, self.shape.shortened),
            "kv_bytes_per_token": self.shape.kv_bytes_per_token(),
            "arguments": contender.arguments,
        }

    def requests(self, case: Case) -> Requests:
        """A case's requests."""
        return case.requests(self.shape.vocab_size, self.shape.shortened)

    def warm_up(self, case: Case) -> Requests:
        """What is run before a case, unmeasured."""
        return case.warm_up(self.shape.vocab_size, self.shape.shortened)


class Run:
    """Goes through a plan. `write` is given every record, of figures and of failures, when it is made.

    An engine that cannot be started is left out from then on, a case that failed is not tried again with that engine; each is
    one record with an "error".
    """

    def __init__(self, plan: Plan, contenders: Sequence[Contender], write: Callable[[Record], None]) -> None:
        self._plan = plan
        self._contenders = list(contenders)
        self._write = write
        self._meter = LoadMeter()
        self._about: dict[str, Record] = {}
        self._failed: set[tuple[str, str]] = set()
        self._num_done = 0

    def run(self) -> None:
        """All rounds, after one unmeasured start of each engine that fills its caches of compiled programs."""
        for contender in list(self._contenders):
            self._guarded(contender, 0, self._prime)
        for round_number in range(1, self._plan.rounds + 1):
            for contender in list(self._contenders):
                self._guarded(contender, round_number, self._round)

    def _guarded(self, contender: Contender, round_number: int, step: Callable[[Contender, int], None]) -> None:
        """Takes a step; an engine that cannot even be started is out."""
        try:
            step(contender, round_number)
        except (PeerFailedError, ValueError) as error:
            self._contenders.remove(contender)
            self._fail(contender, None, round_number, str(error))

    def _prime(self, contender: Contender, _: int) -> None:
        say(f"{contender.name}: first start, unmeasured")
        self._start(contender, self._cache(contender, "warm"))[0].close()

    def _round(self, contender: Contender, round_number: int) -> None:
        cases = [case for case in self._plan.cases if (contender.name, case.name) not in self._failed]
        for case in cases:
            if case.kind == "ready-cold":
                self._measure_cold(contender, case, round_number)
        left = [case for case in cases if case.kind != "ready-cold"]
        while left:
            left = self._one_session(contender, left, round_number)

    def _measure_cold(self, contender: Contender, case: Case, round_number: int) -> None:
        cache = self._cache(contender, "cold")
        shutil.rmtree(cache, ignore_errors=True)
        self._measure_start(contender, case, round_number, cache).close()
        shutil.rmtree(cache, ignore_errors=True)

    def _measure_start(self, contender: Contender, case: Case | None, round_number: int, cache: Path) -> Session:
        quiet = self._wait(contender, case) if case is not None else None
        before = self._meter.read()
        session, seconds = self._start(contender, cache)
        if case is not None and quiet is not None:
            self._record(contender, case, round_number, seconds, quiet, before)
        return session

    def _one_session(self, contender: Contender, cases: list[Case], round_number: int) -> list[Case]:
        """Runs cases in one process; those that are left when it had to be killed."""
        by_kind = {case.kind: case for case in cases}
        start_case = by_kind.get("ready-warm")
        with self._measure_start(contender, start_case, round_number, self._cache(contender, "warm")) as session:
            with_requests = [case for case in cases if case.has_requests]
            for idx, case in enumerate(with_requests):
                try:
                    self._measure(contender, case, round_number, session)
                except (PeerFailedError, ValueError) as error:
                    self._failed.add((contender.name, case.name))
                    self._fail(contender, case, round_number, str(error))
                    if not session.is_alive:
                        return [*with_requests[idx + 1 :], *([by_kind["memory"]] if "memory" in by_kind else [])]
            if (memory := by_kind.get("memory")) and (num_bytes := session.peak_memory()) is not None:
                self._record(contender, memory, round_number, num_bytes / 2**30)
        return []

    def _measure(self, contender: Contender, case: Case, round_number: int, session: Session) -> None:
        plan = self._plan
        session.ask(_generate(plan.warm_up(case)), plan.time_limit)
        quiet = self._wait(contender, case)
        requests = plan.requests(case)
        before = self._meter.read()
        reply = session.ask(_generate(requests), plan.time_limit)
        figure = case.figure(requests, reply["token_times"])
        check_lengths(requests, reply["token_ids"])
        first = [token_ids[0] for token_ids in reply["token_ids"]]
        seconds = max(times[-1] for times in reply["token_times"])
        self._record(contender, case, round_number, figure, quiet, before, {"seconds": seconds, "first_tokens": first})

    def _start(self, contender: Contender, cache: Path) -> tuple[Session, float]:
        """A process that has answered a first request, and the seconds from its start to then."""
        cache.mkdir(parents=True, exist_ok=True)
        log = self._plan.folder / "logs" / f"{_file_name(contender.name)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        session = Session(contender.command(self._plan.threads, cache), log)
        try:
            about = session.ask(self._plan.settings(contender), self._plan.time_limit)
            answer = session.ask(_generate(SHORT_REQUEST), self._plan.time_limit)
            seconds = time.perf_counter() - session.start_time
            check_lengths(SHORT_REQUEST, answer["token_ids"])
        except BaseException:
            session.kill()
            raise
        self._about[contender.name] = about
        return session, seconds

    def _cache(self, contender: Contender, kind: str) -> Path:
        return self._plan.folder / "caches" / f"{_file_name(contender.name)}-{kind}"

    def _wait(self, contender: Contender, case: Case) -> Quiet:
        def waiting(load: float) -> None:
            say(f"{contender.name}: {case.name}: waiting, others keep {100 * load:.0f} % of the machine busy")

        return self._meter.wait_until_quiet(self._plan.quiet_load, self._plan.quiet_limit, waiting=waiting)

    def _record(
        self,
        contender: Contender,
        case: Case,
        round_number: int,
        figure: float,
        quiet: Quiet | None = None,
        before: Any = None,
        more: Record | None = None,
    ) -> None:
        after = self._meter.read()
        load = round(after.other_load(before), 4) if before is not None and after is not None else None
        record = self._base(contender, case, round_number)
        record |= {"value": float(f"{figure:.5g}"), "unit": case.unit, "other_load": load}
        if quiet is not None:
            record |= {"waited_s": round(quiet.seconds, 1), "quiet": quiet.is_quiet}
        self._write(record | (more or {}))
        seen = "" if load is None else f"   (other load {100 * load:.1f} %)"
        self._num_done += 1
        total = self._plan.rounds * len(self._plan.cases) * len(self._contenders)
        say(
            f"[{self._num_done}/{total}] {contender.name}: round {round_number}: {case.name}: {figure:.4g} {case.unit}{seen}"
        )

    def _fail(self, contender: Contender, case: Case | None, round_number: int, reason: str) -> None:
        self._write(self._base(contender, case, round_number) | {"error": reason})
        say(f"{contender.name}: {case.name if case else 'start'} failed: {reason}")

    def _base(self, contender: Contender, case: Case | None, round_number: int) -> Record:
        return {
            "benchmark": "peers",
            "shape": self._plan.shape_name,
            "engine": contender.name,
            **self._about.get(contender.name, {}),
            "threads": self._plan.threads,
            "round": round_number,
            "case": case.name if case is not None else None,
        }


def _generate(requests: Requests) -> Record:
    return {"op": "generate", "prompts": requests.prompts, "output_lens": requests.output_lens}


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
