"""When waiting requests are let in: the batching policy, and the blocks kept free for those already running.

    continuous   whenever there is room (the default)
    windowed     requests gather for a while, then the group joins what is running
    static       a batch is let in when the last one has finished as a whole; rows that end early stay in the batch

The last two are the baselines that continuous batching is compared with. None of them imports jax or looks at blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

from quire.engine.request import Request

BatchingPolicy = Literal["continuous", "windowed", "static"]
BATCHING_POLICIES: tuple[str, ...] = get_args(BatchingPolicy)


class AdmissionPolicy(Protocol):
    """Asked before each step whether the door is open, told afterwards how many came in."""

    def opens(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> bool:
        """Whether waiting requests may be admitted now (`now` in seconds of the clock that arrival times use)."""
        ...

    def admitted(self, count: int, num_waiting: int) -> None:
        """`count` requests came in during an open step, `num_waiting` still wait."""
        ...

    def padded_decode_rows(self, num_running: int) -> int:
        """Decode rows to compute at least, finished ones included; 0 for no padding."""
        ...


class ContinuousBatching:
    """The door is always open."""

    def opens(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> bool:
        return bool(waiting)

    def admitted(self, count: int, num_waiting: int) -> None:
        pass

    def padded_decode_rows(self, num_running: int) -> int:
        return 0


class WindowedBatching:
    """Requests gather until the first of them has waited `window_seconds` or a batch is full; then the group comes in."""

    def __init__(self, window_seconds: float, max_num_seqs: int) -> None:
        self._window_seconds = window_seconds
        self._max_num_seqs = max_num_seqs
        self._num_to_admit = 0

    def opens(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> bool:
        if not waiting:
            return False
        if self._num_to_admit == 0:
            oldest = min(request.source.arrival_time for request in waiting)
            if len(waiting) >= self._max_num_seqs or now - oldest >= self._window_seconds:
                self._num_to_admit = min(len(waiting), self._max_num_seqs)
        return self._num_to_admit > 0

    def admitted(self, count: int, num_waiting: int) -> None:
        self._num_to_admit = min(max(self._num_to_admit - count, 0), num_waiting)

    def padded_decode_rows(self, num_running: int) -> int:
        return 0


class StaticBatching:
    """A batch forms of whatever waits when nothing runs, and nobody joins it later. It is computed at full size to the end."""

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._is_filling = False
        self._batch_size = 0

    def opens(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> bool:
        if not running:
            self._is_filling = True
            self._batch_size = 0
        return self._is_filling and bool(waiting)

    def admitted(self, count: int, num_waiting: int) -> None:
        self._batch_size += count
        if self._batch_size >= self._max_num_seqs or num_waiting == 0:
            self._is_filling = False

    def padded_decode_rows(self, num_running: int) -> int:
        return self._batch_size


def make_admission_policy(name: BatchingPolicy, *, window_seconds: float, max_num_seqs: int) -> AdmissionPolicy:
    """The policy of that name; `window_seconds` matters to `windowed` alone."""
    if name == "windowed":
        return WindowedBatching(window_seconds, max_num_seqs)
    if name == "static":
        return StaticBatching(max_num_seqs)
    return ContinuousBatching()


class Headroom:
    """How many blocks to leave free for the growth of running requests when another one is let in.

    Each is given room for its next `lookahead` tokens, or for all that it may still generate if that is less. The lookahead
    doubles whenever a request had to be preempted, and halves after a stretch of finished requests without one: a cache
    that turned out too small stays guarded for a while, so a request let back in is not thrown out at once.
    """

    MIN_LOOKAHEAD = 32
    MAX_LOOKAHEAD = 4096
    CALM_AFTER = 32  # finished requests without a preemption

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._num_finished = 0
        self.lookahead = self.MIN_LOOKAHEAD

    def blocks(self, running: Sequence[Request], candidate: Request) -> int:
        """Blocks to leave free beside the candidate's known tokens; 0 when it would run alone, since then it has them all."""
        if not running:
            return 0
        return sum(self._growth(request) for request in running) + self._growth(candidate)

    def preempted(self) -> None:
        """A request lost its blocks: look further ahead."""
        self.lookahead = min(2 * self.lookahead, self.MAX_LOOKAHEAD)
        self._num_finished = 0

    def finished(self) -> None:
        """A request came to its end."""
        self._num_finished += 1
        if self._num_finished >= self.CALM_AFTER:
            self.lookahead = max(self.lookahead // 2, self.MIN_LOOKAHEAD)
            self._num_finished = 0

    def _growth(self, request: Request) -> int:
        num_tokens = len(request.token_ids) + request.num_in_flight
        growth = min(self.lookahead, request.max_total_tokens - num_tokens)
        held = max(len(request.block_ids), -(-num_tokens // self._block_size))
        return max(-(-(num_tokens + growth) // self._block_size) - held, 0)
