"""The blocks of the KV cache: who holds them, which hold a known prefix, which goes next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

NULL_BLOCK = 0


class BlockPool:
    """Owns every block id, its reference count, and the map from content hash to block.

    Block 0 is the null block: padding is written to it, it is never handed out. A block with no reference is free; a free
    block that holds a hashed prefix stays findable until it is handed out again, least recently used first. The pool knows
    nothing of requests or tokens.
    """

    def __init__(self, num_blocks: int, *, enable_caching: bool) -> None:
        """`num_blocks` counts the null block."""
        assert num_blocks >= 2, num_blocks
        self.num_blocks = num_blocks
        self._enable_caching = enable_caching
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_usable(self) -> int:
        """Blocks that requests can hold: all but the null block."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody references, findable ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that some request references, each counted once however many share it."""
        return self.num_usable - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, forgetting what they held. The caller has checked `num_free`."""
        assert count <= len(self._free), (count, len(self._free))
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            block_hash = self._hash_of.pop(block, None)
            if block_hash is not None:
                del self._block_of[block_hash]
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to blocks that were found by hash."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference from each block, null blocks excepted.

        The last block of a sequence is the least likely to be asked for again, so it is queued for reuse first; a block
        that holds no findable prefix goes before all that do.
        """
        for block in reversed(blocks):
            if block == NULL_BLOCK:
                continue
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, block
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def find(self, block_hash: bytes) -> int | None:
        """The block that holds the prefix with this hash, if one does."""
        return self._block_of.get(block_hash)

    def is_free(self, block: int) -> bool:
        """Whether nobody references the block."""
        return self._ref_counts[block] == 0

    def publish(self, block: int, block_hash: bytes) -> None:
        """Makes a full block findable. Where two requests computed the same prefix, the first block stays the findable one."""
        if self._enable_caching and block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def forget_all(self) -> bool:
        """Forgets every cached prefix; False, and nothing done, while some block is in use."""
        if self.num_used:
            return False
        self._block_of.clear()
        self._hash_of.clear()
        return True

    def check(self, held: Mapping[int, int]) -> None:
        """Asserts the pool's laws: used + free = total, references as `held` has them by block, hashes one to one."""
        assert len(held) + len(self._free) == self.num_usable, (len(held), len(self._free), self.num_usable)
        assert NULL_BLOCK not in held
        assert NULL_BLOCK not in self._free
        references = {block: count for block, count in enumerate(self._ref_counts) if count}
        assert references == held, (references, held)
        assert not any(block in held for block in self._free)
        assert {block: block_hash for block_hash, block in self._block_of.items()} == self._hash_of
