"""How quickly a worker begins and ends requests."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.workers.pace import Pace


def prefilled(count: int, each: float) -> tuple[Pace, float]:
    """A pace after so many requests, one after the other, and the time of their end."""
    pace, now = Pace(), 0.0
    for _ in range(count):
        pace.sent(now)
        now += each
        pace.began(now)
        pace.ended(each)
    return pace, now


def test_a_worker_without_requests_begins_at_once() -> None:
    assert Pace().wait_seconds(5.0) == 0
    pace, now = prefilled(10, 0.5)
    assert pace.wait_seconds(now) == 0


def test_each_request_that_waits_takes_the_time_of_those_before() -> None:
    pace, now = prefilled(10, 0.5)
    for waiting in (1, 2, 3):
        pace.sent(now)
        assert pace.wait_seconds(now) == pytest.approx(waiting * 0.5)
    # The first one is half done: 0.25 + 2 * 0.5.
    assert pace.wait_seconds(now + 0.25) == pytest.approx(1.25)


def test_the_time_between_two_answers_is_learnt_while_others_wait() -> None:
    pace = Pace()
    for _ in range(40):
        pace.sent(100.0)
    for number in range(1, 41):
        pace.began(100.0 + number * 0.2)
    assert pace.begin_seconds == pytest.approx(0.2)
    # Time without requests is not part of it.
    pace.sent(500.0)
    pace.began(500.2)
    assert pace.begin_seconds == pytest.approx(0.2)


def test_a_batch_that_is_answered_at_once_counts_once() -> None:
    pace, now = Pace(), 0.0
    for _ in range(100):
        for _ in range(4):
            pace.sent(now)
        now += 2.0
        for _ in range(4):
            pace.began(now)
    assert pace.begin_seconds == pytest.approx(0.5, rel=0.2)


def test_the_wait_for_a_worker_that_hangs_rises_with_time() -> None:
    pace, now = prefilled(10, 0.5)
    pace.sent(now)
    pace.sent(now)
    assert pace.wait_seconds(now + 10) == pytest.approx(0.5 + 9.5)
    assert pace.wait_seconds(now + 60) == pytest.approx(0.5 + 59.5)
    unknown = Pace()
    unknown.sent(0.0)
    assert unknown.wait_seconds(7.0) == 7


def test_each_of_two_routers_estimates_the_wait_behind_the_requests_of_both() -> None:
    paces = [Pace(), Pace()]
    for pace in paces:
        for _ in range(20):
            pace.sent(0.0)
    # The worker takes 0.5 s for each, one of each router in turn.
    for number in range(1, 21):
        paces[number % 2].began(number * 0.5)
    # Twenty are left: ten of each router.
    for pace in paces:
        assert pace.waiting == 10
        assert pace.wait_seconds(10.0) == pytest.approx(20 * 0.5, rel=0.15)


def test_requests_that_leave_without_an_answer_are_not_waited_for() -> None:
    pace, now = prefilled(1, 0.5)
    pace.sent(now)
    pace.withdrew()
    assert pace.wait_seconds(now + 9) == 0
    assert pace.request_seconds == 0.5


@given(
    st.lists(st.tuples(st.sampled_from("sbw"), st.floats(0, 1e6)), max_size=60),
    st.floats(0, 1e6),
)
def test_the_wait_is_a_number_from_0_on(events: list[tuple[str, float]], later: float) -> None:
    pace, now = Pace(), 1000.0
    for kind, seconds in events:
        now += seconds
        if kind == "s":
            pace.sent(now)
        elif pace.waiting and kind == "b":
            pace.began(now)
            pace.ended(seconds)
        elif pace.waiting:
            pace.withdrew()
        wait = pace.wait_seconds(now + later)
        assert math.isfinite(wait)
        assert wait >= 0
        assert pace.waiting >= 0
    assert pace.waiting or pace.wait_seconds(now) == 0
