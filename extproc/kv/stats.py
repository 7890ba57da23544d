"""Counts of streams, events and pages: plain numbers that only grow.

Separate from the metrics, so that the modules that count need no Prometheus.
"""

from collections.abc import Sequence
from typing import TypeVar

from msgspec import Struct, field

__all__ = ["IndexStats", "RankStats", "StreamStats", "summed"]


_Counts = TypeVar("_Counts", bound=Struct)


def _per_tier() -> list[int]:
    return [0, 0, 0]


def summed(kind: type[_Counts], counts: Sequence[_Counts]) -> _Counts:
    """The sums of all fields of `kind`; fields of subclasses are left out."""
    total = kind()
    for name in kind.__struct_fields__:
        values = [getattr(one, name) for one in counts]
        if isinstance(getattr(total, name), list):
            setattr(total, name, [sum(column) for column in zip(*values, strict=True)])
        else:
            setattr(total, name, sum(values))
    return total


class StreamStats(Struct):
    """Counts of what a rank's sockets received, before it was decoded.

    `malformed` counts messages that could not be parsed, `dropped` batches that found no room in
    the reorder buffer, `apply_errors` what was received and could not be applied. `clears` counts
    how often one of these made all pages void.
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
    apply_errors: int = 0
    load_reports: int = 0


class RankStats(Struct):
    """Counts of a rank's events; pages as published, by tier: device, host, below.

    `skipped_events` are of unknown kind, malformed or beyond a limit. `unreadable_batches` could
    not be decoded, or may have lost a removal. `foreign_unit_pages` were kept out since they are
    of pairs of tokens where single ones are held, or the reverse. `odd_sized_events` have pages of
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
    """Counts of pages that the index kept out, since the start."""

    # Their parent was never stored, or has been removed, so their place is unknown.
    orphans: int = 0
    # They were removed without having been stored.
    unknown_removals: int = 0
    # The number of tokens does not fit the number of pages.
    mismatched: int = 0
    # Beyond the configured number of pages, or beyond any context window.
    over_limit: int = 0
