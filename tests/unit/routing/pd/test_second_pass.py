"""The second pass: which decode worker an attempt gets. And the settings of both passes."""

import pytest

from extproc.routing.pd.decode_order import DecodeOrder, DecodeQuery
from extproc.routing.pd.settings import PdSettings
from extproc.workers.circuit_breaker import BreakerState
from tests.unit.configs import config
from tests.unit.routing.pd.pd_fleet import (
    DECODES,
    VIA,
    PdFleet,
)

# -- the second pass


async def test_the_second_pass_replaces_the_reservation() -> None:
    fleet = PdFleet()
    pair = await fleet.pair()
    lease = fleet.pick(pair)
    assert pair.reservation is None
    assert sum(fleet.load[1]) == 1
    decision = lease.decision
    assert (decision.model, decision.policy, decision.reason) == (
        "m",
        "decode_affinity",
        "no_peer",
    )
    assert len(decision.destinations) == 1
    assert decision.worker_url == f"http://{decision.destinations[0]}"
    assert decision.timeout_ms == 0
    assert (decision.decode_order, decision.body_members) == ("", b"")
    assert fleet.metric("extproc_pd_decode_choices_total", model="m", reason="no_peer") == 1
    assert fleet.metric("extproc_pd_decode_retries_total", model="m") == 0
    lease.responded(200, decision.destinations[0], VIA, streamed=True)
    assert fleet.outcomes() == {decision.worker_url: ["success"]}
    lease.close()
    pair.close()
    fleet.nothing_is_left()


async def test_an_attempt_picks_from_its_own_group_only() -> None:
    fleet = PdFleet(decodes=[f"http://10.0.1.{n}:8000" for n in range(1, 8)])
    pair = await fleet.pair()
    order = DecodeOrder.from_header(pair.decision.decode_order)
    picked: list[str] = []
    for attempt in (1, 2, 3):
        lease = fleet.pick(pair, attempt)
        assert set(lease.decision.destinations) <= set(order.attempt_group(attempt))
        picked += lease.decision.destinations
        lease.close()
    assert len(set(picked)) == 3
    assert fleet.metric("extproc_pd_decode_retries_total", model="m") == 2
    pair.close()
    fleet.nothing_is_left()


async def test_the_load_at_that_moment_decides_within_a_group() -> None:
    fleet = PdFleet(decode_attempts=1)
    pair = await fleet.pair()
    assert pair.reservation is not None
    busy = pair.reservation.worker
    fleet.reports(busy, 10)
    fleet.reports(fleet.decodes[(fleet.decodes.index(busy) + 1) % 3], 5)
    lease = fleet.pick(pair)
    assert lease.decision.worker_url == fleet.decodes[(fleet.decodes.index(busy) + 2) % 3].url
    lease.close()
    pair.close()


async def test_the_own_reservation_does_not_count_against_a_worker() -> None:
    fleet = PdFleet(["http://10.0.0.1:8000"], ["http://10.0.0.1:9000", *DECODES])
    fleet.decodes[0].in_flight = 1  # just within what an idle pool allows
    pair = await fleet.pair()
    assert fleet.decodes[0].in_flight == 2
    lease = fleet.pick(pair)
    assert (lease.decision.reason, lease.decision.worker_url) == (
        "same_host",
        "http://10.0.0.1:9000",
    )
    lease.close()
    pair.close()
    assert fleet.decodes[0].in_flight == 1


@pytest.mark.parametrize("how", ["breaker", "gone", "role", "address"])
async def test_a_worker_that_left_is_not_picked(how: str) -> None:
    fleet = PdFleet()
    pair = await fleet.pair()
    (address,) = DecodeOrder.from_header(pair.decision.decode_order).attempt_group(1)
    worker = fleet.registry.at_address(address)
    assert worker is not None
    match how:
        case "breaker":
            fleet.trip(worker)
        case "gone":
            fleet.registry.remove(worker.id)
        case "role":
            fleet.registry.set_role(worker, "prefill", None)
        case _:
            worker.address = "10.9.9.9:1"
            fleet.registry.reindex()
    error = fleet.not_picked(pair, 1)
    assert (error.status, error.code) == (503, "no_decode_workers_available")
    assert fleet.load[1] == [0, 0, 0]
    # The next attempt has workers of its own.
    lease = fleet.pick(pair, 2)
    lease.close()
    pair.close()
    fleet.nothing_is_left()


@pytest.mark.parametrize("attempt", [0, 4, 99])
async def test_an_attempt_beyond_the_last_finds_no_worker(attempt: int) -> None:
    fleet = PdFleet()
    pair = await fleet.pair()
    assert fleet.not_picked(pair, attempt).code == "no_decode_workers_available"
    pair.close()
    fleet.nothing_is_left()


async def test_another_replica_can_pick_the_decode_worker() -> None:
    first, second = PdFleet(), PdFleet()
    pair = await first.pair()
    order = DecodeOrder.from_header(pair.decision.decode_order)
    lease = second.pd.pick_decode(DecodeQuery("m", order, 1))
    assert lease.decision.destinations == order.attempt_group(1)
    assert pair.reservation is not None  # the other replica does not know it
    lease.close()
    pair.close()
    first.nothing_is_left()
    second.nothing_is_left()


@pytest.mark.parametrize("status", [404, 422, 500, 503])
async def test_an_error_makes_the_service_recheck_the_role_of_the_worker(status: int) -> None:
    fleet = PdFleet(threshold=1)
    pair = await fleet.pair()
    lease = fleet.pick(pair)
    worker = lease.claim.ticket.worker
    lease.responded(status, lease.decision.destinations[0], VIA, streamed=False)
    assert fleet.rechecked == [worker]
    assert worker.breaker.state is not BreakerState.OPEN
    lease.close()
    pair.close()
    fleet.nothing_is_left()


async def test_a_refused_decode_worker_fails_and_the_next_attempt_takes_another() -> None:
    fleet = PdFleet(threshold=1)
    pair = await fleet.pair()
    lease = fleet.pick(pair, 1)
    first = lease.claim.ticket.worker
    details = "upstream_reset_before_response_started{remote_connection_failure}"
    lease.responded(503, lease.decision.destinations[0], details, streamed=False)
    lease.close()
    assert first.breaker.state is BreakerState.OPEN
    second = fleet.pick(pair, 2)
    assert second.claim.ticket.worker is not first
    second.responded(200, second.decision.destinations[0], VIA, streamed=False)
    assert pair.leg.is_open
    second.close()
    pair.close()
    fleet.nothing_is_left()


async def test_a_probe_of_a_decode_worker_is_claimed_by_the_second_pass() -> None:
    fleet = PdFleet(decodes=DECODES[:1])
    worker = fleet.decodes[0]
    fleet.trip(worker)
    fleet.clock.tick(30.0)
    pair = await fleet.pair()
    now = fleet.clock.monotonic()
    assert not worker.breaker.would_allow(now)  # reserved
    lease = fleet.pick(pair)
    assert not worker.breaker.would_allow(now)
    lease.close()
    assert worker.breaker.would_allow(now)
    pair.close()
    fleet.nothing_is_left()


async def test_an_error_of_an_inline_decode_worker_makes_the_service_recheck_it_too() -> None:
    fleet = PdFleet(inline=True)
    pair = await fleet.pair()
    address = pair.decision.destinations[0]
    pair.responded(500, address, VIA, False)
    pair.close()
    assert fleet.rechecked == [fleet.registry.at_address(address)]


# -- settings


def test_the_settings_come_from_the_configuration() -> None:
    settings = PdSettings.of(
        config(
            models=[{"id": "m"}, {"id": "n", "pd": {"protocol": "nixl"}}],
            pd={"prefill_timeout_secs": 7.0, "prefill_linger_secs": 3.0},
            proxy={"request_timeout_secs": 12.5, "fallback_workers": 4, "retry_busy": False},
            server={"step_deadline_secs": 2.0},
        ),
        "Bearer x",
    )
    assert not settings.inline
    assert settings.protocols == {"m": "sglang", "n": "nixl"}
    assert settings.min_prefill_tokens == {"m": 0, "n": 0}
    assert settings.decode_attempts == 5
    # 30 % of the time for a decision, which is shorter than a connection may take.
    assert settings.connect_seconds == pytest.approx(0.6)
    assert (settings.prefill_seconds, settings.linger_seconds) == (7.0, 3.0)
    assert settings.request_timeout_ms == 12_500
    assert settings.authorization == "Bearer x"


def test_a_gateway_that_takes_one_destination_makes_one_attempt() -> None:
    settings = PdSettings.of(config(envoy={"destination": "single"}), None)
    assert settings.decode_attempts == 1


def test_a_prefill_may_linger_where_the_end_of_a_response_is_not_known() -> None:
    settings = PdSettings.of(
        config(load={"release": "estimate"}, pd={"decode": "inline", "prefill_timeout_secs": 9.0}),
        None,
    )
    assert settings.inline
    assert settings.linger_seconds == 9.0
