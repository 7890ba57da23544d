"""Which worker holds how much of a prompt: prefix hashes to holders.

A holder is one (worker, rank). All holders share one table from the hash of a prefix to a bit
mask of those that hold its last page, so that one walk answers for all of them: whoever holds
page i holds all before it (engines evict leaves first), hence a binary search that splits the
holders at every probe. A holder that broke that order is walked page by page until it is
whole again.

Engines name pages by hashes of their own. These are opaque ids, kept per holder only to find
a page again when a child or a removal names it. Dropping a holder is one step: its bit stops
being asked for. Sweeping the bit out of the table is done in slices by `scrub`.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from msgspec import Struct

from extproc.kv.holder import Holder, Overlap
from extproc.kv.prefix_hash import POSITION_MAX_TOKENS, PrefixHasher, TokenIds

__all__ = ["IndexCounts", "PrefixIndex", "Tier"]

# Integers of 60 bits take two thirds of the memory of 64, and a million pages still miss each
# other with a probability of 1 - 10^-6.
_KEY: Final = (1 << 60) - 1
_KEY_ARRAY: Final = np.uint64(_KEY)
_SECOND_TOKEN_SHIFT: Final = np.uint64(32)
_FIRST_TOKEN: Final = np.uint64((1 << 32) - 1)
_NO_PARENT: Final = -1

# Where a page lies, best place first: 0 device, 1 host, 2 below.
Tier = int
_TIERS: Final = 3
# The best tier of every combination of tiers as bits; index 0 is not held at all.
_BEST_TIER: Final = (3, 0, 1, 0, 2, 0, 1, 0)
_NOT_HELD: Final = 3
_MEMBERS_MAX_ENTRIES: Final = 4096


class IndexCounts(Struct):
    """What the index was told and what it kept out, in pages, since the start."""

    stored: int = 0
    removed: int = 0
    # Their parent was never stored, or is gone: their place is unknown.
    orphans: int = 0
    # Removed without having been stored.
    unknown_removals: int = 0
    # Number of tokens and number of pages do not fit.
    mismatched: int = 0
    # Beyond the configured number of pages, or beyond any context window.
    over_limit: int = 0


class PrefixIndex:
    """The table of all holders."""

    def __init__(self, hasher: PrefixHasher, max_pages: int) -> None:
        """`max_pages` bounds the (page, holder) pairs kept; about 250 bytes each."""
        self.hasher = hasher
        self.counts = IndexCounts()
        self.pages = 0
        self._max_pages = max_pages
        self._holders: dict[int, Holder] = {}  # by bit
        self._special = 0  # bits of holders with `_special`
        self._members: dict[int, tuple[Holder, ...]] = {}  # by mask, made when first met
        self._masks: dict[int, int] = {}  # prefix -> holders
        # prefix -> holders that have it on no better tier than this one; [0] is not used.
        self._below: tuple[dict[int, int], ...] = ({}, {}, {})
        self._free_bits: list[int] = []
        self._next_bit = 1
        self._retired: list[tuple[int, array[int], dict[int, int]]] = []

    # -- holders

    def add(self, name: str, page_size: int, *, bigram: bool = False) -> Holder:
        """A new, empty holder; `page_size` in tokens (bigram: in pairs of tokens)."""
        if page_size < 1:
            raise ValueError("a page has at least one token")
        bit = self._take_bit()
        holder = Holder(name, page_size, bigram, bit)
        self._holders[bit] = holder
        return holder

    def drop(self, holder: Holder) -> None:
        """Forget the holder and all it holds, at once; idempotent."""
        if self._holders.pop(holder.bit, None) is holder:
            self._retire(holder)

    def clear(self, holder: Holder) -> None:
        """Forget what the holder holds, at once."""
        if self._holders.get(holder.bit) is not holder:
            return
        del self._holders[holder.bit]
        self._retire(holder)
        holder.reset(self._take_bit())
        self._holders[holder.bit] = holder

    def scrub(self, max_pages: int) -> bool:
        """Sweep up to that many pages of dropped holders out; True while there is more."""
        while self._retired and max_pages > 0:
            bit, sums, slots = self._retired[-1]
            count = min(max_pages, len(sums))
            for table in (self._masks, *self._below[1:]):
                if table:
                    _discard_all(table, bit, sums[len(sums) - count :])
            del sums[len(sums) - count :]
            # Freeing a million ids in one go would take longer than a decision may.
            for _ in range(min(count, len(slots))):
                slots.popitem()
            max_pages -= count
            if not sums:
                self._retired.pop()
                # Only now can no entry be left that a new holder would inherit.
                self._free_bits.append(bit)
        return bool(self._retired)

    def _take_bit(self) -> int:
        if self._free_bits:
            return self._free_bits.pop()
        bit = self._next_bit
        self._next_bit <<= 1
        return bit

    def _retire(self, holder: Holder) -> None:
        self.pages -= holder.pages
        self._retired.insert(0, (holder.bit, holder.sums, holder.slots))
        self._special &= ~holder.bit
        self._members.clear()
        holder.reset(0)

    # -- what engines tell

    def store(
        self,
        holder: Holder,
        ids: Sequence[int],
        parent: int | None,
        tokens: TokenIds,
        block_size: int,
        tier: Tier = 0,
        seed: int = 0,
    ) -> None:
        """A chain of pages is now on `tier`: `ids` name them in order, 64 bits each.

        `tokens` (uint64) are all their tokens, `block_size` of them a page; for a bigram holder
        units `first | second << 32`. `parent` names the page before, None at the start of a
        sequence, whose namespace `seed` is.
        """
        if block_size < 1 or len(tokens) != len(ids) * block_size or not holder.bit:
            self.counts.mismatched += len(ids)
            return
        start, end, parent_slot = seed, 0, _NO_PARENT
        known = parent is None
        if parent is not None:
            found = holder.slots.get(parent & _KEY)
            if found is not None:
                known = True
                start, end, parent_slot = holder.sums[found], holder.ends[found], found
        if holder.bigram and len(tokens):
            if parent is None:
                start, end = self.hasher.extend(seed, 0, tokens[:1] & _FIRST_TOKEN), 1
            tokens = tokens >> _SECOND_TOKEN_SHIFT
        if end + len(tokens) > POSITION_MAX_TOKENS:
            self.counts.over_limit += len(ids)
            return
        keys = [engine_id & _KEY for engine_id in ids]
        if (
            known
            and len(keys) > 1
            and self.pages + len(keys) <= self._max_pages
            and holder.slots.keys().isdisjoint(keys)
            and len(set(keys)) == len(keys)
        ):
            sums = self.hasher.page_sums(start, end, tokens, block_size)
            self._append_chain(holder, keys, sums, end, parent_slot, block_size, tier)
            if tier:
                self._mark(holder)
            return
        for number, key in enumerate(keys):
            slot = holder.slots.get(key)
            if slot is not None:
                self._retier(holder, slot, holder.tiers[slot] | 1 << tier)
                self.counts.stored += 1
            elif not known:
                self.counts.orphans += 1
                continue
            elif self.pages >= self._max_pages:
                self.counts.over_limit += 1
                known = False
                continue
            else:
                page = tokens[number * block_size : (number + 1) * block_size]
                start = self.hasher.extend(start, end, page)
                slot = self._append(holder, key, start, end + block_size, parent_slot, tier)
            known = True
            start, end, parent_slot = holder.sums[slot], holder.ends[slot], slot
        self._mark(holder)

    def _append_chain(
        self,
        holder: Holder,
        keys: list[int],
        sums: TokenIds,
        end: int,
        parent_slot: int,
        block_size: int,
        tier: Tier,
    ) -> None:
        """Pages none of which is known yet, each the parent of the next."""
        count = len(keys)
        first = len(holder.sums)
        holder.slots.update(zip(keys, range(first, first + count), strict=True))
        holder.sums.frombytes(sums.tobytes())
        holder.ends.extend(range(end + block_size, end + count * block_size + 1, block_size))
        holder.parents.append(parent_slot)
        holder.parents.extend(range(first, first + count - 1))
        holder.children.extend([1] * (count - 1))
        holder.children.append(0)
        if parent_slot >= 0:
            holder.children[parent_slot] += 1
        holder.tiers.frombytes(bytes((1 << tier,)) * count)
        bit, masks = holder.bit, self._masks
        prefixes = (sums & _KEY_ARRAY).tolist()
        for prefix in prefixes:
            mask = masks.get(prefix)
            if mask is None:
                masks[prefix] = bit
            elif mask & bit:
                holder.copies[prefix] = holder.copies.get(prefix, 0) + 1
            else:
                masks[prefix] = mask | bit
        for level in range(1, tier + 1):
            holder.pages_below[level] += count
            for prefix in prefixes:
                _set(self._below[level], prefix, bit)
        holder.pages += count
        self.pages += count
        self.counts.stored += count

    def _append(
        self, holder: Holder, key: int, total: int, end: int, parent_slot: int, tier: Tier
    ) -> int:
        if holder.free:
            slot = holder.free.pop()
            holder.sums[slot] = total
            holder.ends[slot] = end
            holder.parents[slot] = parent_slot
        else:
            slot = len(holder.sums)
            holder.sums.append(total)
            holder.ends.append(end)
            holder.parents.append(parent_slot)
            holder.children.append(0)
            holder.tiers.append(0)
        holder.slots[key] = slot
        if parent_slot >= 0:
            holder.children[parent_slot] += 1
        self._retier(holder, slot, 1 << tier)
        self.counts.stored += 1
        return slot

    def remove(self, holder: Holder, ids: Iterable[int], tier: Tier | None = None) -> None:
        """Pages have left `tier`, or every tier."""
        for engine_id in ids:
            key = engine_id & _KEY
            slot = holder.slots.get(key)
            if slot is None or not holder.tiers[slot]:
                self.counts.unknown_removals += 1
                continue
            self.counts.removed += 1
            left = 0 if tier is None else holder.tiers[slot] & ~(1 << tier)
            self._retier(holder, slot, left)
            if left:
                continue
            if holder.children[slot]:
                # Pages that follow it are still there, and it may come back before them.
                holder.tombstones[slot] = key
            else:
                self._forget(holder, key, slot)
        self._mark(holder)

    def _mark(self, holder: Holder) -> None:
        special = bool(holder.tombstones) or holder.pages_below[1] > 0
        if special != holder.special:
            holder.special = special
            self._special ^= holder.bit

    def _forget(self, holder: Holder, key: int, slot: int) -> None:
        """Free the slot of a page that is gone, and of missing pages only it still needed."""
        while True:
            del holder.slots[key]
            holder.free.append(slot)
            parent = holder.parents[slot]
            if parent < 0:
                return
            holder.children[parent] -= 1
            if holder.children[parent] or parent not in holder.tombstones:
                return
            key, slot = holder.tombstones.pop(parent), parent

    def _retier(self, holder: Holder, slot: int, tiers: int) -> None:
        """Set the tiers of a page, as bits, in the holder and in the tables."""
        before = holder.tiers[slot]
        if before == tiers:
            return
        holder.tiers[slot] = tiers
        prefix = holder.sums[slot] & _KEY
        if not before:
            holder.tombstones.pop(slot, None)
            if self._masks.get(prefix, 0) & holder.bit:
                holder.copies[prefix] = holder.copies.get(prefix, 0) + 1
            else:
                _set(self._masks, prefix, holder.bit)
            holder.pages += 1
            self.pages += 1
        elif not tiers:
            copies = holder.copies.pop(prefix, 0)
            if not copies:
                _unset(self._masks, prefix, holder.bit)
            elif copies > 1:
                holder.copies[prefix] = copies - 1
            holder.pages -= 1
            self.pages -= 1
        was, now = _BEST_TIER[before], _BEST_TIER[tiers]
        for level in range(1, _TIERS):
            lay_below = level <= was < _NOT_HELD
            lies_below = level <= now < _NOT_HELD
            if lies_below and not lay_below:
                _set(self._below[level], prefix, holder.bit)
                holder.pages_below[level] += 1
            elif lay_below and not lies_below:
                _unset(self._below[level], prefix, holder.bit)
                holder.pages_below[level] -= 1

    # -- what requests ask

    def match(
        self, tokens: TokenIds, holders: Iterable[Holder], seed: int = 0
    ) -> dict[Holder, Overlap]:
        """The longest prefix of `tokens` (uint64) that each of the holders has.

        Holders without any page of it, or no longer in the index, are left out.
        """
        shapes: dict[tuple[int, bool], int] = {}
        for holder in holders:
            shape = (holder.page_size, holder.bigram)
            shapes[shape] = shapes.get(shape, 0) | holder.bit
        found: dict[Holder, Overlap] = {}
        for (page_size, bigram), mask in shapes.items():
            prefixes = self.prefixes(tokens, page_size, bigram=bigram, seed=seed)
            self.match_prefixes(prefixes, mask, found)
        return found

    def prefixes(
        self, tokens: TokenIds, page_size: int, *, bigram: bool = False, seed: int = 0
    ) -> TokenIds:
        """The keys of the whole pages of a prompt; uint64, one for each page."""
        start, end = seed, 0
        if bigram and len(tokens):
            start, end = self.hasher.extend(seed, 0, tokens[:1]), 1
            tokens = tokens[1:]
        tokens = tokens[: POSITION_MAX_TOKENS - end]
        return self.hasher.page_sums(start, end, tokens, page_size) & _KEY_ARRAY

    def match_prefixes(self, prefixes: TokenIds, mask: int, found: dict[Holder, Overlap]) -> None:
        """Fill `found` for the holders whose bits are in `mask`; see `match`."""
        count = len(prefixes)
        if not count:
            return
        key, get = prefixes.item, self._masks.get
        mask &= get(key(0), 0)
        if not mask:
            return
        # Of these holders, all have the first `low` pages and none has more than `high`.
        open_ranges = [(1, count, mask)]
        while open_ranges:
            low, high, mask = open_ranges.pop()
            while low < high:
                middle = (low + high + 1) >> 1
                having = mask & get(key(middle - 1), 0)
                if having == mask:
                    low = middle
                    continue
                if having:
                    open_ranges.append((middle, high, having))
                    mask ^= having
                high = middle - 1
            members = self._members.get(mask)
            if members is None:
                members = self._members_of(mask)
            if mask & self._special:
                for holder in members:
                    found[holder] = self._overlap(holder, prefixes, low)
            elif len(members) == 1:
                found[members[0]] = Overlap(low, low, low)
            else:
                found.update(dict.fromkeys(members, Overlap(low, low, low)))

    def _members_of(self, mask: int) -> tuple[Holder, ...]:
        if len(self._members) >= _MEMBERS_MAX_ENTRIES:
            self._members.clear()
        members = tuple([holder for bit, holder in self._holders.items() if bit & mask])
        self._members[mask] = members
        return members

    def _overlap(self, holder: Holder, prefixes: TokenIds, pages: int) -> Overlap:
        if holder.tombstones:
            pages = self._contiguous(holder, prefixes)
        if not holder.pages_below[1]:
            return Overlap(pages, pages, pages)
        device = self._leading(1, holder.bit, prefixes, pages)
        if not holder.pages_below[2]:
            return Overlap(pages, device, pages)
        return Overlap(pages, device, self._leading(2, holder.bit, prefixes, pages))

    def _contiguous(self, holder: Holder, prefixes: TokenIds) -> int:
        """Pages up to the first that is missing, by looking at each."""
        for number, prefix in enumerate(prefixes.tolist()):
            if not self._masks.get(prefix, 0) & holder.bit:
                return number
        return len(prefixes)

    def _leading(self, level: int, bit: int, prefixes: TokenIds, pages: int) -> int:
        """How many of the first `pages` pages come before the first one on this tier or below.

        Engines move leaves down first, so what lies on a better tier comes first.
        """
        below = self._below[level]
        low, high = 0, pages
        while low < high:
            middle = (low + high) >> 1
            if below.get(prefixes.item(middle), 0) & bit:
                high = middle
            else:
                low = middle + 1
        return low


def _set(table: dict[int, int], prefix: int, bit: int) -> None:
    mask = table.get(prefix)
    table[prefix] = bit if mask is None else mask | bit


def _unset(table: dict[int, int], prefix: int, bit: int) -> None:
    left = table.get(prefix, 0) & ~bit
    if left:
        table[prefix] = left
    else:
        table.pop(prefix, None)


def _discard_all(table: dict[int, int], bit: int, sums: "array[int]") -> None:
    for total in sums:
        prefix = total & _KEY
        mask = table.get(prefix)
        if mask is not None and mask & bit:
            if mask == bit:
                del table[prefix]
            else:
                table[prefix] = mask ^ bit
