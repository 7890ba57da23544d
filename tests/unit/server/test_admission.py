"""The limits of requests in flight and of buffered bytes."""

import pytest

from extproc.errors import RouterError
from extproc.server.admission import Admission, AdmissionLimits

MEBIBYTE = 1024 * 1024


def admission(requests: int = 100, buffered_bytes: int = 8 * MEBIBYTE) -> Admission:
    return Admission(AdmissionLimits(max_requests=requests, max_buffered_bytes=buffered_bytes))


def refused(one: Admission, body_bytes: int) -> bool:
    try:
        one.enter(body_bytes)
    except RouterError:
        return True
    return False


def test_a_refusal_says_when_to_try_again() -> None:
    with pytest.raises(RouterError) as caught:
        admission(requests=0).enter(0)
    assert (caught.value.code, caught.value.status) == ("service_overloaded", 503)
    assert caught.value.headers == (("retry-after", "1"),)


def test_a_request_over_the_limit_is_refused_until_another_ends() -> None:
    one = admission(requests=2)
    assert [refused(one, 0) for _ in range(3)] == [False, False, True]
    assert (one.requests, one.refused_requests, one.refused_bytes) == (2, 1, 0)
    one.leave(0)
    assert not refused(one, 0)


def test_large_bodies_leave_room_for_small_ones() -> None:
    one = admission(buffered_bytes=8 * MEBIBYTE)
    assert [refused(one, 3 * MEBIBYTE) for _ in range(3)] == [False, False, True]
    assert [refused(one, MEBIBYTE) for _ in range(3)] == [False, False, True]
    assert (one.requests, one.buffered_bytes) == (4, 8 * MEBIBYTE)
    assert (one.refused_requests, one.refused_bytes) == (0, 2)


def test_a_body_that_was_not_announced_counts_as_it_comes() -> None:
    one = admission(buffered_bytes=4 * MEBIBYTE)
    one.enter(0)
    one.hold(MEBIBYTE, MEBIBYTE)
    one.hold(2 * MEBIBYTE, 3 * MEBIBYTE)
    with pytest.raises(RouterError):
        # A large body in small pieces is still a large body.
        one.hold(1, 3 * MEBIBYTE + 1)
    assert one.buffered_bytes == 3 * MEBIBYTE
    one.give_back(3 * MEBIBYTE)
    one.leave(0)
    assert (one.requests, one.buffered_bytes) == (0, 0)


def test_other_limits_count_what_is_there() -> None:
    one = admission(requests=5)
    for _ in range(3):
        one.enter(10)
    one.limits = AdmissionLimits(max_requests=3, max_buffered_bytes=1000)
    assert refused(one, 0)
    one.leave(10)
    assert not refused(one, 0)
