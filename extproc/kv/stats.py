"""What the room counts about streams, events and pages: plain numbers that only grow."""

from collections.abc import Sequence
from typing import TypeVar

from msgspec import Struct, field

__all__ = ["IndexStats", "RankStats", "StreamStats", "summed"]


_Counts = TypeVar("_Counts", bound=Struct)


def _per_tier() -> list[int]:
    return [0, 0, 0]


def summed(kind: type[_Counts], counts: Sequence[_Counts]) -> _Counts:
    """All of them together; fields that only a subclass has are left out."""
    total = kind()
    for name in kind.__struct_fields__:
        values = [getattr(one, name) for one in counts]
        if isinstance(getattr(total, name), list):
            setattr(total, name, [sum(column) for column in zip(*values, strict=True)])
        else:
            setattr(total, name, sum(values))
    return total


class StreamStats(Struct):
    """What came over a rank's sockets, before anybody looked into it.

    `malformed` are messages that are none, `dropped` batches that were let go while they waited
    for a replay, `sink_errors` what came and could not be used, `clears` how often one of these
    made all that was held void.
    """

    batches: int = 0
    bytes: int = 0
    gaps: int = 0
    restarts: int = 0
    clears: int = 0
    replays: int = 0
    replay_failures: int = 0
    malformed: int = 0
    dropped: int = 0
    sink_errors: int = 0
    load_reports: int = 0


class RankStats(Struct):
    """What a rank has told; pages as told, by tier: device, host, below.

    `skipped_events` are of unknown kind, malformed or beyond a limit. `unreadable_batches` could
    not be read, or not all that they removed. `foreign_unit_pages` are of pairs of tokens where
    single ones are held, or the reverse, and were kept out. `odd_sized_events` have pages of
    another size than expected.
    """

    stored_events: int = 0
    removed_events: int = 0
    cleared_events: int = 0
    stored_pages: list[int] = field(default_factory=_per_tier)
    removed_pages: list[int] = field(default_factory=_per_tier)
    skipped_events: int = 0
    unreadable_batches: int = 0
    foreign_unit_pages: int = 0
    odd_sized_events: int = 0
    unreadable_loads: int = 0


class IndexStats(Struct):
    """What the index kept out, in pages, since the start."""

    # Their parent was never stored, or is gone: their place is unknown.
    orphans: int = 0
    # Removed without having been stored.
    unknown_removals: int = 0
    # Number of tokens and number of pages do not fit.
    mismatched: int = 0
    # Beyond the configured number of pages, or beyond any context window.
    over_limit: int = 0
