"""What the rest of the server sees of the engine: its state, the settings that can change, and who is told of what it does."""

from __future__ import annotations

import enum
from typing import Protocol

import msgspec

from quire.engine.metrics import EngineStats
from quire.server.messages import EngineInfo, Progress
from quire.server.metrics import FinishedRequest


class EngineState(enum.Enum):
    """What the engine process is at."""

    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


class SchedulerSettings(msgspec.Struct, frozen=True):
    """What can change while serving. The queue limits are the server's own, the rest the engine's; 0 is no limit for a queue."""

    max_num_seqs: int
    max_num_batched_tokens: int
    batching: str
    batching_window: float
    scheduling_policy: str
    priority_seconds: float
    max_queued_requests: int
    max_queued_tokens: int


class EngineObserver(Protocol):
    """Who is told what the engine does; `ServerMetrics` is one. Called on the event loop, so it must be quick."""

    def set_info(self, info: EngineInfo) -> None: ...
    def update_progress(self, progress: Progress) -> None: ...
    def update_stats(self, stats: EngineStats) -> None: ...
    def observe_first_token(self, seconds: float) -> None: ...
    def observe_inter_token(self, seconds: float) -> None: ...
    def observe_step(self, num_tokens: int) -> None: ...
    def observe_finished(self, request: FinishedRequest) -> None: ...
