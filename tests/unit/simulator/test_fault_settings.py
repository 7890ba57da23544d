"""The meaning of fault headers and fault objects, without a worker."""

import pytest

from extproc.simulator.faults import FaultBoard, RequestFault, WorkerFaults, parse_header


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ("status=500", RequestFault(status=500)),
        ("hang", RequestFault(hang=True)),
        ("hang=1", RequestFault(hang=1.0)),
        ("hang=2.5", RequestFault(hang=2.5)),
        ("die-before-headers", RequestFault(die_before_headers=True)),
        ("die-after-tokens=3, reset", RequestFault(die_after_tokens=3, reset=True)),
        ("slow-token=0.5,stall-after-tokens=0", RequestFault(slow_token=0.5, stall_after_tokens=0)),
        ("retry-after=2", RequestFault(retry_after=2.0)),
    ],
)
def test_a_header_names_faults(header: str, fault: RequestFault) -> None:
    assert parse_header(header) == fault


@pytest.mark.parametrize(
    "header", ["", "explode", "status=9", "status=abc", "hang=-1", "die-after-tokens=1.5", "status"]
)
def test_a_header_without_a_known_fault_is_refused(header: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_header(header)


def test_a_number_of_seconds_differs_from_true() -> None:
    assert parse_header("hang=1").hang is not True


def test_a_retry_after_alone_is_a_503() -> None:
    assert RequestFault(retry_after=1).answer_status == 503
    assert RequestFault(retry_after=1, status=429).answer_status == 429
    assert RequestFault().answer_status is None


def test_a_count_runs_out() -> None:
    board = FaultBoard()
    board.set(WorkerFaults(status=500, count=2, health_status=503))
    assert [board.take().status for _ in range(3)] == [500, 500, None]
    assert board.faults.probe("health").status == 503


def test_without_a_count_a_fault_stays_until_cleared() -> None:
    board = FaultBoard()
    board.set(WorkerFaults(status=500))
    assert [board.take().status for _ in range(3)] == [500, 500, 500]
    board.clear()
    assert board.take().status is None
