"""A request on two workers ends in many ways; each one leaves nothing behind and counts once."""

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.errors import RouterError, stale_request_expired
from extproc.routing.decision import Decision
from extproc.routing.pd.decode_lease import DecodeLeases
from extproc.routing.pd.pair import Pair, Pairs
from extproc.routing.pd.prefill_leg import PrefillLeg
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.engine_calls import EngineAnswer, EngineTimeoutError, EngineUnreachableError
from extproc.workers.tickets import RankBooking
from extproc.workers.worker import Worker
from tests.builders import make_fleet, make_worker
from tests.fakes import settle

P, D = "http://10.0.0.1:8000", "http://10.0.1.1:8000"
D_ADDRESS = "10.0.1.1:8000"
VIA = "via_upstream"
CLOSED, OPEN = BreakerState.CLOSED, BreakerState.OPEN
HALF_OPEN, BUSY = BreakerState.HALF_OPEN, BreakerState.BUSY
LINGER_SECONDS = 0.01
OUTCOMES = (
    "ok",
    "prefill_failed",
    "prefill_refused",
    "decode_failed",
    "cancelled",
    "abandoned",
)


class FakeCall:
    """A call whose engine answers when the test says so; made within a running loop."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[EngineAnswer] = asyncio.get_running_loop().create_future()
        self._answer.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.cancels = 0

    @property
    def is_open(self) -> bool:
        """The engine still has it."""
        return not self._answer.done()

    async def answer(self) -> EngineAnswer:
        return await self._answer

    def cancel(self) -> None:
        self.cancels += 1
        self._answer.cancel()

    def respond(self, status: int = 200, body: bytes = b"{}") -> None:
        if self.is_open:
            self._answer.set_result(EngineAnswer(status, body))

    def fail(self, error: EngineUnreachableError) -> None:
        if self.is_open:
            self._answer.set_exception(error)


class Booking:
    """A booking on a rank that records its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def started(self, now: float) -> None:
        self.calls.append("started")

    def release(self, now: float) -> None:
        self.calls.append("release")


class Case:
    """A pair of a prefill worker P and a decode worker D, whose call was just made."""

    def __init__(
        self, *, inline: bool = False, linger: float = 0.0, threshold: int = 1, probe: bool = False
    ) -> None:
        self.prefill = make_worker(P, role="prefill", threshold=threshold)
        self.decode = make_worker(D, order=1, role="decode", threshold=threshold)
        self.fleet = make_fleet([self.prefill, self.decode])
        self.rechecked: list[Worker] = []
        self.failures: list[RouterError] = []
        self.call = FakeCall()
        self.pairs = Pairs(self.fleet.clock, self.fleet.metrics.pd, linger_seconds=linger)
        if probe:
            for worker in (self.prefill, self.decode):
                for _ in range(threshold):
                    worker.breaker.failure(self.fleet.clock.monotonic())
            self.fleet.clock.tick(30.0)
        self.pair = self._make(inline)
        self.pair.on_abort = self.failures.append
        self.pair.follow()

    def _make(self, inline: bool) -> Pair:
        claims, now = self.fleet.claims, self.fleet.clock.monotonic()
        leg_parts = msgspec.structs.replace(self.fleet.leg_parts, recheck=self.rechecked.append)
        leg = PrefillLeg(leg_parts, "m", claims.take(self.prefill, now), now, request_id="")
        leg.call = self.call
        decision = Decision(
            model="m",
            policy="p",
            reason="r",
            worker_url=P,
            destinations=(D_ADDRESS,) if inline else (),
            timeout_ms=0,
            decode_order="" if inline else f"1;10.0.0.1;x;{D_ADDRESS}",
        )
        leases = DecodeLeases(self.fleet.lease_parts, claims)
        return Pair(
            self.pairs,
            Pairs.new_id(),
            decision,
            leg,
            decode=leases.take(decision, [self.decode], now, leg) if inline else None,
            reservation=None if inline else leases.reserve(self.decode, now),
        )

    async def answers(self, status: int, body: bytes = b"{}") -> None:
        self.call.respond(status, body)
        await settle()

    async def breaks(self, error: EngineUnreachableError) -> None:
        self.call.fail(error)
        await settle()

    def responds(self, status: int) -> None:
        self.pair.responded(status, D_ADDRESS, VIA, streamed=False)

    # -- what is left

    @property
    def load(self) -> tuple[int, int]:
        return self.prefill.in_flight, self.decode.in_flight

    def ended(self) -> list[str]:
        """Outcomes counted so far."""
        found: list[str] = []
        for outcome in OUTCOMES:
            value = self.fleet.metric("extproc_pd_pairs_total", model="m", outcome=outcome)
            found += [outcome] * int(value)
        return found

    def failure_reasons(self) -> list[str]:
        metric = "extproc_pd_prefill_failures_total"
        reasons = ("connect", "status_4xx", "status_5xx", "broken", "timeout", "no_kv")
        return [
            reason
            for reason in reasons
            for _ in range(int(self.fleet.metric(metric, model="m", reason=reason)))
        ]

    def nothing_is_left(self) -> None:
        assert self.load == (0, 0)
        assert len(self.fleet.tickets) == 0
        assert len(self.pairs) == 0
        assert not self.call.is_open


# -- the prefill's answer


@pytest.mark.parametrize("status", [200, 204])
async def test_a_good_prefill_is_a_success_and_its_load_ends_with_it(status: int) -> None:
    case = Case()
    booking = Booking()
    case.pair.leg.claim.ticket.booking = booking
    assert case.load == (1, 1)
    assert case.pair.holds_stream
    case.fleet.clock.tick(0.3)
    await case.answers(status)
    assert case.load == (0, 1)
    assert booking.calls == ["started", "release"]
    assert not case.pair.holds_stream
    assert case.fleet.outcomes() == {P: ["success"]}
    assert (case.failures, case.failure_reasons(), case.rechecked) == ([], [], [])
    assert case.fleet.metric("extproc_pd_prefill_seconds_sum", model="m") == pytest.approx(0.3)
    assert case.pairs.get(case.pair.id) is case.pair
    case.responds(200)
    case.pair.close()
    case.nothing_is_left()
    assert case.ended() == ["ok"]
    assert case.fleet.outcomes() == {P: ["success"]}


@pytest.mark.parametrize("status", [400, 404, 413, 422, 499])
async def test_a_4xx_is_the_clients_fault_and_reaches_the_client_in_the_engines_words(
    status: int,
) -> None:
    case = Case(threshold=2)
    case.prefill.breaker.failure(0.0)
    body = b'{"object":"error"}'
    await case.answers(status, body)
    (error,) = case.failures
    assert (error.status, error.code, error.body) == (status, "prefill_refused", body)
    case.prefill.breaker.failure(0.0)  # a success in between has reset the count
    assert case.prefill.breaker.state is CLOSED
    assert case.fleet.outcomes() == {P: ["success"]}
    assert case.failure_reasons() == ["status_4xx"]
    assert case.rechecked == [case.prefill]
    assert case.fleet.metric("extproc_pd_prefill_seconds_count", model="m") == 0
    case.pair.close()
    case.nothing_is_left()
    assert case.ended() == ["prefill_refused"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (500, "status_5xx"),
        (503, "status_5xx"),
        (EngineUnreachableError("broken off"), "broken"),
        (EngineTimeoutError("late"), "timeout"),
    ],
)
async def test_a_failed_prefill_aborts_the_request_at_once(
    answer: int | EngineUnreachableError, reason: str
) -> None:
    case = Case()
    booking = Booking()
    case.pair.leg.claim.ticket.booking = booking
    if isinstance(answer, int):
        await case.answers(answer, b"its own words")
    else:
        await case.breaks(answer)
    (error,) = case.failures
    assert (error.status, error.code, error.body) == (502, "prefill_failed", None)
    assert "10.0" not in error.message
    # What the worker answered may be the fault of the request.
    assert (case.prefill.breaker.state is OPEN) is (reason != "status_5xx")
    assert case.fleet.outcomes() == {P: ["busy" if answer == 503 else "error"]}
    assert case.failure_reasons() == [reason]
    assert case.rechecked == [case.prefill]
    assert booking.calls == ["release"]
    assert case.load == (0, 1)
    case.fleet.clock.tick(0.004)
    case.pair.answer_written()
    assert case.fleet.metric("extproc_pd_fail_fast_seconds_sum") == pytest.approx(0.004)
    case.pair.close()
    case.nothing_is_left()
    assert case.ended() == ["prefill_failed"]
    assert case.decode.breaker.state is CLOSED


@pytest.mark.parametrize("status", [200, 400, 500])
async def test_a_prefill_that_ends_after_the_stream_aborts_nothing(status: int) -> None:
    case = Case(linger=60.0)
    case.responds(200)
    case.pair.close()
    await case.answers(status)
    assert case.failures == []
    assert case.ended() == ["ok"]
    case.nothing_is_left()
    expected = {200: "success", 400: "success", 500: "error"}
    assert case.fleet.outcomes() == {P: [expected[status]]}


# -- the stream's end


@pytest.mark.parametrize("linger", [0.0, 60.0])
async def test_a_client_that_leaves_ends_the_prefill_at_once(linger: float) -> None:
    case = Case(linger=linger, probe=True)
    booking = Booking()
    case.pair.leg.claim.ticket.booking = booking
    assert case.prefill.breaker.state is HALF_OPEN
    now = case.fleet.clock.monotonic()
    assert not case.prefill.breaker.would_allow(now)
    case.pair.close()
    assert case.call.cancels >= 1
    await settle()
    case.nothing_is_left()
    assert booking.calls == ["release"]
    # Neither worker has an outcome, so other requests may probe.
    assert case.prefill.breaker.state is case.decode.breaker.state is HALF_OPEN
    assert case.prefill.breaker.would_allow(now)
    assert case.decode.breaker.would_allow(now)
    assert case.fleet.outcomes() == {P: ["cancelled"]}
    assert (case.failures, case.ended()) == ([], ["cancelled"])


async def test_a_prefill_may_linger_after_a_good_response() -> None:
    case = Case(linger=60.0)
    case.responds(200)
    case.pair.close()
    assert not case.pair.holds_stream
    await settle()
    assert (case.call.cancels, case.load, len(case.pairs)) == (0, (1, 0), 1)
    case.call.respond(200)
    await settle()
    case.nothing_is_left()
    assert case.fleet.outcomes() == {P: ["success"]}


async def test_a_lingering_prefill_is_cancelled_in_the_end() -> None:
    case = Case(linger=LINGER_SECONDS)
    case.responds(200)
    case.pair.close()
    async with asyncio.timeout(10):
        while not case.call.cancels:  # noqa: ASYNC110 (a timer of the loop)
            await asyncio.sleep(LINGER_SECONDS / 2)
    await settle()
    case.nothing_is_left()
    assert case.fleet.outcomes() == {P: ["cancelled"]}
    assert (case.failures, case.ended()) == ([], ["ok"])


async def test_without_lingering_a_prefill_ends_with_the_response() -> None:
    case = Case()
    case.responds(200)
    assert case.call.cancels == 0
    case.pair.close()
    assert case.call.cancels == 1
    case.nothing_is_left()


@pytest.mark.parametrize("status", [400, 404, 500, 503])
async def test_a_failed_decode_cancels_the_prefill_before_the_stream_ends(status: int) -> None:
    case = Case(linger=60.0)
    case.responds(status)
    assert case.call.cancels == 1
    assert case.prefill.in_flight == 0
    assert not case.pair.holds_stream
    await settle()
    assert (case.failures, case.ended()) == ([], ["decode_failed"])
    case.pair.close()
    case.nothing_is_left()
    assert case.ended() == ["decode_failed"]
    assert case.fleet.outcomes() == {P: ["cancelled"]}
    assert case.prefill.breaker.state is CLOSED


async def test_a_prefill_that_fails_during_the_response_aborts_the_request() -> None:
    case = Case()
    case.responds(200)
    await case.answers(500)
    assert [error.code for error in case.failures] == ["prefill_failed"]
    case.pair.close()
    assert case.ended() == ["prefill_failed"]
    case.nothing_is_left()


async def test_close_is_idempotent() -> None:
    case = Case()
    case.responds(200)
    await case.answers(200)
    case.pair.close()
    case.pair.close()
    case.nothing_is_left()
    assert case.ended() == ["ok"]


async def test_a_failure_is_recorded_without_a_listener() -> None:
    case = Case()
    case.pair.on_abort = None
    await case.answers(500)
    case.pair.close()
    case.nothing_is_left()
    assert case.ended() == ["prefill_failed"]


# -- abandoned


async def test_abandoning_cancels_the_prefill_and_aborts_the_request() -> None:
    case = Case(probe=True)
    case.pairs.abandon()
    await settle()
    assert [error.status for error in case.failures] == [502]
    assert case.call.cancels == 1
    assert case.prefill.in_flight == 0
    # The worker is not to blame.
    assert case.prefill.breaker.would_allow(case.fleet.clock.monotonic())
    assert case.fleet.outcomes() == {P: ["cancelled"]}
    case.pairs.abandon()
    case.pair.close()
    await settle()
    case.nothing_is_left()
    assert len(case.failures) == 1
    assert case.ended() == ["abandoned"]


async def test_only_the_pairs_of_a_prefill_worker_are_abandoned_with_it() -> None:
    case = Case()
    case.pairs.abandon(case.decode)
    assert case.call.is_open
    case.pairs.abandon(case.prefill)
    assert not case.call.is_open
    case.pair.close()
    case.nothing_is_left()


async def test_a_finished_prefill_is_not_abandoned() -> None:
    case = Case()
    await case.answers(200)
    case.pairs.abandon()
    assert case.failures == []
    case.responds(200)
    case.pair.close()
    assert case.ended() == ["ok"]


async def test_a_lingering_prefill_is_abandoned_without_an_abort() -> None:
    case = Case(linger=60.0)
    case.responds(200)
    case.pair.close()
    case.pairs.abandon()
    await settle()
    case.nothing_is_left()
    assert (case.failures, case.ended()) == ([], ["ok"])


# -- the decode worker's side


async def test_a_reservation_counts_until_it_is_released_once() -> None:
    case = Case(probe=True)
    now = case.fleet.clock.monotonic()
    assert case.load == (1, 1)
    assert not case.decode.breaker.would_allow(now)
    case.pair.release_reservation()
    assert case.load == (1, 0)
    assert case.decode.breaker.would_allow(now)
    # The worker is picked, and another request has its probe now.
    probe = case.decode.breaker.claim(now)
    assert probe
    ticket = case.fleet.tickets.book(case.decode, now)
    case.pair.release_reservation()
    case.pair.close()
    assert case.decode.in_flight == 1
    assert not case.decode.breaker.would_allow(now)
    ticket.release()
    case.nothing_is_left()


async def test_the_claim_of_a_reservation_is_released_once() -> None:
    case = Case(probe=True)
    now = case.fleet.clock.monotonic()
    reservation = case.pair.reservation
    assert reservation is not None
    reservation.release()
    assert case.decode.breaker.claim(now)
    reservation.release()
    assert not case.decode.breaker.would_allow(now)
    assert case.decode.in_flight == 0
    await case.answers(200)


@pytest.mark.parametrize(
    ("status", "state", "outcome"),
    [(200, CLOSED, "success"), (500, CLOSED, "error"), (503, BUSY, "busy")],
)
async def test_inline_the_response_is_recorded_for_the_decode_worker_too(
    status: int, state: BreakerState, outcome: str
) -> None:
    case = Case(inline=True)
    assert case.load == (1, 1)
    assert case.pair.claim.worker is case.decode
    await case.answers(200)
    case.responds(status)
    assert case.pair.served is case.prefill
    assert case.decode.breaker.state is state
    assert case.fleet.outcomes() == {P: ["success"], D: [outcome]}
    case.pair.close()
    case.nothing_is_left()
    assert case.ended() == ["ok" if status < 400 else "decode_failed"]


async def test_inline_a_client_that_leaves_is_not_a_failure_of_either_worker() -> None:
    case = Case(inline=True, probe=True)
    case.pair.close()
    case.nothing_is_left()
    now = case.fleet.clock.monotonic()
    assert case.prefill.breaker.would_allow(now)
    assert case.decode.breaker.would_allow(now)
    assert case.fleet.outcomes() == {P: ["cancelled"], D: ["cancelled"]}


async def test_inline_a_request_that_is_too_old_is_the_decode_workers_failure() -> None:
    case = Case(inline=True)
    case.pair.abort(stale_request_expired())
    case.pair.close()
    assert case.decode.breaker.state is OPEN
    assert case.prefill.breaker.state is CLOSED
    case.nothing_is_left()


async def test_inline_a_failed_prefill_leaves_nothing_for_the_janitor_to_abort() -> None:
    case = Case(inline=True)
    await case.answers(500)
    case.fleet.clock.tick(1000.0)
    assert case.fleet.tickets.sweep() == 0
    assert case.decode.breaker.state is CLOSED
    assert len(case.failures) == 1
    case.pair.close()
    case.nothing_is_left()


async def test_with_two_passes_the_janitor_watches_the_prefill() -> None:
    case = Case()
    assert case.pair.claim is case.pair.leg.claim
    assert case.pair.served is case.prefill
    case.responds(200)
    case.pair.abort(stale_request_expired())
    case.pair.close()
    assert case.decode.breaker.state is CLOSED
    case.nothing_is_left()


# -- the pairs


async def test_a_pair_is_found_by_its_id_until_it_is_over() -> None:
    case = Case()
    assert case.pairs.get(case.pair.id) is case.pair
    assert case.pairs.get("0" * 24) is None
    assert list(case.pairs) == [case.pair]
    case.pair.close()
    assert case.pairs.get(case.pair.id) is None


def test_ids_are_short_and_never_the_same() -> None:
    names = {Pairs.new_id() for _ in range(1000)}
    assert len(names) == 1000
    assert all(len(name) == 24 and name.isalnum() for name in names)


# -- in any order

_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("answer"), st.sampled_from([200, 400, 500])),
        st.tuples(st.just("broken"), st.booleans()),
        st.tuples(st.just("responded"), st.sampled_from([200, 404, 500])),
        st.tuples(st.just("close")),
        st.tuples(st.just("abandon")),
        st.tuples(st.just("expired")),
        st.tuples(st.just("answer_written")),
        st.tuples(st.just("picked")),
        st.tuples(st.just("wait")),
    ),
    max_size=10,
)


async def _play(steps: list[Any], *, inline: bool, linger: float, probe: bool) -> None:
    case = Case(inline=inline, linger=linger, probe=probe)
    booking: RankBooking = Booking()
    case.pair.leg.claim.ticket.booking = booking
    failures_before_close = 0
    closed = responded = False
    for step in steps:
        match step:
            case "answer", status:
                case.call.respond(status)
            case "broken", timed_out:
                case.call.fail((EngineTimeoutError if timed_out else EngineUnreachableError)(""))
            case "responded", status:
                if not responded and not closed:
                    case.responds(status)
                responded = True
            case ("close",):
                case.pair.close()
                if not closed:
                    failures_before_close = len(case.failures)
                closed = True
            case ("abandon",):
                case.pairs.abandon()
            case ("expired",):
                case.pair.abort(stale_request_expired())
            case ("answer_written",):
                if case.failures:
                    case.pair.answer_written()
            case ("picked",):
                case.pair.release_reservation()
            case ("wait",):
                case.fleet.clock.tick(1.0)
                await settle()
        assert min(case.load) >= 0
        assert len(case.failures) <= 1
    case.pair.close()
    if not closed:
        failures_before_close = len(case.failures)
    if linger and case.call.is_open:
        assert len(case.pairs) == 1
        case.call.respond(200)
    await settle()
    case.nothing_is_left()
    assert len(case.failures) == failures_before_close <= 1
    assert len(case.ended()) == 1
    outcomes = case.fleet.outcomes()
    assert len(outcomes[P]) == 1
    assert len(outcomes.get(D, [])) == (1 if inline else 0)
    assert isinstance(booking, Booking)
    assert booking.calls in (["release"], ["started", "release"])
    # The next request may probe: no probe was forgotten.
    case.fleet.clock.tick(120.0)
    now = case.fleet.clock.monotonic()
    assert case.prefill.breaker.would_allow(now)
    assert case.decode.breaker.would_allow(now)


@settings(deadline=None, max_examples=300)
@given(_STEPS, st.booleans(), st.sampled_from([0.0, 60.0]), st.booleans())
def test_whatever_happens_in_whatever_order_nothing_is_left(
    steps: list[Any], inline: bool, linger: float, probe: bool
) -> None:
    asyncio.run(_play(steps, inline=inline, linger=linger, probe=probe))


# -- an answer and its end in one turn of the loop


@pytest.mark.parametrize("status", [200, 500])
async def test_an_answer_on_its_way_when_the_stream_ends_counts_once(status: int) -> None:
    case = Case()
    case.call.respond(status)
    case.pair.close()
    await settle()
    assert len(case.fleet.outcomes()[P]) == 1


async def test_an_answer_on_its_way_when_the_pair_is_abandoned_aborts_only_once() -> None:
    case = Case()
    case.call.respond(500)
    case.pairs.abandon()
    await settle()
    assert len(case.failures) == 1


async def test_an_answer_on_its_way_when_decode_has_failed_does_not_abort() -> None:
    case = Case()
    case.call.respond(500)
    case.responds(500)
    await settle()
    assert case.failures == []


async def test_a_redirect_is_a_failure() -> None:
    case = Case()
    await case.answers(307)
    assert len(case.failures) == 1


# -- which worker is to blame


@pytest.mark.parametrize(("seconds", "blamed"), [(0.5, False), (1.5, True)])
async def test_a_decode_worker_that_waited_for_the_prefill_is_not_to_blame(
    seconds: float, blamed: bool
) -> None:
    case = Case()
    case.fleet.clock.tick(seconds)
    assert case.pair.leg.explains_decode_failure() is blamed
    case.responds(500)
    await settle()
    outcome = "error" if blamed else "cancelled"
    assert case.fleet.outcomes()[P] == [outcome]
    assert case.pair.leg.explains_decode_failure() is False
    case.pair.close()


async def test_a_decode_worker_that_fails_after_the_prefill_is_to_blame() -> None:
    case = Case()
    await case.answers(200)
    case.fleet.clock.tick(5)
    assert case.pair.leg.explains_decode_failure() is False
    case.responds(500)
    assert case.fleet.outcomes()[P] == ["success"]
    case.pair.close()
