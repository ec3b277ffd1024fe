"""The block pool against a model of it so plain that it cannot be wrong."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.engine.block_pool import NULL_BLOCK, BlockPool

NUM_BLOCKS = 9


def block_hash(number: int) -> bytes:
    return number.to_bytes(2, "big")


@given(st.lists(st.tuples(st.sampled_from(["allocate", "release", "publish", "share"]), st.integers(0, 11))))
def test_used_and_free_blocks_add_up_and_a_held_block_is_never_handed_out(actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(NUM_BLOCKS, enable_caching=True)
    holders: list[list[int]] = []
    for action, number in actions:
        held = Counter(block for blocks in holders for block in blocks)
        if action == "allocate" and number <= pool.num_free:
            blocks = pool.allocate(number)
            assert len(set(blocks)) == number
            assert not set(blocks) & {*held, NULL_BLOCK}
            assert not any(pool.find(block_hash(idx)) in blocks for idx in range(12))
            holders.append(blocks)
        elif action == "release" and holders:
            pool.release(holders.pop(number % len(holders)))
        elif action == "publish" and held:
            pool.publish(sorted(held)[number % len(held)], block_hash(number))
        elif action == "share":
            found = pool.find(block_hash(number))
            if found is not None:
                assert pool.is_free(found) == (found not in held)
                pool.share([found])
                holders.append([found])
        held = Counter(block for blocks in holders for block in blocks)
        pool.check(held)
        assert pool.num_used == len(held)
        assert pool.num_used + pool.num_free == pool.num_usable == NUM_BLOCKS - 1


def test_the_least_recently_used_prefix_goes_first_and_its_last_block_before_its_first() -> None:
    pool = BlockPool(6, enable_caching=True)
    old, recent, plain = pool.allocate(2), pool.allocate(2), pool.allocate(1)
    for number, block in enumerate([*old, *recent]):
        pool.publish(block, block_hash(number))
    for blocks in (old, recent, plain):
        pool.release(blocks)
    assert pool.allocate(5) == [*plain, old[1], old[0], recent[1], recent[0]]


def test_a_prefix_that_was_used_again_outlives_one_that_was_not() -> None:
    pool = BlockPool(3, enable_caching=True)
    first, second = pool.allocate(1), pool.allocate(1)
    for number, blocks in enumerate((first, second)):
        pool.publish(blocks[0], block_hash(number))
        pool.release(blocks)
    pool.share(first)
    pool.release(first)
    assert pool.allocate(1) == second
    assert pool.find(block_hash(0)) == first[0]
    assert pool.find(block_hash(1)) is None


def test_the_first_block_of_a_prefix_stays_the_findable_one() -> None:
    pool = BlockPool(4, enable_caching=True)
    first, second = pool.allocate(2)
    pool.publish(first, block_hash(1))
    pool.publish(second, block_hash(1))
    pool.publish(first, block_hash(2))
    assert pool.find(block_hash(1)) == first
    assert pool.find(block_hash(2)) is None
    pool.check({first: 1, second: 1})


def test_nothing_is_findable_without_caching() -> None:
    pool = BlockPool(4, enable_caching=False)
    (block,) = pool.allocate(1)
    pool.publish(block, block_hash(1))
    assert pool.find(block_hash(1)) is None


def test_prefixes_are_forgotten_only_while_no_block_is_used() -> None:
    pool = BlockPool(4, enable_caching=True)
    blocks = pool.allocate(1)
    pool.publish(blocks[0], block_hash(1))
    assert not pool.forget_all()
    assert pool.find(block_hash(1)) == blocks[0]
    pool.release(blocks)
    assert pool.forget_all()
    assert pool.find(block_hash(1)) is None
    pool.check({})


def test_a_block_cannot_be_released_twice_nor_more_be_taken_than_there_are() -> None:
    pool = BlockPool(4, enable_caching=True)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.release(blocks)
    with pytest.raises(AssertionError):
        BlockPool(4, enable_caching=True).allocate(4)


@pytest.mark.parametrize("held", [{}, {1: 2}, {2: 1}, {1: 1, 2: 1}])
def test_the_check_notices_references_that_do_not_match(held: dict[int, int]) -> None:
    pool = BlockPool(4, enable_caching=True)
    assert pool.allocate(1) == [1]
    pool.check({1: 1})
    with pytest.raises(AssertionError):
        pool.check(held)
