"""/health, /ready, /metrics for those who run the server, and /admin/scheduler for those who may change it."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.server.engine_state import EngineState, SchedulerSettings
from quire.server.openapi import Operation
from quire.server.responses import json_response, read_body
from quire.server.state import ServerState, state_of

logger = logging.getLogger(__name__)

# Changes come one after another, so that each answer says truly what held before it.
_change_lock = asyncio.Lock()


class Health(Struct):
    """ok while the engine lives or starts; `message` says why it is dead."""

    status: str
    message: str | None = None


class Readiness(Struct):
    """ready, starting, draining or dead. While starting: `done` of `total` of the phase (load, compile), `progress` from 0 to 1."""

    status: str
    phase: str
    done: int
    total: int
    what: str
    progress: float


# A whole number that fits whatever it is sent through.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class SchedulerChange(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Settings to change; what is left out stays."""

    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    batching: str | None = None
    batching_window: float | None = None
    scheduling_policy: str | None = None
    priority_seconds: float | None = None
    max_queued_requests: Count | None = None
    max_queued_tokens: Count | None = None


class SchedulerState(Struct):
    """What holds now, and what held before the change: sent back, `before` undoes it."""

    settings: SchedulerSettings
    before: SchedulerSettings | None = None


async def health(request: Request) -> Response:
    """Answers GET /health: whether the process is worth keeping."""
    engine = state_of(request).engine
    if engine.state is EngineState.DEAD:
        return json_response(Health("dead", str(engine.failure)), 503)
    return json_response(Health("ok"))


async def ready(request: Request) -> Response:
    """Answers GET /ready: whether requests should be sent here."""
    readiness = _readiness(state_of(request))
    return json_response(readiness, 200 if readiness.status == "ready" else 503)


def _readiness(state: ServerState) -> Readiness:
    engine, progress = state.engine, state.engine.progress
    status = "draining" if state.is_draining and engine.state is EngineState.READY else engine.state.value
    if engine.state is EngineState.READY:
        share = 1.0
    else:
        share = progress.done / progress.total if progress.phase == "compile" and progress.total else 0.0
    return Readiness(status, progress.phase, progress.done, progress.total, progress.what, share)


async def metrics(request: Request) -> Response:
    """Answers GET /metrics in Prometheus' text format."""
    state = state_of(request)
    state.metrics.set_engine_up(state.engine.state is not EngineState.DEAD)
    body, content_type = state.metrics.render()
    return Response(body, headers={"content-type": content_type})


async def get_scheduler(request: Request) -> Response:
    """Answers GET /admin/scheduler."""
    engine = state_of(request).engine
    engine.check_alive()
    assert engine.scheduler_settings is not None
    return json_response(SchedulerState(engine.scheduler_settings))


async def change_scheduler(request: Request) -> Response:
    """Answers PATCH and POST /admin/scheduler: all of the changes, or none and the reason."""
    state = state_of(request)
    body = await read_body(request, SchedulerChange)
    changes: dict[str, Any] = {name: value for name, value in msgspec.structs.asdict(body).items() if value is not None}
    async with _change_lock:
        state.engine.check_alive()
        before = state.engine.scheduler_settings
        after = await state.engine.configure(changes)
    for name in changes:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            logger.warning("scheduler setting %s changed from %r to %r", name, old, new)
            state.metrics.count_change(name)
    return json_response(SchedulerState(after, before))


routes = [
    Route("/health", health, methods=["GET"]),
    Route("/ready", ready, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
    Route("/admin/scheduler", get_scheduler, methods=["GET"]),
    Route("/admin/scheduler", change_scheduler, methods=["PATCH", "POST"]),
]

OPERATIONS = (
    Operation(
        "GET", "/health", "Whether the server is alive.", None, Health, errors=(503,), needs_key=False, tag="Operations"
    ),
    Operation(
        "GET",
        "/ready",
        "Whether to send requests here.",
        None,
        Readiness,
        errors=(503,),
        needs_key=False,
        tag="Operations",
    ),
    Operation(
        "GET", "/admin/scheduler", "Scheduler settings.", None, SchedulerState, errors=(401, 404, 503), tag="Operations"
    ),
    Operation(
        "PATCH",
        "/admin/scheduler",
        "Change scheduler settings while serving.",
        SchedulerChange,
        SchedulerState,
        errors=(401, 404, 503),
        tag="Operations",
    ),
    Operation("GET", "/metrics", "Metrics in Prometheus' text format.", None, None, needs_key=False, tag="Operations"),
)
