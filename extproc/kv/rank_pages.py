"""The pages of one rank, in columns of arrays, and whether they can be trusted.

Separate from the index, since routing reads trust, page size and bit of a rank here.
"""

from array import array
from collections.abc import Sequence
from typing import ClassVar, Final, NamedTuple

__all__ = ["ID_SHARDS", "Overlap", "PageEnd", "RankPages"]

# A dict that grows moves all of its entries at once, so the ids are spread over many dicts.
ID_SHARDS: Final = 64
_SHARD: Final = ID_SHARDS - 1


class Overlap(NamedTuple):
    """The longest prefix of a prompt that a rank holds, in whole pages.

    The first `device_pages` are in device memory, the first `host_pages` in device or host
    memory; the rest of `pages` is on a disk or further away.
    """

    pages: int
    device_pages: int
    host_pages: int


class PageEnd(NamedTuple):
    """Where a page ends: the hash sum and the number of tokens up to there, and its slot.

    The slot is -1 at the start of a prompt, and for a page that only the rank's leader has.
    """

    total: int
    tokens: int
    slot: int = -1


class RankPages:
    """The pages that one rank of a worker holds, and whether that can be trusted.

    PrefixIndex.add makes it, and only the index changes its pages. Pages are slots of parallel
    arrays: a page takes about 20 bytes there, an object would take 100.

    `worker` is the worker's URL, `dp_rank` its data-parallel rank. Routing may rely on the pages
    while `trusted` is true. `reason` says why they are trusted ("complete", "partial") or not
    ("connecting", "disconnected", "replaying", "verifying", "gap", "behind", "restarted",
    "unreadable", "malformed", "unfollowed"). `generation` rises each time everything held
    becomes void, so that others can tell that what they derived from it is void, too.
    """

    # What `reset` empties.
    CONTENT: ClassVar = (
        "bit",
        "children",
        "copies",
        "ends",
        "ever_lower",
        "free",
        "marks",
        "page_count",
        "pages_below",
        "parents",
        "repeats",
        "slots",
        "sums",
        "tiers",
        "tombstones",
    )
    __slots__ = (
        *CONTENT,
        "bigram",
        "dp_rank",
        "generation",
        "groups",
        "leader",
        "needed",
        "page_size",
        "reason",
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
        # Of a hybrid model: the other groups of its blocks, each with the pages of the rank as its
        # `leader`, and the number of pages that must be held there before the end of a prefix;
        # None if all are needed.
        self.groups: tuple[RankPages, ...] = ()
        self.leader: RankPages | None = None
        self.needed: int | None = None
        self.reset()

    def __repr__(self) -> str:
        return f"RankPages({self.worker}, rank {self.dp_rank})"

    def reset(self) -> None:
        # Its bit in the index's masks; 0 while it is not in the index.
        self.bit = 0
        # Pages held, and how many of them are not on the device (1), and not on the host (2).
        self.page_count = 0
        self.pages_below = [0, 0, 0]
        # Engine ids to slots; the lowest bits of an id select the dict.
        self.slots: list[dict[int, int]] = [{} for _ in range(ID_SHARDS)]
        self.sums = array("Q")
        self.ends = array("I")  # number of tokens up to the end of the page
        self.parents = array("i")
        self.children = array("I")
        self.tiers = array("B")
        self.free = array("I")
        # Slots of removed pages that are still followed by held ones: slot -> engine id.
        self.tombstones: dict[int, int] = {}
        # Prefixes that are held under several ids: the number of ids beyond the first.
        self.copies: dict[int, int] = {}
        # Pages that the engine holds several times on one tier, by slot * 4 + tier: the number of
        # blocks beyond the first. Each of them is removed by an event of its own.
        self.repeats: dict[int, int] = {}
        # Since the last reset, a page was stored elsewhere than on the device.
        self.ever_lower = False
        # Whether there are holes, pages below the device, pages below the host, and groups.
        self.marks = (False, False, False, False)

    def find(self, key: int) -> int | None:
        """The slot of an engine id; also that of a removed page which held pages follow."""
        return self.slots[key & _SHARD].get(key)

    def end_of(self, key: int | None, seed: int) -> PageEnd | None:
        """The end of that page, None if it is not known; without a page, the start of a prompt."""
        if key is None:
            return PageEnd(seed, 0)
        slot = self.find(key)
        if slot is not None:
            return PageEnd(self.sums[slot], self.ends[slot], slot)
        # A group keeps no pages before its window, but the same names are known elsewhere.
        leader = self.leader
        if leader is None or (slot := leader.find(key)) is None:
            return None
        return PageEnd(leader.sums[slot], leader.ends[slot])

    def ends_within_page(self, key: int) -> bool:
        """Whether the rank has that page and it ends inside a page of the rank's size."""
        slot = self.find(key)
        return slot is not None and bool((self.ends[slot] - self.bigram) % self.page_size)

    def next_slots(self, count: int) -> Sequence[int]:
        """The last free slots, or new ones in a row behind all others."""
        free = self.free
        if len(free) < count:
            return range(len(self.sums), len(self.sums) + count)
        return free[len(free) - count :].tolist()

    def name_all(self, keys: Sequence[int], slots: Sequence[int]) -> bool:
        """Name slots by ids; changes nothing and gives False if an id is known or comes twice."""
        shards = self.slots
        for number, (key, slot) in enumerate(zip(keys, slots, strict=True)):
            if shards[key & _SHARD].setdefault(key, slot) != slot:
                for named in keys[:number]:
                    del shards[named & _SHARD][named]
                return False
        return True

    def repeat(self, slot: int, tier: int) -> None:
        """Count one block more of a page on a tier where it is held already."""
        repeat = slot << 2 | tier
        self.repeats[repeat] = self.repeats.get(repeat, 0) + 1

    def was_repeated(self, slot: int, tier: int) -> bool:
        """Count one block less of a page; False if it was the last one."""
        repeat = slot << 2 | tier
        count = self.repeats.pop(repeat, 0)
        if count > 1:
            self.repeats[repeat] = count - 1
        return count > 0

    @property
    def has_holes(self) -> bool:
        """True while held pages follow a removed one: the engine evicts out of order."""
        return bool(self.tombstones)
