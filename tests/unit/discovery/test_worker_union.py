"""The union over objects: what moves stays, what disappears from one may still be in another."""

from extproc.discovery.worker_union import Sighting, WorkerUnion
from extproc.worker_url import parse_worker_url
from extproc.workers.source import Added, DrainingChanged, Removed, RoleChanged
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


def test_a_list_adds_its_workers_and_the_same_list_changes_nothing() -> None:
    union = WorkerUnion()
    one, two = seen(), seen(B, "b")
    assert union.replace({"s1": [one], "s2": [two]}) == [Added(one.spec), Added(two.spec)]
    assert union.replace({"s1": [one], "s2": [two]}) == []
    assert union.put("s1", [one], LATER) == []


def test_an_endpoint_that_is_in_both_objects_while_it_moves_stays() -> None:
    union = WorkerUnion()
    union.replace({"s1": [seen(), seen(B, "b")], "s2": []})
    assert union.put("s2", [seen(B, "b")], LATER) == []
    assert union.put("s1", [seen()], LATER) == []


def test_an_endpoint_that_is_in_no_object_while_it_moves_is_not_restarted() -> None:
    union = WorkerUnion()
    union.replace({"s1": [seen(), seen(B, "b")], "s2": []})
    assert union.put("s1", [seen()], LATER) == [DrainingChanged("b", True)]
    assert union.expire(LATER - 0.1) == []
    assert union.put("s2", [seen(B, "b")], LATER) == [DrainingChanged("b", False)]
    assert union.next_expiry is None
    assert union.expire(LATER) == []


def test_a_worker_that_does_not_appear_again_is_removed() -> None:
    union = WorkerUnion()
    union.replace({"s1": [seen()]})
    assert union.put("s1", [], LATER) == [DrainingChanged("a", True)]
    assert union.put("s2", [], LATER + 5) == []
    assert union.next_expiry == LATER
    assert union.expire(LATER) == [Removed("a")]
    assert union.put("s1", [seen()], LATER) == [Added(seen().spec)]


def test_a_list_ends_all_doubt() -> None:
    union = WorkerUnion()
    union.replace({"s1": [seen(), seen(B, "b")]})
    union.put("s1", [], LATER)
    assert union.replace({"s2": [seen(B, "b")]}) == [Removed("a"), DrainingChanged("b", False)]
    assert union.next_expiry is None


def test_a_move_within_one_list_is_seen_at_once() -> None:
    union = WorkerUnion()
    union.replace({"s1": [seen()], "s2": []})
    assert union.replace({"s2": [seen()]}) == []
    assert union.replace({}) == [Removed("a")]


def test_a_list_removes_what_disappeared_before_it() -> None:
    union = WorkerUnion()
    union.replace({"s1": [seen()], "s2": [seen(B, "b")]})
    assert union.replace({"s2": [seen(B, "b")]}) == [Removed("a")]
    assert union.replace({}) == [Removed("b")]


def test_a_pod_of_two_families_is_one_worker_at_the_preferred_address() -> None:
    union = WorkerUnion()
    four, six = seen(A), seen("http://[fd00::1]:8000", rank=1)
    assert union.replace({"v6": [six], "v4": [four]}) == [Added(four.spec)]
    assert union.put("v6", [], LATER) == []
    assert union.put("v6", [six], LATER) == []
    assert union.put("v4", [], LATER) == [Removed("a"), Added(six.spec)]


def test_a_draining_worker_stays_until_it_is_gone() -> None:
    union = WorkerUnion()
    union.replace({"s1": [seen()]})
    assert union.put("s1", [seen(draining=True)], LATER) == [DrainingChanged("a", True)]
    assert union.put("s1", [seen(draining=True)], LATER) == []
    assert union.put("s1", [], LATER) == [Removed("a")]


def test_one_object_that_says_draining_is_enough() -> None:
    union = WorkerUnion()
    union.replace({"s1": [seen()], "s2": [seen()]})
    assert union.put("s2", [seen(draining=True)], LATER) == [DrainingChanged("a", True)]
    assert union.put("s1", [], LATER) == []
    assert union.put("s2", [seen()], LATER) == [DrainingChanged("a", False)]


def test_a_worker_that_is_draining_when_it_is_first_seen_does_not_join() -> None:
    union = WorkerUnion()
    assert union.replace({"s1": [seen(draining=True)]}) == []
    assert union.put("s1", [], LATER) == []
    assert union.put("s1", [seen()], LATER) == [Added(seen().spec)]


def test_another_role_does_not_make_another_worker() -> None:
    union = WorkerUnion()
    union.replace({"s1": [seen(role="decode")]})
    assert union.put("s1", [seen(role="prefill")], LATER) == [RoleChanged("a", "prefill")]
    # In the slices of both Services: prefill counts.
    assert union.put("s2", [seen(role="decode")], LATER) == []
    assert union.put("s1", [], LATER) == [RoleChanged("a", "decode")]


def test_another_address_makes_another_worker() -> None:
    union = WorkerUnion()
    union.replace({"s1": [seen()]})
    assert union.put("s1", [seen(B)], LATER) == [Removed("a"), Added(seen(B).spec)]


def test_an_address_is_freed_before_a_new_pod_gets_it() -> None:
    union = WorkerUnion()
    union.replace({"s1": [seen()]})
    events = union.put("s1", [seen(A, "new")], LATER)
    assert events == [DrainingChanged("a", True), Removed("a"), Added(seen(A, "new").spec)]


def test_the_same_worker_twice_in_one_object_is_one() -> None:
    union = WorkerUnion()
    assert union.put("s1", [seen(), seen()], LATER) == [Added(seen().spec)]
    assert union.put("s1", [], LATER) == [DrainingChanged("a", True)]
