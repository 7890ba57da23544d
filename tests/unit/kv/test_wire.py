"""Tests the wire decoder with payloads of real engines and with invalid ones."""

import json
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.kv import events as kv_events
from extproc.kv.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    LoadStat,
    Medium,
    WireError,
)
from extproc.kv.wire import decode_events, decode_load

_VECTORS = json.loads(
    (Path(__file__).parents[2] / "fixtures" / "kv-event-vectors.json").read_text()
)
_MEDIUMS = {"GPU": Medium.GPU, "CPU_PINNED": Medium.HOST}
_encode = msgspec.msgpack.encode
_CLEARED = {"type": "AllBlocksCleared"}
_CLEARED_ARRAY = ["AllBlocksCleared"]
_UNKNOWN = {"type": "BlockRenamed", "x": 1}


def _payloads(section: str) -> list[Any]:
    return [
        pytest.param(case, bytes.fromhex(case["payload_hex"]), id=case["name"])
        for case in _VECTORS[section]
    ]


def _stored(**fields: Any) -> dict[str, Any]:
    event = {
        "type": "BlockStored",
        "block_hashes": [5],
        "parent_block_hash": None,
        "token_ids": [1, 2],
        "block_size": 2,
    }
    return event | fields


def _removed(**fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": [5], **fields}


def _decoded(*events: Any) -> EventBatch:
    return decode_events(_encode([1.5, events, 0]))


def _only(event: Any) -> BlockStored:
    """The only event of a batch, a BlockStored."""
    batch = _decoded(event)
    assert batch.skipped == 0
    (found,) = batch.events
    assert isinstance(found, BlockStored)
    return found


def _comparable(event: object) -> dict[str, Any]:
    """An event in the form of the test vectors."""
    if isinstance(event, AllBlocksCleared):
        return {"type": "AllBlocksCleared"}
    if isinstance(event, BlockRemoved):
        return {"type": "BlockRemoved", "hashes": event.block_hashes, "medium": event.medium}
    assert isinstance(event, BlockStored)
    assert event.tokens.dtype == np.uint64
    # The group has a test of its own.
    names = event.__struct_fields__[: -len(("group", "kind", "window"))]
    fields: dict[str, Any] = {name: getattr(event, name) for name in names}
    ids = [[unit & 0xFFFFFFFF, unit >> 32] for unit in event.tokens.tolist()]
    fields["tokens"] = ids if event.bigram else [first for first, _ in ids]
    assert event.bigram or not any(second for _, second in ids)
    return {"type": "BlockStored", **fields}


def _expected(event: dict[str, Any]) -> dict[str, Any]:
    if event["type"] == "AllBlocksCleared":
        return event
    medium = _MEDIUMS[event["medium"]]
    if event["type"] == "BlockRemoved":
        return {"type": "BlockRemoved", "hashes": event["block_hashes"], "medium": medium}
    return {
        "type": "BlockStored",
        "block_hashes": event["block_hashes"],
        "parent_block_hash": event["parent_block_hash"],
        "tokens": event["token_ids"],
        "bigram": isinstance(event["token_ids"][0], list),
        "block_size": event["block_size"],
        "medium": medium,
        "cache_salt": event.get("cache_salt"),
        "lora": event.get("lora_name"),
    }


# -- payloads of engines


@pytest.mark.parametrize(("case", "payload"), _payloads("valid"))
def test_batches_of_real_engines_are_decoded(case: dict[str, Any], payload: bytes) -> None:
    batch = decode_events(payload)
    assert [_comparable(event) for event in batch.events] == [
        _expected(event) for event in case["events"]
    ]
    assert batch.dp_rank == case["dp_rank"]
    assert batch.timestamp == 1.5
    assert batch.skipped == ("unknown" in case["name"])


@pytest.mark.parametrize(("case", "payload"), _payloads("malformed"))
def test_a_payload_that_is_not_a_batch_is_refused(case: dict[str, Any], payload: bytes) -> None:
    with pytest.raises(WireError):
        decode_events(payload)


@pytest.mark.parametrize(("case", "payload"), _payloads("load"))
def test_load_reports_of_real_engines_are_decoded(case: dict[str, Any], payload: bytes) -> None:
    given = {
        name: value
        for name, value in msgspec.structs.asdict(decode_load(payload)).items()
        if value is not None
    }
    # The report of a future version has zeros in all known fields.
    assert {name: given[name] for name in case["expect"]} == case["expect"]
    assert all(value == 0 for name, value in given.items() if name not in case["expect"])


def test_maps_and_arrays_in_one_batch_keep_their_order() -> None:
    array = ["BlockRemoved", [2], "CPU_PINNED"]
    batch = _decoded(_removed(), array, _CLEARED, _CLEARED_ARRAY, list(_stored().values()))
    first, second, third, fourth, fifth = batch.events
    assert first == BlockRemoved([5], Medium.GPU)
    assert second == BlockRemoved([2], Medium.HOST)
    assert isinstance(third, AllBlocksCleared)
    assert isinstance(fourth, AllBlocksCleared)
    assert isinstance(fifth, BlockStored)
    assert fifth.tokens.tolist() == [1, 2]


def test_the_kind_of_an_event_need_not_come_first() -> None:
    event = dict(reversed(_stored().items()))
    assert _only(event).block_hashes == [5]


def test_unknown_fields_of_a_batch_are_ignored() -> None:
    assert decode_events(_encode([2, [_CLEARED], 3, "later"])).dp_rank == 3


def test_a_batch_may_be_empty() -> None:
    assert _decoded() == EventBatch(1.5, [], 0, 0)


@pytest.mark.parametrize(
    ("name", "medium"),
    [
        (None, Medium.GPU),
        ("GPU", Medium.GPU),
        ("CPU_PINNED", Medium.HOST),
        ("CPU", Medium.HOST),
        ("DISK", Medium.DISK),
        ("EXTERNAL", Medium.EXTERNAL),
        ("TAPE", Medium.EXTERNAL),
    ],
)
def test_each_name_of_a_medium_is_known(name: str | None, medium: Medium) -> None:
    assert _only(_stored(medium=name)).medium is medium
    assert _decoded(_removed(medium=name)).events == [BlockRemoved([5], medium)]


@pytest.mark.parametrize(
    ("fields", "lora"),
    [
        ({}, None),
        ({"lora_id": 3}, 3),
        ({"lora_id": "3f"}, "3f"),
        ({"lora_id": 3, "lora_name": "a"}, "a"),
        ({"lora_id": 3, "lora_name": ""}, 3),
    ],
)
def test_the_adapter_is_its_name_or_else_its_id(fields: dict[str, Any], lora: object) -> None:
    assert _only(_stored(**fields)).lora == lora


def test_an_empty_salt_is_the_same_as_no_salt() -> None:
    assert _only(_stored(cache_salt="")).cache_salt is None


def test_metadata_of_an_array_names_salt_and_adapter() -> None:
    metadata = {"session_id": "s", "cache_salt": "salt", "lora_name": "a", "more": [1]}
    event = _only([*_stored().values(), None, None, metadata])
    assert (event.cache_salt, event.lora) == ("salt", "a")


def test_events_of_hybrid_models_name_their_group() -> None:
    kind = {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 512}
    stored = [*_stored().values(), None, "GPU", None, None, 7, *kind.values()]
    removed = ["BlockRemoved", [1], "GPU", 7]
    for event in (_stored(group_idx=7, **kind), stored):
        found = _only(event)
        assert (found.group, found.kind, found.window) == (7, "sliding_window", 512)
    for event in (_removed(group_idx=7), removed):
        (gone,) = _decoded(event).events
        assert isinstance(gone, BlockRemoved)
        assert gone.group == 7


@pytest.mark.parametrize(
    ("keys", "lora", "salt"),
    [
        (None, None, None),
        ([None, ["later"]], None, None),
        ([["salt"], None], None, "salt"),
        ([["a"]], "a", None),
        ([["a", "salt"]], "a", "salt"),
        ([["a", ["image", 3], "salt", b"digest"]], "a", "salt"),
        ([[["image", -5]]], None, None),
        ([[""]], None, None),
        ([], None, None),
    ],
)
def test_a_salt_is_found_among_the_keys_of_the_first_block(
    keys: Any, lora: str | None, salt: str | None
) -> None:
    array = [*_stored().values(), None, "GPU", lora, keys]
    for event in (_stored(extra_keys=keys, lora_name=lora), array):
        found = _only(event)
        assert (found.cache_salt, found.lora) == (salt, lora)


def test_keys_of_blocks_that_follow_others_name_no_salt() -> None:
    assert _only(_stored(parent_block_hash=3, extra_keys=[["text"]])).cache_salt is None


# What vLLM 0.32 publishes for an image of eight tokens after three others, in blocks of four.
_IMAGE = "cat-1"
_SEEN: dict[str, Any] = {
    "block_hashes": [5, 6, 7, 8],
    "token_ids": [1, 2, 3, 9, 9, 9, 9, 9, 9, 9, 9, 4, 5, 6, 7, 8],
    "block_size": 4,
    "extra_keys": [[[_IMAGE, 3]], [[_IMAGE, -1]], [[_IMAGE, -5]], None],
}


def test_blocks_with_an_image_are_not_those_of_their_tokens() -> None:
    plain = _stored(**_SEEN)
    keys = plain.pop("extra_keys")
    array = [*plain.values(), None, "GPU", None, keys]
    for event in (_stored(**_SEEN), array):
        found = _only(event)
        assert found.cache_salt is None
        tokens = found.tokens.tolist()
        assert [index for index, token in enumerate(tokens) if token >> 32] == [0, 4, 8]
        ids = _SEEN["token_ids"]
        assert tokens[1:4] + tokens[5:8] + tokens[9:] == ids[1:4] + ids[5:8] + ids[9:]


def test_the_same_image_at_the_same_place_has_the_same_blocks() -> None:
    def tokens(identifier: str, offset: int) -> list[int]:
        keys = [["lora", [identifier, offset], "salt"]]
        found = _only(_stored(extra_keys=keys, lora_name="lora"))
        assert (found.cache_salt, found.lora) == ("salt", "lora")
        ids: list[int] = found.tokens.tolist()
        return ids

    assert tokens("a", 1) == tokens("a", 1)
    assert len({tuple(tokens(*place)) for place in (("a", 1), ("a", 0), ("b", 1))}) == 3


def test_blocks_with_embeddings_are_not_those_of_their_tokens() -> None:
    assert _only(_stored(extra_keys=[[b"digest"]])).tokens[0] >> 32


@pytest.mark.parametrize("keys", [[["x" * 1025]], {"a": 1}, [3]])
def test_keys_of_blocks_that_cannot_be_read_cost_only_their_event(keys: Any) -> None:
    batch = _decoded(_stored(extra_keys=keys), _removed())
    assert (len(batch.events), batch.skipped, batch.removals_lost) == (1, 1, False)


def test_an_event_may_name_known_blocks_without_tokens() -> None:
    event = _only(_stored(token_ids=[], block_size=0, medium="CPU", group_idx=0))
    assert (event.block_size, len(event.tokens), event.medium) == (0, 0, Medium.HOST)


@pytest.mark.parametrize(("name", "medium"), [("CPU", Medium.HOST), ("STORAGE", Medium.DISK)])
def test_the_media_of_vllm_are_known(name: str, medium: Medium) -> None:
    assert _only(_stored(medium=name)).medium is medium


def test_pairs_become_units_of_two_tokens() -> None:
    top = 2**32 - 1
    event = _only(_stored(token_ids=[[0, 1], [1, 300], [300, top], [top, 0]]))
    assert event.bigram
    assert event.tokens.tolist() == [1 << 32, 300 << 32 | 1, top << 32 | 300, top]


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_token_ids_of_all_widths(ids: list[int]) -> None:
    event = _only(_stored(token_ids=ids))
    assert event.tokens.tolist() == ids
    assert event.tokens.dtype == np.uint64
    assert not event.bigram


@given(st.lists(st.integers(-(2**63), 2**64 - 1) | st.binary(min_size=8, max_size=40)))
def test_hashes_fold_to_64_bits(hashes: list[int | bytes]) -> None:
    folded = [
        one % 2**64 if isinstance(one, int) else int.from_bytes(one, "big") % 2**64
        for one in hashes
    ]
    parent = hashes[0] if hashes else None
    event = _only(_stored(block_hashes=hashes, parent_block_hash=parent))
    assert event.block_hashes == folded
    assert event.parent_block_hash == (folded[0] if hashes else None)


# -- invalid payloads

_BAD_EVENTS = [
    *(
        _stored(token_ids=ids)
        for ids in (
            None,
            7,
            "12",
            [1, -1],
            [1, 2**32],
            [1, True],
            [1, 2.0],
            [1, "2"],
            [1, None],
            [1, [1, 2]],
            [[1, 2], 1],
            [[1]],
            [[1, 2, 3]],
            [[1, -2]],
            [[1, 2**32]],
            [[1, True]],
        )
    ),
    *(_stored(block_size=size) for size in (0, -1, 1.5, None, 2**40)),
    *(_stored(block_hashes=hashes) for hashes in (None, 1, [1.5], [None], [b""], [b"seven.."])),
    *(_stored(parent_block_hash=parent) for parent in (1.5, "x", b"", [1])),
    _stored(cache_salt=1),
    _stored(lora_name=[1]),
    _stored(medium=1),
    _stored(group_idx="x"),
    _removed(block_hashes=[True]),
    {"type": "BlockStored"},
    {"type": "BlockRemoved"},
    {"type": 5},
    {"block_hashes": [1]},
    {},
    [],
    [5],
    ["BlockStored", [1]],
    ["Unknown", 1, 2],
    None,
    3,
    "AllBlocksCleared",
    {1: 2},
    {"type": b"\xff\xff"},
]


@pytest.mark.parametrize("bad", _BAD_EVENTS, ids=repr)
@pytest.mark.parametrize("neighbour", [_CLEARED, _CLEARED_ARRAY, _UNKNOWN], ids=str)
def test_one_malformed_event_does_not_cost_the_others(bad: Any, neighbour: Any) -> None:
    unknown = neighbour is _UNKNOWN
    batch = _decoded(neighbour, bad, _removed())
    assert batch.skipped == 1 + unknown
    assert len(batch.events) == 2 - unknown
    assert batch.events[-1] == BlockRemoved([5], Medium.GPU)


def test_malformed_tokens_and_unknown_kinds_are_only_counted() -> None:
    assert _decoded(_stored(token_ids=[-1])) == EventBatch(1.5, [], 0, 1)
    assert _decoded(_stored(token_ids="x"), _UNKNOWN, ["Unknown"]) == EventBatch(1.5, [], 0, 3)


@pytest.mark.parametrize(
    ("bad", "lost"),
    [
        (_UNKNOWN, False),
        (["Unknown"], False),
        (_stored(token_ids=[-1]), False),
        (_stored(block_size=0), False),
        (_removed(medium=1), True),
        (_removed(block_hashes=[b"seven.."]), True),
        (_removed(block_hashes=[None]), True),
        (["BlockRemoved", [1], 5], True),
        ({"type": "BlockRemoved"}, True),
        ({"block_hashes": [1]}, True),
        (None, True),
    ],
    ids=repr,
)
def test_events_that_may_have_been_removals_are_marked(bad: Any, lost: bool) -> None:
    batch = _decoded(_CLEARED, bad)
    assert (batch.skipped, batch.removals_lost) == (1, lost)


@pytest.mark.parametrize("events", [[3], [{}], [_removed(block_hashes=["x"]), None]], ids=repr)
def test_a_batch_without_a_readable_event_is_refused(events: list[Any]) -> None:
    with pytest.raises(WireError):
        _decoded(*events)


@pytest.mark.parametrize(
    "batch",
    [
        [1.5],
        [],
        {},
        ["x", []],
        [None, []],
        [float("nan"), []],
        [float("inf"), [_CLEARED]],
        [1.5, {}],
        [1.5, None],
        [1.5, [], "x"],
        [1.5, [], 1.5],
        {"events": []},
        {"ts": 1.5},
        None,
        5,
    ],
    ids=repr,
)
def test_other_outer_forms_are_refused(batch: Any) -> None:
    with pytest.raises(WireError):
        decode_events(_encode(batch))


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(WireError):
        decode_events(_encode([1.5, [_CLEARED], 0]) + b"\x00")


def test_errors_do_not_quote_the_payload() -> None:
    secret = "what the patient said"
    payloads = [
        _encode([1.5, [secret], 0]),
        _encode([1.5, [_removed(block_hashes=[secret])], 0]),
        _encode([1.5, [], secret]),
        _encode(secret),
        _encode([secret, 1]),
    ]
    for decode in (decode_events, decode_load):
        for payload in payloads:
            with pytest.raises(WireError) as caught:
                decode(payload)
            assert "patient" not in str(caught.value)
            assert caught.value.__suppress_context__


# -- limits


def test_too_long_names_are_refused() -> None:
    most = "x" * kv_events.NAME_MAX_CHARS
    assert _only(_stored(cache_salt=most, lora_name=most)).cache_salt == most
    for field in ("cache_salt", "lora_name", "lora_id", "medium"):
        assert _decoded(_CLEARED, _stored(**{field: most + "x"})).skipped == 1
    metadata = [*_stored().values(), None, None, {"cache_salt": most + "x"}]
    assert _decoded(_CLEARED, metadata).skipped == 1


def test_too_many_tokens_or_blocks_are_refused() -> None:
    tokens = [1] * kv_events.TOKENS_MAX_PER_EVENT
    assert len(_only(_stored(token_ids=tokens)).tokens) == kv_events.TOKENS_MAX_PER_EVENT
    assert _decoded(_stored(token_ids=[*tokens, 1]), _CLEARED).skipped == 1
    blocks = [1] * (kv_events.BLOCKS_MAX_PER_EVENT + 1)
    batch = _decoded(_stored(block_hashes=blocks), _removed(block_hashes=blocks), _CLEARED)
    assert batch == EventBatch(1.5, [AllBlocksCleared()], 0, 2, removals_lost=True)


def test_too_many_events_are_refused() -> None:
    one = _encode(_CLEARED_ARRAY)
    most = kv_events.EVENTS_MAX_PER_BATCH

    def batch(count: int) -> bytes:
        return b"\x92\x00\xdd" + count.to_bytes(4, "big") + one * count

    assert len(decode_events(batch(most)).events) == most
    with pytest.raises(WireError):
        decode_events(batch(most + 1))


def test_too_large_payloads_are_refused() -> None:
    for decode in (decode_events, decode_load):
        with pytest.raises(WireError, match="larger than"):
            decode(bytes(kv_events.PAYLOAD_MAX_BYTES + 1))


@pytest.mark.parametrize("head", [b"\x91", b"\x81\xa1x", b"\x81\xa4type"], ids=repr)
@pytest.mark.parametrize(
    "before", [b"", b"\x92\x00\x91", b"\x93\x00\x91\x81\xa1x", b"\x97\xa8LoadStat\x00\x00"]
)
def test_deep_nesting_is_refused(before: bytes, head: bytes) -> None:
    for decode in (decode_events, decode_load):
        with pytest.raises(WireError):
            decode(before + head * 200_000)


@pytest.mark.parametrize("head", [b"\xdd", b"\xdf", b"\xc6", b"\xdb"], ids=repr)
def test_announced_sizes_without_content_are_refused(head: bytes) -> None:
    size = b"\xff\xff\xff\xff"
    hashes = _encode("block_hashes")
    for before in (b"", b"\x92\x00", b"\x92\x00\x91", b"\x92\x00\x91\x81" + hashes):
        with pytest.raises(WireError):
            decode_events(before + head + size)


# -- load


@pytest.mark.parametrize(
    "report",
    [
        [],
        ["LoadStat"],
        ["LoadStat", 1, 1, 1, 1],
        ["Other", 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        ["LoadStat", -1, 1, 1, 1, 0],
        ["LoadStat", 1, 1, 1, 1, -1],
        ["LoadStat", 1, 1.5, 1, 1, 0],
        ["LoadStat", 1, True, 1, 1, 0],
        ["LoadStat", 1, None, 1, 1, 0],
        ["LoadStat", 1, "1", 1, 1, 0],
        ["LoadStat", 2**63, 1, 1, 1, 0],
        ["LoadStat", 1, 1, 1, 1, 0, -5],
        ["LoadStat", 1, 1, 1, 1, 0, 1, 1, 1, 1, "x"],
        {"type": "LoadStat"},
        "LoadStat",
    ],
    ids=repr,
)
def test_impossible_load_reports_are_refused(report: Any) -> None:
    with pytest.raises(WireError):
        decode_load(_encode(report))


def test_later_fields_of_a_load_report_may_be_null() -> None:
    report = ["LoadStat", 1, 2, 3, 4, 0, None, 7]
    assert decode_load(_encode(report)) == LoadStat(1, 2, 3, 4, 0, None, 7)


# -- random payloads

_GOOD = [bytes.fromhex(case["payload_hex"]) for case in _VECTORS["valid"] + _VECTORS["load"]]


def _survives(payload: bytes) -> None:
    for decode in (decode_events, decode_load):
        with suppress(WireError):
            decode(payload)


@given(st.binary(max_size=200))
def test_random_bytes_raise_only_wire_errors(payload: bytes) -> None:
    _survives(payload)


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_ten_thousand_random_bytes_raise_only_wire_errors(seed: int) -> None:
    noise = Random(seed).randbytes(10_000)
    for before in (b"", b"\x93\x00\xdc\xff\xff", b"\x93\x00\xdd\x00\x00\x00\x08"):
        _survives(before + noise)


@given(st.sampled_from(_GOOD), st.data())
def test_truncated_payloads_are_refused(payload: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(WireError):
        decode_events(payload[:cut])
    _survives(payload[:cut])


@settings(max_examples=500)
@given(st.sampled_from(_GOOD), st.data())
def test_mutated_payloads_are_decoded_or_refused(payload: bytes, data: st.DataObject) -> None:
    changed = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        if not changed:
            break
    _survives(bytes(changed))


_ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=9)
    | st.sampled_from(["GPU", "BlockStored", "BlockRemoved", "AllBlocksCleared", "type", "x"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(sorted(_stored(medium=0, group_idx=0))), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(st.lists(_ANYTHING, max_size=4))
def test_every_event_is_applied_or_counted(events: list[Any]) -> None:
    batch = _decoded(*events, _CLEARED, {**_removed(), "group_idx": 0})
    assert len(batch.events) + batch.skipped <= len(events) + 2
    assert batch.events[-2:] == [AllBlocksCleared(), BlockRemoved([5], Medium.GPU, 0)]
