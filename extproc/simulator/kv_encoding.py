"""Encodes KV events and load reports as SGLang does.

Two generations of events: tagged maps (SGLang since autumn 2026) and arrays (before). Maps
leave out optional fields that are None; arrays do not, and carry a salt or an adapter in a
metadata map after the seven fixed elements.
"""

from collections.abc import Iterable
from typing import Any, TypeAlias

import msgspec

from extproc.simulator.cache_events import CacheEvent, Page, Removed, Stored
from extproc.simulator.engine import RankLoad
from extproc.simulator.settings import WireFormat

__all__ = ["EventEncoder", "WireEvent", "encode_batch", "encode_load", "token_ids_of"]

_TokenIds: TypeAlias = list[int] | list[tuple[int, int]]  # bigram pages hold pairs

_encoder = msgspec.msgpack.Encoder()


class _StoredMap(msgspec.Struct, tag_field="type", tag="BlockStored", omit_defaults=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: _TokenIds
    block_size: int
    lora_id: int | None
    medium: str | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    lora_name: str | None = None


class _RemovedMap(msgspec.Struct, tag_field="type", tag="BlockRemoved", omit_defaults=True):
    block_hashes: list[int]
    medium: str | None = None


class _ClearedMap(msgspec.Struct, tag_field="type", tag="AllBlocksCleared"):
    pass


class _StoredArray(msgspec.Struct, array_like=True, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: _TokenIds
    block_size: int
    lora_id: int | None
    medium: str | None


class _StoredArrayWithMetadata(_StoredArray, array_like=True, tag="BlockStored"):
    metadata: dict[str, str]


class _RemovedArray(msgspec.Struct, array_like=True, tag="BlockRemoved"):
    block_hashes: list[int]
    medium: str | None


class _ClearedArray(msgspec.Struct, array_like=True, tag="AllBlocksCleared"):
    pass


WireEvent: TypeAlias = msgspec.Struct


class EventEncoder:
    """Encodes cache events for consumers; pages must come from `pages_of`."""

    def __init__(self, wire_format: WireFormat, block_size: int) -> None:
        self._is_array = wire_format == "array"
        self._block_size = block_size

    def wire_event(self, event: CacheEvent, *, missing_tokens: int = 0) -> WireEvent:
        """Encode one event. `missing_tokens` drops tokens at its end: a fault for tests."""
        if isinstance(event, Stored):
            token_ids = token_ids_of(event.pages)
            return self._stored(event, token_ids[: len(token_ids) - missing_tokens])
        if isinstance(event, Removed):
            kind = _RemovedArray if self._is_array else _RemovedMap
            return kind(event.hashes, event.medium)
        return _ClearedArray() if self._is_array else _ClearedMap()

    def _stored(self, event: Stored, token_ids: list[Any]) -> WireEvent:
        metadata = msgspec.structs.asdict(event.namespace)
        fields: dict[str, Any] = {
            "block_hashes": event.hashes,
            "parent_block_hash": event.parent,
            "token_ids": token_ids,
            "block_size": self._block_size,
            "lora_id": None,
            "medium": event.medium,
        }
        if not self._is_array:
            return _StoredMap(**fields, **metadata)
        given = {name: value for name, value in metadata.items() if value is not None}
        if given:
            return _StoredArrayWithMetadata(**fields, metadata=given)
        return _StoredArray(**fields)


def encode_batch(timestamp: float, events: list[WireEvent], rank: int) -> bytes:
    return _encoder.encode((timestamp, events, rank))


def encode_load(
    load: RankLoad, *, rank: int, max_total_num_tokens: int, max_running_requests: int
) -> bytes:
    return _encoder.encode(
        (
            "LoadStat",
            load.running,
            load.waiting,
            load.used_tokens,
            max_total_num_tokens,
            rank,
            load.waiting_uncached_tokens,
            load.used_tokens + load.waiting_tokens,
            max_running_requests,
            load.prefilled_tokens,
            load.prefill_microseconds,
        )
    )


def token_ids_of(pages: Iterable[Page]) -> list[Any]:
    """The ids of these pages, one after the other; TypeError for pages of something else."""
    ids: list[Any] = []
    for page in pages:
        if not isinstance(page, tuple):
            raise TypeError("only pages of token ids can be published")
        ids.extend(page)
    return ids
