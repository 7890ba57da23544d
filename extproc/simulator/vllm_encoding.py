"""Encodes KV events as vLLM 0.32 does.

Maps that leave out optional fields without a value. An adapter is named in each event; a salt only
among the extra keys of the first block of a prompt.
"""

from typing import Any, Final

import msgspec

from extproc.simulator.cache_events import FULL_ATTENTION, CacheEvent, Removed, Stored
from extproc.simulator.kv_encoding import WireEvent, token_ids_of

__all__ = ["VllmEventEncoder"]

_HASH_MASK: Final = (1 << 64) - 1
_MEDIUM: Final = "GPU"


class _Stored(msgspec.Struct, tag_field="type", tag="BlockStored", omit_defaults=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    session_id: str | None = None


class _Removed(msgspec.Struct, tag_field="type", tag="BlockRemoved", omit_defaults=True):
    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class _Cleared(msgspec.Struct, tag_field="type", tag="AllBlocksCleared"):
    pass


class VllmEventEncoder:
    """Encodes cache events for consumers."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    def wire_event(self, event: CacheEvent, *, missing_tokens: int = 0) -> WireEvent:
        """Encode one event. `missing_tokens` drops tokens at its end: a fault for tests."""
        if isinstance(event, Stored):
            return self._stored(event, missing_tokens)
        if isinstance(event, Removed):
            group = event.group or FULL_ATTENTION
            return _Removed(_unsigned(event.hashes), _MEDIUM, group.number)
        return _Cleared()

    def _stored(self, event: Stored, missing_tokens: int) -> WireEvent:
        token_ids = token_ids_of(event.pages)
        group = event.group or FULL_ATTENTION
        adapter = event.namespace.lora_name
        return _Stored(
            block_hashes=_unsigned(event.hashes),
            parent_block_hash=None if event.parent is None else event.parent & _HASH_MASK,
            token_ids=token_ids[: len(token_ids) - missing_tokens],
            block_size=self._block_size,
            # Engines number their adapters from 1, in the order in which they were loaded.
            lora_id=None if adapter is None else 1,
            medium=_MEDIUM,
            lora_name=adapter,
            extra_keys=_extra_keys(event),
            group_idx=group.number,
            kv_cache_spec_kind=group.kind,
            kv_cache_spec_sliding_window=group.window,
        )


def _unsigned(hashes: list[int]) -> list[int]:
    return [number & _HASH_MASK for number in hashes]


def _extra_keys(event: Stored) -> list[tuple[Any, ...] | None] | None:
    """What separates a block from others with its tokens, for each block; the adapter first."""
    space = event.namespace
    adapter = () if space.lora_name is None else (space.lora_name,)
    keys: list[tuple[Any, ...] | None] = [adapter or None for _ in event.hashes]
    if event.parent is None and space.cache_salt:
        keys[0] = (*adapter, space.cache_salt)
    return keys
