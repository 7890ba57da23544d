"""Bytes of KV events and load reports, as captured from engines."""

import msgspec
import pytest

from extproc.simulator.cache_events import (
    DEFAULT_NAMESPACE,
    CacheEvent,
    Cleared,
    Namespace,
    Page,
    Removed,
    Stored,
)
from extproc.simulator.engine import RankLoad
from extproc.simulator.kv_encoding import EventEncoder, encode_batch, encode_load
from extproc.simulator.settings import WireFormat


def stored(
    hashes: list[int],
    parent: int | None,
    pages: list[Page],
    namespace: Namespace = DEFAULT_NAMESPACE,
) -> Stored:
    return Stored(hashes, parent, pages, "GPU", namespace)


# The first batches of 2026 had ts = 1.5; what SGLang 0.5.23 and older builds sent for them.
@pytest.mark.parametrize(
    ("wire_format", "rank", "event", "expected"),
    [
        (
            "map",
            0,
            stored([-5], None, [(1, 2, 300)]),
            "93cb3ff80000000000009187a474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657391fb"
            "b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473930102cd012c"
            "aa626c6f636b5f73697a6503a76c6f72615f6964c0a66d656469756da347505500",
        ),
        (
            "map",
            0,
            Cleared(),
            "93cb3ff80000000000009181a474797065b0416c6c426c6f636b73436c656172656400",
        ),
        (
            "array",
            0,
            stored([-5], None, [(1, 2, 300)]),
            "93cb3ff80000000000009197ab426c6f636b53746f72656491fbc0930102cd012c03c0a347505500",
        ),
        (
            "array",
            1,
            Removed([2**63 - 1, -(2**63)], "CPU_PINNED"),
            "93cb3ff80000000000009193ac426c6f636b52656d6f76656492cf7fffffffffffffff"
            "d38000000000000000aa4350555f50494e4e454401",
        ),
        ("array", 0, Cleared(), "93cb3ff80000000000009191b0416c6c426c6f636b73436c656172656400"),
    ],
)
def test_events_match_those_of_the_engine(
    wire_format: WireFormat, rank: int, event: CacheEvent, expected: str
) -> None:
    wire_event = EventEncoder(wire_format, 3).wire_event(event)
    assert encode_batch(1.5, [wire_event], rank).hex() == expected


def test_a_chain_is_one_event_with_all_its_tokens() -> None:
    event = stored([11, -12, 13], 10, [(1, 2), (3, 4), (5, 6)])
    payload = encode_batch(1.5, [EventEncoder("map", 2).wire_event(event)], 1)
    assert payload.hex() == (
        "93cb3ff80000000000009187a474797065ab426c6f636b53746f726564ac626c6f636b5f686173686573930bf4"
        "0db1706172656e745f626c6f636b5f686173680aa9746f6b656e5f69647396010203040506"
        "aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da347505501"
    )


def test_the_metadata_of_arrays_is_a_map_at_the_end() -> None:
    event = stored([1], None, [(1,)], Namespace(cache_salt="tenant-a"))
    wire_event = EventEncoder("array", 1).wire_event(event)
    # The captured batch has no rank: its last byte is nil, here it is rank 0.
    assert encode_batch(1.5, [wire_event], 0).hex() == (
        "93cb3ff80000000000009198ab426c6f636b53746f7265649101c0910101c0a3475055"
        "81aa63616368655f73616c74a874656e616e742d6100"
    )


def test_opaque_pages_have_no_tokens_to_publish() -> None:
    with pytest.raises(TypeError, match="token ids"):
        EventEncoder("map", 1).wire_event(stored([1], None, ["page"]))


def test_a_load_report_begins_in_the_old_shape() -> None:
    load = RankLoad(
        running=1,
        waiting=2,
        used_tokens=30,
        waiting_tokens=40,
        waiting_uncached_tokens=25,
        prefilled_tokens=500,
        prefill_microseconds=60,
    )
    payload = encode_load(load, rank=3, max_total_num_tokens=1000, max_running_requests=8)
    assert msgspec.msgpack.decode(payload) == ["LoadStat", 1, 2, 30, 1000, 3, 25, 70, 8, 500, 60]
