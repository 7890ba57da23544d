"""The order in which requests leave a queue."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from extproc.routing.fair_queue import FairQueue


def queue_of(*items: tuple[str, int, str]) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue(3)
    for item, priority, tenant in items:
        queue.push(item, priority, tenant)
    return queue


def drained(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_a_higher_class_is_served_before_all_below_it() -> None:
    queue = queue_of(("c", 2, "t"), ("b", 1, "t"), ("a", 0, "t"), ("b2", 1, "t"))
    assert drained(queue) == ["a", "b", "b2", "c"]


def test_tenants_take_turns() -> None:
    queue = queue_of(*[(f"a{i}", 1, "a") for i in range(4)], ("b0", 1, "b"), ("b1", 1, "b"))
    assert drained(queue) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_a_tenant_that_comes_again_waits_for_its_turn() -> None:
    queue = queue_of(("a0", 1, "a"), ("b0", 1, "b"))
    assert queue.pop() == "a0"
    queue.push("a1", 1, "a")
    assert drained(queue) == ["b0", "a1"]


def test_the_newest_of_the_greediest_in_the_lowest_class_makes_room() -> None:
    queue = queue_of(("a", 0, "a"), ("b0", 1, "b"), ("b1", 1, "b"), ("c", 1, "c"))
    assert queue.least_entitled() == "b1"
    assert queue.remove("b1")
    assert not queue.remove("b1")
    assert queue.least_entitled() in ("b0", "c")
    assert queue_of().least_entitled() is None


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc")), max_size=40))
def test_everything_leaves_once_and_no_tenant_is_two_ahead(
    pushed: list[tuple[int, str]],
) -> None:
    queue: FairQueue[tuple[int, int, str]] = FairQueue(3)
    for number, (priority, tenant) in enumerate(pushed):
        queue.push((number, priority, tenant), priority, tenant)
    left = [queue.pop() for _ in range(len(queue))]
    assert sorted(left) == [(n, p, t) for n, (p, t) in enumerate(pushed)]
    assert [priority for _, priority, _ in left] == sorted(priority for priority, _ in pushed)
    for priority in range(3):
        served: Counter[str] = Counter()
        still = Counter(tenant for one, tenant in pushed if one == priority)
        for _, _, tenant in [one for one in left if one[1] == priority]:
            assert served[tenant] <= min(served[one] for one in still if still[one] > served[one])
            served[tenant] += 1
