"""The prefix cache against a brute-force model, and its rules one by one."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.simulator.cache_events import (
    DEFAULT_NAMESPACE,
    CacheEvent,
    Cleared,
    Namespace,
    Removed,
    Stored,
    pages_of,
)
from extproc.simulator.radix_cache import Lease, Match, RadixCache

PAGE = 4
SALTED = Namespace(cache_salt="tenant")


def cache(pages: int, host: int = 0, **fields: bool) -> RadixCache:
    made = RadixCache(
        capacity_tokens=pages * PAGE, page_size=PAGE, host_capacity_tokens=host * PAGE, **fields
    )
    assert made.take_events() == ([Cleared()] if fields.get("record_events", True) else [])
    return made


def keep(cache: RadixCache, pages: Sequence[str], now: float) -> Match:
    """One request from beginning to end; gives what was cached for it."""
    lease = cache.acquire(pages, now)
    cache.release(lease, now, pages)
    return lease.cached


def hashes_of(events: list[CacheEvent]) -> dict[str, int]:
    """Page to hash, where pages have names of their own."""
    stores = [item for item in events if isinstance(item, Stored)]
    return {
        str(page): h for item in stores for page, h in zip(item.pages, item.hashes, strict=True)
    }


def removed(events: list[CacheEvent], medium: str = "GPU") -> list[int]:
    items = [item for item in events if isinstance(item, Removed) and item.medium == medium]
    return [h for item in items for h in item.hashes]


def test_only_whole_pages_count() -> None:
    assert pages_of(range(11), 4) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert pages_of(b"\x01\x02", 1) == pages_of([1, 2], 1) == [(1,), (2,)]
    assert pages_of([], 4) == []


def test_a_new_chain_is_one_event_and_a_longer_one_names_its_parent() -> None:
    held = cache(10)
    assert keep(held, "ab", 1) == Match(0, 0)
    (first,) = held.take_events()
    assert isinstance(first, Stored)
    assert (first.parent, first.pages, first.medium) == (None, ["a", "b"], "GPU")
    assert keep(held, "abcd", 2) == Match(2 * PAGE, 0)
    (second,) = held.take_events()
    assert isinstance(second, Stored)
    assert (second.parent, second.pages) == (first.hashes[-1], ["c", "d"])


def test_the_least_recently_used_leaves_go_first_and_before_their_parents() -> None:
    held = cache(5)
    keep(held, "abc", 1)
    keep(held, "axy", 2)  # a b c x y
    names = hashes_of(held.take_events())
    keep(held, "abc", 3)
    keep(held, "m", 4)
    assert removed(held.take_events()) == [names["y"]]
    keep(held, "mno", 5)
    # x was used at 2, then c, used at 3; a and b stay.
    assert removed(held.take_events()) == [names["x"], names["c"]]
    assert held.match("abc") == Match(2 * PAGE, 0)
    assert held.used_tokens == 5 * PAGE


def test_a_parent_is_as_fresh_as_the_children_it_lost() -> None:
    held = cache(4)
    keep(held, "ab", 1)
    keep(held, "x", 2)
    keep(held, "ab", 3)
    keep(held, "mn", 4)  # fills it: a b m n once x is gone
    assert held.match("ab").tokens == 2 * PAGE
    assert held.match("x").tokens == 0


def test_pages_in_use_stay_and_pages_that_do_not_fit_are_dropped() -> None:
    held = cache(3)
    lease = held.acquire("ab", 1)
    held.insert(lease, "ab", 1)
    keep(held, "xyz", 2)
    assert held.match("xyz").gpu == PAGE
    assert held.match("ab").gpu == 2 * PAGE
    held.release(lease, 3)
    keep(held, "xyz", 4)
    assert held.match("xyz").gpu == 3 * PAGE


def test_namespaces_share_nothing() -> None:
    held = cache(4)
    keep(held, "ab", 1)
    assert held.match("ab", SALTED) == Match(0, 0)
    lease = held.acquire("ab", 2, SALTED)
    held.release(lease, 2, "ab")
    plain, salted = held.take_events()
    assert isinstance(plain, Stored)
    assert isinstance(salted, Stored)
    assert salted.namespace == SALTED
    assert not set(plain.hashes) & set(salted.hashes)


def test_a_demotion_is_stored_on_the_host_before_it_leaves_the_device() -> None:
    held = cache(2, host=2)
    keep(held, "ab", 1)
    first = held.take_events()[0]
    keep(held, "xy", 2)
    demoted, gone, stored = held.take_events()
    assert isinstance(first, Stored)
    assert demoted == Stored(first.hashes, None, ["a", "b"], "CPU_PINNED", DEFAULT_NAMESPACE)
    assert gone == Removed(first.hashes[::-1], "GPU")
    assert isinstance(stored, Stored)
    assert held.match("ab") == Match(0, 2 * PAGE)
    assert (held.used_tokens, held.host_used_tokens) == (2 * PAGE, 2 * PAGE)


def test_a_hit_on_the_host_brings_the_pages_back() -> None:
    held = cache(3, host=3)
    keep(held, "ab", 1)
    keep(held, "xyz", 2)
    held.take_events()
    lease = held.acquire("abc", 3)
    assert lease.cached == Match(0, 2 * PAGE)
    events = held.take_events()
    # z and y make room: demoted first, then a and b are stored on the device.
    assert [(type(item).__name__, getattr(item, "medium", "")) for item in events] == [
        ("Stored", "CPU_PINNED"),
        ("Removed", "GPU"),
        ("Stored", "GPU"),
        ("Removed", "CPU_PINNED"),
    ]
    assert held.match("ab") == Match(2 * PAGE, 0)
    held.release(lease, 4)


def test_pages_that_do_not_fit_on_the_host_are_lost() -> None:
    held = cache(2, host=1)
    keep(held, "ab", 1)
    names = hashes_of(held.take_events())
    keep(held, "xy", 2)
    assert held.match("ab") == Match(0, PAGE)
    keep(held, "mn", 3)
    assert removed(held.take_events(), "CPU_PINNED") == [names["a"]]
    assert held.match("ab") == Match(0, 0)
    assert held.match("x") == Match(0, PAGE)


def test_a_flush_voids_leases() -> None:
    held = cache(4)
    lease = held.acquire("ab", 1)
    held.insert(lease, "ab", 1)
    held.flush()
    assert held.take_events()[-1] == Cleared()
    held.insert(lease, "abc", 2)
    held.release(lease, 2, "abcd")
    assert held.used_tokens == 0
    assert held.take_events() == []


def test_without_recording_no_events_are_made() -> None:
    held = cache(2, record_events=False)
    keep(held, "abc", 1)
    held.flush()
    assert held.take_events() == []


def test_a_busy_cache_that_never_evicts_stays_small() -> None:
    held = cache(10)
    for now in range(5000):
        keep(held, "ab", now)
    assert len(held._gpu_leaves) < 2000


class Mirror:
    """What a consumer of the events believes: hash to parent, per medium."""

    def __init__(self) -> None:
        self.media: dict[str, set[int]] = {"GPU": set(), "CPU_PINNED": set()}
        self.parents: dict[int, int | None] = {}
        self.paths: dict[int, tuple[object, ...]] = {}

    def apply(self, event: CacheEvent) -> None:
        if isinstance(event, Cleared):
            self.__init__()  # type: ignore[misc]
        elif isinstance(event, Stored):
            parent = event.parent
            for h, page in zip(event.hashes, event.pages, strict=True):
                assert parent is None or parent in self.held
                assert h not in self.media[event.medium]
                self.media[event.medium].add(h)
                self.parents[h] = parent
                before = (event.namespace,) if parent is None else self.paths[parent]
                self.paths[h] = (*before, page)
                parent = h
        else:
            for h in event.hashes:
                self.media[event.medium].remove(h)
                orphans = {other for other in self.held if self.parents[other] == h}
                assert h in self.held or not orphans
        assert all(
            self.parents[h] is None or self.parents[h] in self.media["GPU"]
            for h in self.media["GPU"]
        ), "the device is closed under prefixes"

    @property
    def held(self) -> set[int]:
        return self.media["GPU"] | self.media["CPU_PINNED"]

    def named(self, medium: str) -> set[tuple[object, ...]]:
        return {self.paths[h] for h in self.media[medium]}


chains = st.text("ab", max_size=6)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("acquire"), chains, st.sampled_from([DEFAULT_NAMESPACE, SALTED])),
        st.tuples(st.just("insert"), chains, st.integers(0, 9)),
        st.tuples(st.just("release"), chains, st.integers(0, 9)),
        st.tuples(st.just("abandon"), chains, st.integers(0, 9)),
        st.tuples(st.just("flush"), st.just(""), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=400)
@given(capacity=st.integers(0, 8), host=st.integers(0, 5), steps=steps)
def test_events_describe_exactly_the_held_pages(
    capacity: int, host: int, steps: list[tuple[str, str, object]]
) -> None:
    held, mirror = cache(capacity, host), Mirror()
    leases: list[tuple[Lease, str, Namespace]] = []
    for now, (what, chain, extra) in enumerate(steps, start=1):
        if what == "acquire":
            assert isinstance(extra, Namespace)
            before = held.match(chain, extra)
            lease = held.acquire(chain, now, extra)
            assert lease.cached.gpu == before.gpu
            assert lease.cached.host <= before.host
            leases.append((lease, chain, extra))
        elif what == "flush":
            held.flush()
        elif leases:
            assert isinstance(extra, int)
            lease, own, namespace = leases.pop(extra % len(leases))
            if what == "insert":
                held.insert(lease, own + chain, now)
                leases.append((lease, own + chain, namespace))
            else:
                held.release(lease, now, own + chain if what == "release" else None)
        for event in held.take_events():
            mirror.apply(event)
        check(held, mirror, leases, capacity, host)
    for lease, _, _ in leases:
        held.release(lease, 1000)
    if capacity:  # no page stays pinned: all can be evicted
        keep(held, [f"p{n}" for n in range(capacity)], 1001)
        assert held.match([f"p{n}" for n in range(capacity)]).gpu == capacity * PAGE


def check(
    held: RadixCache,
    mirror: Mirror,
    leases: list[tuple[Lease, str, Namespace]],
    capacity: int,
    host: int,
) -> None:
    assert held.used_tokens == len(mirror.media["GPU"]) * PAGE <= capacity * PAGE
    assert held.host_used_tokens == len(mirror.media["CPU_PINNED"]) * PAGE <= host * PAGE
    assert not mirror.media["GPU"] & mirror.media["CPU_PINNED"]
    gpu, on_host = mirror.named("GPU"), mirror.named("CPU_PINNED")
    for path in gpu | on_host:
        namespace, *pages = path
        assert isinstance(namespace, Namespace)
        want = [sum(path[: n + 2] in where for n in range(len(pages))) for where in (gpu, on_host)]
        assert held.match(pages, namespace) == Match(want[0] * PAGE, want[1] * PAGE)
        assert sum(want) == len(pages)
    for lease, chain, namespace in leases:
        if held._is_live(lease):
            assert held.match(chain, namespace).gpu >= lease._depth * PAGE


class BruteForce:
    """LRU over whole paths, no host: what a cache of one medium holds, found the slow way."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used: dict[str, float] = {}

    def keep(self, chain: str, now: float) -> int:
        """The number of pages found; then all of the chain that finds room is kept."""
        paths = [chain[: n + 1] for n in range(len(chain))]
        found = sum(path in self.used for path in paths)
        for path in paths[:found]:
            self.used[path] = now
        for path in paths[found:]:
            while len(self.used) >= self.capacity and (leaves := self.leaves(chain)):
                del self.used[min(leaves, key=lambda leaf: (self.used[leaf], -len(leaf)))]
            if len(self.used) >= self.capacity:
                break
            self.used[path] = now
        return found

    def leaves(self, chain: str) -> list[str]:
        inner = {path[:-1] for path in self.used}
        return [p for p in self.used if p not in inner and not chain.startswith(p)]


@settings(max_examples=400)
@given(
    capacity=st.integers(0, 8),
    chains=st.lists(st.text("ab", max_size=6), max_size=40),
)
def test_hits_are_those_of_a_brute_force_lru(capacity: int, chains: list[str]) -> None:
    held, model = cache(capacity), BruteForce(capacity)
    for now, chain in enumerate(chains, start=1):
        assert keep(held, chain, now) == Match(model.keep(chain, now) * PAGE, 0)
        for path in model.used:
            assert held.match(path).gpu == len(path) * PAGE
        assert held.used_tokens == len(model.used) * PAGE
