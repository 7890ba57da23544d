"""The index of all pages: which ranks hold how much of a prompt.

All ranks share one table from the hash of a prefix to a bit mask of the ranks that hold its last
page, so that one walk answers for all of them. A rank that holds page i holds all pages before it,
since engines evict leaves first; a binary search that splits the ranks at every probe is enough.
A rank that broke this order is walked page by page until it has no holes again.

Engines name pages by hashes of their own. The index keeps them per rank, as opaque ids, to find a
page again when a child or a removal names it.

The index stores and removes pages; `ownership` has the tables and the walk.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from extproc.kv.ownership import PREFIX_BITS, Ownership
from extproc.kv.prefix_hash import POSITION_MAX_TOKENS, PrefixHasher, TokenIds
from extproc.kv.rank_pages import ID_SHARDS, Overlap, PageEnd, RankPages
from extproc.kv.stats import IndexStats

__all__ = ["PrefixIndex", "Tier"]

_KEY: Final = PREFIX_BITS
_KEY_ARRAY: Final = np.uint64(_KEY)
_ID_SHARD: Final = ID_SHARDS - 1
_SECOND_TOKEN_SHIFT: Final = np.uint64(32)
_FIRST_TOKEN: Final = np.uint64((1 << 32) - 1)

# Where a page is, best place first: 0 device, 1 host, 2 below.
Tier = int
_TIERS: Final = 3
# The best tier of every combination of tiers (as bits); index 0 is a page that is not held.
_BEST_TIER: Final = (3, 0, 1, 0, 2, 0, 1, 0)
_NOT_HELD: Final = 3
# Retired ranks make all masks longer, so this is how many may wait for the sweep.
_RETIRED_RANKS: Final = 64
_SCRUBBED_BY_A_CLEAR: Final = 512


class PrefixIndex:
    """The pages of all ranks."""

    def __init__(self, hasher: PrefixHasher, max_pages: int) -> None:
        """`max_pages` bounds the sum of all ranks' pages; a page takes about 250 bytes.

        Pages of dropped ranks count until they are swept out.
        """
        self.hasher = hasher
        self.counts = IndexStats()
        self.page_count = 0
        # Removed pages that held pages still follow.
        self.missing_pages = 0
        self.max_pages = max_pages
        self._ownership = Ownership()

    # -- ranks

    def add(
        self, worker: str, page_size: int, *, dp_rank: int = 0, bigram: bool = False
    ) -> RankPages:
        """The empty pages of a new rank; `page_size` in tokens (bigram: in pairs of tokens).

        Raises ValueError for a page size below 1.
        """
        if page_size < 1:
            raise ValueError("a page has at least one token")
        pages = RankPages(worker, dp_rank, page_size, bigram)
        self._ownership.enter(pages)
        return pages

    def add_group(self, pages: RankPages, page_size: int, needed: int | None) -> RankPages:
        """Empty pages of a further group of a hybrid model, which limits what a match finds.

        Of a prefix, the last `needed` pages must be held in the group, or all if that is None.
        They leave with those of the rank.
        """
        made = self.add(pages.worker, page_size, dp_rank=pages.dp_rank, bigram=pages.bigram)
        made.leader, made.needed = pages, needed
        pages.groups = (*pages.groups, made)
        self._ownership.mark(pages)
        return made

    def lead(self, pages: RankPages, group: RankPages) -> None:
        """Let the pages of a group be those of the rank itself, which is empty."""
        if self._ownership.has(pages):
            pages.groups = tuple([one for one in pages.groups if one is not group])
            self._ownership.exchange(pages, group)
            pages.page_size = group.page_size
            self._retire(group)
            self._ownership.mark(pages)

    def drop(self, pages: RankPages) -> None:
        """Forget the rank and all its pages, at once; idempotent."""
        pages.generation += 1
        if self._ownership.has(pages):
            self._retire(pages)

    def clear(self, pages: RankPages) -> None:
        """Forget the rank's pages, at once."""
        pages.generation += 1
        if self._ownership.has(pages) and (pages.page_count or pages.tombstones or pages.groups):
            self._retire(pages)
            self._ownership.enter(pages)
            if self._ownership.retired_ranks > _RETIRED_RANKS:
                # An engine that clears often pays for the sweep itself.
                self.scrub(_SCRUBBED_BY_A_CLEAR)

    def _retire(self, pages: RankPages) -> None:
        for group in pages.groups:
            self._retire(group)
        pages.groups = ()
        self.page_count -= pages.page_count
        self.missing_pages -= len(pages.tombstones)
        self._ownership.retire(pages)

    def scrub(self, max_pages: int) -> bool:
        """Sweep out up to `max_pages` pages of dropped ranks; True while there are more."""
        return self._ownership.scrub(max_pages)

    def tidy(self) -> Iterator[None]:
        """Give back memory that is not used any more; a generator, to be advanced bit by bit."""
        return self._ownership.tidy()

    @property
    def retired_pages(self) -> int:
        """Pages of dropped ranks that still have to be swept out."""
        return self._ownership.retired_pages

    # -- changes that engines publish

    def store(
        self,
        pages: RankPages,
        ids: Sequence[int],
        parent: int | None,
        tokens: TokenIds,
        block_size: int,
        tier: Tier = 0,
        seed: int = 0,
        *,
        counted: bool = False,
    ) -> None:
        """Store a chain of pages on `tier`; `ids` name them in order, 64 bits each.

        With `counted`, a page that is there already is held once more, and is removed as often.

        `tokens` (uint64) are the tokens of all pages, `block_size` per page; a bigram rank has
        units of `first | second << 32`. `parent` names the page before the chain. It is None at
        the start of a prompt, where `seed` is that of its namespace.
        """
        if block_size < 1 or len(tokens) != len(ids) * block_size or not pages.bit:
            self.counts.mismatched += len(ids)
            return
        after = pages.end_of(None if parent is None else parent & _KEY, seed)
        if pages.bigram and len(tokens):
            if parent is None:
                after = PageEnd(self.hasher.extend(seed, 0, tokens[:1] & _FIRST_TOKEN), 1)
            tokens = tokens >> _SECOND_TOKEN_SHIFT
        if len(tokens) + (0 if after is None else after.tokens) > POSITION_MAX_TOKENS:
            self.counts.over_limit += len(ids)
            return
        keys = [engine_id & _KEY for engine_id in ids]
        if after is not None and 1 < len(keys) <= self._room:
            slots = pages.next_slots(len(keys))
            if pages.name_all(keys, slots):
                sums = self.hasher.page_sums(after.total, after.tokens, tokens, block_size)
                self._append_chain(pages, slots, sums, after, block_size, tier)
                if tier:
                    self._ownership.mark(pages)
                return
        self._store_each(pages, keys, after, tokens, tier, counted)

    @property
    def _room(self) -> int:
        return self.max_pages - self.page_count - self.missing_pages - self.retired_pages

    def _store_each(
        self,
        pages: RankPages,
        keys: Sequence[int],
        after: PageEnd | None,
        tokens: TokenIds,
        tier: Tier,
        counted: bool,
    ) -> None:
        """Store a chain page by page; `after` is where the page before it ends, if known."""
        last, room = len(keys) - 1, self._room
        size = len(tokens) // max(1, len(keys))
        for number, key in enumerate(keys):
            slot = pages.find(key)
            if slot is not None:
                if counted and pages.tiers[slot] & 1 << tier:
                    pages.repeat(slot, tier)
                self._retier(pages, slot, pages.tiers[slot] | 1 << tier)
            elif after is None:
                self.counts.orphans += 1
                continue
            elif room <= 0:
                self.counts.over_limit += 1
                after = None
                continue
            else:
                page = tokens
                if len(keys) > 1:
                    page = tokens[number * size : (number + 1) * size]
                total = self.hasher.extend(after.total, after.tokens, page)
                slot = self._append(pages, key, total, after.tokens + size, after.slot, tier)
                room -= 1
            if number < last:
                after = PageEnd(pages.sums[slot], pages.ends[slot], slot)
        self._ownership.mark(pages)

    def place(self, pages: RankPages, ids: Iterable[int], tier: Tier) -> None:
        """Known pages are on this tier, too; those that are not known are left out."""
        for engine_id in ids:
            slot = pages.find(engine_id & _KEY)
            if slot is None or not pages.tiers[slot]:
                self.counts.orphans += 1
            else:
                self._retier(pages, slot, pages.tiers[slot] | 1 << tier)
        self._ownership.mark(pages)

    def _append_chain(
        self,
        pages: RankPages,
        slots: Sequence[int],
        sums: TokenIds,
        after: PageEnd,
        block_size: int,
        tier: Tier,
    ) -> None:
        """Append pages that were not known, each the parent of the next, to slots named before."""
        count = len(slots)
        end, parent_slot = after.tokens, after.slot
        ends = range(end + block_size, end + count * block_size + 1, block_size)
        if parent_slot >= 0:
            pages.children[parent_slot] += 1
        if slots[0] == len(pages.sums):
            pages.sums.frombytes(sums.tobytes())
            pages.ends.extend(ends)
            pages.parents.append(parent_slot)
            pages.parents.extend(slots[:-1])
            pages.children.extend([1] * (count - 1))
            pages.children.append(0)
            pages.tiers.frombytes(bytes((1 << tier,)) * count)
        else:
            del pages.free[len(pages.free) - count :]
            for slot, total, page_end in zip(slots, sums.tolist(), ends, strict=True):
                pages.sums[slot] = total
                pages.ends[slot] = page_end
                pages.parents[slot] = parent_slot
                pages.children[slot] = 1
                pages.tiers[slot] = 1 << tier
                parent_slot = slot
            pages.children[parent_slot] = 0
        self._enter(pages, (sums & _KEY_ARRAY).tolist(), tier)

    def _append(
        self, pages: RankPages, key: int, total: int, end: int, parent_slot: int, tier: Tier
    ) -> int:
        if pages.free:
            slot = pages.free.pop()
            pages.sums[slot] = total
            pages.ends[slot] = end
            pages.parents[slot] = parent_slot
            pages.tiers[slot] = 1 << tier
        else:
            slot = len(pages.sums)
            pages.sums.append(total)
            pages.ends.append(end)
            pages.parents.append(parent_slot)
            pages.children.append(0)
            pages.tiers.append(1 << tier)
        pages.slots[key & _ID_SHARD][key] = slot
        if parent_slot >= 0:
            pages.children[parent_slot] += 1
        self._enter(pages, [total & _KEY], tier)
        return slot

    def _enter(self, pages: RankPages, prefixes: list[int], tier: Tier) -> None:
        """Enter pages that are held from now on."""
        for prefix in self._ownership.held.add_all(prefixes, pages.bit):
            pages.copies[prefix] = pages.copies.get(prefix, 0) + 1
        count = len(prefixes)
        for level in range(1, tier + 1):
            pages.ever_lower = True
            pages.pages_below[level] += count
            self._ownership.below[level].add_all(prefixes, pages.bit)
        pages.page_count += count
        self.page_count += count

    def remove(self, pages: RankPages, ids: Iterable[int], tier: Tier | None = None) -> None:
        """Remove pages from `tier`, or from every tier if it is None."""
        for engine_id in ids:
            key = engine_id & _KEY
            slot = pages.find(key)
            if slot is None or not pages.tiers[slot]:
                self.counts.unknown_removals += 1
                continue
            if pages.repeats and tier is not None and pages.was_repeated(slot, tier):
                continue
            left = 0 if tier is None else pages.tiers[slot] & ~(1 << tier)
            self._retier(pages, slot, left)
            if left:
                continue
            if pages.children[slot]:
                # Pages that follow it are still held, and it may be stored again.
                pages.tombstones[slot] = key
                self.missing_pages += 1
            else:
                self._forget(pages, key, slot)
        self._ownership.mark(pages)

    def _forget(self, pages: RankPages, key: int, slot: int) -> None:
        """Free the slot of a removed page, and of removed pages before it that nothing follows."""
        while True:
            del pages.slots[key & _ID_SHARD][key]
            pages.free.append(slot)
            parent = pages.parents[slot]
            if parent < 0:
                return
            pages.children[parent] -= 1
            if pages.children[parent] or parent not in pages.tombstones:
                return
            key, slot = pages.tombstones.pop(parent), parent
            self.missing_pages -= 1

    def _retier(self, pages: RankPages, slot: int, tiers: int) -> None:
        """Set the tiers of a page (as bits), in the rank's pages and in the tables."""
        before = pages.tiers[slot]
        if before == tiers:
            return
        pages.tiers[slot] = tiers
        prefix = pages.sums[slot] & _KEY
        if not before:
            if pages.tombstones.pop(slot, None) is not None:
                self.missing_pages -= 1
            if not self._ownership.held.add(prefix, pages.bit):
                pages.copies[prefix] = pages.copies.get(prefix, 0) + 1
            pages.page_count += 1
            self.page_count += 1
        elif not tiers:
            copies = pages.copies.pop(prefix, 0)
            if not copies:
                self._ownership.held.discard(prefix, pages.bit)
            elif copies > 1:
                pages.copies[prefix] = copies - 1
            pages.page_count -= 1
            self.page_count -= 1
        was, now = _BEST_TIER[before], _BEST_TIER[tiers]
        for level in range(1, _TIERS):
            lay_below = level <= was < _NOT_HELD
            lies_below = level <= now < _NOT_HELD
            if lies_below and not lay_below:
                pages.ever_lower = True
                self._ownership.below[level].add(prefix, pages.bit)
                pages.pages_below[level] += 1
            elif lay_below and not lies_below:
                self._ownership.below[level].discard(prefix, pages.bit)
                pages.pages_below[level] -= 1

    # -- look-ups of requests

    def match(
        self, tokens: TokenIds, ranks: Iterable[RankPages], seed: int = 0
    ) -> dict[RankPages, Overlap]:
        """The longest prefix of `tokens` (uint64) that each of the ranks holds.

        Ranks that hold no page of it, or are no longer in the index, are left out.
        """
        shapes: dict[tuple[int, bool], int] = {}
        for pages in ranks:
            shape = (pages.page_size, pages.bigram)
            shapes[shape] = shapes.get(shape, 0) | pages.bit
        found: dict[RankPages, Overlap] = {}
        for (page_size, bigram), mask in shapes.items():
            prefixes = self.prefixes(tokens, page_size, bigram=bigram, seed=seed)
            self.match_prefixes(prefixes, mask, found)
        return found

    def prefixes(
        self, tokens: TokenIds, page_size: int, *, bigram: bool = False, seed: int = 0
    ) -> TokenIds:
        """The keys of a prompt's whole pages; uint64, one for each page."""
        start, end = seed, 0
        if bigram and len(tokens):
            start, end = self.hasher.extend(seed, 0, tokens[:1]), 1
            tokens = tokens[1:]
        tokens = tokens[: POSITION_MAX_TOKENS - end]
        return self.hasher.page_sums(start, end, tokens, page_size) & _KEY_ARRAY

    def match_prefixes(
        self, prefixes: TokenIds, mask: int, found: dict[RankPages, Overlap]
    ) -> None:
        """Fill `found` for the ranks whose bits are in `mask`; see `match`."""
        self._ownership.match(prefixes, mask, found)
