"""Engines on virtual clocks side by side, and the requests that reach them: a discrete-event simulation whose events are steps.

Every replica has a clock of its own. The one that is furthest behind goes next, so that a request is given to a replica as things
stood when it came: to the one with the fewest requests, the first of equals.
"""

from __future__ import annotations

import heapq
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quire.bench.plan.workload import Arrival, Traffic
from quire.engine.core import EngineCore
from quire.engine.request import EngineCoreRequest
from quire.engine.sampling_params import SamplingParams
from quire.engine.simulation import SimulatedRunner
from quire.engine.step_data import EngineCoreOutput

# While requests gather in a window nothing happens by itself; then the clock goes on by so much.
TICK = 0.005


@dataclass
class Outcome:
    """What became of a request; times in seconds since the start."""

    arrival: Arrival
    replica: int
    queue_seconds: float = 0.0
    first_token: float | None = None
    last_token: float = 0.0
    num_tokens: int = 0
    is_done: bool = False
    num_cached: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True)
class Sample:
    """How the fleet stood at a time, all replicas together."""

    time: float
    num_running: int
    num_waiting: int
    kv_usage: float
    """Of the fullest replica."""


@dataclass
class Run:
    """A simulation that has come to its end."""

    outcomes: list[Outcome] = field(default_factory=list)
    gaps: array[float] = field(default_factory=lambda: array("d"))
    """Seconds between tokens, of all requests; those that come together share what they took."""
    gap_times: array[float] = field(default_factory=lambda: array("d"))
    """When each of them ended."""
    samples: list[Sample] = field(default_factory=list)
    busy_seconds: float = 0.0
    """Of all replicas' devices."""
    seconds: float = 0.0
    """From the first arrival to the last answer."""
    num_steps: int = 0
    host_seconds: float = 0.0
    """That this machine took to schedule and update, all steps together."""
    wall_seconds: float = 0.0


class Fleet:
    """So many engines that are alike."""

    def __init__(self, engines: Sequence[EngineCore], temperature: float = 0.7) -> None:
        """Each must be on a virtual clock of its own."""
        self._engines = list(engines)
        self._temperature = temperature

    def run(self, traffic: Traffic, progress: Callable[[float, int], None] = lambda *_: None) -> Run:
        """Serves all of it; `progress(seconds, answers)` is told now and then where the simulation has come to."""
        return _Running(self._engines, self._temperature, traffic, progress).run()


class _Running:
    SAMPLE_SECONDS = 0.5

    def __init__(
        self,
        engines: list[EngineCore],
        temperature: float,
        traffic: Traffic,
        progress: Callable[[float, int], None],
    ) -> None:
        self._engines = engines
        self._traffic = traffic
        self._progress = progress
        self._temperature = temperature
        self._arrivals = [(arrival.time, idx, arrival) for idx, arrival in enumerate(traffic.initial())]
        heapq.heapify(self._arrivals)
        self._num_arrived = len(self._arrivals)
        self._open: dict[str, Outcome] = {}
        self._loads = [0] * len(engines)
        self._next_sample = 0.0
        self._found = Run()

    def run(self) -> Run:
        begin = time.perf_counter()
        while True:
            busy = [idx for idx, engine in enumerate(self._engines) if engine.has_work]
            slowest = min(busy, key=lambda idx: self._engines[idx].clock.now(), default=None)
            if slowest is None and not self._arrivals:
                break
            now = None if slowest is None else self._engines[slowest].clock.now()
            if self._arrivals and (now is None or self._arrivals[0][0] <= now):
                self._take(heapq.heappop(self._arrivals)[2])
            else:
                assert slowest is not None
                self._step(slowest)
        found = self._found
        found.wall_seconds = time.perf_counter() - begin
        found.busy_seconds = sum(_runner(engine).busy_seconds for engine in self._engines)
        found.num_steps = sum(engine.scheduler.counters.num_steps for engine in self._engines)
        found.host_seconds = sum(engine.seconds.schedule + engine.seconds.update for engine in self._engines)
        found.seconds = max((outcome.last_token for outcome in found.outcomes), default=0.0)
        return found

    def _take(self, arrival: Arrival) -> None:
        replica = min(range(len(self._engines)), key=lambda idx: (self._loads[idx], idx))
        engine = self._engines[replica]
        if not engine.has_work:
            engine.clock.wait_until(arrival.time)
        params = SamplingParams(
            temperature=self._temperature, max_tokens=arrival.max_tokens, ignore_eos=True, detokenize=False, seed=0
        )
        request_id = str(len(self._found.outcomes))
        engine.add_request(EngineCoreRequest(request_id, arrival.prompt, params, arrival_time=arrival.time))
        self._loads[replica] += 1
        outcome = Outcome(arrival, replica)
        self._open[request_id] = outcome
        self._found.outcomes.append(outcome)

    def _step(self, replica: int) -> None:
        engine = self._engines[replica]
        before = engine.clock.now()
        outputs = engine.step()
        now = engine.clock.now()
        if now == before and not engine.is_busy:
            following = self._arrivals[0][0] if self._arrivals else before + TICK
            engine.clock.wait_until(min(following, before + TICK))
        for output in outputs:
            self._note(output, now)
        if now >= self._next_sample:
            self._sample(now)

    def _note(self, output: EngineCoreOutput, now: float) -> None:
        outcome = self._open[output.request_id]
        count = len(output.new_token_ids)
        if count:
            if outcome.first_token is None:
                outcome.first_token = now
                outcome.num_cached = output.num_cached_tokens
                scheduled = output.first_scheduled_time
                outcome.queue_seconds = 0.0 if scheduled is None else scheduled - outcome.arrival.time
            else:
                gap = (now - outcome.last_token) / count
                self._found.gaps.extend([gap] * count)
                self._found.gap_times.extend([now] * count)
            outcome.last_token = now
            outcome.num_tokens += count
        if output.finish_reason is not None:
            outcome.is_done = True
            outcome.num_preemptions = output.num_preemptions
            del self._open[output.request_id]
            self._loads[outcome.replica] -= 1
            following = self._traffic.after(outcome.arrival, now)
            if following is not None:
                heapq.heappush(self._arrivals, (following.time, self._num_arrived, following))
                self._num_arrived += 1

    def _sample(self, now: float) -> None:
        schedulers = [engine.scheduler for engine in self._engines]
        usages = [one.kv_cache.usage(one.running).used_fraction for one in schedulers]
        self._found.samples.append(
            Sample(
                now,
                sum(len(one.running) for one in schedulers),
                sum(len(one.waiting) for one in schedulers),
                max(usages),
            )
        )
        self._next_sample = now + self.SAMPLE_SECONDS
        self._progress(now, sum(outcome.is_done for outcome in self._found.outcomes[-2000:]))


def _runner(engine: EngineCore) -> SimulatedRunner:
    assert isinstance(engine.runner, SimulatedRunner), engine.runner
    return engine.runner
