"""What an engine counts and measures: plain numbers, read at any time, exported by whoever serves them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from quire.engine.draft_scheduler import DraftCounters
from quire.engine.model_runner import Runner
from quire.engine.scheduler import Scheduler


class StepSeconds:
    """Seconds the host spent in each part of its steps: schedule, launch, wait (for the device) and update."""

    def __init__(self) -> None:
        self.schedule = 0.0
        self.launch = 0.0
        self.wait = 0.0
        self.update = 0.0

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Adds the time spent inside the context to `part`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - begin)


class IdleClock:
    """Seconds in which the device had nothing to do, since the clock was made."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now` is the clock it goes by."""
        self._now = now
        self._seconds = 0.0
        self._since: float | None = now()

    def launched(self) -> None:
        """A step was given to the device."""
        if self._since is not None:
            self._seconds += self._now() - self._since
            self._since = None

    def drained(self) -> None:
        """The last step in flight has come back."""
        self._since = self._now()

    @property
    def seconds(self) -> float:
        """The sum so far, up to this moment where the device is idle."""
        return self._seconds + (0.0 if self._since is None else self._now() - self._since)


@dataclass(frozen=True)
class EngineStats:
    """One reading. Counts since the start, except the gauges in the first group."""

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float
    kv_wasted_tokens: int
    num_speculative_tokens: int
    """Drafts per row in the step that was scheduled last; 0 without speculation."""

    num_steps: int
    num_finished: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generation_tokens: int
    num_prefix_queries: int
    num_prefix_hits: int
    num_real_tokens: int
    num_padding_tokens: int
    num_compilations: int
    num_recompilations: int
    compile_seconds: float
    schedule_seconds: float
    launch_seconds: float
    wait_seconds: float
    update_seconds: float
    idle_seconds: float
    num_draft_rounds: int
    """Times that drafts of a row were verified."""
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_per_pos: tuple[int, ...]
    """How often the draft of each position was accepted, up to the most that are drafted; empty without speculation."""

    @classmethod
    def read(cls, scheduler: Scheduler, runner: Runner, seconds: StepSeconds, idle: IdleClock) -> EngineStats:
        """Reads everything now; takes microseconds per running request."""
        usage = scheduler.kv_cache.usage(scheduler.running)
        drafts = scheduler.drafts
        drafted = DraftCounters() if drafts is None else drafts.counters
        return cls(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=len(scheduler.waiting),
            kv_cache_usage=usage.used_fraction,
            kv_wasted_tokens=usage.num_wasted_tokens,
            num_speculative_tokens=0 if drafts is None else drafts.num_drafts,
            num_steps=scheduler.counters.num_steps,
            num_finished=scheduler.counters.num_finished,
            num_preemptions=scheduler.counters.num_preemptions,
            num_prompt_tokens=scheduler.counters.num_prompt_tokens,
            num_generation_tokens=scheduler.counters.num_generation_tokens,
            num_prefix_queries=scheduler.kv_cache.num_prefix_queries,
            num_prefix_hits=scheduler.kv_cache.num_prefix_hits,
            num_real_tokens=runner.counters.num_real_tokens,
            num_padding_tokens=runner.counters.num_padding_tokens,
            num_compilations=runner.compilations.num_in_warm_up,
            num_recompilations=runner.compilations.num_after_warm_up,
            compile_seconds=runner.compilations.seconds,
            schedule_seconds=seconds.schedule,
            launch_seconds=seconds.launch,
            wait_seconds=seconds.wait,
            update_seconds=seconds.update,
            idle_seconds=idle.seconds,
            num_draft_rounds=drafted.num_rounds,
            num_draft_tokens=drafted.num_draft_tokens,
            num_accepted_tokens=drafted.num_accepted_tokens,
            num_accepted_per_pos=tuple(drafted.num_accepted_per_pos),
        )
