"""Whether 5xx answers are the fault of a worker or of the requests."""

import pytest

from extproc.workers.pool_faults import PoolFaults

THRESHOLD = 3


def fail(faults: PoolFaults, worker: str, now: float, times: int = 1) -> list[float]:
    return [faults.failed(worker, now, THRESHOLD) for _ in range(times)]


def serve(faults: PoolFaults, worker: str, now: float, times: int = 1) -> None:
    for _ in range(times):
        faults.answered(worker, now)


def test_a_worker_that_fails_alone_is_avoided_for_longer_and_longer() -> None:
    faults, now = PoolFaults(), 0.0
    serve(faults, "b", now, 5)
    assert fail(faults, "a", now, 3) == [0.0, 0.0, 2.0]
    for seconds in (2.0, 4.0, 8.0, 16.0, 32.0):
        now += seconds
        serve(faults, "b", now, 5)
        assert fail(faults, "a", now) == [min(2 * seconds, 32.0)]


def test_what_fails_on_a_second_worker_is_the_fault_of_the_request() -> None:
    """A policy sends all requests of a kind to one worker, and to others while that is avoided."""
    faults = PoolFaults()
    serve(faults, "b", 0.0, 5)
    assert fail(faults, "a", 0.0, 3)[-1] > 0
    assert fail(faults, "b", 1.0) == [0.0]
    # For a while no worker is suspected, and then not for longer than at first.
    assert fail(faults, "a", 3.0, 5) == [0.0] * 5
    serve(faults, "b", 12.0, 5)
    assert fail(faults, "a", 12.0, 3) == [0.0, 0.0, 2.0]


def test_requests_that_fail_on_all_workers_cast_no_suspicion() -> None:
    faults = PoolFaults()
    for _ in range(10):
        for worker in ("a", "b", "c"):
            assert fail(faults, worker, 0.0) == [0.0]


def test_a_worker_that_serves_most_of_its_requests_is_not_suspected() -> None:
    faults = PoolFaults()
    serve(faults, "a", 0.0, 20)
    serve(faults, "b", 0.0, 20)
    assert fail(faults, "a", 0.0, 19) == [0.0] * 19


def test_a_suspected_worker_that_serves_again_begins_anew() -> None:
    faults = PoolFaults()
    serve(faults, "b", 0.0, 5)
    fail(faults, "a", 0.0, 3)
    serve(faults, "a", 2.0, 10)
    assert fail(faults, "a", 2.0) == [0.0]


def test_a_few_errors_of_others_do_not_acquit() -> None:
    """The others fail one request in ten, before and during the suspicion."""
    faults = PoolFaults()
    serve(faults, "b", 0.0, 90)
    fail(faults, "b", 0.0, 10)
    assert fail(faults, "a", 0.0, 3)[-1] == 2.0
    serve(faults, "b", 1.0, 90)
    fail(faults, "b", 1.0, 9)
    assert fail(faults, "a", 2.0) == [4.0]


@pytest.mark.parametrize("later", [10.0, 1000.0])
def test_old_answers_do_not_count(later: float) -> None:
    faults = PoolFaults()
    fail(faults, "a", 0.0, 2)
    assert fail(faults, "a", later) == [0.0]


def test_workers_without_recent_answers_are_forgotten() -> None:
    faults = PoolFaults()
    for number in range(1000):
        serve(faults, str(number), 0.0)
        fail(faults, str(number), 0.0)
    for now in (5.0, 10.0, 15.0, 100.0):
        serve(faults, "a", now)
    assert len(faults._counts) == 1
    assert not faults._suspicions


def test_it_is_known_whether_others_have_answered_since() -> None:
    faults = PoolFaults()
    assert not faults.others_answered_since("a", 0.0)
    serve(faults, "a", 1.0)
    assert not faults.others_answered_since("a", 0.0)
    assert faults.others_answered_since("b", 0.0)
    faults.heard_from("b", 2.0)
    assert faults.others_answered_since("a", 1.5)
    assert faults.others_answered_since("b", 0.5)
    assert not faults.others_answered_since("b", 1.5)
