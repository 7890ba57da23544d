"""What is asked again: workers that told nothing, names whose address may change; and the log."""

import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from extproc.workers.engine_calls import EngineAnswer, EngineUnreachableError
from extproc.workers.source import Added, Removed
from tests.fakes import FakeEngineClient, make_spec, settle

from .house import DNS_TTL_SECONDS, NAMED, RETRY_SECONDS, A, B, Gate, House, running


def warnings(logs: list[EventDict]) -> list[str]:
    """What the log says about workers that do not answer, or need a change."""
    events = ("worker_not_answering", "worker_not_usable", "worker_misconfigured")
    return [
        f"{line.get('error', line.get('reason'))} {line.get('models', '')}"
        for line in logs
        if line["event"] in events
    ]


async def test_a_dead_worker_is_registered_without_a_model() -> None:
    async with running(House()) as house:
        await house.happens(Added(make_spec(A)))
        await house.clock.advance(1.0)
        assert house.worker(A).model_ids == ()
        assert house.pool() == []
        assert house.metric("extproc_introspections_total", outcome="failed") == 1


async def test_a_worker_without_a_model_is_asked_again_until_it_reports_one() -> None:
    async with running(House()) as house:
        house.client.tell(A, None)
        await house.happens(Added(make_spec(A)))
        for rounds in (2, 3, 4):
            await house.clock.advance(RETRY_SECONDS)
            assert len(house.client.asked(A)) == rounds
        house.client.tell(A, "m")
        await house.clock.advance(RETRY_SECONDS)
        assert house.pool() == [A]
        asked = len(house.client.asked(A))
        await house.clock.advance(10 * RETRY_SECONDS)
        assert len(house.client.asked(A)) == asked


async def test_a_worker_that_reports_its_model_late_keeps_its_order() -> None:
    async with running(House()) as house:
        house.client.tell(B, "m")
        await house.happens(Added(make_spec(A)))
        await house.clock.advance(1.0)
        await house.happens(Added(make_spec(B)))
        house.client.tell(A, "m")
        await house.clock.advance(RETRY_SECONDS)
        assert house.pool() == [A, B]


async def test_a_worker_whose_model_discovery_knows_is_not_asked_again_early() -> None:
    async with running(House()) as house:
        await house.happens(Added(make_spec(A, model_ids=("m",))))
        await house.clock.advance(1.0)
        assert house.pool() == [A]
        asked = len(house.client.asked(A))
        await house.clock.advance(3 * RETRY_SECONDS)
        assert len(house.client.asked(A)) == asked


async def test_a_worker_without_a_model_is_not_asked_again_while_its_answer_is_pending() -> None:
    async with running(House()) as house:
        gate = Gate(FakeEngineClient.info("m"))
        house.client.script(A, "/server_info", FakeEngineClient.info(None), gate)
        await house.happens(Added(make_spec(A)))
        await house.clock.advance(5 * RETRY_SECONDS)
        assert gate.entered == 1
        gate.open()
        await settle()
        assert house.pool() == [A]


async def test_the_answer_of_a_worker_that_has_left_is_dropped() -> None:
    async with running(House()) as house:
        gate = Gate(FakeEngineClient.info("m"))
        house.client.script(A, "/server_info", FakeEngineClient.info(None), gate)
        await house.happens(Added(make_spec(A)))
        await house.clock.advance(RETRY_SECONDS)
        await house.happens(Removed(A))
        gate.open()
        await settle()
        assert house.registry.get(A) is None


async def test_a_host_name_is_resolved_again_and_the_new_address_is_used() -> None:
    async with running(House()) as house:
        house.client.tell(NAMED, "m")
        house.resolver.names["name"] = ["10.1.0.1:8000"]
        await house.happens(Added(make_spec(NAMED)))
        worker, changes = house.worker(NAMED), house.changes
        house.resolver.names["name"] = ["10.1.0.2:8000"]
        await house.clock.advance(DNS_TTL_SECONDS)
        assert worker.address == "10.1.0.2:8000"
        assert house.registry.at_address("10.1.0.2:8000") is worker
        assert house.registry.at_address("10.1.0.1:8000") is None
        assert house.changes == changes + 1


async def test_an_address_is_kept_while_the_resolver_still_returns_it() -> None:
    async with running(House()) as house:
        house.client.tell(NAMED, "m")
        house.resolver.names["name"] = ["10.1.0.5:8000"]
        await house.happens(Added(make_spec(NAMED)))
        changes = house.changes
        house.resolver.names["name"] = ["10.1.0.1:8000", "10.1.0.5:8000"]
        await house.clock.advance(3 * DNS_TTL_SECONDS)
        assert house.worker(NAMED).address == "10.1.0.5:8000"
        assert house.changes == changes


async def test_a_worker_whose_name_cannot_be_resolved_any_more_keeps_its_address() -> None:
    async with running(House()) as house:
        house.client.tell(NAMED, "m")
        house.resolver.names["name"] = ["10.1.0.1:8000"]
        await house.happens(Added(make_spec(NAMED)))
        house.resolver.names["name"] = []
        await house.clock.advance(3 * DNS_TTL_SECONDS)
        assert house.worker(NAMED).address == "10.1.0.1:8000"
        assert house.pool() == [NAMED]


async def test_a_worker_joins_its_pool_when_its_name_gets_an_address() -> None:
    async with running(House()) as house:
        house.client.tell(NAMED, "m")
        await house.happens(Added(make_spec(NAMED)))
        assert house.worker(NAMED).address is None
        assert house.pool() == []
        house.resolver.names["name"] = ["10.1.0.1:8000"]
        await house.clock.advance(DNS_TTL_SECONDS)
        assert house.pool() == [NAMED]


async def test_ip_addresses_are_not_resolved_again() -> None:
    async with running(House()) as house:
        house.client.tell(A, "m")
        await house.happens(Added(make_spec(A)))
        house.resolver.calls.clear()
        await house.clock.advance(3 * DNS_TTL_SECONDS)
        assert house.resolver.calls == []


async def test_a_dead_worker_is_warned_about_once() -> None:
    with capture_logs() as logs:
        async with running(House()) as house:
            await house.happens(Added(make_spec(A)))
            await house.clock.advance(10 * RETRY_SECONDS)
    assert len(warnings(logs)) == 1


async def test_a_dead_worker_with_an_unknown_host_name_does_not_fill_the_log() -> None:
    with capture_logs() as logs:
        async with running(House()) as house:
            await house.happens(Added(make_spec(NAMED)))
            await house.clock.advance(10 * RETRY_SECONDS)
    reasons = warnings(logs)
    assert len(reasons) == len(set(reasons))


async def test_a_new_error_and_a_repeated_one_after_a_removal_are_warned_about() -> None:
    with capture_logs() as logs:
        async with running(House()) as house:
            await house.happens(Added(make_spec(A)))
            await house.clock.advance(1.0)
            house.client.script(A, "/server_info", EngineAnswer(401, b""))
            await house.clock.advance(2 * RETRY_SECONDS)
            await house.happens(Removed(A))
            await house.happens(Added(make_spec(A)))
            house.client.script(A, "/server_info", EngineUnreachableError("connection refused"))
            await house.clock.advance(2 * RETRY_SECONDS)
    reasons = warnings(logs)
    assert len(reasons) == 4
    assert [word in reason for word, reason in zip(("refused", "401") * 2, reasons, strict=True)]


async def test_a_model_that_is_not_configured_is_warned_about_with_its_name() -> None:
    with capture_logs() as logs:
        async with running(House()) as house:
            house.client.tell(A, "foreign")
            await house.happens(Added(make_spec(A)))
            await house.clock.advance(3 * RETRY_SECONDS)
    assert [("foreign" in reason) for reason in warnings(logs)] == [True]


@pytest.mark.parametrize("role", ["null", "prefill", "decode"])
async def test_a_usable_worker_is_not_warned_about(role: str) -> None:
    with capture_logs() as logs:
        async with running(House()) as house:
            house.client.tell(A, "m", disaggregation_mode=role, disaggregation_bootstrap_port=8998)
            await house.happens(Added(make_spec(A)))
            await house.clock.advance(3 * RETRY_SECONDS)
    assert warnings(logs) == []


async def test_a_refused_worker_is_logged_once() -> None:
    with capture_logs() as logs:
        async with running(House()) as house:
            house.client.tell(A, "m")
            house.client.tell(B, None)
            await house.happens(Added(make_spec(A)), Added(make_spec(B)))
            house.client.tell(B, "m", disaggregation_mode="decode")
            await house.clock.advance(10 * RETRY_SECONDS)
            assert house.pool() == [A]
    assert sum(line["event"] == "worker_refused" for line in logs) == 1


async def test_a_refused_worker_joins_when_its_role_fits() -> None:
    async with running(House()) as house:
        house.client.tell(A, "m", disaggregation_mode="decode")
        house.client.tell(B, "m")
        await house.happens(Added(make_spec(A)))
        await house.happens(Added(make_spec(B)))
        assert house.pool() == []
        await house.happens(Removed(A))
        await house.clock.advance(RETRY_SECONDS)
        assert house.pool() == [B]
