"""Decodes what engines publish: batches of KV events, and load reports.

A batch is an array (in one vLLM revision a map) of a time, events and a rank. Events are tagged
maps or, from older engines, arrays; both may occur in one batch.

The payload is not trusted. Counts and lengths are checked before memory is allocated for them,
nesting is bounded, and errors never quote the payload, since it contains prompts.

Separate from `wire_schema`, which has the encoded forms: here these become the values of `events`.
"""

import math
import struct
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from extproc.kv.events import (
    NAME_MAX_CHARS,
    PAYLOAD_MAX_BYTES,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    KvEvent,
    LoadStat,
    Medium,
    WireError,
)
from extproc.kv.wire_schema import (
    UNREADABLE,
    ClearedArray,
    ClearedMap,
    Hash,
    Metadata,
    Removed,
    RemovedArray,
    RemovedMap,
    StoredArray,
    StoredMap,
    Unit,
    parse,
)

__all__ = ["decode_events", "decode_load"]

_HASH_MASK: Final = (1 << 64) - 1
_HASH_BYTES: Final = 8
_NULL: Final = b"\xc0"
_NO_TOKEN: Final = 1 << 63
_PACKINGS_KEPT: Final = 512
_TOKEN: Final = np.dtype("<u4")
_PAIR: Final = np.dtype("<u8")


# SGLang's names, and vLLM's for host memory and storage.
_MEDIUMS: Final = {
    None: Medium.GPU,
    "GPU": Medium.GPU,
    "CPU_PINNED": Medium.HOST,
    "CPU": Medium.HOST,
    "DISK": Medium.DISK,
    "STORAGE": Medium.DISK,
    "EXTERNAL": Medium.EXTERNAL,
}


_extra_keys_decoder: Final = msgspec.msgpack.Decoder(list[list[Any] | None])
_encoder: Final = msgspec.msgpack.Encoder()
_load_decoder: Final = msgspec.msgpack.Decoder(LoadStat)

# The errors of events that have the right types and wrong values.
_MALFORMED: Final = (ValueError, TypeError, struct.error)


def decode_events(payload: bytes) -> EventBatch:
    """Decode a batch of events, the third frame of a message.

    Raises WireError if it is not a batch, or is beyond EVENTS_MAX_PER_BATCH or PAYLOAD_MAX_BYTES.
    """
    _check_size(payload)
    # An event that nests too deep cannot be skipped, so the whole batch is lost.
    try:
        batch = parse(payload)
    except UNREADABLE:
        raise WireError("the payload is not a batch of KV events") from None
    if not math.isfinite(batch.ts):
        raise WireError("the time of a batch of KV events is not a number")
    events: list[KvEvent] = []
    skipped, removals_lost = batch.skipped, batch.removals_lost
    for parsed in batch.events:
        try:
            event = _CONVERSIONS[type(parsed)](parsed)
        except _MALFORMED:
            skipped += 1
            removals_lost |= isinstance(parsed, Removed)
        else:
            if event is not None:
                events.append(event)
    return EventBatch(batch.ts, events, batch.dp_rank, skipped, removals_lost)


def decode_load(payload: bytes) -> LoadStat:
    """Decode a load report; raises WireError if it is not one or has a count below zero."""
    _check_size(payload)
    try:
        return _load_decoder.decode(payload)
    except UNREADABLE:
        raise WireError("the payload is not a load report") from None


def _check_size(payload: bytes) -> None:
    if len(payload) > PAYLOAD_MAX_BYTES:
        raise WireError(f"the payload is larger than {PAYLOAD_MAX_BYTES} bytes")


# -- from encoded forms to events


def _stored_map(event: StoredMap) -> BlockStored | None:
    return _stored(event, event.cache_salt, event.lora_name)


def _stored_array(event: StoredArray) -> BlockStored | None:
    naming = event.naming
    if isinstance(naming, Metadata):
        return _stored(event, naming.cache_salt, naming.lora_name)
    return _stored(event, None, naming)


def _stored(
    event: StoredMap | StoredArray, cache_salt: str | None, lora_name: str | None
) -> BlockStored:
    if event.token_ids and not event.block_size:
        raise ValueError("tokens without blocks")
    tokens, bigram = _tokens(event.token_ids)
    parent = event.parent_block_hash
    if _has_keys(event):
        keys = _extra_keys_decoder.decode(event.extra_keys)
        if parent is None:
            cache_salt = cache_salt or _salt(keys, lora_name)
        if not bigram:
            _mix(tokens, keys, event.block_size)
    return BlockStored(
        _folded(event.block_hashes),
        None if parent is None else _fold(parent),
        tokens,
        bigram,
        event.block_size,
        _medium(event.medium),
        # For engines, an empty name is the same as no name.
        cache_salt or None,
        lora_name or event.lora_id,
        event.group_idx,
        event.kv_cache_spec_kind,
        event.kv_cache_spec_sliding_window,
    )


def _has_keys(event: StoredMap | StoredArray) -> bool:
    """False if the extra keys are missing, or a null for each block."""
    size, blocks = len(event.extra_keys), len(event.block_hashes)
    if size <= 1:
        return False
    head = 1 if blocks < 1 << 4 else 3 if blocks < 1 << 16 else 5
    return size != head + blocks or bytes(event.extra_keys)[head:] != _NULL * blocks


def _salt(extra_keys: list[list[Any] | None], lora_name: str | None) -> str | None:
    """The cache salt of a prompt among the keys of its first block (vLLM).

    The keys are the adapter's name, pairs for each image, the salt, and digests of embeddings.
    """
    keys = extra_keys[0] if extra_keys else None
    texts = [key for key in keys or () if isinstance(key, str)]
    if texts and texts[0] == lora_name:
        del texts[0]
    salt = texts[-1] if texts else ""
    if len(salt) > NAME_MAX_CHARS:
        raise ValueError("a salt that is too long")
    return salt or None


def _mix(tokens: NDArray[np.uint64], extra_keys: list[list[Any] | None], block_size: int) -> None:
    """Mix the keys of a block that are not names into its first token.

    All images have the same tokens. The engine tells their blocks apart by pairs of an image's
    hash and its place in the block, and those of embeddings by a digest. The token becomes
    a number that no token has, so no prompt without the image finds such a block.
    """
    for number, keys in enumerate(extra_keys):
        others = [key for key in keys or () if not isinstance(key, str)]
        if others and number * block_size < len(tokens):
            digest = blake2b(_encoder.encode(others), digest_size=_HASH_BYTES).digest()
            tokens[number * block_size] ^= np.uint64(int.from_bytes(digest, "big") | _NO_TOKEN)


def _removed(event: Removed) -> BlockRemoved:
    return BlockRemoved(_folded(event.block_hashes), _medium(event.medium), event.group_idx)


def _cleared(_: Struct) -> AllBlocksCleared:
    return AllBlocksCleared()


_CONVERSIONS: Final[dict[type[Struct], Callable[[Any], KvEvent | None]]] = {
    StoredMap: _stored_map,
    StoredArray: _stored_array,
    RemovedMap: _removed,
    RemovedArray: _removed,
    ClearedMap: _cleared,
    ClearedArray: _cleared,
}


def _medium(name: str | None) -> Medium:
    """The medium of a name; an unknown name counts as the farthest one.

    As device memory it would attract requests to blocks that are slow to fetch. Without the event,
    its removals would be lost. Stores and removals with the same unknown name still cancel out.
    """
    return _MEDIUMS.get(name, Medium.EXTERNAL)


def _folded(hashes: list[Hash]) -> list[int]:
    try:
        return [block & _HASH_MASK for block in hashes]  # type: ignore[operator]
    except TypeError:
        return [_fold(block) for block in hashes]


def _fold(block: Hash) -> int:
    """Unsigned 64 bits of a signed or unsigned integer, or of a digest its end, as vLLM does."""
    if isinstance(block, int):
        return block & _HASH_MASK
    if len(block) < _HASH_BYTES:
        raise ValueError("a digest shorter than 64 bits")
    return int.from_bytes(block[-_HASH_BYTES:], "big")


def _tokens(units: tuple[Unit, ...]) -> tuple[NDArray[np.uint64], bool]:
    """The units as uint64, and whether they are pairs.

    Packing into 32 bits is the fastest way from integers to an array, four times faster than
    `np.array`, and refuses numbers that are not token ids. A packed pair is the unit.
    """
    if units and isinstance(units[0], tuple):
        ids: tuple[Any, ...] = tuple(chain.from_iterable(units))  # type: ignore[arg-type]
        return np.frombuffer(_packing(len(ids)).pack(*ids), _PAIR), True
    packed = _packing(len(units)).pack(*units)
    return np.frombuffer(packed, _TOKEN).astype(np.uint64), False


@lru_cache(_PACKINGS_KEPT)
def _packing(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}I")
