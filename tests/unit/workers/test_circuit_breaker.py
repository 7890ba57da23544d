"""The breaker's transitions and its single probe; a stateful comparison with a small model."""

from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from extproc.workers.circuit_breaker import NO_PROBE, BreakerState, CircuitBreaker

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


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
        breaker.success()
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
    assert not breaker.would_allow(1e9)
    assert breaker.claim(1e9) == NO_PROBE


def test_a_successful_probe_closes_the_breaker_and_resets_its_count() -> None:
    breaker, _ = probing()
    breaker.success()
    assert breaker.state is CLOSED
    breaker.failure(31.0)
    breaker.failure(31.0)
    assert breaker.state is CLOSED


def test_a_failed_probe_opens_the_breaker_for_a_whole_cool_down() -> None:
    breaker, _ = probing(threshold=3)
    breaker.failure(35.0)
    assert breaker.state is OPEN
    assert not breaker.would_allow(64.9)
    assert breaker.would_allow(65.0)


def test_a_probe_given_back_can_be_claimed_by_another() -> None:
    breaker, probe = probing()
    breaker.give_back(probe)
    assert breaker.state is HALF_OPEN
    assert breaker.would_allow(30.0)
    assert breaker.claim(30.0) not in (NO_PROBE, probe)


def test_giving_back_an_older_generation_does_not_free_the_newer_probe() -> None:
    breaker, old = probing()
    breaker.failure(30.0)
    new = breaker.claim(60.0)
    breaker.give_back(old)
    assert not breaker.would_allow(60.0)
    breaker.give_back(new)
    assert breaker.would_allow(60.0)


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
    breaker.success()
    assert breaker.state is CLOSED
    assert breaker.would_allow(0.0)


def test_without_a_cool_down_a_probe_is_allowed_at_once() -> None:
    breaker = opened(cool_down=0.0, at=5.0)
    assert breaker.would_allow(5.0)
    assert breaker.claim(5.0) != NO_PROBE


class _Model(NamedTuple):
    """The specification, written as literally as possible."""

    failures: int = 0
    opened_at: float | None = None
    half_open: bool = False
    probe: int | None = None


class BreakerMachine(RuleBasedStateMachine):
    """Random outcomes, claims and given back probes, compared with the specification."""

    @initialize(threshold=st.integers(1, 4), cool_down=st.sampled_from([0.0, 1.0, 5.0]))
    def start(self, threshold: int, cool_down: float) -> None:
        self.threshold, self.cool_down, self.now = threshold, cool_down, 0.0
        self.breaker = CircuitBreaker(threshold, cool_down)
        self.model = _Model()
        self.probes: list[int] = []

    def allowed(self) -> bool:
        model = self.model
        if model.opened_at is not None:
            return self.now - model.opened_at >= self.cool_down
        return not (model.half_open and model.probe is not None)

    @rule(seconds=st.sampled_from([0.25, 1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def claim(self) -> None:
        expected = self.allowed() and (self.model.opened_at is not None or self.model.half_open)
        probe = self.breaker.claim(self.now)
        assert (probe != NO_PROBE) is expected
        if expected:
            assert probe not in self.probes
            self.probes.append(probe)
            self.model = _Model(self.model.failures, None, True, probe)

    @precondition(lambda self: self.probes)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        probe = data.draw(st.sampled_from(self.probes))
        self.breaker.give_back(probe)
        if self.model.probe == probe:
            self.model = self.model._replace(probe=None)

    @rule()
    def succeed(self) -> None:
        self.breaker.success()
        self.model = _Model()

    @rule()
    def fail(self) -> None:
        self.breaker.failure(self.now)
        if self.model.opened_at is None:
            failures = self.model.failures + 1
            self.model = (
                _Model(failures, self.now)
                if failures >= self.threshold
                else self.model._replace(failures=failures)
            )

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "model"):
            return
        expected = OPEN if self.model.opened_at is not None else CLOSED
        assert self.breaker.state is (HALF_OPEN if self.model.half_open else expected)
        assert self.breaker.would_allow(self.now) is self.allowed()


BreakerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestBreakerAgainstModel = BreakerMachine.TestCase
