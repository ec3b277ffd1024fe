"""When waiting requests are let in: the batching policy, and the blocks kept free for those already running.

    continuous   whenever there is room (the default)
    windowed     requests gather for a while, then the group joins what is running
    static       a batch is let in when the last one has finished as a whole; its prompts are padded to the longest and computed
                 before any token is generated, and rows that end early stay in the batch

The last two are the baselines that continuous batching is compared with. None of them imports jax or looks at blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

from quire.engine.request import Request

BatchingPolicy = Literal["continuous", "windowed", "static"]
BATCHING_POLICIES: tuple[str, ...] = get_args(BatchingPolicy)


class AdmissionPolicy(Protocol):
    """Asked before each step how far the door is open, told afterwards how many came in."""

    computes_prompts_first: bool
    """Whether nothing is generated while a prompt is still to be computed."""

    def num_admissible(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> int:
        """How many may be admitted now, if there is room for them; `waiting` has at least one request.

        `now` is in seconds of the clock that arrival times use.
        """
        ...

    def admitted(self, count: int, is_blocked: bool) -> None:
        """`count` requests came in; `is_blocked` when another one would have, had there been blocks for it."""
        ...

    def padded_decode_rows(self) -> int:
        """Decode rows to compute at least, finished ones included; 0 for no padding."""
        ...

    def prompt_padding(self, request: Request) -> int:
        """Tokens of padding that are computed with the request's prompt."""
        ...


class ContinuousBatching:
    """The door is always open."""

    computes_prompts_first = False

    def num_admissible(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> int:
        return len(waiting)

    def admitted(self, count: int, is_blocked: bool) -> None:
        pass

    def padded_decode_rows(self) -> int:
        return 0

    def prompt_padding(self, request: Request) -> int:
        return 0


class WindowedBatching:
    """Requests gather until the first of them has waited `window_seconds` or a batch is full; then the group comes in."""

    computes_prompts_first = False

    def __init__(self, window_seconds: float, max_num_seqs: int) -> None:
        self._window_seconds = window_seconds
        self._max_num_seqs = max_num_seqs
        self._num_to_admit = 0
        self._opened_at = 0.0

    def num_admissible(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> int:
        if self._num_to_admit:  # those of the group that are still there: an aborted member leaves its place to nobody
            in_group = sum(request.source.arrival_time <= self._opened_at for request in waiting)
            self._num_to_admit = min(self._num_to_admit, in_group)
        if self._num_to_admit == 0:
            oldest = min(request.source.arrival_time for request in waiting)
            if len(waiting) >= self._max_num_seqs or now - oldest >= self._window_seconds:
                self._num_to_admit = min(len(waiting), self._max_num_seqs)
                self._opened_at = now
        return self._num_to_admit

    def admitted(self, count: int, is_blocked: bool) -> None:
        self._num_to_admit -= count

    def padded_decode_rows(self) -> int:
        return 0

    def prompt_padding(self, request: Request) -> int:
        return 0


class StaticBatching:
    """A batch forms of whatever waits when nothing runs, and nobody joins it later. It is computed at full size to the end.

    Its members come in as fast as the steps have room for their prompts; one for which there are no blocks is left to the
    next batch, with all behind it.
    """

    computes_prompts_first = True

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._num_to_admit = 0
        self._batch_size = 0
        self._longest = 0

    def num_admissible(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> int:
        if not running:
            self._num_to_admit = min(len(waiting), self._max_num_seqs)
            self._batch_size = 0
            self._longest = max(len(request.token_ids) for request in waiting[: self._num_to_admit])
        return self._num_to_admit

    def admitted(self, count: int, is_blocked: bool) -> None:
        self._batch_size += count
        self._num_to_admit = 0 if is_blocked else self._num_to_admit - count

    def padded_decode_rows(self) -> int:
        return self._batch_size

    def prompt_padding(self, request: Request) -> int:
        return max(self._longest - len(request.token_ids), 0)


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
    doubles when a request had to be preempted, and halves after a stretch of finished requests without one: a cache
    that turned out too small stays guarded for a while, so a request let back in is not thrown out at once. Preemptions
    count once until another request is let in: they all show the same mistake.
    """

    MIN_LOOKAHEAD = 32
    MAX_LOOKAHEAD = 4096
    # Finished requests without a preemption. More leaves memory idle: where it is tight (tests/engine/test_scheduler.py),
    # 32 had 7 preemptions instead of 12, and 748 steps instead of 573.
    CALM_AFTER = 4

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._num_finished = 0
        self._has_admitted = False
        self.lookahead = self.MIN_LOOKAHEAD

    def blocks(self, running: Sequence[Request]) -> int:
        """Blocks to leave free for the growth of all these requests."""
        return sum(map(self.growth, running))

    def growth(self, request: Request) -> int:
        """Blocks that the request will take for its next tokens, beyond those that it holds or needs at once."""
        num_tokens = request.most_tokens
        growth = min(self.lookahead, request.max_total_tokens - num_tokens)
        held = max(len(request.block_ids), -(-num_tokens // self._block_size))
        return max(-(-(num_tokens + growth) // self._block_size) - held, 0)

    def admitted(self) -> None:
        """A request was let in."""
        self._has_admitted = True

    def preempted(self) -> None:
        """A request lost its blocks: look further ahead."""
        if self._has_admitted:
            self.lookahead = min(2 * self.lookahead, self.MAX_LOOKAHEAD)
        self._has_admitted = False
        self._num_finished = 0

    def finished(self) -> None:
        """A request came to its end."""
        self._num_finished += 1
        if self._num_finished >= self.CALM_AFTER:
            self.lookahead = max(self.lookahead // 2, self.MIN_LOOKAHEAD)
            self._num_finished = 0
