"""The load of a rank, calculated by hand: prompts at 100 tokens a second.

No speed is learnt from prompts of less than 256 tokens, so in most tests the speed stays 100.
"""

import pytest
from msgspec import Struct

from extproc.workers.prefill_speed import SPEED_DEFAULT_TOKENS_PER_SECOND, PrefillSpeed
from extproc.workers.rank_load import RankLoad

SPEED = 100.0


class Report(Struct, frozen=True, kw_only=True):
    """An engine's report; a test sets the fields that it needs."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_tokens: int = 0
    max_total_num_tokens: int = 0
    num_waiting_uncached_tokens: int | None = None
    max_running_requests: int | None = None
    total_prefill_uncached_tokens: int | None = None
    total_prefill_busy_us: int | None = None


def counters(tokens: int, seconds: float) -> Report:
    """Tokens computed since the engine's start, and how long it was busy with them."""
    return Report(total_prefill_uncached_tokens=tokens, total_prefill_busy_us=round(seconds * 1e6))


def make_load(speed: float = SPEED) -> RankLoad:
    return RankLoad(PrefillSpeed(default_tokens_per_second=speed))


def ahead(load: RankLoad, *moments: float) -> list[float]:
    return [load.prefill_tokens_ahead(now) for now in moments]


# -- our bookings


def test_a_new_rank_has_no_load() -> None:
    load = make_load()
    assert load.prefill_tokens_ahead(5.0) == 0
    assert (load.in_flight, load.requests(5.0), load.running(5.0)) == (0, 0, 0)
    assert load.slot_wait_seconds(1000, 5.0) == 0
    assert load.prefill_tokens_per_second == SPEED


def test_time_reduces_only_the_head_of_the_queue() -> None:
    load = make_load()
    load.book(200, 0.0)
    load.book(100, 0.0)
    # 300 - 0, 300 - 50, 300 - 200; the second begins only when the first is seen to end
    assert ahead(load, 0.0, 0.5, 2.0, 9.0) == [300, 250, 100, 100]
    assert (load.in_flight, load.requests(9.0), load.running(9.0)) == (2, 2, 0)


def test_the_start_of_a_response_ends_the_first_prefill_and_begins_the_next() -> None:
    load = make_load()
    first, second = load.book(200, 0.0), load.book(100, 1.0)
    assert ahead(load, 1.0) == [200]  # 200 - 100 + 100
    first.started(3.0)
    assert ahead(load, 3.0, 3.5, 5.0) == [100, 50, 0]
    assert (load.requests(5.0), load.running(5.0)) == (2, 1)
    second.started(5.0)
    assert ahead(load, 5.0) == [0]
    assert (load.requests(5.0), load.running(5.0)) == (2, 2)
    first.release(6.0)
    second.release(6.0)
    assert (load.in_flight, load.requests(6.0), load.running(6.0)) == (0, 0, 0)


def test_the_first_prefill_of_an_empty_queue_begins_with_its_booking() -> None:
    load = make_load()
    load.book(100, 0.0).started(1.0)
    load.book(100, 5.0)
    assert ahead(load, 5.0, 5.25) == [100, 75]


def test_a_request_has_at_least_a_token_to_prefill() -> None:
    load = make_load()
    load.book(0, 0.0)
    load.book(-5, 0.0)
    assert ahead(load, 0.0) == [2]


def test_time_that_goes_back_changes_nothing() -> None:
    load = make_load()
    load.book(100, 10.0)
    assert ahead(load, 9.0) == [100]


def test_start_and_release_count_once() -> None:
    load = make_load()
    first, second = load.book(200, 0.0), load.book(100, 0.0)
    first.started(2.0)
    first.started(2.5)  # would restart the second prefill
    assert ahead(load, 3.0) == [0]
    first.release(3.0)
    first.release(3.0)
    first.started(3.0)
    assert (load.in_flight, load.running(3.0)) == (1, 0)
    second.release(3.0)
    assert load.in_flight == 0


def test_a_request_released_before_its_start_leaves_the_queue() -> None:
    load = make_load()
    first, second, third = (load.book(tokens, 0.0) for tokens in (200, 100, 50))
    second.release(1.0)
    assert ahead(load, 1.0) == [150]  # 200 - 100 + 50
    first.release(1.5)  # half-way through; the third begins
    assert ahead(load, 1.5, 1.75) == [50, 25]
    second.started(1.75)
    first.started(1.75)
    assert (load.in_flight, load.running(1.75)) == (1, 0)
    third.release(2.0)
    assert ahead(load, 2.0) == [0]


def test_a_start_out_of_order_leaves_the_earlier_prefills_in_the_queue() -> None:
    load = make_load()
    first, second, third = (load.book(tokens, 0.0) for tokens in (200, 100, 50))
    second.started(1.0)
    # The engine has prefilled the second until now: all of the first is left.
    assert ahead(load, 1.0, 1.5, 4.0) == [250, 200, 50]
    assert load.running(4.0) == 1
    first.started(4.0)
    assert ahead(load, 4.0, 4.25) == [50, 25]
    third.started(4.5)
    assert ahead(load, 4.5) == [0]


# -- responses that are not streamed


def test_an_unobserved_prefill_ends_at_its_estimated_time() -> None:
    load = make_load()
    load.book(200, 0.0, streamed=False)
    second = load.book(100, 1.0)
    # 200 - 100 + 100; the first ends at 2.0, and 50 of the second are left at 2.5
    assert ahead(load, 1.0, 1.5, 2.0, 2.5, 9.0) == [200, 150, 100, 50, 0]
    assert (load.in_flight, load.running(9.0)) == (2, 1)
    second.started(9.0)
    assert (load.in_flight, load.running(9.0)) == (2, 2)


def test_unobserved_prefills_follow_each_other() -> None:
    load = make_load()
    for tokens in (100, 200, 50):
        load.book(tokens, 0.0, streamed=False)
    # They end at 1.0, 3.0 and 3.5.
    assert ahead(load, 0.0, 1.0, 2.0, 3.25, 3.5) == [350, 250, 150, 25, 0]
    assert load.running(3.5) == 3


@pytest.mark.parametrize(("now", "running"), [(0.5, 0), (1.0, 1), (2.9, 1), (3.0, 2), (3.5, 3)])
def test_running_requests_are_right_before_the_queue_was_read(now: float, running: int) -> None:
    load = make_load()
    for tokens in (100, 200, 50):
        load.book(tokens, 0.0, streamed=False)
    assert load.running(now) == running


def test_an_unobserved_prefill_begins_after_the_streamed_one_before_it() -> None:
    load = make_load()
    first = load.book(100, 0.0)
    load.book(200, 0.0, streamed=False)
    assert ahead(load, 5.0) == [200]  # 100 at most of the first
    first.started(5.0)
    assert ahead(load, 6.0, 7.0) == [100, 0]


def test_an_unobserved_prefill_has_ended_when_a_later_response_starts() -> None:
    load = make_load()
    unseen = load.book(200, 0.0, streamed=False)
    seen, last = load.book(50, 0.0), load.book(50, 0.0)
    seen.started(1.0)  # earlier than estimated: the engine is faster
    assert ahead(load, 1.0, 1.25) == [50, 25]
    assert load.running(1.25) == 2
    unseen.started(9.0)  # the whole answer comes at once
    unseen.release(9.0)
    last.release(9.0)
    assert (load.in_flight, load.running(9.0)) == (1, 1)


def test_an_unobserved_prefill_has_ended_when_its_response_starts() -> None:
    load = make_load()
    unseen = load.book(200, 0.0, streamed=False)
    load.book(100, 0.0)
    unseen.started(0.5)
    assert ahead(load, 0.5, 1.0) == [100, 50]
    unseen.release(0.5)
    assert load.in_flight == 1


def test_an_unobserved_prefill_that_failed_leaves_the_queue() -> None:
    load = make_load()
    unseen = load.book(200, 0.0, streamed=False)
    load.book(100, 0.0)
    unseen.release(1.0)
    assert ahead(load, 1.0, 1.5) == [100, 50]


def test_the_next_prefill_begins_with_its_booking_after_an_unobserved_end() -> None:
    load = make_load()
    load.book(100, 0.0, streamed=False)  # ends at 1.0
    load.book(100, 5.0)
    assert ahead(load, 5.5) == [50]


def test_a_prefill_released_behind_an_unobserved_one_is_skipped() -> None:
    load = make_load()
    load.book(100, 0.0, streamed=False)  # ends at 1.0
    head = load.book(100, 0.0)
    load.book(50, 0.0)
    head.release(1.5)
    assert ahead(load, 1.5, 1.75) == [50, 25]


def test_a_start_does_not_affect_later_or_released_bookings() -> None:
    load = make_load()
    load.book(200, 0.0, streamed=False)
    load.book(200, 0.0, streamed=False).release(0.0)
    load.book(200, 0.0).release(0.0)
    seen = load.book(50, 0.0)
    load.book(70, 0.0, streamed=False)
    seen.started(1.0)
    assert ahead(load, 1.0, 1.5) == [70, 20]
    assert (load.in_flight, load.running(1.5)) == (3, 2)


# -- speed
#
# A learnt speed is a sum of tokens divided by a sum of seconds, which begin with 0.25 s of the
# speed that was known.


def test_the_speed_is_learnt_from_an_observed_prefill() -> None:
    load = make_load(1000.0)
    load.book(500, 0.0).started(0.25)
    # (0.25 * 1000 + 500) / (0.25 + 0.25) = 750 / 0.5
    assert load.prefill_tokens_per_second == 1500
    load.book(1250, 1.0).started(1.5)
    # (750 + 1250) / (0.5 + 0.5)
    assert load.prefill_tokens_per_second == 2000


def test_the_queue_shrinks_at_the_learnt_speed() -> None:
    load = make_load(1000.0)
    load.book(500, 0.0).started(0.25)
    load.book(1500, 0.25)
    assert ahead(load, 0.75) == [750]  # 1500 - 0.5 * 1500


@pytest.mark.parametrize(
    ("tokens", "seconds", "speed"),
    [
        # Expected to take 1 s.
        (1000, 0.5, (250 + 1000) / (0.25 + 0.5)),
        # No more than 8 times faster, 0.125 s.
        (1000, 0.125, (250 + 1000) / (0.25 + 0.125)),
        (1000, 0.001, (250 + 1000) / (0.25 + 0.125)),
        # No more than 4 times slower, 4 s.
        (1000, 4.0, (250 + 1000) / (0.25 + 4.0)),
        (1000, 3600.0, (250 + 1000) / (0.25 + 4.0)),
        # Too small, and impossible.
        (256, 0.256, 1000.0),
        (255, 10.0, 1000.0),
        (1000, 0.0, 1000.0),
        (1000, -1.0, 1000.0),
        ((1 << 40) + 1, 1.0, 1000.0),
    ],
)
def test_the_effect_of_a_sample_is_bounded(tokens: int, seconds: float, speed: float) -> None:
    learnt = PrefillSpeed(default_tokens_per_second=1000.0)
    says_something = 256 <= tokens <= 1 << 40 and seconds > 0
    assert learnt.observe(tokens, seconds) is says_something
    assert learnt.tokens_per_second == pytest.approx(speed)


def test_old_samples_fade() -> None:
    speed = PrefillSpeed(default_tokens_per_second=1000.0)
    speed.observe(30_000, 30.0)
    assert speed.tokens_per_second == pytest.approx(1000)  # 30250 / 30.25, kept as 30000 / 30
    speed.observe(60_000, 30.0)
    assert speed.tokens_per_second == pytest.approx(1500)  # 90000 / 60, kept as 45000 / 30
    speed.observe(15_000, 30.0)
    assert speed.tokens_per_second == pytest.approx(1000)  # 60000 / 60


def test_the_learnt_speed_is_bounded() -> None:
    slow = PrefillSpeed(default_tokens_per_second=60.0)
    for _ in range(3):
        slow.observe(300, 3600.0)  # (15 + 300) / (0.25 + 4 * 5) = 15.6
    assert slow.tokens_per_second == 50
    fast = PrefillSpeed(default_tokens_per_second=1e6)
    fast.observe(1_000_000, 0.01)  # 1250000 / (0.25 + 0.125) = 3.3 million
    assert fast.tokens_per_second == 2_000_000


def test_a_new_rank_begins_with_the_speed_of_its_model() -> None:
    model = PrefillSpeed(default_tokens_per_second=1000.0)
    old, new = RankLoad(model), RankLoad(model)
    old.book(500, 0.0).started(0.25)
    assert old.prefill_tokens_per_second == 1500
    assert new.prefill_tokens_per_second == 1500
    new.book(1500, 0.0).started(1.5)
    # From the model's 1500: (375 + 1500) / (0.25 + 1.5) = 1071.43; the other rank keeps its own.
    assert new.prefill_tokens_per_second == pytest.approx(1875 / 1.75)
    assert old.prefill_tokens_per_second == 1500
    # The model's own sums: (750 + 1500) / (0.5 + 1.5)
    assert model.tokens_per_second == pytest.approx(1125)


def test_a_rank_without_a_model_has_the_default_speed() -> None:
    assert RankLoad(PrefillSpeed()).prefill_tokens_per_second == SPEED_DEFAULT_TOKENS_PER_SECOND


def test_nothing_is_learnt_from_unobserved_prefills() -> None:
    # Not streamed: its response starts when it ends.
    load = make_load()
    load.book(1000, 0.0, streamed=False).started(1.0)
    assert load.prefill_tokens_per_second == SPEED
    # The prefill before it had an estimated end, so its own beginning is an estimate, too.
    load = make_load()
    load.book(1000, 0.0, streamed=False)
    behind = load.book(1000, 0.0)
    assert ahead(load, 10.0) == [1000]
    behind.started(11.0)
    assert load.prefill_tokens_per_second == SPEED
    # Out of order: nothing is learnt either.
    load = make_load()
    first, second = load.book(1000, 0.0), load.book(1000, 0.0)
    second.started(1.0)
    first.started(2.0)
    assert load.prefill_tokens_per_second == SPEED
    # The next one in order is observed again.
    load = make_load()
    load.book(1000, 0.0, streamed=False)
    load.book(200, 0.0).started(2.0)
    load.book(1000, 2.0).started(7.0)
    assert load.prefill_tokens_per_second == pytest.approx((25 + 1000) / (0.25 + 5.0))


# -- reports


def test_the_larger_of_bookings_and_report_counts() -> None:
    load = make_load()
    load.book(100, 0.0)
    load.report(Report(num_running_reqs=3, num_waiting_reqs=4), 0.0)
    assert (load.requests(0.0), load.running(0.0), load.in_flight) == (7, 3, 1)
    load.report(Report(), 1.0)
    assert (load.requests(1.0), load.running(1.0), load.in_flight) == (1, 0, 1)


def test_our_bookings_and_releases_are_added_to_the_report() -> None:
    load = make_load()
    first = load.book(100, 0.0)
    load.report(Report(num_running_reqs=3, num_waiting_reqs=4), 0.0)
    second = load.book(100, 0.5)
    assert load.requests(0.5) == 8
    first.release(0.5)
    second.release(0.5)
    assert load.requests(0.5) == 6


def test_reported_tokens_are_added_and_shrink_with_time() -> None:
    load = make_load()
    load.book(100, 0.0)
    # 250 of others and ours; 30 of ours come after the report.
    load.report(Report(num_waiting_uncached_tokens=250), 0.0)
    load.book(30, 0.5)
    # max(130 - 50, 250 + 30 - 50), then 250 + 30 - 200 = 80 against 30
    assert ahead(load, 0.5, 2.0) == [230, 80]
    # 250 + 30 - 270 = 10 against 30
    assert ahead(load, 2.7) == [30]


def test_a_booking_released_before_its_start_no_longer_adds_to_the_report() -> None:
    load = make_load()
    before = load.book(40, 0.0)
    load.report(Report(num_waiting_uncached_tokens=100), 0.0)
    since = load.book(30, 0.0)
    assert ahead(load, 0.0) == [130]
    since.release(0.0)
    assert ahead(load, 0.0) == [100]
    # Whether the report counts it is unknown, so the report is not changed.
    before.release(0.0)
    assert ahead(load, 0.0) == [100]


@pytest.mark.parametrize(("age", "requests", "tokens"), [(3.0, 9, 700), (3.01, 1, 0)])
def test_a_stale_report_is_ignored(age: float, requests: int, tokens: int) -> None:
    load = make_load()
    load.report(
        Report(
            num_running_reqs=4,
            num_waiting_reqs=4,
            num_waiting_uncached_tokens=900,
            max_running_requests=4,
        ),
        10.0,
    )
    load.book(100, 10.0)
    now = 10.0 + age
    fresh = bool(tokens)
    assert load.requests(now) == requests
    assert load.running(now) == (4 if fresh else 0)
    assert load.prefill_tokens_ahead(now) == tokens  # 900 + 100 - 3 * 100
    assert (load.slot_wait_seconds(0, now) > 0) is fresh


@pytest.mark.parametrize(
    "report",
    [
        Report(num_running_reqs=-1, num_waiting_reqs=2),
        Report(num_running_reqs=2, num_waiting_reqs=-1),
        Report(num_running_reqs=100_001),
        Report(num_waiting_reqs=100_001),
    ],
)
def test_an_implausible_report_is_ignored(report: Report) -> None:
    load = make_load()
    load.report(Report(num_running_reqs=5, num_waiting_uncached_tokens=1000), 0.0)
    load.book(7, 0.0)
    load.report(report, 1.0)
    assert (load.requests(1.0), load.running(1.0)) == (6, 5)
    assert ahead(load, 1.0) == [907]  # 1000 + 7 - 100
    assert load.requests(3.5) == 1  # and the earlier report does not become fresher


@pytest.mark.parametrize("tokens", [-1, (1 << 40) + 1, None])
def test_implausible_waiting_tokens_are_ignored(tokens: int | None) -> None:
    load = make_load()
    load.report(Report(num_running_reqs=5, num_waiting_uncached_tokens=1000), 0.0)
    load.report(Report(num_running_reqs=6, num_waiting_uncached_tokens=tokens), 0.0)
    load.book(7, 0.0)
    assert load.requests(0.0) == 7
    assert ahead(load, 0.0) == [7]


def test_the_largest_plausible_report_is_used() -> None:
    load = make_load()
    tokens = 1 << 40
    load.report(
        Report(
            num_running_reqs=100_000,
            num_waiting_reqs=100_000,
            num_waiting_uncached_tokens=tokens,
            max_running_requests=100_000,
            num_tokens=tokens,
            max_total_num_tokens=tokens,
        ),
        0.0,
    )
    assert (load.requests(0.0), load.running(0.0)) == (200_000, 100_000)
    assert ahead(load, 0.0) == [tokens]
    # 100 001 of 100 000 have to end, after 5 s.
    assert load.slot_wait_seconds(1, 0.0) == pytest.approx(5.00005)


# -- the counters of reports


def test_the_speed_is_learnt_from_the_counters_of_two_reports() -> None:
    load = make_load(1000.0)
    load.report(counters(1_000_000, 5.0), 0.0)
    assert load.prefill_tokens_per_second == 1000  # the first counters have no beginning
    load.report(counters(1_000_500, 5.25), 1.0)
    assert load.prefill_tokens_per_second == 1500  # (250 + 500) / (0.25 + 0.25)


def test_small_steps_of_the_counters_add_up() -> None:
    load = make_load(1000.0)
    for step in range(4):  # 0, 200, 400, 600 tokens; 0.1 s each
        load.report(counters(200 * step, 0.1 * step), step / 10)
        # 400 tokens in 0.2 s are a sample: (250 + 400) / (0.25 + 0.2); 200 more are too few.
        expected = 1000 if step < 2 else 650 / 0.45
        assert load.prefill_tokens_per_second == pytest.approx(expected)


def test_counters_that_go_back_are_those_of_a_restarted_engine() -> None:
    load = make_load(1000.0)
    load.report(counters(5000, 5.0), 0.0)
    load.report(counters(100, 0.1), 1.0)
    assert load.prefill_tokens_per_second == 1000
    load.report(counters(600, 0.35), 2.0)
    assert load.prefill_tokens_per_second == 1500  # 500 in 0.25 s
    # Busy time that goes back also shows a restart.
    load.report(counters(5000, 0.1), 3.0)
    assert load.prefill_tokens_per_second == 1500
    load.report(counters(6250, 0.6), 4.0)
    assert load.prefill_tokens_per_second == 2000  # (750 + 1250) / (0.5 + 0.5)


def test_incomplete_counters_are_ignored() -> None:
    load = make_load(1000.0)
    load.report(counters(0, 0.0), 0.0)
    load.report(counters(5000, 0.0), 0.1)
    load.report(Report(total_prefill_uncached_tokens=9000), 0.2)
    load.report(Report(total_prefill_busy_us=9_000_000), 0.3)
    assert load.prefill_tokens_per_second == 1000
    load.report(counters(500, 0.25), 0.4)  # compared with the first report
    assert load.prefill_tokens_per_second == 1500


def test_no_speed_is_measured_while_the_engine_reports_counters() -> None:
    load = make_load(1000.0)
    load.report(counters(0, 0.0), 0.0)
    load.report(counters(500, 0.25), 10.0)
    assert load.prefill_tokens_per_second == 1500
    load.book(1500, 10.0).started(14.0)
    load.book(1500, 66.0).started(70.0)  # 60 s after the last counters
    assert load.prefill_tokens_per_second == 1500
    load.book(1500, 71.0).started(72.0)
    assert load.prefill_tokens_per_second == 1500  # (750 + 1500) / (0.5 + 1.0)
    load.book(1500, 72.0).started(74.0)
    assert load.prefill_tokens_per_second == pytest.approx(3750 / 3.5)


# -- waiting for room


@pytest.mark.parametrize(
    ("report", "booked", "prompt_tokens", "seconds"),
    [
        # The engine reports nothing.
        (Report(num_running_reqs=50, num_waiting_reqs=50), 0, 1000, 0.0),
        # There is room: 2 + 1 and 7 + 1 <= 8.
        (Report(num_running_reqs=2, max_running_requests=8), 0, 1000, 0.0),
        (Report(num_running_reqs=7, max_running_requests=8), 0, 1000, 0.0),
        # One of 8 has to end, which takes 5 s each: 1 * 5 / 8.
        (Report(num_running_reqs=8, max_running_requests=8), 0, 1000, 0.625),
        # 3 wait before: 4 * 5 / 8.
        (Report(num_running_reqs=8, num_waiting_reqs=3, max_running_requests=8), 0, 1, 2.5),
        # And 2 booked since: 6 * 5 / 8.
        (Report(num_running_reqs=8, num_waiting_reqs=3, max_running_requests=8), 2, 1, 3.75),
        # Room for the prompt: 600 + 400 <= 1000.
        (Report(num_running_reqs=3, num_tokens=600, max_total_num_tokens=1000), 0, 400, 0.0),
        # 300 too many at 300 each: 1 of 3 that end after 5 s.
        (Report(num_running_reqs=3, num_tokens=900, max_total_num_tokens=1000), 0, 400, 5 / 3),
        # 450 too many: 1.5 of 3.
        (Report(num_running_reqs=3, num_tokens=900, max_total_num_tokens=1000), 0, 550, 2.5),
        # Full, but no request runs: all of it is cache, which can be evicted.
        (Report(num_tokens=1000, max_total_num_tokens=1000), 0, 400, 0.0),
        # The larger of both: 3 requests, or the memory of 1.5; 5 s, 2 run at once.
        (
            Report(
                num_running_reqs=2,
                num_waiting_reqs=2,
                max_running_requests=2,
                num_tokens=800,
                max_total_num_tokens=1000,
            ),
            0,
            800,
            7.5,
        ),
        # Implausible figures, one by one.
        (Report(num_running_reqs=8, max_running_requests=0), 0, 1, 0.0),
        (Report(num_running_reqs=8, max_running_requests=-1), 0, 1, 0.0),
        (Report(num_running_reqs=8, max_running_requests=100_001), 0, 1, 0.0),
        (Report(num_running_reqs=3, num_tokens=900, max_total_num_tokens=800), 0, 400, 0.0),
        (Report(num_running_reqs=3, num_tokens=-1, max_total_num_tokens=800), 0, 900, 0.0),
    ],
)
def test_a_request_waits_for_room_on_a_full_rank(
    report: Report, booked: int, prompt_tokens: int, seconds: float
) -> None:
    load = make_load()
    load.report(report, 0.0)
    for _ in range(booked):
        load.book(1, 0.0)
    assert load.slot_wait_seconds(prompt_tokens, 0.0) == pytest.approx(seconds)


def test_the_duration_of_decoding_is_learnt() -> None:
    load = make_load()
    streamed = load.book(100, 0.0)
    streamed.started(1.0)
    streamed.release(38.0)  # 37 s: 5 + (37 - 5) / 32 = 6
    # Nothing is learnt from an unobserved start, or without a start.
    load.book(100, 38.0).release(60.0)
    unseen = load.book(100, 60.0, streamed=False)
    unseen.started(90.0)
    unseen.release(190.0)
    load.report(Report(num_running_reqs=4, max_running_requests=4), 200.0)
    assert load.slot_wait_seconds(1, 200.0) == pytest.approx(6 / 4)
