"""The breaker's transitions, its probes and its busy times; invariants of random histories."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from extproc.workers.circuit_breaker import NO_PROBE, BreakerState, CircuitBreaker

CLOSED, OPEN = BreakerState.CLOSED, BreakerState.OPEN
HALF_OPEN, BUSY = BreakerState.HALF_OPEN, BreakerState.BUSY


def opened(*, threshold: int = 3, cool_down: float = 30.0, at: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker(threshold, cool_down)
    for _ in range(threshold):
        breaker.failure(at)
    assert breaker.state is OPEN
    return breaker


def probing(*, threshold: int = 3) -> tuple[CircuitBreaker, int]:
    """A half-open breaker at t = 30 and its claimed probe."""
    breaker = opened(threshold=threshold)
    probe = breaker.claim(30.0)
    assert breaker.state is HALF_OPEN
    return breaker, probe


@pytest.mark.parametrize("threshold", [1, 2, 3, 10])
def test_the_breaker_opens_at_the_threshold_and_not_before(threshold: int) -> None:
    breaker = CircuitBreaker(threshold, 30.0)
    for _ in range(threshold - 1):
        breaker.failure(0.0)
        assert breaker.state is CLOSED
        assert breaker.would_allow(0.0)
    breaker.failure(0.0)
    assert breaker.state is OPEN
    assert not breaker.would_allow(0.0)


def test_only_consecutive_failures_count() -> None:
    breaker = CircuitBreaker(3, 30.0)
    for _ in range(5):
        breaker.failure(0.0)
        breaker.failure(0.0)
        breaker.success(0.0, 0.0)
    assert breaker.state is CLOSED


@pytest.mark.parametrize(
    ("now", "allowed"), [(0.0, False), (29.999, False), (30.0, True), (1e9, True)]
)
def test_the_breaker_stays_open_for_the_cool_down(now: float, allowed: bool) -> None:
    assert opened().would_allow(now) is allowed


def test_asking_whether_a_request_is_allowed_changes_nothing() -> None:
    breaker = opened()
    for _ in range(10):
        assert breaker.would_allow(30.0)
    assert breaker.state is OPEN


def test_failures_of_an_open_breaker_do_not_prolong_its_cool_down() -> None:
    breaker = opened()
    breaker.failure(29.0)
    assert breaker.would_allow(30.0)


def test_a_claim_on_a_closed_breaker_is_not_a_probe() -> None:
    breaker = CircuitBreaker(3, 30.0)
    assert breaker.claim(0.0) == NO_PROBE
    assert breaker.claim(0.0) == NO_PROBE


def test_a_claim_before_the_cool_down_changes_nothing() -> None:
    breaker = opened()
    assert breaker.claim(29.0) == NO_PROBE
    assert breaker.state is OPEN


def test_a_half_open_breaker_lets_one_probe_through() -> None:
    breaker, probe = probing()
    assert probe != NO_PROBE
    assert not breaker.would_allow(34.9)
    assert breaker.claim(34.9) == NO_PROBE


def test_probes_without_an_answer_are_joined_by_twice_as_many_every_five_seconds() -> None:
    breaker, _ = probing()
    claimed = []
    for seconds in (0.0, 5.0, 10.0, 15.0, 20.0, 1000.0):
        while breaker.claim(30.0 + seconds) != NO_PROBE:
            pass
        claimed.append(len(breaker._probes))
    assert claimed == [1, 2, 4, 8, 8, 8]


def test_a_successful_probe_closes_the_breaker_and_resets_its_count() -> None:
    breaker, _ = probing()
    breaker.success(31.0, 30.0)
    assert breaker.state is CLOSED
    breaker.failure(31.0)
    breaker.failure(31.0)
    assert breaker.state is CLOSED


def test_each_failed_probe_makes_the_cool_down_longer_up_to_four_times() -> None:
    breaker, _ = probing(threshold=3)
    now = 30.0
    for cool_down in (60.0, 120.0, 120.0):
        breaker.failure(now, now)
        assert breaker.state is OPEN
        assert not breaker.would_allow(now + cool_down - 0.1)
        now += cool_down
        assert breaker.claim(now) != NO_PROBE
    breaker.success(now, now)
    for _ in range(3):
        breaker.failure(now)
    assert breaker.would_allow(now + 30.0)


def test_outcomes_of_requests_from_before_the_opening_do_not_decide() -> None:
    breaker, _ = probing()
    breaker.failure(31.0, sent_at=-1.0)
    assert breaker.state is HALF_OPEN
    breaker.success(31.0, sent_at=-1.0)
    assert breaker.state is HALF_OPEN


def test_a_late_busy_answer_does_not_close_an_open_breaker() -> None:
    breaker = opened(at=10.0)
    breaker.busy(11.0, sent_at=9.0)
    assert breaker.state is OPEN


def test_a_sign_of_life_ends_the_cool_down() -> None:
    breaker = opened()
    breaker.probe_at_once(1.0)
    assert breaker.claim(1.0) != NO_PROBE


def test_a_probe_given_back_can_be_claimed_by_another() -> None:
    breaker, probe = probing()
    breaker.give_back(probe)
    assert breaker.state is HALF_OPEN
    assert breaker.would_allow(30.0)
    assert breaker.claim(30.0) not in (NO_PROBE, probe)


def test_giving_back_an_older_generation_does_not_free_the_newer_probe() -> None:
    breaker, old = probing()
    breaker.failure(30.0)
    new = breaker.claim(90.0)
    breaker.give_back(old)
    assert not breaker.would_allow(90.0)
    breaker.give_back(new)
    assert breaker.would_allow(90.0)


def test_giving_back_twice_does_not_free_the_next_probe() -> None:
    breaker, probe = probing()
    breaker.give_back(probe)
    breaker.claim(30.0)
    breaker.give_back(probe)
    assert not breaker.would_allow(30.0)


def test_giving_back_without_a_probe_changes_nothing() -> None:
    breaker, _ = probing()
    breaker.give_back(NO_PROBE)
    assert not breaker.would_allow(30.0)


@pytest.mark.parametrize("prepare", [lambda: opened(), lambda: probing()[0]])
def test_success_closes_from_every_state(prepare: object) -> None:
    assert callable(prepare)
    breaker = prepare()
    breaker.success(31.0, 30.0)
    assert breaker.state is CLOSED
    assert breaker.would_allow(0.0)


def test_without_a_cool_down_a_probe_is_allowed_at_once() -> None:
    breaker = opened(cool_down=0.0, at=5.0)
    assert breaker.would_allow(5.0)
    assert breaker.claim(5.0) != NO_PROBE


# -- busy


def test_a_busy_worker_is_avoided_for_its_retry_after() -> None:
    breaker = CircuitBreaker(3, 30.0)
    breaker.busy(10.0, 1.5)
    assert breaker.state is BUSY
    assert not breaker.would_allow(11.4)
    assert breaker.would_allow(11.5)
    assert breaker.claim(11.5) == NO_PROBE
    assert breaker.state is CLOSED


@pytest.mark.parametrize(("given", "seconds"), [(3600.0, 5.0), (0.0, 0.25), (-1.0, 0.25)])
def test_a_retry_after_is_bounded(given: float, seconds: float) -> None:
    breaker = CircuitBreaker(3, 30.0)
    breaker.busy(0.0, given)
    assert breaker.would_allow(seconds)
    assert not breaker.would_allow(seconds - 0.01)


def test_without_retry_after_the_time_doubles_up_to_two_seconds() -> None:
    breaker, now = CircuitBreaker(3, 30.0), 0.0
    for seconds in (0.25, 0.5, 1.0, 2.0, 2.0):
        breaker.busy(now)
        assert not breaker.would_allow(now + seconds - 0.01)
        now += seconds
        breaker.claim(now)
    breaker.success(now, now)
    breaker.busy(now)
    assert breaker.would_allow(now + 0.25)


def test_busy_answers_of_one_moment_count_once() -> None:
    breaker = CircuitBreaker(3, 30.0)
    for _ in range(1000):
        breaker.busy(0.0)
    assert breaker.would_allow(0.25)
    assert breaker.state is BUSY


def test_busy_answers_never_open_the_breaker_and_end_a_row_of_failures() -> None:
    breaker = CircuitBreaker(3, 30.0)
    for now in range(100):
        breaker.failure(float(now))
        breaker.failure(float(now))
        breaker.busy(float(now))
        assert breaker.state is BUSY


def test_only_a_request_sent_since_ends_a_busy_time() -> None:
    breaker = CircuitBreaker(3, 30.0)
    breaker.busy(10.0, 5.0)
    breaker.success(11.0, sent_at=9.0)
    assert breaker.state is BUSY
    breaker.success(11.0, sent_at=10.5)
    assert breaker.state is CLOSED


def test_a_busy_probe_shows_that_the_worker_is_alive() -> None:
    breaker, _ = probing()
    breaker.busy(30.0, 1.0)
    assert breaker.state is BUSY
    assert breaker.would_allow(31.0)


# -- errors and suspicion


def test_an_error_of_a_half_open_worker_is_no_recovery() -> None:
    breaker, probe = probing()
    breaker.error(31.0)
    assert breaker.state is HALF_OPEN
    assert breaker.answered_at == 31.0
    breaker.give_back(probe)
    breaker.failure(32.0)
    assert breaker.state is OPEN


def test_a_worker_that_alternates_between_resets_and_errors_opens() -> None:
    breaker = CircuitBreaker(3, 30.0)
    for now in (1.0, 2.0, 3.0):
        breaker.error(now)
        breaker.failure(now)
    assert breaker.state is OPEN


def test_a_good_answer_does_not_end_a_suspicion() -> None:
    breaker = CircuitBreaker(3, 30.0)
    breaker.avoid(10.0, 4.0)
    breaker.success(11.0, sent_at=10.5)  # under last resort
    assert not breaker.would_allow(13.9)
    assert breaker.would_allow(14.0)
    breaker.claim(14.0)
    assert breaker.state is CLOSED


def test_a_passed_check_ends_a_suspicion() -> None:
    breaker = CircuitBreaker(3, 30.0)
    breaker.avoid(10.0, 400.0)
    breaker.acquit(11.0)
    assert breaker.state is CLOSED
    # A later busy time is not a suspicion.
    breaker.busy(20.0, 5.0)
    breaker.success(21.0, sent_at=20.5)
    assert breaker.state is CLOSED


# -- random histories


class BreakerMachine(RuleBasedStateMachine):
    """Random outcomes, claims and given back probes."""

    @initialize(threshold=st.integers(1, 4), cool_down=st.sampled_from([0.0, 1.0, 5.0]))
    def start(self, threshold: int, cool_down: float) -> None:
        self.now = 0.0
        self.breaker = CircuitBreaker(threshold, cool_down)
        self.longest = max(4 * cool_down, 5.0)
        self.probes: list[int] = []

    @rule(seconds=st.sampled_from([0.25, 1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def claim(self) -> None:
        allowed = self.breaker.would_allow(self.now)
        probe = self.breaker.claim(self.now)
        assert probe == NO_PROBE or allowed
        assert (probe != NO_PROBE) is (allowed and self.breaker.state is HALF_OPEN)
        if probe != NO_PROBE:
            assert probe not in self.probes
            self.probes.append(probe)

    @precondition(lambda self: self.probes)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.breaker.give_back(data.draw(st.sampled_from(self.probes)))

    @rule(age=st.sampled_from([0.0, 1.0, 10.0]))
    def succeed(self, age: float) -> None:
        self.breaker.success(self.now, self.now - age)

    @rule(age=st.sampled_from([0.0, 1.0, 10.0]))
    def fail(self, age: float) -> None:
        self.breaker.failure(self.now, self.now - age)

    @rule(retry_after=st.sampled_from([None, 0.0, 1.0, 1e9]))
    def busy(self, retry_after: float | None) -> None:
        self.breaker.busy(self.now, retry_after)
        assert self.breaker.state is BUSY

    @invariant()
    def nothing_keeps_a_worker_away_for_long(self) -> None:
        if hasattr(self, "breaker") and self.breaker.state is not HALF_OPEN:
            assert self.breaker.would_allow(self.now + self.longest)


BreakerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestBreakerHistories = BreakerMachine.TestCase
