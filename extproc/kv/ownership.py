"""Who holds which prefix: all holders' bits in shared tables, and the walk that answers for all.

Dropping a holder is one step: its bit stops being asked for. Sweeping the bit out of the tables
is done in slices by `scrub`, and only then does another holder get it.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final, NamedTuple

from extproc.kv.prefix_hash import TokenIds
from extproc.kv.prefix_table import PrefixTable, tidied
from extproc.kv.rank_pages import Overlap, RankPages

__all__ = ["PREFIX_BITS", "Ownership"]

# Integers of 60 bits take less memory than those of 64, and a million pages still miss each
# other with a probability of 1 - 10^-6.
PREFIX_BITS: Final = (1 << 60) - 1
_MEMBERS_KEPT: Final = 4096
_WHOLE_KEPT: Final = 8192


class _Retired(NamedTuple):
    """What a holder that is gone has left in the tables."""

    bit: int
    sums: "array[int]"
    ids: list[dict[int, int]]
    tables: tuple[PrefixTable, ...]


@lru_cache(_WHOLE_KEPT)
def _whole(pages: int) -> Overlap:
    return Overlap(pages, pages, pages)


class Ownership:
    """Bits and tables; which pages are entered is decided by the index."""

    def __init__(self) -> None:
        # prefix -> holders that have it
        self.held = PrefixTable()
        # prefix -> holders that have it on no better tier than this one; [0] is not used.
        self.below = (PrefixTable(), PrefixTable(), PrefixTable())
        # Holders of which a page is missing before others, and those with pages not on the
        # device, and not on the host either: as bits.
        self._holed = 0
        self._lower = 0
        self._deep = 0
        self._holders: dict[int, RankPages] = {}  # by bit
        self._members: dict[int, tuple[RankPages, ...]] = {}  # by mask, made when first met
        self._free_bits: list[int] = []
        self._next_bit = 1
        # The oldest last.
        self._retired: deque[_Retired] = deque()
        # Of holders that are gone, still to be swept out; slots, so a few more than pages.
        self.retired_pages = 0

    # -- holders

    def has(self, holder: RankPages) -> bool:
        return self._holders.get(holder.bit) is holder

    def enter(self, holder: RankPages) -> None:
        """Give a new or emptied holder a bit."""
        if self._free_bits:
            bit = self._free_bits.pop()
        else:
            bit = self._next_bit
            self._next_bit <<= 1
        holder.bit = bit
        self._holders[bit] = holder

    def retire(self, holder: RankPages) -> None:
        """Take its bit and its pages away, at once."""
        bit = holder.bit
        del self._holders[bit]
        tables = (self.held, *self.below[1:]) if holder.ever_lower else (self.held,)
        self._retired.appendleft(_Retired(bit, holder.sums, holder.slots, tables))
        self.retired_pages += len(holder.sums)
        self._holed &= ~bit
        self._lower &= ~bit
        self._deep &= ~bit
        self._members.clear()
        holder.reset()

    def mark(self, holder: RankPages) -> None:
        """Note whether a match has to look closer at the holder."""
        _, lower, deep = holder.pages_below
        marks = bool(holder.tombstones), lower > 0, deep > 0
        if marks != holder.marks:
            holder.marks = marks
            bit = holder.bit
            holed, has_lower, has_deep = marks
            self._holed = self._holed | bit if holed else self._holed & ~bit
            self._lower = self._lower | bit if has_lower else self._lower & ~bit
            self._deep = self._deep | bit if has_deep else self._deep & ~bit

    @property
    def retired_holders(self) -> int:
        return len(self._retired)

    def scrub(self, max_pages: int) -> bool:
        """Sweep up to that many pages of dropped holders out; True while there is more."""
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
                # Only now can no entry be left that a new holder would inherit.
                self._free_bits.append(gone.bit)
        return bool(self._retired)

    def tidy(self) -> Iterator[None]:
        """Give memory back that is not used any more; yields often."""
        for table in (self.held, *self.below[1:]):
            yield from table.tidy()
        for holder in list(self._holders.values()):
            yield from tidied(holder.slots)

    # -- what requests ask

    def match(self, prefixes: TokenIds, mask: int, found: dict[RankPages, Overlap]) -> None:
        """Fill `found` for the holders whose bits are in `mask`."""
        if not len(prefixes):
            return
        view: memoryview[int] = memoryview(prefixes)  # type: ignore[arg-type]
        mask &= self.held.get(view[0])
        holed = mask & self._holed
        groups = self._walk(prefixes, holed) if holed else []
        if mask := mask ^ holed:
            groups += self.held.depths(view, 1, len(prefixes), mask, present=True)
        for pages, members in groups:
            lower = members & self._lower
            if lower:
                self._match_lower(view, pages, lower, found)
                members ^= lower
            self._tell(found, members, _whole(pages))

    def _walk(self, prefixes: TokenIds, mask: int) -> list[tuple[int, int]]:
        """Pages up to the first that is missing, by looking at each; as `depths` gives them."""
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
        """For holders that have these pages, and not all of theirs on the device.

        Engines move leaves down first, so what lies on a better tier comes first.
        """
        _, below_device, below_host = self.below
        for device, members in below_device.depths(view, 0, pages, mask, present=False):
            deep = members & self._deep
            self._tell(found, members ^ deep, Overlap(pages, device, pages))
            if deep:
                for host, some in below_host.depths(view, device, pages, deep, present=False):
                    self._tell(found, some, Overlap(pages, device, host))

    def _tell(self, found: dict[RankPages, Overlap], mask: int, overlap: Overlap) -> None:
        if (holder := self._holders.get(mask)) is not None:
            found[holder] = overlap
        elif mask:
            members = self._members.get(mask)
            found.update(dict.fromkeys(members or self._members_of(mask), overlap))

    def _members_of(self, mask: int) -> tuple[RankPages, ...]:
        if len(self._members) >= _MEMBERS_KEPT:
            self._members.clear()
        members = tuple([holder for bit, holder in self._holders.items() if bit & mask])
        self._members[mask] = members
        return members


def _free(ids: Iterable[dict[int, int]], count: int) -> None:
    """Let go of so many ids: freeing a million in one go would take longer than a request may."""
    for shard in ids:
        while shard and count:
            shard.popitem()
            count -= 1
        if not count:
            return
