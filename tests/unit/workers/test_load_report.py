"""The running prefill, inferred from consecutive reports of an engine; 100 tokens/s."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from extproc.workers.load_report import EngineState, RunningPrefill
from extproc.workers.prefill_speed import PrefillSpeed
from extproc.workers.rank_load import RankLoad

SPEED = 100.0


def left(*reports: tuple[float, EngineState], now: float) -> float:
    prefill = RunningPrefill()
    for at, state in reports:
        prefill.read(state, at)
    return prefill.tokens_left(now, SPEED)


def state(
    running: int = 0,
    waiting: int = 0,
    tokens: int | None = 0,
    *,
    used: int | None = None,
    done: int | None = None,
) -> EngineState:
    return EngineState(running, waiting, tokens, used, done)


def test_nothing_is_inferred_from_one_report() -> None:
    assert left((0.0, state(1, 2, 900, used=500, done=7)), now=0.0) == 0


def test_tokens_that_left_the_queue_are_being_prefilled() -> None:
    reports = [(0.0, state(1, 2, 900)), (1.0, state(1, 1, 400))]
    # 900 - 400, then 100 a second
    assert [left(*reports, now=now) for now in (1.0, 3.0, 6.0, 9.0)] == [500, 300, 0, 0]


def test_tokens_that_join_the_queue_change_nothing() -> None:
    reports = [(0.0, state(1, 2, 900)), (1.0, state(1, 1, 400)), (2.0, state(1, 2, 700))]
    assert left(*reports, now=2.0) == 400


def test_a_prompt_that_never_waited_is_found_by_the_tokens_in_use() -> None:
    reports = [(0.0, state(3, used=1000)), (1.0, state(4, used=1600))]
    assert left(*reports, now=2.0) == 500  # 600 - 100


def test_a_request_that_ends_is_not_taken_for_a_prefill() -> None:
    assert left((0.0, state(4, used=1000)), (1.0, state(3, used=800)), now=1.0) == 0


def test_a_prefill_has_ended_when_its_tokens_are_counted() -> None:
    waited = [(0.0, state(0, 1, 500)), (0.0, state(1, 0, 0, done=0))]
    came = [(0.0, state(used=0, done=0)), (0.0, state(1, used=600, done=0))]
    assert left(*waited, (1.0, state(1, 0, 0, done=500)), now=1.0) == 0
    # 100 of the 600 were cached.
    assert left(*came, (1.0, state(1, used=600, done=500)), now=1.0) == 0


def test_a_prompt_prefilled_in_chunks_shrinks_by_each_chunk() -> None:
    reports = [
        (0.0, state(0, 1, 900, done=50)),
        (0.0, state(1, 0, 0, done=50)),
        (1.0, state(1, 0, 0, done=350)),
    ]
    # 900 - 300, then 100 a second from there
    assert [left(*reports, now=now) for now in (1.0, 2.0)] == [600, 500]


def test_a_restarted_engine_has_no_running_prefill() -> None:
    reports = [(0.0, state(0, 1, 900, done=50)), (0.0, state(1, 0, 0, done=50))]
    assert left(*reports, (1.0, state(1, 0, 0, done=3)), now=1.0) == 0


def test_a_report_is_not_compared_with_one_that_is_too_old() -> None:
    prefill = RunningPrefill()
    prefill.read(state(0, 2, 900), 0.0)
    prefill.read(state(1, 1, 400), 1.0)
    prefill.forget()
    assert prefill.tokens_left(1.0, SPEED) == 0
    prefill.read(state(1, 0, 0), 9.0)
    assert prefill.tokens_left(9.0, SPEED) == 0


_COUNTS = st.integers(0, 50)
_MAYBE = st.none() | st.integers(0, 5000)


@given(st.lists(st.builds(EngineState, _COUNTS, _COUNTS, _MAYBE, _MAYBE, _MAYBE), max_size=20))
def test_the_estimate_is_never_negative_and_never_above_the_reported_tokens(
    states: list[EngineState],
) -> None:
    prefill = RunningPrefill()
    for number, one in enumerate(states):
        prefill.read(one, float(number))
        assert 0 <= prefill.tokens_left(float(number), SPEED) <= 5000
    assert prefill.tokens_left(len(states) + 50.0, SPEED) == 0


# -- in the load of a rank


class Report(Struct, frozen=True, kw_only=True):
    """An engine's report; a test sets the fields that it needs."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_tokens: int = 0
    max_total_num_tokens: int = 100_000
    num_waiting_uncached_tokens: int | None = 0
    max_running_requests: int | None = None
    total_prefill_uncached_tokens: int | None = None
    total_prefill_busy_us: int | None = None


def make_load() -> RankLoad:
    return RankLoad(PrefillSpeed(default_tokens_per_second=SPEED))


def test_a_running_prefill_of_another_router_counts() -> None:
    load = make_load()
    load.report(Report(), 0.0)
    load.report(Report(num_running_reqs=1, num_tokens=900), 0.5)
    # 900 - 100, and 30 of ours behind them
    assert load.prefill_tokens_ahead(1.5) == 800
    load.book(30, 1.5)
    assert load.prefill_tokens_ahead(1.5) == 830


def test_the_running_prefill_and_the_waiting_prompts_add_up() -> None:
    load = make_load()
    load.report(Report(num_waiting_reqs=2, num_waiting_uncached_tokens=900), 0.0)
    load.report(
        Report(num_running_reqs=1, num_waiting_reqs=1, num_waiting_uncached_tokens=400), 0.0
    )
    # 500 + 400, of which 100 a second
    assert [load.prefill_tokens_ahead(now) for now in (0.0, 2.0)] == [900, 700]


def test_our_own_prompts_are_counted_from_our_bookings() -> None:
    load = make_load()
    load.report(Report(), 0.0)
    load.book(100, 0.0)  # 800 of its 900 tokens are cached
    load.report(Report(num_running_reqs=1, num_tokens=900), 0.0)
    assert load.prefill_tokens_ahead(0.5) == 50


@pytest.mark.parametrize(("since", "tokens"), [(0.2, 0.0), (0.3, 600.0)])
def test_a_request_that_has_just_ended_is_not_taken_for_another_routers(
    since: float, tokens: float
) -> None:
    load = make_load()
    load.report(Report(), 0.0)
    booking = load.book(100, 0.0)
    booking.started(1.0)
    booking.release(1.0)
    # The report may have been made before the request ended.
    load.report(Report(num_running_reqs=1, num_tokens=600), 1.0 + since)
    assert load.prefill_tokens_ahead(1.0 + since) == tokens
