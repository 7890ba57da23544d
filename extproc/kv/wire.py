"""What engines publish about their KV caches and their load, from bytes to values.

A batch is an array (in one vLLM revision a map) of a time, events and a rank. Events are tagged
maps or, from older engines, arrays; both may occur in one batch. The usual batch has only one
shape and nothing wrong with it, so it is decoded in one typed pass. Whatever fails that pass is
taken apart event by event, at about twice the price, and only what can not be read is left out:
losing a removal because its neighbour was odd would leave a wrong view of a cache behind.

Anybody who can reach the socket's peer can send anything. Counts and lengths are checked before
anything is made of them, nesting is bounded, and errors never quote the payload, for it carries
prompts.
"""

import math
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import lru_cache
from itertools import chain
from typing import Annotated, Any, Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta, Raw, Struct
from numpy.typing import NDArray

__all__ = [
    "BLOCKS_MAX_PER_EVENT",
    "EVENTS_MAX_PER_BATCH",
    "NAME_MAX_CHARS",
    "PAYLOAD_MAX_BYTES",
    "TOKENS_MAX_PER_EVENT",
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "EventBatch",
    "KvEvent",
    "LoadStat",
    "Medium",
    "WireError",
    "decode_events",
    "decode_load",
]

# What one step of a scheduler publishes is far below. While it is decoded, a payload takes up
# eight times its size in token ids, and thirty times in pairs.
PAYLOAD_MAX_BYTES: Final = 1 << 24
# With pages of one token and without coalescing, a long prompt is 100 000 events.
EVENTS_MAX_PER_BATCH: Final = 1 << 18
TOKENS_MAX_PER_EVENT: Final = 1 << 20
# A page may be one token.
BLOCKS_MAX_PER_EVENT: Final = TOKENS_MAX_PER_EVENT
# Of cache_salt, lora_name, lora_id and medium.
NAME_MAX_CHARS: Final = 1024

_HASH_MASK: Final = (1 << 64) - 1
_HASH_BYTES: Final = 8
_COUNT_MAX: Final = (1 << 63) - 1
_PACKINGS_KEPT: Final = 512
_TOKEN: Final = np.dtype("<u4")
_PAIR: Final = np.dtype("<u8")
_KINDS_WITH_BLOCKS: Final = ("BlockStored", "BlockRemoved")


class WireError(ValueError):
    """The payload can not be read at all; the text quotes nothing of it."""


class Medium(IntEnum):
    """Where a block lies, nearest first."""

    GPU = 0
    HOST = 1
    DISK = 2
    EXTERNAL = 3


# SGLang's names, and vLLM's for host memory.
_MEDIUMS: Final = {
    None: Medium.GPU,
    "GPU": Medium.GPU,
    "CPU_PINNED": Medium.HOST,
    "CPU": Medium.HOST,
    "DISK": Medium.DISK,
    "EXTERNAL": Medium.EXTERNAL,
}


class BlockStored(Struct, frozen=True, gc=False, eq=False):
    """A chain of blocks that follows `parent_block_hash`, or starts a prompt if that is None.

    Hashes are unsigned 64-bit whatever the engine sends. `tokens` is a uint64 array of the units
    of all blocks one after the other: token ids, or with `bigram` pairs of neighbours, where a
    unit is t_j | t_{j+1} << 32. Its length may not fit blocks and `block_size` (tokens or pairs
    per block); that is for the index to judge. `lora` is the adapter's name, or its id if only
    that was sent.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    tokens: NDArray[np.uint64]
    bigram: bool
    block_size: int
    medium: Medium
    cache_salt: str | None
    lora: str | int | None


class BlockRemoved(Struct, frozen=True, gc=False):
    """Blocks that are gone from one medium; others may still hold them."""

    block_hashes: list[int]
    medium: Medium


class AllBlocksCleared(Struct, frozen=True, gc=False):
    """Nothing is held any more, on no medium."""


KvEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(Struct, frozen=True):
    """One message of a rank, `events` in the order in which they happened.

    `timestamp` is the engine's, in seconds since the epoch. `skipped` counts events of unknown
    kind, malformed or beyond a limit. Events of an attention group other than the first are left
    out without being counted: hybrid models send them all the time, and a router follows one
    group.
    """

    timestamp: float
    events: list[KvEvent]
    dp_rank: int | None
    skipped: int


_Count: TypeAlias = Annotated[int, Meta(ge=0, le=_COUNT_MAX)]


class LoadStat(Struct, frozen=True, gc=False, array_like=True, tag="LoadStat"):
    """The load of one rank; counts of requests and tokens, and microseconds.

    Engines append fields over time (SGLang 0.5.23 has these): those after `attn_dp_rank` may be
    missing, later ones are ignored.
    """

    num_running_reqs: _Count
    num_waiting_reqs: _Count
    num_tokens: _Count
    max_total_num_tokens: _Count
    attn_dp_rank: _Count
    num_waiting_uncached_tokens: _Count | None = None
    num_total_tokens: _Count | None = None
    max_running_requests: _Count | None = None
    total_prefill_uncached_tokens: _Count | None = None
    total_prefill_busy_us: _Count | None = None


# -- shapes on the wire

_Hash: TypeAlias = int | bytes
_Hashes: TypeAlias = Annotated[list[_Hash], Meta(max_length=BLOCKS_MAX_PER_EVENT)]
_Name: TypeAlias = Annotated[str, Meta(max_length=NAME_MAX_CHARS)]
_Unit: TypeAlias = int | tuple[int, int]
_Units: TypeAlias = Annotated[tuple[_Unit, ...], Meta(max_length=TOKENS_MAX_PER_EVENT)]
_BlockSize: TypeAlias = Annotated[int, Meta(ge=1, le=TOKENS_MAX_PER_EVENT)]


class _Stored(Struct):
    block_hashes: _Hashes
    parent_block_hash: _Hash | None
    token_ids: _Units
    block_size: _BlockSize
    lora_id: int | _Name | None = None
    medium: _Name | None = None


class _StoredMap(_Stored, tag="BlockStored"):
    cache_salt: _Name | None = None
    lora_name: _Name | None = None
    group_idx: int | None = None


class _Metadata(Struct):
    cache_salt: _Name | None = None
    lora_name: _Name | None = None


class _StoredArray(_Stored, tag="BlockStored", array_like=True):
    # vLLM's LoRA name, or SGLang's map.
    naming: _Name | _Metadata | None = None
    extra_keys: Raw | None = None
    group_idx: int | None = None


class _Removed(Struct):
    block_hashes: _Hashes
    medium: _Name | None = None
    group_idx: int | None = None


class _RemovedMap(_Removed, tag="BlockRemoved"):
    pass


class _RemovedArray(_Removed, tag="BlockRemoved", array_like=True):
    pass


class _ClearedMap(Struct, tag="AllBlocksCleared"):
    pass


class _ClearedArray(Struct, tag="AllBlocksCleared", array_like=True):
    pass


class _HeadMap(Struct):
    type: str
    block_hashes: Raw = Raw()


class _HeadArray(Struct, array_like=True):
    type: str
    block_hashes: Raw = Raw()


_EventMap: TypeAlias = _StoredMap | _RemovedMap | _ClearedMap
_EventArray: TypeAlias = _StoredArray | _RemovedArray | _ClearedArray
_Limit: Final = Meta(max_length=EVENTS_MAX_PER_BATCH)


class _BatchOfMaps(Struct, array_like=True):
    ts: float
    events: Annotated[list[_EventMap], _Limit]
    dp_rank: int | None = None


class _BatchOfArrays(Struct, array_like=True):
    ts: float
    events: Annotated[list[_EventArray], _Limit]
    dp_rank: int | None = None


class _AnyBatch(Struct, array_like=True):
    ts: float
    events: Annotated[list[Raw], _Limit]
    dp_rank: int | None = None


class _AnyBatchMap(Struct):
    ts: float
    events: Annotated[list[Raw], _Limit]
    dp_rank: int | None = msgspec.field(default=None, name="data_parallel_rank")


_uniform_decoders: Final = (
    msgspec.msgpack.Decoder(_BatchOfMaps),
    msgspec.msgpack.Decoder(_BatchOfArrays),
)
_any_batch_decoder: Final = msgspec.msgpack.Decoder(_AnyBatch)
_any_batch_map_decoder: Final = msgspec.msgpack.Decoder(_AnyBatchMap)
_map_decoder: Final = msgspec.msgpack.Decoder(_EventMap)
_array_decoder: Final = msgspec.msgpack.Decoder(_EventArray)
_head_map_decoder: Final = msgspec.msgpack.Decoder(_HeadMap)
_head_array_decoder: Final = msgspec.msgpack.Decoder(_HeadArray)
_hashes_decoder: Final = msgspec.msgpack.Decoder(_Hashes)
_load_decoder: Final = msgspec.msgpack.Decoder(LoadStat)

# msgspec's errors are ValueErrors, so is text that is not UTF-8; RecursionError is nesting.
_UNREADABLE: Final = (ValueError, RecursionError)
# What events raise that have the right types and the wrong values.
_MALFORMED: Final = (ValueError, TypeError, struct.error)


def decode_events(payload: bytes) -> EventBatch:
    """Read a batch of events, the third frame of a message.

    Raises WireError if it is no batch, or beyond EVENTS_MAX_PER_BATCH or PAYLOAD_MAX_BYTES.
    """
    _check_size(payload)
    # An event that nests too deep can not be stepped over, so it costs the batch.
    try:
        batch, malformed = _parsed(payload)
    except _UNREADABLE:
        raise WireError("the payload is not a batch of KV events") from None
    if not math.isfinite(batch.ts):
        raise WireError("the time of a batch of KV events is not a number")
    events: list[KvEvent] = []
    for parsed in batch.events:
        try:
            event = _CONVERSIONS[type(parsed)](parsed)
        except _MALFORMED:
            malformed += 1
        else:
            if event is not None:
                events.append(event)
    return EventBatch(batch.ts, events, batch.dp_rank, malformed)


def decode_load(payload: bytes) -> LoadStat:
    """Read a load report; raises WireError if it is none or has a count below zero."""
    _check_size(payload)
    try:
        return _load_decoder.decode(payload)
    except _UNREADABLE:
        raise WireError("the payload is not a load report") from None


def _check_size(payload: bytes) -> None:
    if len(payload) > PAYLOAD_MAX_BYTES:
        raise WireError(f"the payload is larger than {PAYLOAD_MAX_BYTES} bytes")


# -- from bytes to shapes


class _Parsed(Struct):
    ts: float
    events: Sequence[_EventMap | _EventArray]
    dp_rank: int | None


def _parsed(payload: bytes) -> tuple[_BatchOfMaps | _BatchOfArrays | _Parsed, int]:
    """The batch, and how many of its events are left out."""
    for decoder in _uniform_decoders:
        try:
            return decoder.decode(payload), 0
        except _UNREADABLE:
            continue
    whole = _any_batch_map_decoder if _is_map(payload) else _any_batch_decoder
    batch = whole.decode(payload)
    events: list[_EventMap | _EventArray] = []
    unreadable = 0
    for raw in batch.events:
        decoder_of_one = _map_decoder if _is_map(raw) else _array_decoder
        try:
            events.append(decoder_of_one.decode(raw))
        except _UNREADABLE:
            unreadable += not _has_head(raw)
    if batch.events and unreadable == len(batch.events):
        raise WireError("no event of the batch can be read")
    return _Parsed(batch.ts, events, batch.dp_rank), len(batch.events) - len(events)


def _has_head(raw: Raw) -> bool:
    """Whether an event that can not be used has a kind and names blocks as its kind should.

    A batch of nothing but events without is not from an engine. An unknown kind, or odd tokens,
    are another matter.
    """
    try:
        head = (_head_map_decoder if _is_map(raw) else _head_array_decoder).decode(raw)
        if head.type in _KINDS_WITH_BLOCKS:
            _hashes_decoder.decode(head.block_hashes)
    except _UNREADABLE:
        return False
    return True


def _is_map(encoded: bytes | Raw) -> bool:
    """Whether msgpack starts with the head of a map: fixmap, map 16 or map 32."""
    head = memoryview(encoded)[:1].tobytes()
    return b"\x80" <= head <= b"\x8f" or head in (b"\xde", b"\xdf")


# -- from shapes to events


def _stored_map(event: _StoredMap) -> BlockStored | None:
    return _stored(event, event.group_idx, event.cache_salt, event.lora_name)


def _stored_array(event: _StoredArray) -> BlockStored | None:
    naming = event.naming
    if isinstance(naming, _Metadata):
        return _stored(event, event.group_idx, naming.cache_salt, naming.lora_name)
    return _stored(event, event.group_idx, None, naming)


def _stored(
    event: _Stored, group: int | None, cache_salt: str | None, lora_name: str | None
) -> BlockStored | None:
    if group:
        return None
    tokens, bigram = _tokens(event.token_ids)
    parent = event.parent_block_hash
    return BlockStored(
        _folded(event.block_hashes),
        None if parent is None else _fold(parent),
        tokens,
        bigram,
        event.block_size,
        _medium(event.medium),
        # Engines take an empty name for none.
        cache_salt or None,
        lora_name or event.lora_id,
    )


def _removed(event: _Removed) -> BlockRemoved | None:
    if event.group_idx:
        return None
    return BlockRemoved(_folded(event.block_hashes), _medium(event.medium))


def _cleared(_: Struct) -> AllBlocksCleared:
    return AllBlocksCleared()


_CONVERSIONS: Final[dict[type[Struct], Callable[[Any], KvEvent | None]]] = {
    _StoredMap: _stored_map,
    _StoredArray: _stored_array,
    _RemovedMap: _removed,
    _RemovedArray: _removed,
    _ClearedMap: _cleared,
    _ClearedArray: _cleared,
}


def _medium(name: str | None) -> Medium:
    """The tier of a name; one that nobody knows yet counts as the farthest.

    Taking it for device memory would send requests after blocks that are slow to fetch, and
    dropping the event would lose the removals that belong to it. Stores and removals under the
    same unknown name still cancel out.
    """
    return _MEDIUMS.get(name, Medium.EXTERNAL)


def _folded(hashes: list[_Hash]) -> list[int]:
    try:
        return [block & _HASH_MASK for block in hashes]  # type: ignore[operator]
    except TypeError:
        return [_fold(block) for block in hashes]


def _fold(block: _Hash) -> int:
    """Unsigned 64 bits of a signed or unsigned integer or, as vLLM does, the end of a digest."""
    if isinstance(block, int):
        return block & _HASH_MASK
    if len(block) < _HASH_BYTES:
        raise ValueError("a digest shorter than 64 bits")
    return int.from_bytes(block[-_HASH_BYTES:], "big")


def _tokens(units: tuple[_Unit, ...]) -> tuple[NDArray[np.uint64], bool]:
    """The units as uint64, and whether they are pairs.

    Packing into 32 bits is the quickest way from integers to an array, four times quicker than
    `np.array`, and refuses what is no token id. A packed pair is the unit.
    """
    if units and isinstance(units[0], tuple):
        ids: tuple[Any, ...] = tuple(chain.from_iterable(units))  # type: ignore[arg-type]
        return np.frombuffer(_packing(len(ids)).pack(*ids), _PAIR), True
    packed = _packing(len(units)).pack(*units)
    return np.frombuffer(packed, _TOKEN).astype(np.uint64), False


@lru_cache(_PACKINGS_KEPT)
def _packing(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}I")
