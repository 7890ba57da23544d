"""Tests that one rank's encoded batches change the index as they should."""

from typing import Any

import msgspec
import numpy as np
import pytest
from structlog.testing import capture_logs

from extproc.kv.event_applier import EventApplier
from extproc.kv.events import LoadStat, WireError
from extproc.kv.index import PrefixIndex
from extproc.kv.prefix_hash import PrefixHasher
from extproc.kv.rank_pages import Overlap

_CLEARED = {"type": "AllBlocksCleared"}


class OneRank:
    """An applier with an index of its own, and the load reports it passed on."""

    def __init__(self, page_size: int = 4, *, bigram: bool = False) -> None:
        self.index = PrefixIndex(PrefixHasher(secret=3), 1_000_000)
        self.pages = self.index.add("http://w:1", page_size, dp_rank=3, bigram=bigram)
        self.loads: list[LoadStat] = []
        self.breaks = 0
        self.applier = EventApplier(
            self.index, self.pages, self.index.hasher.seed, self.loads.append, self.count_break
        )

    def count_break(self) -> None:
        self.breaks += 1

    def apply(self, *events: Any) -> int:
        """Apply a batch; gives the number of steps."""
        return 1 + sum(1 for _ in self.applier.apply(msgspec.msgpack.encode([1.5, events, 0])))

    def match(self, tokens: range, seed: int = 0) -> Overlap:
        found = self.index.match(np.array(tokens, np.uint64), [self.pages], seed)
        return found.get(self.pages, Overlap(0, 0, 0))


def stored(ids: range, first: int = 0, size: int = 4, **fields: Any) -> dict[str, Any]:
    """Pages whose tokens count up from `first`."""
    event = {
        "type": "BlockStored",
        "block_hashes": list(ids),
        "parent_block_hash": None,
        "token_ids": list(range(first, first + len(ids) * size)),
        "block_size": size,
    }
    return event | fields


def removed(ids: range, **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(ids), **fields}


def test_pages_are_stored_on_and_removed_from_every_medium() -> None:
    rank = OneRank()
    rank.apply(stored(range(1, 9)), stored(range(9, 11), first=32, parent_block_hash=8))
    assert rank.match(range(40)) == (10, 10, 10)
    for name, place in (("CPU_PINNED", 6), ("DISK", 8), ("EXTERNAL", 9)):
        moved = range(place + 1, 11)
        rank.apply(stored(moved, 4 * place, parent_block_hash=place, medium=name))
    rank.apply(removed(range(10, 6, -1)))
    rank.apply(removed(range(10, 8, -1), medium="CPU_PINNED"))
    assert rank.match(range(40)) == (10, 6, 8)
    rank.apply(removed(range(10, 9, -1), medium="EXTERNAL"))
    assert rank.match(range(40)) == (9, 6, 8)
    counts = rank.applier.counts
    assert (counts.stored_events, counts.removed_events) == (5, 3)
    assert (counts.stored_pages, counts.removed_pages) == ([10, 4, 3], [4, 2, 1])


def test_a_namespace_has_a_seed_of_its_own() -> None:
    rank = OneRank()
    rank.apply(stored(range(1, 3), cache_salt="tenant", lora_name="a"))
    assert rank.match(range(8)).pages == 0
    assert rank.match(range(8), rank.index.hasher.seed("tenant", "a")).pages == 2


def test_each_clear_empties_the_pages_and_starts_a_new_generation() -> None:
    rank = OneRank()
    pages = rank.pages
    rank.apply(stored(range(1, 3)), _CLEARED, stored(range(5, 6)))
    assert (rank.match(range(8)).pages, pages.generation) == (1, 1)
    rank.applier.clear("restarted")
    assert (pages.page_count, pages.generation) == (0, 2)
    rank.applier.clear("restarted")  # even though no page is held
    assert (pages.page_count, pages.generation) == (0, 3)


@pytest.mark.parametrize("large", [False, True], ids=["many pages", "many tokens"])
def test_a_huge_batch_is_applied_in_steps(large: bool) -> None:
    size = 64 if large else 1
    rank = OneRank(size)
    pages = 20_000
    steps = rank.apply(stored(range(1, pages + 1), size=size))
    assert steps > 20
    assert rank.match(range(pages * size)).pages == pages
    assert rank.apply(removed(range(pages, 0, -1))) > 20
    assert rank.pages.page_count == 0
    assert rank.applier.counts.stored_events >= 1


def test_a_huge_event_with_too_few_tokens_counts_each_of_its_pages_once() -> None:
    rank = OneRank()
    rank.apply(stored(range(1, 20_001), token_ids=[1, 2, 3]))
    assert (rank.index.counts.mismatched, rank.index.page_count) == (20_000, 0)


def test_pairs_of_tokens_are_accepted_while_no_page_is_held() -> None:
    rank = OneRank()
    pairs = [[n, n + 1] for n in range(8)]
    with capture_logs() as logs:
        rank.apply(stored(range(1, 3), token_ids=pairs))
        assert rank.match(range(9)).pages == 2
        assert rank.pages.bigram
        rank.apply(stored(range(5, 7)), stored(range(7, 9)))
    assert rank.applier.counts.foreign_unit_pages == 4
    assert rank.index.page_count == 2
    assert [line["event"] for line in logs] == ["kv_units_differ", "kv_units_mixed"]
    # After a clear the units may change.
    rank.apply(_CLEARED, stored(range(1, 3)))
    assert rank.match(range(8)).pages == 2
    assert not rank.pages.bigram


@pytest.mark.parametrize("expected", [1, 2, 3, 8, 64])
def test_the_page_size_is_taken_from_the_events(expected: int) -> None:
    rank = OneRank(expected)
    with capture_logs() as logs:
        rank.apply(stored(range(1, 4)))
        rank.apply(stored(range(4, 6), first=12, parent_block_hash=3))
    assert rank.pages.page_size == 4
    assert rank.match(range(20)).pages == 5
    assert rank.applier.counts.odd_sized_events == 1
    assert [line["event"] for line in logs] == ["kv_page_size_differs"]


def test_a_small_page_changes_the_page_size_once_another_page_follows_it() -> None:
    rank = OneRank(16)
    rank.apply(stored(range(1, 2)))
    assert rank.pages.page_size == 16  # the page may be the short end of a prompt
    rank.apply(stored(range(2, 3), first=4, parent_block_hash=1))
    assert rank.pages.page_size == 4
    assert rank.match(range(8)).pages == 2


def test_a_short_page_at_the_end_does_not_change_the_page_size() -> None:
    rank = OneRank()
    rank.apply(stored(range(1, 3)), stored(range(3, 4), first=8, size=3, parent_block_hash=2))
    assert rank.pages.page_size == 4
    assert rank.match(range(11)).pages == 2


@pytest.mark.parametrize(
    "event", [removed(range(1, 3), medium=3), {"type": "BlockRemoved"}, None, 7], ids=str
)
def test_a_batch_that_may_hide_a_removal_is_not_applied(event: Any) -> None:
    rank = OneRank()
    with pytest.raises(WireError):
        rank.apply(stored(range(1, 3)), event)
    assert rank.index.page_count == 0
    assert rank.applier.counts.unreadable_batches == 1


def test_an_unreadable_event_that_cannot_be_a_removal_is_left_out_and_counted() -> None:
    rank = OneRank()
    rank.apply(stored(range(1, 3)), {"type": "New"}, stored(range(3, 4), token_ids="x"))
    assert rank.match(range(8)).pages == 2
    assert rank.applier.counts.skipped_events == 2


def test_trust_is_kept_on_the_pages_and_outlives_a_clear() -> None:
    rank = OneRank()
    assert (rank.pages.trusted, rank.pages.reason) == (False, "connecting")
    for trusted, reason in ((False, "replaying"), (True, "partial"), (True, "complete")):
        rank.applier.set_trusted(trusted, reason)
        assert (rank.pages.trusted, rank.pages.reason) == (trusted, reason)
    rank.apply(stored(range(1, 3)), _CLEARED)
    assert (rank.pages.trusted, rank.pages.reason) == (True, "complete")


def test_a_load_report_is_passed_on_and_an_unreadable_one_counted() -> None:
    rank = OneRank()
    rank.applier.on_load(msgspec.msgpack.encode(["LoadStat", 1, 2, 3, 4, 0]))
    rank.applier.on_load(b"no report")
    assert rank.loads == [LoadStat(1, 2, 3, 4, 0)]
    assert rank.applier.counts.unreadable_loads == 1


@pytest.mark.parametrize(
    ("reason", "breaks"),
    [("disconnected", 1), ("reconnected", 1), ("restarted", 1), ("gap", 0), ("unreadable", 0)],
)
def test_a_process_that_may_be_another_one_is_reported(reason: str, breaks: int) -> None:
    rank = OneRank()
    rank.applier.clear(reason)
    assert rank.breaks == breaks
    rank.applier.set_trusted(False, reason)
    assert rank.breaks == 2 * breaks


def test_an_error_of_the_load_book_is_passed_on() -> None:
    """The subscriber counts it."""

    def fail(load: LoadStat) -> None:
        raise RuntimeError

    rank = OneRank()
    applier = EventApplier(rank.index, rank.pages, rank.index.hasher.seed, fail, rank.count_break)
    with pytest.raises(RuntimeError):
        applier.on_load(msgspec.msgpack.encode(["LoadStat", 1, 2, 3, 4, 0]))


def test_log_lines_name_the_worker_and_the_rank_in_fields_of_their_own() -> None:
    rank = OneRank(expected_page_size := 8)
    with capture_logs() as logs:
        rank.apply(stored(range(1, 4)))
    (line,) = logs
    assert (line["worker"], line["rank"]) == ("http://w:1", 3)
    assert line["expected"] == expected_page_size
