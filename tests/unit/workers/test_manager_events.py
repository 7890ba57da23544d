"""From discovery events to registered workers: order, identity, and roles that do not mix."""

import asyncio

import pytest
from structlog.testing import capture_logs

from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.engine_calls import EngineAnswer
from extproc.workers.observer import WorkerObserver
from extproc.workers.source import Added, Listed, Removed, RoleChanged
from tests.builders import make_spec
from tests.fakes import FakeEngineClient, settle

from .manager_setup import NAMED, A, B, C, Gate, ManagerSetup, running


async def test_an_added_worker_is_registered_with_its_answer() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
        assert (worker.model_ids, worker.role, worker.address) == (("m",), "plain", "10.0.0.1:8000")
        assert setup.pool() == [A]
        assert setup.changes == 1
        assert setup.client.asked(A) == ["/server_info"]
        assert setup.metric("extproc_introspections_total", outcome="answered") == 1


@pytest.mark.parametrize(
    ("name", "threshold", "cool_down"), [("m", 3, 30.0), ("n", 7, 5.0), ("foreign", 3, 30.0)]
)
async def test_the_breaker_has_the_settings_of_the_workers_model(
    name: str, threshold: int, cool_down: float
) -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, name)
        await setup.deliver(Added(make_spec(A)))
        breaker = setup.worker(A).breaker
        assert (breaker.threshold, breaker.cool_down_seconds) == (threshold, cool_down)


async def test_workers_join_in_parallel() -> None:
    async with running(ManagerSetup()) as setup:
        gates = [Gate(FakeEngineClient.info("m")) for _ in range(3)]
        for url, gate in zip((A, B, C), gates, strict=True):
            setup.client.script(url, "/server_info", gate)
        await setup.deliver(*(Added(make_spec(url)) for url in (A, B, C)))
        assert [gate.entered for gate in gates] == [1, 1, 1]
        gates[2].open()
        await settle()
        assert setup.pool() == [C]
        for gate in gates:
            gate.open()
        await settle()
        assert sorted(setup.pool()) == [A, B, C]


async def test_a_removal_waits_until_the_same_worker_was_added() -> None:
    async with running(ManagerSetup()) as setup:
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", gate)
        setup.client.tell(B, "m")
        await setup.deliver(Added(make_spec(A)), Removed(A), Added(make_spec(B)))
        assert setup.pool() == [B]  # B does not wait for A
        gate.open()
        await settle()
        assert setup.registry.get(A) is None
        assert setup.pool() == [B]


async def test_events_of_one_worker_keep_their_order() -> None:
    async with running(ManagerSetup()) as setup:
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", gate, FakeEngineClient.info("n"))
        await setup.deliver(Added(make_spec(A)), Removed(A), Added(make_spec(A)))
        assert len(setup.registry) == 0
        gate.open()
        await settle()
        assert setup.worker(A).model_ids == ("n",)


async def test_removing_an_unknown_worker_changes_nothing() -> None:
    async with running(ManagerSetup()) as setup:
        await setup.deliver(Removed("nobody"), RoleChanged("nobody", "decode"))
        assert setup.changes == 0


async def test_a_removed_worker_leaves_no_metric_series() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        setup.metrics.worker_requests(A, "m", "plain", "success").inc()
        await setup.deliver(Removed(A))
        labels = {"worker": A, "model": "m", "role": "plain", "outcome": "success"}
        assert setup.prometheus.get_sample_value("extproc_worker_requests_total", labels) is None


async def test_a_changed_role_keeps_load_and_breaker() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
        worker.in_flight = 5
        for _ in range(3):
            worker.breaker.failure(0.0)
        await setup.deliver(RoleChanged(A, "decode"))
        assert setup.worker(A) is worker
        assert (worker.role, worker.in_flight) == ("decode", 5)
        assert worker.breaker.state is BreakerState.OPEN
        assert setup.pool() == []
        await setup.deliver(RoleChanged(A, "plain"))
        assert setup.pool() == [A]


async def test_a_changed_role_is_kept_when_the_worker_reports_its_model() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, None)
        await setup.deliver(Added(make_spec(A)), RoleChanged(A, "decode"))
        setup.client.tell(A, "m")
        await setup.clock.advance(31.0)
        assert setup.worker(A).model_ids == ("m",)
        assert setup.worker(A).role == "decode"


async def test_a_worker_added_again_under_its_id_is_another_engine() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, "m")
        setup.client.tell(B, "m")
        await setup.deliver(Added(make_spec(A, id="pod")), Added(make_spec(C, id="other")))
        setup.worker("pod").breaker.failure(0.0)
        await setup.deliver(Added(make_spec(B, id="pod")))
        worker = setup.worker("pod")
        assert (worker.url, worker.order, worker.in_flight) == (B, 0, 0)
        assert setup.registry.at_address("10.0.0.1:8000") is None


async def test_a_new_worker_never_gets_the_order_of_an_old_one() -> None:
    async with running(ManagerSetup()) as setup:
        for url in (A, B, C):
            setup.client.tell(url, "m")
        await setup.deliver(Added(make_spec(A)), Added(make_spec(B)))
        await setup.deliver(Removed(B), Added(make_spec(C)), Added(make_spec(B)))
        orders = [worker.order for worker in setup.registry]
        assert len(set(orders)) == 3
        assert setup.worker(C).order > 1
        assert setup.worker(B).order > 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_whose_role_does_not_fit_is_refused_logged_and_counted(role: str) -> None:
    with capture_logs() as logs:
        async with running(ManagerSetup()) as setup:
            setup.client.tell(A, "m")
            setup.client.tell(B, "m", disaggregation_mode=role, disaggregation_bootstrap_port=8998)
            await setup.deliver(Added(make_spec(A)))
            await setup.deliver(Added(make_spec(B)))
            assert setup.pool() == [A]
            assert setup.registry.get(B) is None
            assert setup.metric("extproc_workers_refused_total") == 1
    refused = [line for line in logs if line["event"] == "worker_refused"]
    assert [(line["worker"], line["log_level"]) for line in refused] == [(B, "error")]


async def test_an_unexpected_error_of_one_worker_does_not_stop_the_others() -> None:
    with capture_logs() as logs:
        async with running(ManagerSetup()) as setup:
            setup.client.script(A, "/server_info", RuntimeError("boom"))
            setup.client.tell(B, "m")
            await setup.deliver(Added(make_spec(A)), Added(make_spec(B)), Listed())
            assert setup.pool() == [B]
            assert setup.manager.first_round_done
    assert any(line["event"] == "introspection_failed" for line in logs)


async def test_a_worker_with_an_unexpected_error_is_asked_again() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.script(A, "/server_info", RuntimeError("boom"), FakeEngineClient.info("m"))
        await setup.deliver(Added(make_spec(A)))
        await setup.clock.advance(31.0)
        assert setup.pool() == [A]


async def test_an_unexpected_error_of_one_resolution_does_not_stop_the_others() -> None:
    async with running(ManagerSetup()) as setup:
        setup.resolver.names["name"] = ["10.0.0.9:8000"]
        setup.client.tell(NAMED, "m")
        setup.client.tell(A, "m")
        setup.client.tell(B, "m")
        await setup.deliver(Added(make_spec(NAMED)), Added(make_spec(A)))
        setup.resolver.names["name"] = RuntimeError("boom")
        await setup.clock.advance(41.0)
        await setup.deliver(Added(make_spec(B)))
        assert setup.pool() == [NAMED, A, B]


async def test_the_first_round_is_done_when_every_listed_worker_was_asked() -> None:
    async with running(ManagerSetup()) as setup:
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", gate)
        await setup.deliver(Added(make_spec(A)), Added(make_spec(B)), Listed())
        await setup.clock.advance(10.0)  # all attempts to reach B have failed by then
        assert not setup.manager.first_round_done
        gate.open()
        await settle()
        assert setup.manager.first_round_done


async def test_an_empty_list_ends_the_first_round() -> None:
    async with running(ManagerSetup()) as setup:
        assert not setup.manager.first_round_done
        await setup.deliver(Listed())
        assert setup.manager.first_round_done
        assert setup.changes == 1


async def test_cancellation_ends_a_running_introspection() -> None:
    gate = Gate(EngineAnswer(200, b"{}"))
    async with running(ManagerSetup()) as setup:
        setup.client.script(A, "/server_info", gate)
        await setup.deliver(Added(make_spec(A)), Listed())
    assert gate.cancelled == 1


async def test_cancellation_ends_an_introspection_that_later_events_wait_for() -> None:
    gate = Gate(EngineAnswer(200, b"{}"))
    async with running(ManagerSetup()) as setup:
        setup.client.script(A, "/server_info", gate)
        await setup.deliver(Added(make_spec(A)), Removed(A), Listed())
    assert gate.cancelled == 1


async def test_a_source_that_fails_ends_the_manager_with_its_error() -> None:
    setup = ManagerSetup()

    class Broken:
        async def events(self):  # type: ignore[no-untyped-def]
            yield Added(make_spec(A))
            raise RuntimeError("boom")

    setup.manager._source = Broken()
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(setup.manager.run(), 5)
    assert caught.group_contains(RuntimeError, match="boom")


async def test_a_worker_that_is_removed_while_it_is_asked_is_never_in_the_pool() -> None:
    seen: list[int] = []

    class Watching(WorkerObserver):
        def workers_changed(self) -> None:
            seen.append(len(setup.pool()))

    setup = ManagerSetup(observers=[Watching()])
    async with running(setup):
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", gate)
        await setup.deliver(Added(make_spec(A)), Removed(A))
        gate.open()
        for _ in range(20):
            await asyncio.sleep(0)
            seen.append(len(setup.pool()))
        assert setup.registry.get(A) is None
        assert set(seen) == {0}
