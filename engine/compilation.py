"""Counts what XLA compiles, so that a compilation while serving is seen and not merely felt."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar

import jax

logger = logging.getLogger(__name__)

# jax reports one such event per program handed to XLA (or found in the persistent cache), in jax 0.7.0 as in the newest.
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompilationCounter:
    """Counts the compilations of one engine, apart before and after warm-up; those after it are logged as warnings.

    jax tells its listeners of every compilation in the process, on the thread that caused it; the engine's are those that
    happen inside `counting`.
    """

    _current: ClassVar[ContextVar[CompilationCounter | None]] = ContextVar("quire_compilations", default=None)
    _lock: ClassVar[threading.Lock] = threading.Lock()
    _is_listening: ClassVar[bool] = False

    def __init__(self) -> None:
        self.num_in_warm_up = 0
        self.num_after_warm_up = 0
        self.seconds = 0.0
        self._is_warm = False
        with self._lock:
            if not CompilationCounter._is_listening:
                jax.monitoring.register_event_duration_secs_listener(_on_duration)
                CompilationCounter._is_listening = True

    @contextmanager
    def counting(self) -> Iterator[None]:
        """What this thread compiles inside the context is this engine's."""
        token = self._current.set(self)
        try:
            yield
        finally:
            self._current.reset(token)

    def finish_warm_up(self) -> None:
        """From here on every compilation is one too many."""
        self._is_warm = True

    def _count(self, seconds: float, what: str) -> None:
        with self._lock:
            self.seconds += seconds
            if self._is_warm:
                self.num_after_warm_up += 1
            else:
                self.num_in_warm_up += 1
        if self._is_warm:
            logger.warning("compiled %s in %.2f s after warm-up; serving stood still meanwhile", what, seconds)


def _on_duration(event: str, duration_secs: float, **details: str | int) -> None:
    counter = CompilationCounter._current.get()
    if event == _COMPILE_EVENT and counter is not None:
        counter._count(duration_secs, str(details.get("fun_name", "a program")))
