"""Tests that a batch decoded in parts means the same as the whole batch."""

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.kv import wire_chunks
from extproc.kv.events import (
    PAYLOAD_MAX_BYTES,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    WireError,
)
from extproc.kv.wire import decode_events
from extproc.kv.wire_chunks import decode_in_parts

_encode = msgspec.msgpack.encode
_HASHES = st.integers(-(2**63), 2**64 - 1) | st.binary(min_size=8, max_size=40)
_TOKENS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_chunks, "_PART_BYTES", 60)
    monkeypatch.setattr(wire_chunks, "_UNITS_PER_PIECE", 6)


_KEYS = st.none() | st.lists(
    st.sampled_from(["adapter", "salt", ["image", 3], ["image", -2], b"digest"]), max_size=3
)


def _keys(count: int) -> st.SearchStrategy[dict[str, Any]]:
    """What an event of vLLM says besides: no adapter, and the keys of each block."""
    keys = st.none() | st.lists(_KEYS, min_size=count, max_size=count)
    return st.just({}) | keys.map(lambda one: {"lora_name": None, "extra_keys": one})


@st.composite
def _stored(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.integers(1, 9))
    hashes = draw(st.lists(_HASHES, max_size=20))
    units: st.SearchStrategy[Any] = _TOKENS
    if draw(st.booleans()):
        units = st.tuples(_TOKENS, _TOKENS)
    count = len(hashes) * size
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": draw(st.none() | _HASHES),
        "token_ids": draw(st.lists(units, min_size=count, max_size=count)),
        "block_size": size,
        "lora_id": None,
        "medium": draw(st.sampled_from(["GPU", "CPU_PINNED", None])),
        **draw(_keys(len(hashes))),
    }


_EVENTS = st.one_of(
    _stored(),
    st.fixed_dictionaries({"type": st.just("BlockRemoved"), "block_hashes": st.lists(_HASHES)}),
    st.just({"type": "AllBlocksCleared"}),
    st.just({"type": "Unknown", "x": list(range(100))}),
)


def _array(event: dict[str, Any]) -> list[Any]:
    return [event["type"], *(value for name, value in event.items() if name != "type")]


def _blocks(events: list[KvEvent]) -> list[tuple[Any, ...]]:
    """Block by block, so that the cuts in a chain do not show."""
    found: list[tuple[Any, ...]] = []
    for event in events:
        if isinstance(event, AllBlocksCleared):
            found.append(("cleared",))
        elif isinstance(event, BlockRemoved):
            found += [("removed", one, event.medium) for one in event.block_hashes]
        else:
            found += _stored_blocks(event)
    return found


def _stored_blocks(event: BlockStored) -> list[tuple[Any, ...]]:
    parents = [event.parent_block_hash, *event.block_hashes]
    size = event.block_size
    return [
        (one, parents[n], event.tokens[n * size : (n + 1) * size].tolist(), event.medium)
        for n, one in enumerate(event.block_hashes)
    ]


@settings(max_examples=200, deadline=None)
@given(events=st.lists(_EVENTS, min_size=1, max_size=8), arrays=st.booleans())
def test_the_parts_together_equal_the_whole_batch(
    events: list[dict[str, Any]], arrays: bool
) -> None:
    shaped = [_array(event) for event in events] if arrays else events
    payload = _encode([1.5, shaped, 3])
    whole = decode_events(payload)
    parts = list(decode_in_parts(payload))
    assert _blocks([e for part in parts for e in part.events]) == _blocks(whole.events)
    assert sum(part.skipped for part in parts) == whole.skipped
    assert {(part.timestamp, part.dp_rank) for part in parts} == {(1.5, 3)}
    assert len(parts) > 1 or len(payload) < 1000


def test_no_piece_is_too_large() -> None:
    event = {
        "type": "BlockStored",
        "block_hashes": list(range(100)),
        "parent_block_hash": None,
        "token_ids": list(range(200)),
        "block_size": 2,
    }
    for part in decode_in_parts(_encode([1.5, [event], 0])):
        for piece in part.events:
            assert isinstance(piece, BlockStored)
            assert len(piece.tokens) <= 6


def test_tokens_that_do_not_fit_the_blocks_are_left_out_of_all_pieces() -> None:
    event = {
        "type": "BlockStored",
        "block_hashes": list(range(100)),
        "parent_block_hash": None,
        "token_ids": list(range(199)),
        "block_size": 2,
    }
    pieces = [e for part in decode_in_parts(_encode([1.5, [event], 0])) for e in part.events]
    assert all(isinstance(piece, BlockStored) and not len(piece.tokens) for piece in pieces)
    assert len(_blocks(pieces)) == 100


def _ignore_until_error(payload: bytes) -> None:
    for _ in decode_in_parts(payload):
        pass


@pytest.mark.parametrize(
    "event",
    [
        {"type": "BlockRemoved", "block_hashes": [1.5] * 100},
        {"type": "BlockRemoved", "block_hashes": "x" * 100},
        {"type": "BlockRemoved", "hashes": [1] * 100},
        {"type": "BlockStored", "block_hashes": [1] * 100, "token_ids": [1], "block_size": "x"},
        {"type": 5, "block_hashes": [1] * 100},
        ["BlockStored", [1] * 100],
        ["BlockRemoved"] + [[1]] * 100,
        [None] * 100,
        "x" * 100,
    ],
    ids=lambda event: str(event)[:40],
)
def test_large_malformed_events_are_refused_or_skipped(event: Any) -> None:
    try:
        parts = list(decode_in_parts(_encode([1.5, [event, {"type": "AllBlocksCleared"}], 0])))
    except WireError:
        return
    assert any(part.removals_lost or part.skipped for part in parts)


def test_too_large_payloads_are_refused() -> None:
    with pytest.raises(WireError, match="larger than"):
        _ignore_until_error(bytes(PAYLOAD_MAX_BYTES + 1))


@settings(max_examples=300, deadline=None)
@given(events=st.lists(_EVENTS, min_size=1, max_size=4), data=st.data())
def test_mutated_payloads_are_decoded_or_refused(events: list[Any], data: st.DataObject) -> None:
    changed = bytearray(_encode([1.5, events, 0]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    with suppress(WireError):
        _ignore_until_error(bytes(changed))


@given(st.binary(min_size=61, max_size=300))
def test_random_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        _ignore_until_error(b"\xc1" + payload)
