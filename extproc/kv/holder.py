"""What one worker's rank holds, in columns: the index's book of a single holder."""

from array import array
from typing import NamedTuple

__all__ = ["Holder", "Overlap"]


class Overlap(NamedTuple):
    """The longest prefix that a holder has, in whole pages.

    The first `device_pages` lie in device memory, the first `host_pages` there or in the
    host's; the rest of `pages` is further down.
    """

    pages: int
    device_pages: int
    host_pages: int


class Holder:
    """What one (worker, rank) holds; made by PrefixIndex.add and changed by the index alone.

    Pages are numbered by slots of parallel arrays: a page costs some 20 bytes there instead of
    an object of 100.
    """

    __slots__ = (
        "bigram",
        "bit",
        "children",
        "copies",
        "ends",
        "free",
        "name",
        "page_size",
        "pages",
        "pages_below",
        "parents",
        "slots",
        "special",
        "sums",
        "tiers",
        "tombstones",
    )

    def __init__(self, name: str, page_size: int, bigram: bool, bit: int) -> None:
        self.name = name
        self.page_size = page_size
        self.bigram = bigram
        self.reset(bit)

    def reset(self, bit: int) -> None:
        self.bit = bit
        # Pages held, and how many of them not on the device (1) and not on the host either (2).
        self.pages = 0
        self.pages_below = [0, 0, 0]
        self.slots: dict[int, int] = {}
        self.sums = array("Q")
        self.ends = array("I")  # tokens up to the end of the page
        self.parents = array("i")
        self.children = array("I")
        self.tiers = array("B")
        self.free: list[int] = []
        # Slots of pages that are gone while pages that follow them are not: slot -> engine id.
        self.tombstones: dict[int, int] = {}
        # Prefixes held under several ids: how many beyond the first.
        self.copies: dict[int, int] = {}
        # Holes or pages below the device: a match has to look closer.
        self.special = False

    @property
    def has_holes(self) -> bool:
        """True while a page is missing before others: its engine evicts out of order."""
        return bool(self.tombstones)
