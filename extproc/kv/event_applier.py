"""Applies one rank's KV events to the index: what each event means, and which pages are kept out.

A batch is applied in steps of about a thousand pages, so that the caller can pause between two
steps however large the batch is. A batch that may have lost a removal is not applied: it raises,
and what was applied before is void.

The configuration says how large a rank's pages are and whether they hold pairs of tokens. If the
events say otherwise, the events win.

Separate from the index, which knows nothing of encodings, counts and logs.
"""

from collections.abc import Callable, Iterator
from typing import Final

import structlog
from msgspec.structs import replace

from extproc.kv.attention_groups import AttentionGroups
from extproc.kv.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    LoadStat,
    WireError,
)
from extproc.kv.index import PrefixIndex
from extproc.kv.ownership import PREFIX_BITS
from extproc.kv.rank_pages import RankPages
from extproc.kv.sparse_blocks import is_sparse, runs_of
from extproc.kv.stats import RankStats
from extproc.kv.wire import decode_load
from extproc.kv.wire_chunks import decode_in_parts

__all__ = ["EventApplier"]

_log = structlog.get_logger()

_PAGES_A_STEP: Final = 512
# A larger batch may have further parts, and decoding each of them takes time.
_LARGE_BYTES: Final = 1 << 16
# The index's tier of each medium: disk and external storage count alike.
_TIERS: Final = (0, 1, 2, 2)
# Reasons after which the events may be those of another engine process.
_BREAKS: Final = frozenset(("disconnected", "reconnected", "restarted"))


class EventApplier:
    """Applies the events of one rank to its pages, and keeps their trust; an Applier.

    `seed` gives the start of a namespace's prefix hashes. `report_load` takes the engine's load
    reports. `report_break` is called when the engine may have been replaced by another process.
    """

    def __init__(
        self,
        index: PrefixIndex,
        pages: RankPages,
        seed: Callable[[str | None, str | int | None], int],
        report_load: Callable[[LoadStat], None],
        report_break: Callable[[], None],
    ) -> None:
        self.pages = pages
        self.counts = RankStats()
        self._index = index
        self._groups = AttentionGroups(index, pages)
        # Of the current batch: the last event of the full-attention group, and those of other
        # groups whose blocks it will name.
        self._full: BlockStored | None = None
        self._sparse: list[tuple[RankPages, BlockStored]] = []
        self._seed = seed
        self._report_load = report_load
        self._report_break = report_break
        self._log = _log.bind(worker=pages.worker, rank=pages.dp_rank)
        self._warned: set[str] = set()

    def apply(self, payload: bytes) -> Iterator[None]:
        """Apply a batch, in steps.

        Raises WireError when the batch cannot be read in full: a removal may be lost.
        """
        parts = decode_in_parts(payload)
        room = _PAGES_A_STEP
        while (batch := self._next_part(parts)) is not None:
            for event in batch.events:
                if isinstance(event, AllBlocksCleared):
                    self.counts.cleared_events += 1
                    self._clear()
                    continue
                if len(event.block_hashes) <= _PAGES_A_STEP:
                    self._apply_event(event)
                else:
                    for part in _parts(event):
                        self._apply_event(part)
                        yield
                self._stored_all(event)
                room -= len(event.block_hashes) + 1
                if room <= 0:
                    room = _PAGES_A_STEP
                    yield
            if len(payload) > _LARGE_BYTES:
                yield
        self._full = None
        self._sparse.clear()
        self._groups.end_of_batch()

    def _clear(self) -> None:
        self._full = None
        self._sparse.clear()
        self._index.clear(self.pages)
        self._groups.forget()

    def _next_part(self, parts: Iterator[EventBatch]) -> EventBatch | None:
        try:
            batch = next(parts, None)
            if batch is not None:
                self.counts.skipped_events += batch.skipped
                if batch.removals_lost:
                    raise WireError("an event that may have been a removal cannot be read")
        except WireError:
            self.counts.unreadable_batches += 1
            raise
        return batch

    def clear(self, reason: str) -> None:
        self._clear()
        if reason in _BREAKS:
            self._report_break()

    def set_trusted(self, trusted: bool, reason: str) -> None:
        self.pages.trusted, self.pages.reason = trusted, reason
        if reason in _BREAKS:
            self._report_break()

    def on_load(self, payload: bytes) -> None:
        try:
            load = decode_load(payload)
        except WireError:
            self.counts.unreadable_loads += 1
        else:
            self._report_load(load)

    def _apply_event(self, event: BlockStored | BlockRemoved) -> None:
        ids, tier, counts = event.block_hashes, _TIERS[event.medium], self.counts
        if isinstance(event, BlockRemoved):
            counts.removed_events += 1
            counts.removed_pages[tier] += len(ids)
            if (pages := self._groups.removed_in(event)) is not None:
                self._index.remove(pages, ids, tier)
            return
        counts.stored_events += 1
        counts.stored_pages[tier] += len(ids)
        pages = self.pages if event.group is None else self._groups.stored_in(event)
        if pages is None:
            return
        if not event.block_size:
            self._index.place(pages, ids, tier)
        elif pages is not self.pages and is_sparse(event):
            self._sparse.append((pages, event))
            if self._groups.is_after_full(event):
                self._store_sparse()
        elif pages is not self.pages or self._fits(event):
            self._store(pages, event)

    def _store(self, pages: RankPages, event: BlockStored) -> None:
        parent, seed = event.parent_block_hash, 0
        if parent is None and (event.cache_salt is not None or event.lora is not None):
            seed = self._seed(event.cache_salt, event.lora)
        self._index.store(
            pages,
            event.block_hashes,
            parent,
            event.tokens,
            event.block_size,
            _TIERS[event.medium],
            seed,
            # An engine that numbers groups tells of each block, also of the same one twice.
            counted=event.group is not None,
        )

    def _stored_all(self, event: BlockStored | BlockRemoved) -> None:
        """An event has been applied in full: that of the full-attention group names blocks."""
        if isinstance(event, BlockStored) and self._groups.is_full(event):
            self._full = event
            self._store_sparse()

    def _store_sparse(self) -> None:
        sparse, self._sparse = self._sparse, []
        for pages, event in sparse:
            for run in runs_of(event, self._full):
                self._store(pages, run)

    def _fits(self, event: BlockStored) -> bool:
        """Whether the pages fit those held; learns page size and units from the event."""
        pages = self.pages
        if event.bigram != pages.bigram and event.block_hashes:
            if pages.page_count or pages.has_holes:
                self.counts.foreign_unit_pages += len(event.block_hashes)
                self._warn("kv_units_mixed", pairs_held=pages.bigram)
                return False
            self._warn("kv_units_differ", pairs_published=event.bigram)
            pages.bigram = event.bigram
        if event.block_size != pages.page_size:
            self._learn_page_size(event)
        return True

    def _learn_page_size(self, event: BlockStored) -> None:
        """Take over the event's page size, unless it may be a short page at the end of a prompt.

        A larger page, or a smaller one that another page follows, cannot be that. Prefix hashes
        do not depend on the page size, so pages that are stored stay right.
        """
        pages, size, parent = self.pages, event.block_size, event.parent_block_hash
        self.counts.odd_sized_events += 1
        if (
            size > pages.page_size
            or len(event.block_hashes) > 1
            or (parent is not None and pages.ends_within_page(parent & PREFIX_BITS))
        ):
            self._warn("kv_page_size_differs", expected=pages.page_size, published=size)
            pages.page_size = size

    def _warn(self, event: str, **fields: object) -> None:
        """Log once per rank, since the engine will publish more of the same."""
        if event not in self._warned:
            self._warned.add(event)
            self._log.warning(event, **fields)


def _parts(event: BlockStored | BlockRemoved) -> Iterator[BlockStored | BlockRemoved]:
    """Split an event of many blocks into events of fewer; not if its tokens do not fit."""
    ids = event.block_hashes
    size = event.block_size if isinstance(event, BlockStored) else 0
    if isinstance(event, BlockStored) and len(event.tokens) != len(ids) * size:
        yield event
        return
    for first in range(0, len(ids), _PAGES_A_STEP):
        some = ids[first : first + _PAGES_A_STEP]
        if isinstance(event, BlockRemoved):
            yield replace(event, block_hashes=some)
        else:
            yield replace(
                event,
                block_hashes=some,
                parent_block_hash=ids[first - 1] if first else event.parent_block_hash,
                tokens=event.tokens[first * size : (first + len(some)) * size],
            )
