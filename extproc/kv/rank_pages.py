"""What one worker's rank holds, in columns: the index's book of a single rank."""

from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = ["ID_SHARDS", "Overlap", "RankPages"]

# A dict that grows moves all of its entries at once, so the ids of a rank are spread.
ID_SHARDS: Final = 64
_SHARD: Final = ID_SHARDS - 1


class Overlap(NamedTuple):
    """The longest prefix that a rank has, in whole pages.

    The first `device_pages` lie in device memory, the first `host_pages` there or in the
    host's; the rest of `pages` is further down.
    """

    pages: int
    device_pages: int
    host_pages: int


class RankPages:
    """The pages that one rank of a worker holds, and whether that can be trusted.

    PrefixIndex.add makes it and the index alone changes its pages. Pages are numbered by slots of
    parallel arrays: a page costs some 20 bytes there instead of an object of 100.

    `worker` is the worker's URL, `dp_rank` its data-parallel rank. `trusted` and `reason` are set
    from the rank's event stream: routing may rely on the pages while `trusted` is true, and
    `reason` says why it is or is not. `generation` rises whenever everything held became void,
    so that others can see that what they derived from it is void, too.
    """

    __slots__ = (
        "bigram",
        "bit",
        "children",
        "copies",
        "dp_rank",
        "ends",
        "ever_lower",
        "free",
        "generation",
        "marks",
        "page_count",
        "page_size",
        "pages_below",
        "parents",
        "reason",
        "slots",
        "sums",
        "tiers",
        "tombstones",
        "trusted",
        "worker",
    )

    def __init__(self, worker: str, dp_rank: int, page_size: int, bigram: bool) -> None:
        self.worker = worker
        self.dp_rank = dp_rank
        self.trusted = False
        self.reason = "connecting"
        self.generation = 0
        self.page_size = page_size
        self.bigram = bigram
        self.reset()

    def __repr__(self) -> str:
        return f"RankPages({self.worker}, rank {self.dp_rank})"

    def reset(self) -> None:
        # Of no use without one.
        self.bit = 0
        # Pages held, and how many of them not on the device (1) and not on the host either (2).
        self.page_count = 0
        self.pages_below = [0, 0, 0]
        # Engine ids to slots; the id's lowest bits tell in which part.
        self.slots: list[dict[int, int]] = [{} for _ in range(ID_SHARDS)]
        self.sums = array("Q")
        self.ends = array("I")  # tokens up to the end of the page
        self.parents = array("i")
        self.children = array("I")
        self.tiers = array("B")
        self.free = array("I")
        # Slots of pages that are gone while pages that follow them are not: slot -> engine id.
        self.tombstones: dict[int, int] = {}
        # Prefixes held under several ids: how many beyond the first.
        self.copies: dict[int, int] = {}
        # A page was stored elsewhere than on the device, since the last reset.
        self.ever_lower = False
        # Whether there are holes, pages below the device, pages below the host.
        self.marks = (False, False, False)

    def find(self, key: int) -> int | None:
        """The slot of an engine id, also of a page that is gone before others."""
        return self.slots[key & _SHARD].get(key)

    def name_all(self, keys: Sequence[int], slots: Sequence[int]) -> bool:
        """Give ids to slots; False, and nothing done, if one of them is known or comes twice."""
        shards = self.slots
        for number, (key, slot) in enumerate(zip(keys, slots, strict=True)):
            if shards[key & _SHARD].setdefault(key, slot) != slot:
                for named in keys[:number]:
                    del shards[named & _SHARD][named]
                return False
        return True

    @property
    def has_holes(self) -> bool:
        """True while a page is missing before others: its engine evicts out of order."""
        return bool(self.tombstones)
