"""The values that engines publish: KV events and load reports, independent of their encoding.

Separate from the decoder, so that the index and the load book need nothing of msgpack.
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from extproc.errors import ServiceError

__all__ = [
    "BLOCKS_MAX_PER_EVENT",
    "BLOCK_MAX_TOKENS",
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
]

# One step of a scheduler publishes far less. While it is decoded, a payload takes eight times its
# size in memory as token ids, and thirty times as pairs.
PAYLOAD_MAX_BYTES: Final = 1 << 24
# With pages of one token and without coalescing, a long prompt is 100 000 events.
EVENTS_MAX_PER_BATCH: Final = 1 << 18
TOKENS_MAX_PER_EVENT: Final = 1 << 20
# A page may be one token.
BLOCKS_MAX_PER_EVENT: Final = TOKENS_MAX_PER_EVENT
# Pages have some hundreds of tokens at most, those of hybrid models some thousands.
BLOCK_MAX_TOKENS: Final = 1 << 16
# Of cache_salt, lora_name, lora_id and medium.
NAME_MAX_CHARS: Final = 1024

_COUNT_MAX: Final = (1 << 63) - 1


class WireError(ServiceError, ValueError):
    """The payload cannot be decoded; the text quotes nothing of it."""


class Medium(IntEnum):
    """Where a block is stored, nearest first."""

    GPU = 0
    HOST = 1
    DISK = 2
    EXTERNAL = 3


class BlockStored(Struct, frozen=True, gc=False, eq=False):
    """A chain of blocks that follows `parent_block_hash`, or starts a prompt if that is None.

    Hashes are unsigned 64-bit integers, whatever the engine sends. `tokens` is a uint64 array of
    the units of all blocks: token ids, or with `bigram` pairs of neighbours, t_j | t_{j+1} << 32.
    The first token of a block with an image is a larger number, which stands for the image, too.
    The index checks whether its length fits the blocks and `block_size` (tokens or pairs per
    block). `lora` is the adapter's name, or its id if only that was sent. `group` is the number of
    the blocks' attention group, `kind` the engine's word for its kind, and `window` its sliding
    window in tokens. With a `block_size` of 0 the event says only where known blocks are, too.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    tokens: NDArray[np.uint64]
    bigram: bool
    block_size: int
    medium: Medium
    cache_salt: str | None
    lora: str | int | None
    group: int | None = None
    kind: str | None = None
    window: int | None = None


class BlockRemoved(Struct, frozen=True, gc=False):
    """Blocks that were removed from one medium; other media may still hold them.

    `group` is that of a hybrid model's blocks.
    """

    block_hashes: list[int]
    medium: Medium
    group: int | None = None


class AllBlocksCleared(Struct, frozen=True, gc=False):
    """All blocks were removed, from every medium."""


KvEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(Struct, frozen=True):
    """One message of a rank, `events` in the order in which they happened.

    `timestamp` is the engine's, in seconds since the epoch. `skipped` counts events that are of
    unknown kind, malformed or beyond a limit; with `removals_lost`, one of them may have been a
    removal.
    """

    timestamp: float
    events: list[KvEvent]
    dp_rank: int | None
    skipped: int
    removals_lost: bool = False


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
