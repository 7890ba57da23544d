"""From the hash of a prefix to the holders that have it, as bits.

Many small tables instead of a large one: a Python dict that grows moves all of its entries at
once, which at a million of them holds the event loop up for 100 ms.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Final

__all__ = ["PrefixTable", "tidied"]

_SHARDS: Final = 1024
_SHARD: Final = _SHARDS - 1
# A dict that has just the room it needs has 40 to 60 for each entry.
_LOOSE_BYTES_PER_ENTRY: Final = 70
_DICT_BYTES: Final = 300


def tidied(shards: list[dict[int, int]]) -> Iterator[None]:
    """Replace dicts that take more memory than their entries need; yields after each.

    A dict keeps a place for every deleted entry until it grows, and then takes thrice what it
    has entries for.
    """
    for number, shard in enumerate(shards):
        if sys.getsizeof(shard) > _LOOSE_BYTES_PER_ENTRY * len(shard) + _DICT_BYTES:
            shards[number] = dict(shard)
        yield


class PrefixTable:
    """Prefixes are integers of 60 bits, of which any few are as good as random."""

    __slots__ = ("_shards",)

    def __init__(self) -> None:
        self._shards: list[dict[int, int]] = [{} for _ in range(_SHARDS)]

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def get(self, prefix: int) -> int:
        return self._shards[prefix & _SHARD].get(prefix, 0)

    def add(self, prefix: int, bit: int) -> bool:
        """False if the bit was there."""
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
        """Gives those that had the bit already."""
        shards = self._shards
        had: list[int] = []
        # Neighbours in a chain mostly have the same holders: they share one integer.
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
        """Give back what deletions have left unused, a part at a time."""
        return tidied(self._shards)

    def depths(
        self, prefixes: "memoryview[int]", low: int, high: int, mask: int, *, present: bool
    ) -> list[tuple[int, int]]:
        """How many leading prefixes each of the holders in `mask` has; or, not `present`, lacks.

        That is known to be `low` at least and `high` at most, and once it ends not to come
        back: a binary search that splits the holders at every probe. Gives pairs of a number
        and the holders whose it is.
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
