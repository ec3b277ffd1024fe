"""Which blocks hold which tokens of which request."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from quire.engine.block_pool import NULL_BLOCK, BlockPool
from quire.engine.request import Request


@dataclass(frozen=True)
class KVCacheUsage:
    """A reading of the cache. `num_wasted_tokens` is the room in held blocks that holds no token."""

    num_blocks: int
    num_used_blocks: int
    num_wasted_tokens: int

    @property
    def used_fraction(self) -> float:
        """Used blocks over usable blocks, 0 to 1."""
        return self.num_used_blocks / self.num_blocks


@dataclass(frozen=True)
class CachedPrefix:
    """Leading blocks of a request whose keys and values are in the cache already."""

    block_ids: tuple[int, ...]
    num_tokens: int
    # Of those blocks, how many nobody references: taking them lowers the number of free blocks.
    num_free: int


class KVCacheManager:
    """Gives requests their blocks, finds cached prefixes, and takes blocks back. It never copies a block.

    A full block gets a hash chained over the hashes before it, its own tokens and the request's cache salt, so equal hashes
    mean equal prefixes. A block can be found by other requests from the step after the one that fills it.
    Knows nothing of steps, slots or devices.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool,
        sliding_window: int | None = None,
    ) -> None:
        """`sliding_window` is given when *every* layer has one: blocks that lie before it are freed while the request runs."""
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, enable_caching=enable_prefix_caching)
        self._enable_prefix_caching = enable_prefix_caching
        self._sliding_window = sliding_window
        self._being_computed: dict[bytes, str] = {}
        # Full blocks whose tokens a draft model's cache has as well, or for all of which a head's has an entry.
        self._drafted: set[int] = set()
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    @property
    def has_window(self) -> bool:
        """Whether blocks fall out of sight while their request runs."""
        return self._sliding_window is not None

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, request: Request) -> CachedPrefix:
        """The longest run of leading full blocks in the cache; at least one token is always left to compute."""
        if not self._uses_prefix(request):
            return CachedPrefix((), 0, 0)
        self._extend_hashes(request)
        blocks: list[int] = []
        for block_hash in request.block_hashes[: (len(request.token_ids) - 1) // self.block_size]:
            block = self.pool.find(block_hash)
            if block is None:
                break
            blocks.append(block)
        num_free = sum(self.pool.is_free(block) for block in blocks)
        return CachedPrefix(tuple(blocks), len(blocks) * self.block_size, num_free)

    def is_being_computed(self, request: Request, prefix: CachedPrefix) -> bool:
        """Whether a running request is about to compute the block that follows `prefix`: waiting a step saves the work."""
        next_idx = len(prefix.block_ids)
        if not self._uses_prefix(request) or next_idx >= (len(request.token_ids) - 1) // self.block_size:
            return False
        return request.block_hashes[next_idx] in self._being_computed

    def num_blocks_to_admit(self, request: Request, prefix: CachedPrefix) -> int:
        """Free blocks that admitting the request takes: its known tokens, less the part of the prefix that others hold too."""
        return self.num_blocks_for(len(request.token_ids)) - len(prefix.block_ids) + prefix.num_free

    def admit(self, request: Request, prefix: CachedPrefix) -> None:
        """Gives the request blocks for all the tokens it has, the cached prefix first. The caller has checked the room."""
        assert not request.block_ids, request
        self.pool.share(prefix.block_ids)
        missing = self.num_blocks_for(len(request.token_ids)) - len(prefix.block_ids)
        request.block_ids = [*prefix.block_ids, *self._allocate(missing)]
        request.num_hashed_blocks = len(prefix.block_ids)
        request.num_nulled_blocks = 0
        if self._enable_prefix_caching:
            self._extend_hashes(request)
            for block_hash in request.block_hashes[len(prefix.block_ids) :]:
                self._being_computed.setdefault(block_hash, request.request_id)
        if self._uses_prefix(request) and request.num_preemptions == 0:
            self.num_prefix_queries += len(request.token_ids)
            self.num_prefix_hits += prefix.num_tokens

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Extends the request's blocks to hold `num_tokens` tokens; the new block ids, or None (and nothing done) without room."""
        missing = -(-num_tokens // self.block_size) - len(request.block_ids)
        if missing <= 0:
            return []
        if missing > self.pool.num_free:
            return None
        blocks = self._allocate(missing)
        request.block_ids.extend(blocks)
        return blocks

    def num_drafted(self, request: Request, at_least: int) -> int:
        """Leading tokens that a drafter's cache has, `at_least` so many: those, and the blocks after them that others filled."""
        idx = at_least // self.block_size
        while idx < len(request.block_ids) and request.block_ids[idx] in self._drafted:
            idx += 1
        return max(at_least, idx * self.block_size)

    def publish_drafted(self, request: Request, start: int, end: int) -> None:
        """Tokens `start ... end - 1` of the request, which are known, are in the draft model's cache from now on, as all before them."""
        for idx in range(start // self.block_size, end // self.block_size):
            if request.block_ids[idx] != NULL_BLOCK:
                self._drafted.add(request.block_ids[idx])

    def _allocate(self, count: int) -> list[int]:
        blocks = self.pool.allocate(count)
        self._drafted.difference_update(blocks)
        return blocks

    def publish_full_blocks(self, request: Request) -> None:
        """Makes the request's full blocks findable, as far as their tokens are known and a dispatched step computes them."""
        if not self._enable_prefix_caching:
            return
        num_full = min(request.num_computed_tokens, len(request.token_ids)) // self.block_size
        if num_full <= request.num_hashed_blocks:
            return
        self._extend_hashes(request)
        for idx in range(request.num_hashed_blocks, num_full):
            block_hash = request.block_hashes[idx]
            if request.block_ids[idx] != NULL_BLOCK:
                self.pool.publish(request.block_ids[idx], block_hash)
                if (idx + 1) * self.block_size <= request.num_in_place:
                    self._drafted.add(request.block_ids[idx])
            self._disown(request, block_hash)
        request.num_hashed_blocks = num_full

    def release_out_of_window(self, request: Request) -> tuple[int, int]:
        """Frees blocks that no later token of the request can see; their table entries become the null block.

        Returns (first block index, count) of the entries that became null; count is 0 where no window applies.
        """
        first = request.num_nulled_blocks
        if self._sliding_window is None:
            return first, 0
        # What may come of drafts counts only once it has: until then the row may stand further back.
        num_computed = min(request.num_computed_tokens, request.least_tokens - 1)
        first_visible = num_computed - self._sliding_window + 1
        count = min(max(first_visible, 0) // self.block_size, len(request.block_ids)) - first
        if count <= 0:
            return first, 0
        self.publish_full_blocks(request)
        self.pool.release(request.block_ids[first : first + count])
        request.block_ids[first : first + count] = [NULL_BLOCK] * count
        request.num_nulled_blocks = first + count
        return first, count

    def release(self, request: Request) -> None:
        """Takes back every block of the request."""
        self.pool.release(request.block_ids)
        for block_hash in request.block_hashes[request.num_hashed_blocks :]:
            self._disown(request, block_hash)
        request.block_ids = []
        request.num_hashed_blocks = 0
        request.num_nulled_blocks = 0

    def forget_prefixes(self) -> bool:
        """Forgets every cached prefix; False, and nothing done, while some block is in use."""
        return self.pool.forget_all()

    def usage(self, running: Sequence[Request]) -> KVCacheUsage:
        """A reading of the cache; `running` are the requests that hold blocks."""
        wasted = 0
        for request in running:
            held = len(request.block_ids) * self.block_size
            wasted += held - min(held, request.num_computed_tokens)
        return KVCacheUsage(self.pool.num_usable, self.pool.num_used, wasted)

    def check(self, running: Sequence[Request]) -> None:
        """Asserts the laws of block accounting; `running` are all the requests that hold blocks."""
        held = Counter(block for request in running for block in request.block_ids if block != NULL_BLOCK)
        self.pool.check(held)
        for request in running:
            assert len(request.block_ids) >= self.num_blocks_for(request.num_computed_tokens), request
            assert request.block_ids[: request.num_nulled_blocks] == [NULL_BLOCK] * request.num_nulled_blocks, request
            assert NULL_BLOCK not in request.block_ids[request.num_nulled_blocks :], request
        assert set(self._being_computed.values()) <= {request.request_id for request in running}

    def _uses_prefix(self, request: Request) -> bool:
        """Log-probabilities of prompt tokens come of computing them, so such a request takes nothing from the cache."""
        return self._enable_prefix_caching and request.params.prompt_logprobs is None

    def _disown(self, request: Request, block_hash: bytes) -> None:
        if self._being_computed.get(block_hash) == request.request_id:
            del self._being_computed[block_hash]

    def _extend_hashes(self, request: Request) -> None:
        """Hashes the full blocks of known tokens that have none yet."""
        size, hashes, token_ids = self.block_size, request.block_hashes, request.token_ids
        for idx in range(len(hashes), len(token_ids) // size):
            parent = hashes[-1] if hashes else _digest((request.cache_salt or "").encode())
            hashes.append(_digest(parent + array("q", token_ids[idx * size : (idx + 1) * size]).tobytes()))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
