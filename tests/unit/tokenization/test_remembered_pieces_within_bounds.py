"""The cache of pieces drops the least recently used ones and bounds its memory."""

import tracemalloc

import pytest

from extproc.tokenization.caches import SegmentCache
from extproc.tokenization.text_encoder import TextEncoder
from tests.unit.tokenization.small_tokenizers import llama


def _filled(count: int, max_bytes: int) -> SegmentCache:
    cache = SegmentCache(max_bytes)
    for n in range(count):
        cache.put(f"piece {n}", bytes(4))
    return cache


def test_the_least_recently_used_piece_is_dropped_first() -> None:
    cache = SegmentCache(10_000)
    size = cache.put("piece 0", bytes(4))
    count = 10_000 // size
    for n in range(1, count):
        cache.put(f"piece {n}", bytes(4))
    assert (len(cache), cache.evictions) == (count, 0)
    assert cache.get("piece 0") == bytes(4)
    cache.put("one more", bytes(4))
    cache.put("and more", bytes(4))
    assert cache.get("piece 0") is not None
    assert cache.get("piece 1") is None
    assert cache.get("piece 2") is None or count < 3
    assert cache.evictions >= 2
    assert cache.bytes <= 10_000


def test_a_piece_is_cached_once() -> None:
    cache = SegmentCache(10_000)
    assert cache.put("piece", bytes(4)) > 0
    before = cache.bytes
    assert cache.put("piece", bytes(4)) == 0
    assert (cache.bytes, len(cache)) == (before, 1)


def test_a_piece_larger_than_a_share_is_not_cached() -> None:
    cache = _filled(20, 80_000)
    assert cache.put("x" * 10_001, bytes(4)) == 0
    assert cache.put("x", bytes(10_001)) == 0
    assert (len(cache), cache.evictions) == (20, 0)


@pytest.mark.parametrize("letter", ["x", "é", "你", "👍"])
def test_the_bound_holds_for_measured_memory(letter: str) -> None:
    """Wide characters cost up to four bytes each, and many small pieces their bookkeeping."""
    bound = 500_000
    for chars in (10, 300):
        tracemalloc.start()
        cache = SegmentCache(bound)
        before, _ = tracemalloc.get_traced_memory()
        for n in range(10_000):
            cache.put(f"{n}{letter * chars}", bytes(chars))
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert cache.evictions > 0
        assert 0.9 * bound < cache.bytes <= bound
        assert 0.7 * bound < after - before < 1.1 * bound


def test_one_request_does_not_push_out_the_pieces_of_others() -> None:
    encoder = TextEncoder(llama(), 400_000)
    others = [f"{n} is a question of another client, in some more words." for n in range(100)]
    for text in others:
        encoder.encode(encoder.look_up(text, False))
    huge = "\n".join(f"line {n} of a text that comes only once" for n in range(20_000))
    encoder.encode(encoder.look_up(huge, False))
    assert len(encoder.cache) > 100
    assert all(not encoder.look_up(text, False).missing for text in others)
    assert encoder.cache.evictions == 0
