"""The union over objects: what moves stays, what disappears from one may still be in another."""

import time

import msgspec

from extproc.discovery.worker_union import Reading, Sighting, WorkerUnion
from extproc.worker_url import parse_worker_url
from extproc.workers.source import Added, DrainingChanged, Removed, RoleChanged, Vanished
from extproc.workers.worker import Role, WorkerSpec

LATER = 100.0
A, B = "http://10.0.0.1:8000", "http://10.0.0.2:8000"


def seen(
    url: str = A,
    worker_id: str = "a",
    *,
    role: Role = "plain",
    draining: bool = False,
    rank: int = 0,
) -> Sighting:
    spec = WorkerSpec(id=worker_id, url=parse_worker_url(url), role=role)
    return Sighting(spec, draining, rank)


def part(*sightings: Sighting, left: tuple[str, ...] = ()) -> Reading:
    """A slice, which shares the workers of its Service with others."""
    return Reading(sightings, shared=True, left=left)


def test_a_list_adds_its_workers_and_the_same_list_changes_nothing() -> None:
    union = WorkerUnion()
    one, two = seen(), seen(B, "b")
    assert union.replace({"s1": part(one), "s2": part(two)}) == [Added(one.spec), Added(two.spec)]
    assert union.replace({"s1": part(one), "s2": part(two)}) == []
    assert union.put("s1", part(one)) == []


def test_an_endpoint_that_is_in_both_objects_while_it_moves_stays() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen(), seen(B, "b")), "s2": part()})
    assert union.put("s2", part(seen(B, "b"))) == []
    assert union.put("s1", part(seen())) == []


def test_a_worker_of_a_deleted_object_that_appears_in_another_one_is_not_restarted() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen(), seen(B, "b")), "s2": part()})
    union.put("s2", part(seen()))
    assert union.delete("s1", LATER) == [DrainingChanged("b", True)]
    assert union.expire(LATER - 0.1) == []
    assert union.put("s2", part(seen(), seen(B, "b"))) == [DrainingChanged("b", False)]
    assert union.next_expiry is None
    assert union.expire(LATER) == []


def test_a_worker_of_a_deleted_object_that_does_not_appear_again_is_removed() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen())})
    assert union.delete("s1", LATER) == [DrainingChanged("a", True)]
    assert union.put("s2", part()) == []
    assert union.next_expiry == LATER
    assert union.expire(LATER) == [Removed("a")]
    assert union.put("s1", part(seen())) == [Added(seen().spec)]


def test_a_list_ends_all_doubt_of_deleted_objects() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen(), seen(B, "b"))})
    union.delete("s1", LATER)
    assert union.replace({"s2": part(seen(B, "b"))}) == [
        Removed("a"),
        DrainingChanged("b", False),
    ]
    assert union.next_expiry is None


def test_a_move_within_one_list_is_seen_at_once() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen()), "s2": part()})
    assert union.replace({"s2": part(seen())}) == []


def test_a_worker_that_a_list_does_not_name_has_vanished() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen()), "s2": part(seen(B, "b"))})
    assert union.replace({"s2": part(seen(B, "b"))}) == [Vanished(seen().spec)]
    assert union.replace({}) == [Vanished(seen(B, "b").spec)]
    assert union.replace({"s1": part(seen())}) == [Added(seen().spec)]


def test_a_worker_that_its_slice_does_not_name_any_more_has_vanished() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen(), seen(B, "b"))})
    assert union.put("s1", part(seen())) == [Vanished(seen(B, "b").spec)]
    assert union.put("s2", part(seen(B, "b"))) == [Added(seen(B, "b").spec)]


def test_a_worker_has_left_if_a_slice_says_so() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen(), seen(B, "b"))})
    assert union.put("s1", part(seen(B, "b"), left=("a",))) == [Removed("a")]
    assert union.put("s1", part(seen(B, "b"), left=("a",))) == []
    # Also where another object named it, and in a list.
    assert union.replace({"s2": part(left=("b",))}) == [Removed("b")]


def test_the_sign_that_a_worker_leaves_may_come_after_it_has_vanished() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen())})
    assert union.put("s1", part()) == [Vanished(seen().spec)]
    assert union.put("s1", part(left=("a",))) == [Removed("a")]
    assert union.put("s1", part(left=("a",))) == []
    assert union.put("s1", part(seen())) == [Added(seen().spec)]


def test_an_object_of_its_own_says_that_a_worker_leaves_by_naming_it_no_longer() -> None:
    union = WorkerUnion()
    union.replace({"p1": Reading([seen()]), "p2": Reading([seen(B, "b")])})
    assert union.put("p1", Reading()) == [Removed("a")]
    # A list without the object says less.
    assert union.replace({}) == [Vanished(seen(B, "b").spec)]


def test_other_rules_of_selection_leave_nothing_to_hold() -> None:
    union = WorkerUnion()
    union.replace({"p1": Reading([seen()]), "p2": Reading([seen(B, "b")])})
    union.replace({"p1": Reading([seen()])})
    assert union.replace({}, others_left=True) == [Removed("b"), Removed("a")]
    assert union.replace({}, others_left=True) == []


def test_no_more_than_ten_thousand_vanished_workers_are_remembered() -> None:
    union = WorkerUnion()
    many = [seen(f"http://10.1.{n // 250}.{n % 250}:8000", f"w{n}") for n in range(10_001)]
    union.replace({"s1": part(*many)})
    assert len(union.replace({})) == 10_001
    assert len(union.replace({}, others_left=True)) == 10_000


def test_a_pod_of_two_families_is_one_worker_at_the_preferred_address() -> None:
    union = WorkerUnion()
    four, six = seen(A), seen("http://[fd00::1]:8000", rank=1)
    assert union.replace({"v6": part(six), "v4": part(four)}) == [Added(four.spec)]
    assert union.put("v6", part()) == []
    assert union.put("v6", part(six)) == []
    assert union.put("v4", part()) == [Removed("a"), Added(six.spec)]


def test_a_draining_worker_stays_until_it_is_gone() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen())})
    assert union.put("s1", part(seen(draining=True))) == [DrainingChanged("a", True)]
    assert union.put("s1", part(seen(draining=True))) == []
    assert union.put("s1", part()) == [Removed("a")]


def test_one_object_that_says_draining_is_enough() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen()), "s2": part(seen())})
    assert union.put("s2", part(seen(draining=True))) == [DrainingChanged("a", True)]
    assert union.put("s1", part()) == []
    assert union.put("s2", part(seen())) == [DrainingChanged("a", False)]


def test_a_worker_that_is_draining_when_it_is_first_seen_joins_as_such() -> None:
    union = WorkerUnion()
    one = seen(draining=True)
    assert union.replace({"s1": part(one)}) == [Added(one.spec), DrainingChanged("a", True)]
    assert union.put("s1", part(seen())) == [DrainingChanged("a", False)]


def test_a_draining_worker_that_does_not_serve_need_not_join() -> None:
    union = WorkerUnion()
    ending = msgspec.structs.replace(seen(draining=True), serving=False)
    assert union.replace({"s1": part(ending)}) == []
    assert union.put("s1", part()) == []
    assert union.put("s1", part(seen())) == [Added(seen().spec)]
    # One that has joined stays until it is gone.
    assert union.put("s1", part(ending)) == [DrainingChanged("a", True)]
    assert union.put("s1", part()) == [Removed("a")]


def test_a_worker_that_vanished_and_is_seen_draining_drains() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen())})
    assert union.replace({"s1": part()}) == [Vanished(seen().spec)]
    ending = msgspec.structs.replace(seen(draining=True), serving=False)
    events = union.put("s1", part(ending))
    assert events == [Added(ending.spec), DrainingChanged("a", True)]


def test_another_role_does_not_make_another_worker() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen(role="decode"))})
    assert union.put("s1", part(seen(role="prefill"))) == [RoleChanged("a", "prefill")]
    # In the slices of both Services: prefill counts.
    assert union.put("s2", part(seen(role="decode"))) == []
    assert union.put("s1", part()) == [RoleChanged("a", "decode")]


def test_another_address_makes_another_worker() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen())})
    assert union.put("s1", part(seen(B))) == [Removed("a"), Added(seen(B).spec)]


def test_an_address_is_freed_before_a_new_pod_gets_it() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen())})
    events = union.put("s1", part(seen(A, "new")))
    assert events == [Vanished(seen().spec), Added(seen(A, "new").spec)]


def test_an_address_of_a_deleted_object_is_freed_before_a_new_pod_gets_it() -> None:
    union = WorkerUnion()
    union.replace({"s1": part(seen())})
    union.delete("s1", LATER)
    new = seen(A, "new")
    assert union.put("s2", part(new)) == [Removed("a"), Added(new.spec)]


def test_the_same_worker_twice_in_one_object_is_one() -> None:
    union = WorkerUnion()
    assert union.put("s1", part(seen(), seen())) == [Added(seen().spec)]
    assert union.put("s1", part()) == [Vanished(seen().spec)]


def test_changes_beside_many_that_leave_cost_no_more_and_their_number_is_limited() -> None:
    union = WorkerUnion()

    def name(n: int) -> Sighting:
        return seen(f"http://10.{n >> 16}.{n >> 8 & 255}.{n & 255}:8000", f"w{n}")

    union.replace({f"s{n}": part(name(n)) for n in range(3_000)})
    events = [event for n in range(3_000) for event in union.delete(f"s{n}", LATER)]
    # Of very many that leave, the oldest are removed at once.
    assert [event for event in events if isinstance(event, Removed)] == [
        Removed(f"w{n}") for n in range(1_000)
    ]
    began = time.process_time()
    for n in range(3_000, 6_000):
        assert union.put(f"s{n}", part(name(n))) == [Added(name(n).spec)]
    # A look at all that leave, for each of them, takes seconds.
    assert time.process_time() - began < 0.5
    assert union.put("s", part(seen("http://10.0.7.208:8000", "new"))) == [
        Removed("w2000"),
        Added(seen("http://10.0.7.208:8000", "new").spec),
    ]
