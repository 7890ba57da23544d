"""What the manager repeats: unanswered questions and resolutions; and what it logs."""

import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from extproc.workers.engine_calls import EngineAnswer, EngineUnreachableError
from extproc.workers.source import Added, Removed
from tests.builders import make_spec
from tests.fakes import FakeEngineClient, settle

from .manager_setup import DNS_TTL_SECONDS, NAMED, RETRY_SECONDS, A, B, Gate, ManagerSetup, running


def warnings(logs: list[EventDict]) -> list[str]:
    """The warnings about workers that do not answer or that need a change."""
    events = ("worker_not_answering", "worker_not_usable", "worker_misconfigured")
    return [
        f"{line.get('error', line.get('reason'))} {line.get('models', '')}"
        for line in logs
        if line["event"] in events
    ]


async def test_a_dead_worker_is_registered_without_a_model() -> None:
    async with running(ManagerSetup()) as setup:
        await setup.deliver(Added(make_spec(A)))
        await setup.clock.advance(1.0)
        assert setup.worker(A).model_ids == ()
        assert setup.pool() == []
        assert setup.metric("extproc_introspections_total", outcome="failed") == 1


async def test_a_worker_without_a_model_is_asked_again_until_it_reports_one() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, None)
        await setup.deliver(Added(make_spec(A)))
        for rounds in (2, 3, 4):
            await setup.clock.advance(RETRY_SECONDS)
            assert len(setup.client.asked(A)) == rounds
        setup.client.tell(A, "m")
        await setup.clock.advance(RETRY_SECONDS)
        assert setup.pool() == [A]
        asked = len(setup.client.asked(A))
        await setup.clock.advance(10 * RETRY_SECONDS)
        assert len(setup.client.asked(A)) == asked


async def test_a_worker_that_reports_its_model_late_keeps_its_order() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(B, "m")
        await setup.deliver(Added(make_spec(A)))
        await setup.clock.advance(1.0)
        await setup.deliver(Added(make_spec(B)))
        setup.client.tell(A, "m")
        await setup.clock.advance(RETRY_SECONDS)
        assert setup.pool() == [A, B]


async def test_a_worker_whose_model_discovery_knows_is_not_asked_again_early() -> None:
    async with running(ManagerSetup()) as setup:
        await setup.deliver(Added(make_spec(A, model_ids=("m",))))
        await setup.clock.advance(1.0)
        assert setup.pool() == [A]
        asked = len(setup.client.asked(A))
        await setup.clock.advance(3 * RETRY_SECONDS)
        assert len(setup.client.asked(A)) == asked


async def test_a_worker_without_a_model_is_not_asked_again_while_its_answer_is_pending() -> None:
    async with running(ManagerSetup()) as setup:
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", FakeEngineClient.info(None), gate)
        await setup.deliver(Added(make_spec(A)))
        await setup.clock.advance(5 * RETRY_SECONDS)
        assert gate.entered == 1
        gate.open()
        await settle()
        assert setup.pool() == [A]


async def test_the_answer_of_a_worker_that_has_left_is_dropped() -> None:
    async with running(ManagerSetup()) as setup:
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", FakeEngineClient.info(None), gate)
        await setup.deliver(Added(make_spec(A)))
        await setup.clock.advance(RETRY_SECONDS)
        await setup.deliver(Removed(A))
        gate.open()
        await settle()
        assert setup.registry.get(A) is None


async def test_a_host_name_is_resolved_again_and_the_new_address_is_used() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(NAMED, "m")
        setup.resolver.names["name"] = ["10.1.0.1:8000"]
        await setup.deliver(Added(make_spec(NAMED)))
        worker, changes = setup.worker(NAMED), setup.changes
        setup.resolver.names["name"] = ["10.1.0.2:8000"]
        await setup.clock.advance(DNS_TTL_SECONDS)
        assert worker.address == "10.1.0.2:8000"
        assert setup.registry.at_address("10.1.0.2:8000") is worker
        assert setup.registry.at_address("10.1.0.1:8000") is None
        assert setup.changes == changes + 1


async def test_an_address_is_kept_while_the_resolver_still_returns_it() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(NAMED, "m")
        setup.resolver.names["name"] = ["10.1.0.5:8000"]
        await setup.deliver(Added(make_spec(NAMED)))
        changes = setup.changes
        setup.resolver.names["name"] = ["10.1.0.1:8000", "10.1.0.5:8000"]
        await setup.clock.advance(3 * DNS_TTL_SECONDS)
        assert setup.worker(NAMED).address == "10.1.0.5:8000"
        assert setup.worker(NAMED).unused_addresses == ("10.1.0.1:8000",)
        assert setup.changes == changes


async def test_a_worker_whose_name_cannot_be_resolved_any_more_keeps_its_address() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(NAMED, "m")
        setup.resolver.names["name"] = ["10.1.0.1:8000"]
        await setup.deliver(Added(make_spec(NAMED)))
        setup.resolver.names["name"] = []
        await setup.clock.advance(3 * DNS_TTL_SECONDS)
        assert setup.worker(NAMED).address == "10.1.0.1:8000"
        assert setup.pool() == [NAMED]


async def test_a_worker_joins_its_pool_when_its_name_gets_an_address() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(NAMED, "m")
        await setup.deliver(Added(make_spec(NAMED)))
        assert setup.worker(NAMED).address is None
        assert setup.pool() == []
        setup.resolver.names["name"] = ["10.1.0.1:8000"]
        await setup.clock.advance(DNS_TTL_SECONDS)
        assert setup.pool() == [NAMED]


async def test_ip_addresses_are_not_resolved_again() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        setup.resolver.calls.clear()
        await setup.clock.advance(3 * DNS_TTL_SECONDS)
        assert setup.resolver.calls == []


async def test_a_dead_worker_is_warned_about_once() -> None:
    with capture_logs() as logs:
        async with running(ManagerSetup()) as setup:
            await setup.deliver(Added(make_spec(A)))
            await setup.clock.advance(10 * RETRY_SECONDS)
    assert len(warnings(logs)) == 1


async def test_a_dead_worker_with_an_unknown_host_name_does_not_fill_the_log() -> None:
    with capture_logs() as logs:
        async with running(ManagerSetup()) as setup:
            await setup.deliver(Added(make_spec(NAMED)))
            await setup.clock.advance(10 * RETRY_SECONDS)
    reasons = warnings(logs)
    assert len(reasons) == len(set(reasons))


async def test_a_new_error_and_a_repeated_one_after_a_removal_are_warned_about() -> None:
    with capture_logs() as logs:
        async with running(ManagerSetup()) as setup:
            await setup.deliver(Added(make_spec(A)))
            await setup.clock.advance(1.0)
            setup.client.script(A, "/server_info", EngineAnswer(401, b""))
            await setup.clock.advance(2 * RETRY_SECONDS)
            await setup.deliver(Removed(A))
            await setup.deliver(Added(make_spec(A)))
            setup.client.script(A, "/server_info", EngineUnreachableError("connection refused"))
            await setup.clock.advance(2 * RETRY_SECONDS)
    reasons = warnings(logs)
    assert len(reasons) == 4
    assert [word in reason for word, reason in zip(("refused", "401") * 2, reasons, strict=True)]


async def test_a_model_that_is_not_configured_is_warned_about_with_its_name() -> None:
    with capture_logs() as logs:
        async with running(ManagerSetup()) as setup:
            setup.client.tell(A, "foreign")
            await setup.deliver(Added(make_spec(A)))
            await setup.clock.advance(3 * RETRY_SECONDS)
    assert [("foreign" in reason) for reason in warnings(logs)] == [True]


@pytest.mark.parametrize("role", ["null", "prefill", "decode"])
async def test_a_usable_worker_is_not_warned_about(role: str) -> None:
    with capture_logs() as logs:
        async with running(ManagerSetup()) as setup:
            setup.client.tell(A, "m", disaggregation_mode=role, disaggregation_bootstrap_port=8998)
            await setup.deliver(Added(make_spec(A)))
            await setup.clock.advance(3 * RETRY_SECONDS)
    assert warnings(logs) == []


async def test_a_refused_worker_is_logged_once() -> None:
    with capture_logs() as logs:
        async with running(ManagerSetup()) as setup:
            setup.client.tell(A, "m")
            setup.client.tell(B, None)
            await setup.deliver(Added(make_spec(A)), Added(make_spec(B)))
            setup.client.tell(B, "m", disaggregation_mode="decode")
            await setup.clock.advance(10 * RETRY_SECONDS)
            assert setup.pool() == [A]
    assert sum(line["event"] == "worker_refused" for line in logs) == 1


async def test_a_refused_worker_joins_when_its_role_fits() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, "m")
        setup.client.tell(B, "m", disaggregation_mode="decode")
        await setup.deliver(Added(make_spec(A)))
        await setup.deliver(Added(make_spec(B)))
        assert setup.pool(role="decode") == []
        await setup.deliver(Removed(A))
        assert setup.pool(role="decode") == [B]  # at once
