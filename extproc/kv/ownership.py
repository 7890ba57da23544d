"""Which ranks own which prefix: a bit mask for each prefix, and the walk that finds all overlaps.

A table maps the hash of a prefix to the ranks that have it, as bits. It consists of many small
dicts, since a Python dict that grows moves all of its entries at once: with a million entries that
blocks the event loop for 100 ms.

Dropping a rank is one step: no match asks for its bit any more. `scrub` sweeps the bit out of the
tables in slices, and only then another rank gets it.

Separate from the index, which keeps each rank's pages: this module knows only bits and prefixes.
"""

import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final, NamedTuple

from extproc.kv.prefix_hash import TokenIds
from extproc.kv.rank_pages import Overlap, RankPages

__all__ = ["PREFIX_BITS", "Ownership"]

# Integers of 60 bits take less memory than those of 64. No two of a million pages collide, with
# a probability of 1 - 10^-6.
PREFIX_BITS: Final = (1 << 60) - 1
_MEMBERS_KEPT: Final = 4096
_WHOLE_KEPT: Final = 8192
_SHARDS: Final = 1024
_SHARD: Final = _SHARDS - 1
# A dict without spare room takes 40 to 60 bytes for each entry.
_LOOSE_BYTES_PER_ENTRY: Final = 70
_DICT_BYTES: Final = 300


class PrefixTable:
    """Maps prefixes to masks of ranks; a prefix is an integer of 60 random bits."""

    __slots__ = ("_shards",)

    def __init__(self) -> None:
        self._shards: list[dict[int, int]] = [{} for _ in range(_SHARDS)]

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def get(self, prefix: int) -> int:
        return self._shards[prefix & _SHARD].get(prefix, 0)

    def add(self, prefix: int, bit: int) -> bool:
        """Set the bit; False if it was set."""
        shard = self._shards[prefix & _SHARD]
        mask = shard.get(prefix)
        if mask is None:
            shard[prefix] = bit
        elif mask & bit:
            return False
        else:
            shard[prefix] = mask | bit
        return True

    def add_all(self, prefixes: Iterable[int], bit: int) -> list[int]:
        """Set the bit for all of them; gives those that had it already."""
        shards = self._shards
        had: list[int] = []
        # Neighbours in a chain are mostly held by the same ranks, so they share one integer.
        last = merged = 0
        for prefix in prefixes:
            shard = shards[prefix & _SHARD]
            mask = shard.get(prefix)
            if mask is None:
                shard[prefix] = bit
            elif mask & bit:
                had.append(prefix)
            else:
                if mask != last:
                    last, merged = mask, mask | bit
                shard[prefix] = merged
        return had

    def discard(self, prefix: int, bit: int) -> None:
        shard = self._shards[prefix & _SHARD]
        mask = shard.get(prefix)
        if mask is None or not mask & bit:
            return
        if mask == bit:
            del shard[prefix]
        else:
            shard[prefix] = mask ^ bit

    def discard_all(self, prefixes: Iterable[int], bit: int) -> None:
        shards = self._shards
        for prefix in prefixes:
            shard = shards[prefix & _SHARD]
            mask = shard.get(prefix)
            if mask is not None and mask & bit:
                if mask == bit:
                    del shard[prefix]
                else:
                    shard[prefix] = mask ^ bit

    def tidy(self) -> Iterator[None]:
        """Give back memory that deletions have left unused; yields after each part."""
        return _tidied(self._shards)

    def depths(
        self, prefixes: "memoryview[int]", low: int, high: int, mask: int, *, present: bool
    ) -> list[tuple[int, int]]:
        """How many leading prefixes each rank in `mask` has; or lacks, if not `present`.

        The number is known to be between `low` and `high`, and after the first prefix that is
        not counted no other one would be: a binary search that splits the ranks at every probe.
        Gives pairs of a number and the mask of the ranks that it is true for.
        """
        shards = self._shards
        flip = 0 if present else -1
        found: list[tuple[int, int]] = []
        ranges: list[tuple[int, int, int]] = []
        while True:
            while low < high:
                middle = (low + high) >> 1
                prefix = prefixes[middle]
                having = mask & (shards[prefix & _SHARD].get(prefix, 0) ^ flip)
                if having == mask:
                    low = middle + 1
                elif having:
                    ranges.append((low, middle, mask ^ having))
                    low, mask = middle + 1, having
                else:
                    high = middle
            found.append((low, mask))
            if not ranges:
                return found
            low, high, mask = ranges.pop()


class _Retired(NamedTuple):
    """What a dropped rank has left in the tables."""

    bit: int
    sums: "array[int]"
    ids: list[dict[int, int]]
    tables: tuple[PrefixTable, ...]


@lru_cache(_WHOLE_KEPT)
def _whole(pages: int) -> Overlap:
    return Overlap(pages, pages, pages)


class Ownership:
    """The ranks' bits and the tables; the index decides which pages are entered."""

    def __init__(self) -> None:
        # prefix -> ranks that hold it
        self.held = PrefixTable()
        # prefix -> ranks that hold it on this tier or a worse one only; [0] is not used.
        self.below = (PrefixTable(), PrefixTable(), PrefixTable())
        # Masks: ranks with holes, with pages that are not on the device, and with pages that are
        # not on the host either.
        self._holed = 0
        self._lower = 0
        self._deep = 0
        # Those of hybrid models: other groups limit what may be reused.
        self._grouped = 0
        self._ranks: dict[int, RankPages] = {}  # by bit
        self._members: dict[int, tuple[RankPages, ...]] = {}  # by mask, filled when first needed
        self._free_bits: list[int] = []
        self._next_bit = 1
        # The oldest last.
        self._retired: deque[_Retired] = deque()
        # Still to be swept out; slots, which are a few more than pages.
        self.retired_pages = 0

    # -- ranks

    def has(self, rank_pages: RankPages) -> bool:
        return self._ranks.get(rank_pages.bit) is rank_pages

    def enter(self, rank_pages: RankPages) -> None:
        """Give a bit to a new or emptied rank."""
        if self._free_bits:
            bit = self._free_bits.pop()
        else:
            bit = self._next_bit
            self._next_bit <<= 1
        rank_pages.bit = bit
        self._ranks[bit] = rank_pages

    def exchange(self, one: RankPages, other: RankPages) -> None:
        """Exchange all pages of two ranks, with their bits."""
        for name in RankPages.CONTENT:
            held, others = getattr(one, name), getattr(other, name)
            setattr(one, name, others)
            setattr(other, name, held)
        self._ranks[one.bit], self._ranks[other.bit] = one, other
        self._members.clear()

    def retire(self, rank_pages: RankPages) -> None:
        """Take the rank's bit and its pages away, at once."""
        bit = rank_pages.bit
        del self._ranks[bit]
        tables = (self.held, *self.below[1:]) if rank_pages.ever_lower else (self.held,)
        self._retired.appendleft(_Retired(bit, rank_pages.sums, rank_pages.slots, tables))
        self.retired_pages += len(rank_pages.sums)
        self._holed &= ~bit
        self._grouped &= ~bit
        self._lower &= ~bit
        self._deep &= ~bit
        self._members.clear()
        rank_pages.reset()

    def mark(self, rank_pages: RankPages) -> None:
        """Note whether a match has to look closer at the rank_pages."""
        _, lower, deep = rank_pages.pages_below
        marks = bool(rank_pages.tombstones), lower > 0, deep > 0, bool(rank_pages.groups)
        if marks != rank_pages.marks:
            rank_pages.marks = marks
            bit = rank_pages.bit
            holed, has_lower, has_deep, grouped = marks
            self._grouped = self._grouped | bit if grouped else self._grouped & ~bit
            self._holed = self._holed | bit if holed else self._holed & ~bit
            self._lower = self._lower | bit if has_lower else self._lower & ~bit
            self._deep = self._deep | bit if has_deep else self._deep & ~bit

    @property
    def retired_ranks(self) -> int:
        return len(self._retired)

    def scrub(self, max_pages: int) -> bool:
        """Sweep out up to `max_pages` pages of dropped ranks; True while there are more."""
        while self._retired and max_pages > 0:
            gone = self._retired[-1]
            first = max(0, len(gone.sums) - max_pages)
            count = len(gone.sums) - first
            prefixes = [total & PREFIX_BITS for total in gone.sums[first:]]
            del gone.sums[first:]
            for table in gone.tables:
                table.discard_all(prefixes, gone.bit)
            _free(gone.ids, count)
            max_pages -= max(count, 1)
            self.retired_pages -= count
            if not gone.sums:
                self._retired.pop()
                # No entry is left that a new rank would inherit.
                self._free_bits.append(gone.bit)
        return bool(self._retired)

    def tidy(self) -> Iterator[None]:
        """Give back memory that is not used any more; yields often."""
        for table in (self.held, *self.below[1:]):
            yield from table.tidy()
        for rank_pages in list(self._ranks.values()):
            yield from _tidied(rank_pages.slots)

    # -- look-ups of requests

    def match(self, prefixes: TokenIds, mask: int, found: dict[RankPages, Overlap]) -> None:
        """Fill `found` with the overlaps of the ranks whose bits are in `mask`."""
        if not len(prefixes):
            return
        view: memoryview[int] = memoryview(prefixes)  # type: ignore[arg-type]
        mask &= self.held.get(view[0])
        grouped = mask & self._grouped
        holed = mask & self._holed
        groups = self._walk(prefixes, holed) if holed else []
        if mask := mask ^ holed:
            groups += self.held.depths(view, 1, len(prefixes), mask, present=True)
        for pages, members in groups:
            lower = members & self._lower
            if lower:
                self._match_lower(view, pages, lower, found)
                members ^= lower
            self._enter_found(found, members, _whole(pages))
        if grouped:
            for rank_pages in self._members_of(grouped):
                self._limit(view, rank_pages, found)

    def _limit(
        self, view: "memoryview[int]", rank_pages: RankPages, found: dict[RankPages, Overlap]
    ) -> None:
        """Shorten what was found for a hybrid model to what all its groups can reuse."""
        overlap = found[rank_pages]
        pages, before = overlap.pages, -1
        while pages and pages != before:
            before = pages
            for group in rank_pages.groups:
                # Pages of another size end elsewhere; they are not compared.
                if group.page_size == rank_pages.page_size:
                    pages = self._reusable(view, pages, group)
        if not pages:
            del found[rank_pages]
        elif pages != overlap.pages:
            device, host = min(overlap.device_pages, pages), min(overlap.host_pages, pages)
            found[rank_pages] = Overlap(pages, device, host)

    def _reusable(self, view: "memoryview[int]", pages: int, group: RankPages) -> int:
        """The longest prefix, up to `pages`, whose last pages the group holds."""
        held, bit, needed = self.held, group.bit, group.needed
        if needed is None:
            for number in range(pages):
                if not held.get(view[number]) & bit:
                    return number
            return pages
        in_a_row = 0
        for number in range(pages - 1, -1, -1):
            if not held.get(view[number]) & bit:
                in_a_row, pages = 0, number
                continue
            in_a_row += 1
            if in_a_row == needed:
                break
        return pages

    def _walk(self, prefixes: TokenIds, mask: int) -> list[tuple[int, int]]:
        """The same as `depths` for ranks with holes: looks at each page up to the first hole."""
        groups: list[tuple[int, int]] = []
        for number, prefix in enumerate(prefixes.tolist()):
            having = mask & self.held.get(prefix)
            if having != mask:
                groups.append((number, mask ^ having))
                mask = having
                if not mask:
                    return groups
        return [*groups, (len(prefixes), mask)]

    def _match_lower(
        self, view: "memoryview[int]", pages: int, mask: int, found: dict[RankPages, Overlap]
    ) -> None:
        """Fill `found` for ranks that hold these pages, some of them not on the device.

        Engines move leaves to a worse tier first, so pages on a better tier come first.
        """
        _, below_device, below_host = self.below
        for device, members in below_device.depths(view, 0, pages, mask, present=False):
            deep = members & self._deep
            self._enter_found(found, members ^ deep, Overlap(pages, device, pages))
            if deep:
                for host, some in below_host.depths(view, device, pages, deep, present=False):
                    self._enter_found(found, some, Overlap(pages, device, host))

    def _enter_found(self, found: dict[RankPages, Overlap], mask: int, overlap: Overlap) -> None:
        if (rank_pages := self._ranks.get(mask)) is not None:
            found[rank_pages] = overlap
        elif mask:
            members = self._members.get(mask)
            found.update(dict.fromkeys(members or self._members_of(mask), overlap))

    def _members_of(self, mask: int) -> tuple[RankPages, ...]:
        if len(self._members) >= _MEMBERS_KEPT:
            self._members.clear()
        members = tuple([rank_pages for bit, rank_pages in self._ranks.items() if bit & mask])
        self._members[mask] = members
        return members


def _free(ids: Iterable[dict[int, int]], count: int) -> None:
    """Delete `count` ids; deleting a million at once would delay requests."""
    for shard in ids:
        while shard and count:
            shard.popitem()
            count -= 1
        if not count:
            return


def _tidied(shards: list[dict[int, int]]) -> Iterator[None]:
    """Replace dicts that take more memory than their entries need; yields after each dict.

    A dict keeps room for every deleted entry until it grows, and then takes room for three times
    its entries.
    """
    for number, shard in enumerate(shards):
        if sys.getsizeof(shard) > _LOOSE_BYTES_PER_ENTRY * len(shard) + _DICT_BYTES:
            shards[number] = dict(shard)
        yield
