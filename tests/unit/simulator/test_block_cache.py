"""The block cache of a worker like vLLM: duplicates, order of eviction, windows, resets."""

from extproc.simulator.block_cache import BlockCache, BlockRequest
from extproc.simulator.cache_events import (
    DEFAULT_NAMESPACE,
    CacheEvent,
    Cleared,
    Namespace,
    Removed,
    Stored,
)

SIZE = 4


def cache(blocks: int = 16, window: int | None = None) -> BlockCache:
    return BlockCache(blocks=blocks, block_size=SIZE, window=window)


def begun(
    held: BlockCache, prompt: range, namespace: Namespace = DEFAULT_NAMESPACE
) -> BlockRequest:
    request = BlockRequest(held, prompt, namespace)
    request.begin(reads_cache=True)
    return request


def served(held: BlockCache, prompt: range, namespace: Namespace = DEFAULT_NAMESPACE) -> int:
    """The cached tokens of a request that ends with its first token."""
    request = begun(held, prompt, namespace)
    request.end()
    return request.cached_tokens


def stored(events: list[CacheEvent]) -> list[int]:
    return [number for one in events if isinstance(one, Stored) for number in one.hashes]


def removed(events: list[CacheEvent]) -> list[int]:
    return [number for one in events if isinstance(one, Removed) for number in one.hashes]


def test_a_prefix_is_found_by_whole_blocks() -> None:
    held = cache()
    assert served(held, range(10)) == 0
    assert served(held, range(9)) == 8
    assert served(held, range(1, 10)) == 0


def test_the_last_block_of_a_prompt_held_in_full_is_made_anew() -> None:
    held = cache()
    served(held, range(8))
    first = stored(held.take_events())
    assert served(held, range(8)) == 4
    assert stored(held.take_events()) == first[1:]
    # The hash is that of two blocks: both leave, by an event each.
    served(held, range(100, 164))
    assert sorted(removed(held.take_events())) == sorted([*first, first[1]])


def test_two_requests_at_once_share_the_blocks_of_the_first() -> None:
    held = cache()
    first = begun(held, range(9))
    second = begun(held, range(9))
    assert second.cached_tokens == 8
    first.end()
    second.end()
    assert held.pool.used == 0


def test_a_namespace_has_blocks_of_its_own() -> None:
    held = cache()
    salted = Namespace(cache_salt="a")
    served(held, range(9))
    assert served(held, range(9), salted) == 0
    assert served(held, range(9), salted) == 8
    assert served(held, range(9), Namespace(lora_name="a")) == 0


def test_the_end_of_the_longest_unused_prompt_is_evicted_first() -> None:
    held = cache(blocks=6)
    served(held, range(8))
    served(held, range(50, 58))
    old, new = (stored([one]) for one in held.take_events())
    served(held, range(8))  # used again; its last block is made anew, in one that was empty
    held.take_events()
    served(held, range(90, 98))
    assert removed(held.take_events()) == [old[1]]
    served(held, range(70, 78))
    assert removed(held.take_events()) == [new[1], new[0]]
    assert served(held, range(8)) == 4


def test_an_output_is_stored_block_by_block_without_its_last_token() -> None:
    held = cache()
    request = begun(held, range(6))
    held.take_events()
    grown = [
        request.grow(produced, lambda count: range(100, 100 + count)) for produced in (1, 2, 3)
    ]
    assert grown == [False, False, True]
    (event,) = held.take_events()
    assert isinstance(event, Stored)
    assert event.pages == [(4, 5, 100, 101)]
    request.end()
    assert served(held, range(0)) == 0


def test_a_block_without_room_is_not_kept() -> None:
    held = cache(blocks=2)
    first = begun(held, range(8))
    second = begun(held, range(20, 28))
    assert (len(stored(held.take_events())), held.pool.free) == (2, 0)
    second.end()
    first.end()
    assert held.pool.free == 2


def test_a_reset_waits_for_the_next_step() -> None:
    held = cache()
    request = begun(held, range(8))
    held.flush()
    request.end()
    held.take_events()
    held.flush()
    assert held.take_events() == []
    assert served(held, range(8)) == 0
    assert [type(one) for one in held.take_events()] == [Cleared, Stored]


def test_events_wait_for_the_end_of_their_step() -> None:
    held = cache()
    held.begin_step()
    begun(held, range(8))
    assert held.take_events() == []
    held.end_step()
    assert len(held.take_events()) == 1


def test_a_window_needs_only_its_last_blocks() -> None:
    held = cache(blocks=64, window=8)
    first = begun(held, range(40))
    groups = [one.group for one in held.take_events() if isinstance(one, Stored)]
    assert [(one.number, one.kind, one.window) for one in groups if one is not None] == [
        (0, "sliding_window", 8),
        (1, "full_attention", None),
    ]
    first.grow(2, range)  # leaves what no further token sees
    first.end()
    assert served(held, range(40)) == 36
    assert served(held, range(20)) == 16


def test_a_window_that_was_evicted_limits_the_prefix() -> None:
    held = cache(blocks=24, window=8)
    request = begun(held, range(40))
    for produced in (1, 2):
        request.grow(produced, range)
    request.end()
    assert served(held, range(40)) == 36
    # The blocks that left the window are taken first: a shorter prefix has no window any more.
    served(held, range(100, 124))
    assert served(held, range(40)) == 36
    assert served(held, range(20)) == 0
