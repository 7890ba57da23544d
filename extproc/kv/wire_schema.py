"""The msgpack schema of event batches, and the parser that reads batches into it.

The usual batch has events of one form and no errors, so it is decoded in one typed pass. A batch
that fails this pass is decoded event by event, at about twice the cost, and only events that cannot
be decoded are left out: losing a removal because of a malformed event beside it would leave pages
in the index that the engine has dropped.
"""

from collections.abc import Sequence
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta, Raw, Struct

from extproc.kv.events import (
    BLOCK_MAX_TOKENS,
    BLOCKS_MAX_PER_EVENT,
    EVENTS_MAX_PER_BATCH,
    NAME_MAX_CHARS,
    TOKENS_MAX_PER_EVENT,
    WireError,
)

__all__ = [
    "UNREADABLE",
    "ClearedArray",
    "ClearedMap",
    "EventArray",
    "EventMap",
    "Hash",
    "Metadata",
    "Parsed",
    "RawBatch",
    "Removed",
    "RemovedArray",
    "RemovedMap",
    "Stored",
    "StoredArray",
    "StoredMap",
    "Unit",
    "is_map",
    "parse",
    "parse_raw",
]

_GROUP_MAX: Final = 1 << 16
_KINDS_WITH_BLOCKS: Final = ("BlockStored", "BlockRemoved")
_KINDS_THAT_REMOVE: Final = ("BlockRemoved", "AllBlocksCleared")
# msgspec's errors and those of text that is not UTF-8 are ValueErrors; too deep nesting raises
# RecursionError.
UNREADABLE: Final = (ValueError, RecursionError)

Hash: TypeAlias = int | bytes
_Hashes: TypeAlias = Annotated[list[Hash], Meta(max_length=BLOCKS_MAX_PER_EVENT)]
_Name: TypeAlias = Annotated[str, Meta(max_length=NAME_MAX_CHARS)]
Unit: TypeAlias = int | tuple[int, int]
_Units: TypeAlias = Annotated[tuple[Unit, ...], Meta(max_length=TOKENS_MAX_PER_EVENT)]
# vLLM's offloading connector says 0 where it knows only the names of the blocks.
_BlockSize: TypeAlias = Annotated[int, Meta(ge=0, le=BLOCK_MAX_TOKENS)]
_Group: TypeAlias = Annotated[int, Meta(ge=0, le=_GROUP_MAX)]
_Window: TypeAlias = Annotated[int, Meta(ge=0, le=TOKENS_MAX_PER_EVENT)]


class Stored(Struct):
    block_hashes: _Hashes
    parent_block_hash: Hash | None
    token_ids: _Units
    block_size: _BlockSize
    lora_id: int | _Name | None = None
    medium: _Name | None = None


class StoredMap(Stored, tag="BlockStored"):
    cache_salt: _Name | None = None
    lora_name: _Name | None = None
    # For each block what its hash depends on besides tokens, or null; decoded where it is needed.
    extra_keys: Raw = Raw()
    group_idx: _Group | None = None
    kv_cache_spec_kind: _Name | None = None
    kv_cache_spec_sliding_window: _Window | None = None


class Metadata(Struct):
    cache_salt: _Name | None = None
    lora_name: _Name | None = None


class StoredArray(Stored, tag="BlockStored", array_like=True):
    # vLLM has the LoRA name here, SGLang a map.
    naming: _Name | Metadata | None = None
    extra_keys: Raw = Raw()
    group_idx: _Group | None = None
    kv_cache_spec_kind: _Name | None = None
    kv_cache_spec_sliding_window: _Window | None = None


class Removed(Struct):
    block_hashes: _Hashes
    medium: _Name | None = None
    group_idx: _Group | None = None


class RemovedMap(Removed, tag="BlockRemoved"):
    pass


class RemovedArray(Removed, tag="BlockRemoved", array_like=True):
    pass


class ClearedMap(Struct, tag="AllBlocksCleared"):
    pass


class ClearedArray(Struct, tag="AllBlocksCleared", array_like=True):
    pass


class _HeadMap(Struct):
    type: str
    block_hashes: Raw = Raw()


class _HeadArray(Struct, array_like=True):
    type: str
    block_hashes: Raw = Raw()


EventMap: TypeAlias = StoredMap | RemovedMap | ClearedMap
EventArray: TypeAlias = StoredArray | RemovedArray | ClearedArray
_Limit: Final = Meta(max_length=EVENTS_MAX_PER_BATCH)


class _BatchOfMaps(Struct, array_like=True):
    ts: float
    events: Annotated[list[EventMap], _Limit]
    dp_rank: int | None = None


class _BatchOfArrays(Struct, array_like=True):
    ts: float
    events: Annotated[list[EventArray], _Limit]
    dp_rank: int | None = None


class RawBatch(Struct, array_like=True):
    """A batch whose events are not decoded."""

    ts: float
    events: Annotated[list[Raw], _Limit]
    dp_rank: int | None = None


class _RawBatchMap(Struct):
    ts: float
    events: Annotated[list[Raw], _Limit]
    dp_rank: int | None = msgspec.field(default=None, name="data_parallel_rank")


_uniform_decoders: Final = (
    msgspec.msgpack.Decoder(_BatchOfMaps),
    msgspec.msgpack.Decoder(_BatchOfArrays),
)
_raw_batch_decoder: Final = msgspec.msgpack.Decoder(RawBatch)
_raw_batch_map_decoder: Final = msgspec.msgpack.Decoder(_RawBatchMap)
_map_decoder: Final = msgspec.msgpack.Decoder(EventMap)
_array_decoder: Final = msgspec.msgpack.Decoder(EventArray)
_head_map_decoder: Final = msgspec.msgpack.Decoder(_HeadMap)
_head_array_decoder: Final = msgspec.msgpack.Decoder(_HeadArray)
_hashes_decoder: Final = msgspec.msgpack.Decoder(_Hashes)


class Parsed(Struct):
    """A batch without its `skipped` events; `removals_lost` if they may have been removals."""

    ts: float
    events: Sequence[EventMap | EventArray]
    dp_rank: int | None
    skipped: int = 0
    removals_lost: bool = False


def parse(payload: bytes) -> Parsed:
    """Read a batch; raises one of UNREADABLE if it is not a batch."""
    for decoder in _uniform_decoders:
        try:
            batch = decoder.decode(payload)
        except UNREADABLE:
            continue
        return Parsed(batch.ts, batch.events, batch.dp_rank)
    raw_batch = parse_raw(payload)
    events: list[EventMap | EventArray] = []
    unreadable = 0
    removals_lost = False
    for raw in raw_batch.events:
        decoder_of_one = _map_decoder if is_map(raw) else _array_decoder
        try:
            events.append(decoder_of_one.decode(raw))
        except UNREADABLE:
            kind = _kind(raw)
            unreadable += kind is None
            removals_lost |= kind is None or kind in _KINDS_THAT_REMOVE
    if raw_batch.events and unreadable == len(raw_batch.events):
        raise WireError("no event of the batch can be read")
    skipped = len(raw_batch.events) - len(events)
    return Parsed(raw_batch.ts, events, raw_batch.dp_rank, skipped, removals_lost)


def parse_raw(payload: bytes) -> RawBatch | _RawBatchMap:
    """Read a batch without decoding its events; raises one of UNREADABLE."""
    return (_raw_batch_map_decoder if is_map(payload) else _raw_batch_decoder).decode(payload)


def _kind(raw: Raw) -> str | None:
    """The kind of an event that cannot be decoded; None if its kind or blocks are unreadable.

    A batch with only such events is not from an engine. Events of unknown kinds, or with malformed
    tokens, may be from one.
    """
    try:
        head = (_head_map_decoder if is_map(raw) else _head_array_decoder).decode(raw)
        if head.type in _KINDS_WITH_BLOCKS:
            _hashes_decoder.decode(head.block_hashes)
    except UNREADABLE:
        return None
    return head.type


def is_map(encoded: bytes | Raw) -> bool:
    """Whether msgpack starts with the head of a map: fixmap, map 16 or map 32."""
    head = memoryview(encoded)[:1].tobytes()
    return b"\x80" <= head <= b"\x8f" or head in (b"\xde", b"\xdf")
