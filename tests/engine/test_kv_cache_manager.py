"""Which prefixes are found, which blocks are given and taken back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from quire.engine.block_pool import NULL_BLOCK
from quire.engine.kv_cache_manager import CachedPrefix, KVCacheManager
from quire.engine.request import Request
from tests.engine.fake_model import make_request

BLOCK_SIZE = 4
NONE_CACHED = CachedPrefix((), 0, 0)


def make_manager(num_blocks: int = 20, *, caching: bool = True, sliding_window: int | None = None) -> KVCacheManager:
    return KVCacheManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=caching, sliding_window=sliding_window)


def new_request(
    prompt: Sequence[int], name: str = "r", *, salt: str | None = None, prompt_logprobs: int | None = None
) -> Request:
    source = make_request(name, prompt, cache_salt=salt, prompt_logprobs=prompt_logprobs)
    return Request(source, max_model_len=64, order=(0.0, 0))


def compute(manager: KVCacheManager, request: Request) -> Request:
    """Admits a request and has all its tokens computed."""
    prefix = manager.find_prefix(request)
    manager.admit(request, prefix)
    request.num_computed_tokens = len(request.token_ids)
    manager.publish_full_blocks(request)
    return request


def test_a_request_shares_the_full_blocks_of_a_computed_prefix_and_no_others() -> None:
    manager = make_manager()
    first = compute(manager, new_request(range(11), "a"))
    second = new_request([*range(8), 12, 12, 12], "b")
    prefix = manager.find_prefix(second)
    assert (prefix.block_ids, prefix.num_tokens, prefix.num_free) == (tuple(first.block_ids[:2]), 8, 0)
    assert manager.num_blocks_to_admit(second, prefix) == 1
    compute(manager, second)
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    manager.check([first, second])
    assert (manager.num_prefix_queries, manager.num_prefix_hits) == (22, 8)


def test_at_least_one_token_of_a_fully_cached_prompt_is_left_to_compute() -> None:
    manager = make_manager()
    compute(manager, new_request(range(8), "a"))
    assert manager.find_prefix(new_request(range(8), "b")).num_tokens == 4
    assert manager.find_prefix(new_request(range(9), "c")).num_tokens == 8


def test_equal_blocks_after_different_beginnings_are_not_shared() -> None:
    manager = make_manager()
    compute(manager, new_request([1, 1, 1, 1, 5, 6, 7, 8, 9], "a"))
    assert manager.find_prefix(new_request([2, 2, 2, 2, 5, 6, 7, 8, 9], "b")) == NONE_CACHED
    assert manager.find_prefix(new_request([5, 6, 7, 8, 9], "c")) == NONE_CACHED


@pytest.mark.parametrize(("writer", "reader"), [(None, "x"), ("x", None), ("x", "y")])
def test_a_prefix_is_not_shared_across_cache_salts(writer: str | None, reader: str | None) -> None:
    manager = make_manager()
    compute(manager, new_request(range(9), "a", salt=writer))
    assert manager.find_prefix(new_request(range(9), "b", salt=reader)) == NONE_CACHED
    assert manager.find_prefix(new_request(range(9), "c", salt=writer)).num_tokens == 8


def test_nothing_is_shared_without_prefix_caching_nor_with_prompt_logprobs() -> None:
    manager = make_manager(caching=False)
    compute(manager, new_request(range(9), "a"))
    assert manager.find_prefix(new_request(range(9), "b")) == NONE_CACHED
    manager = make_manager()
    compute(manager, new_request(range(9), "a"))
    assert manager.find_prefix(new_request(range(9), "b", prompt_logprobs=0)) == NONE_CACHED


def test_blocks_of_a_finished_request_are_found_until_they_are_needed() -> None:
    manager = make_manager(num_blocks=6)
    request = compute(manager, new_request(range(9), "a"))
    manager.release(request)
    assert manager.pool.num_used == 0
    again = new_request(range(9), "b")
    prefix = manager.find_prefix(again)
    assert (prefix.num_tokens, prefix.num_free) == (8, 2)
    assert manager.num_blocks_to_admit(again, prefix) == 3
    compute(manager, new_request([12] * 20, "c"))
    assert manager.find_prefix(again) == NONE_CACHED


def test_a_prefix_that_another_is_computing_is_worth_waiting_for_until_it_is_done_or_given_up() -> None:
    manager = make_manager()
    first, second = new_request(range(12), "a"), new_request(range(12), "b")
    manager.admit(first, manager.find_prefix(first))
    assert manager.is_being_computed(second, manager.find_prefix(second))
    first.num_computed_tokens = 6
    manager.publish_full_blocks(first)
    assert manager.find_prefix(second).num_tokens == 4
    assert manager.is_being_computed(second, manager.find_prefix(second))
    manager.release(first)
    assert not manager.is_being_computed(second, manager.find_prefix(second))
    wants_logprobs = new_request(range(12), "c", prompt_logprobs=0)
    manager.admit(second, manager.find_prefix(second))
    assert not manager.is_being_computed(wants_logprobs, NONE_CACHED)
    manager.check([second])


def test_growing_gives_just_the_missing_blocks_or_changes_nothing() -> None:
    manager = make_manager(num_blocks=5)
    request = compute(manager, new_request(range(6), "a"))
    assert manager.grow(request, 8) == []
    (block,) = manager.grow(request, 9) or []
    assert request.block_ids[2:] == [block]
    assert manager.grow(request, 17) is None
    assert len(request.block_ids) == 3
    assert manager.pool.num_free == 1
    manager.check([request])


@pytest.mark.parametrize("num_computed", range(17))
def test_exactly_the_blocks_before_the_window_are_released(num_computed: int) -> None:
    window = 6
    manager = make_manager(sliding_window=window)
    request = new_request(range(16))
    manager.admit(request, NONE_CACHED)
    request.num_computed_tokens = num_computed
    first_visible = max(num_computed - window + 1, 0)
    assert manager.release_out_of_window(request) == (0, first_visible // BLOCK_SIZE)
    for idx, block in enumerate(request.block_ids):
        is_visible = any(position >= first_visible for position in range(idx * BLOCK_SIZE, (idx + 1) * BLOCK_SIZE))
        assert (block != NULL_BLOCK) == is_visible
    assert manager.release_out_of_window(request)[1] == 0
    manager.check([request])
    manager.release(request)
    manager.check([])


def test_waste_is_the_room_in_held_blocks_that_holds_no_token() -> None:
    manager = make_manager()
    request = new_request(range(9))
    manager.admit(request, NONE_CACHED)
    request.num_computed_tokens = 9
    usage = manager.usage([request])
    assert (usage.num_blocks, usage.num_used_blocks, usage.num_wasted_tokens) == (19, 3, 3)
    assert usage.used_fraction == 3 / 19
