"""Registered workers whose role, models or place of KV events change."""

from typing import Any

import pytest
from msgspec import structs
from structlog.testing import capture_logs

from extproc.config.models import KvEventsConfig, ModelConfig, PdModelConfig
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.engine_calls import EngineAnswer, EngineUnreachableError
from extproc.workers.observer import WorkerObserver
from extproc.workers.source import Added, Listed, Removed, RoleChanged
from extproc.workers.worker import Role, Worker
from tests.builders import make_spec
from tests.fakes import FakeEngineClient, settle

from .manager_setup import INTERVAL_SECONDS, RETRY_SECONDS, A, B, C, Gate, ManagerSetup, running

PREFILL: dict[str, Any] = {
    "disaggregation_mode": "prefill",
    "disaggregation_bootstrap_port": 8998,
}
DECODE: dict[str, Any] = {"disaggregation_mode": "decode"}
PLAIN: dict[str, Any] = {"disaggregation_mode": "null"}
KV: dict[str, Any] = {"endpoint_port_base": 5557, "block_size": 64}


class Follower(WorkerObserver):
    """Records which workers joined and left."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, tuple[str, ...], int | None]] = []

    def joined(self, worker: Worker) -> None:
        self._note("joined", worker)

    async def left(self, worker: Worker) -> None:
        self._note("left", worker)

    def _note(self, what: str, worker: Worker) -> None:
        events = worker.spec.kv_events
        self.seen.append((what, worker.url, worker.model_ids, events.port if events else None))


def asking(follower: Follower | None = None, **settings: Any) -> ManagerSetup:
    observers = [follower] if follower is not None else []
    return ManagerSetup(interval_seconds=INTERVAL_SECONDS, observers=observers, **settings)


async def test_a_changed_role_is_noticed_within_one_interval() -> None:
    async with running(asking()) as setup:
        setup.client.tell(A, "m", **PREFILL)
        await setup.deliver(Added(make_spec(A)))
        await setup.clock.advance(1.7 * INTERVAL_SECONDS)
        assert setup.role_changes == []
        worker, changes = setup.worker(A), setup.changes
        worker.in_flight = 5
        for _ in range(3):
            worker.breaker.failure(0.0)
        setup.client.tell(A, "m", **DECODE)
        with capture_logs() as logs:
            await setup.clock.advance(INTERVAL_SECONDS)
        assert setup.worker(A) is worker
        assert (worker.role, worker.spec.role, worker.spec.bootstrap_port) == (
            "decode",
            "decode",
            None,
        )
        assert (worker.in_flight, worker.breaker.state) == (5, BreakerState.OPEN)
        assert (setup.pool(role="prefill"), setup.pool(role="decode")) == ([], [A])
        assert setup.role_changes == [(worker, "prefill", "decode")]
        assert setup.changes == changes + 1
        assert [(line["event"], line["old"], line["new"]) for line in logs] == [
            ("worker_role_changed", "prefill", "decode")
        ]


async def test_a_role_can_change_and_change_back() -> None:
    async with running(asking()) as setup:
        setup.client.tell(A, "m", **PREFILL)
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
        for fields in (DECODE, PREFILL):
            setup.client.tell(A, "m", **fields)
            await setup.clock.advance(INTERVAL_SECONDS)
        assert setup.worker(A) is worker
        assert worker.spec.bootstrap_port == 8998
        assert setup.pool(role="prefill") == [A]
        assert setup.role_changes == [
            (worker, "prefill", "decode"),
            (worker, "decode", "prefill"),
        ]


async def test_a_new_bootstrap_port_is_a_change_but_not_of_the_role() -> None:
    async with running(asking()) as setup:
        setup.client.tell(A, "m", **PREFILL)
        await setup.deliver(Added(make_spec(A)))
        changes = setup.changes
        setup.client.tell(A, "m", **PREFILL | {"disaggregation_bootstrap_port": 9000})
        await setup.clock.advance(INTERVAL_SECONDS)
        assert setup.worker(A).spec.bootstrap_port == 9000
        assert (setup.role_changes, setup.changes) == ([], changes + 1)


@pytest.mark.parametrize(
    "fields", [{}, {"disaggregation_mode": "prefill"}, {"disaggregation_mode": "both"}]
)
async def test_an_answer_without_a_role_does_not_change_the_role(fields: dict[str, Any]) -> None:
    async with running(asking()) as setup:
        setup.client.tell(A, "m", **PREFILL)
        await setup.deliver(Added(make_spec(A)))
        spec, changes = setup.worker(A).spec, setup.changes
        setup.client.tell(A, "m", **fields)
        await setup.clock.advance(2 * INTERVAL_SECONDS)
        assert (setup.worker(A).spec, setup.changes) == (spec, changes)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_role_that_only_discovery_knows_is_kept(role: Role) -> None:
    async with running(asking()) as setup:
        setup.client.script(A, "/server_info", EngineAnswer(404, b""))
        setup.client.script(A, "/v1/models", EngineAnswer(200, b'{"data": [{"id": "m"}]}'))
        await setup.deliver(Added(make_spec(A, role=role, bootstrap_port=8998)))
        await setup.clock.advance(3 * INTERVAL_SECONDS)
        assert setup.pool(role=role) == [A]
        assert setup.worker(A).spec.bootstrap_port == 8998


async def test_a_worker_that_stops_answering_stays_registered_and_is_logged_once() -> None:
    with capture_logs() as logs:
        async with running(asking()) as setup:
            setup.client.tell(A, "m", **DECODE)
            await setup.deliver(Added(make_spec(A)))
            worker, spec, changes = setup.worker(A), setup.worker(A).spec, setup.changes
            for status in (503, 401, 500, 503):
                setup.client.script(A, "/server_info", EngineAnswer(status, b""))
                await setup.clock.advance(INTERVAL_SECONDS)
            assert setup.worker(A) is worker
            assert (worker.spec, setup.changes) == (spec, changes)
            setup.client.tell(A, "m", **DECODE)
            await setup.clock.advance(INTERVAL_SECONDS)
            setup.client.script(A, "/server_info", EngineAnswer(503, b""))
            await setup.clock.advance(2 * INTERVAL_SECONDS)
    silent = [line["log_level"] for line in logs if line["event"] == "worker_not_answering"]
    assert silent == ["warning"] * 2  # the second one after it had answered again
    assert {line["event"] for line in logs if line["log_level"] == "warning"} == {
        "worker_not_answering"
    }


async def test_a_worker_that_did_not_answer_is_asked_every_second_until_it_does() -> None:
    """It may come back as another engine, and must not get requests for its old model."""
    async with running(asking()) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        setup.client.script(A, "/server_info", EngineUnreachableError("refused"))
        setup.manager.recheck(setup.worker(A))
        await settle()
        asked = len(setup.client.asked(A))
        await setup.clock.advance(5.0)
        assert 5 <= len(setup.client.asked(A)) - asked <= 6  # one may be that of the interval
        setup.client.tell(A, "n")
        await setup.clock.advance(1.0)
        assert (setup.pool("m"), setup.pool("n")) == ([], [A])
        asked = len(setup.client.asked(A))
        await setup.clock.advance(0.5 * INTERVAL_SECONDS)
        assert len(setup.client.asked(A)) <= asked + 1  # at the usual interval again


async def test_a_worker_that_does_not_answer_loses_its_traffic_and_is_tried_when_it_does() -> None:
    async with running(asking()) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        breaker = setup.worker(A).breaker
        setup.client.script(A, "/server_info", EngineUnreachableError("silent"))
        await setup.clock.advance(INTERVAL_SECONDS + 10.0)
        assert breaker.state is BreakerState.OPEN
        assert not breaker.would_allow(setup.clock.monotonic())
        setup.client.tell(A, "m")
        await setup.clock.advance(2.0)
        assert breaker.would_allow(setup.clock.monotonic())


async def test_a_busy_worker_whose_requests_are_answered_keeps_its_traffic() -> None:
    async with running(asking()) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        breaker = setup.worker(A).breaker
        setup.client.script(A, "/server_info", EngineUnreachableError("silent"))
        for _ in range(60):
            await setup.clock.advance(1.0)
            now = setup.clock.monotonic()
            breaker.success(now, now)
        assert breaker.state is BreakerState.CLOSED


async def test_of_many_workers_that_do_not_answer_a_few_are_asked_each_second() -> None:
    async with running(asking()) as setup:
        urls = [f"http://10.1.0.{n}:8000" for n in range(100)]
        for url in urls:
            setup.client.tell(url, "m")
        await setup.deliver(*(Added(make_spec(url)) for url in urls))
        for url in urls:
            setup.client.script(url, "/server_info", EngineUnreachableError("refused"))
        await setup.clock.advance(INTERVAL_SECONDS)
        before = {url: len(setup.client.asked(url)) for url in urls}
        await setup.clock.advance(4.0)
        counts = [len(setup.client.asked(url)) - before[url] for url in urls]
        assert 4 * 32 <= sum(counts) <= 4 * 32 + 40
        assert min(counts) >= 1  # every worker has its turn


@pytest.mark.parametrize("odd", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("plain", [1, 2, 5])
async def test_a_worker_with_a_wrong_role_that_answers_first_is_put_out_and_named(
    odd: dict[str, Any], plain: int
) -> None:
    with capture_logs() as logs:
        async with running(asking()) as setup:
            urls = [f"http://10.2.0.{n}:8000" for n in range(plain)]
            setup.client.tell(A, "m", **odd)
            await setup.deliver(Added(make_spec(A)))
            for url in urls:
                setup.client.tell(url, "m", **PLAIN)
            await setup.deliver(*(Added(make_spec(url)) for url in urls), Listed())
            assert setup.manager.first_round_done
            assert sorted(setup.pool()) == urls
            assert [spec.id for spec in setup.manager.refused()] == [A]
    refused = [line for line in logs if line["event"] == "worker_refused"]
    assert refused[-1]["worker"] == A
    assert "whose other workers are plain workers" in refused[-1]["error"]


async def test_a_plain_worker_that_answers_first_is_put_out_of_a_pair_of_pools() -> None:
    async with running(asking()) as setup:
        setup.client.tell(A, "m", **PLAIN)
        await setup.deliver(Added(make_spec(A)))
        setup.client.tell(B, "m", **PREFILL)
        setup.client.tell(C, "m", **DECODE)
        await setup.deliver(Added(make_spec(B)), Added(make_spec(C)))
        assert (setup.pool(role="prefill"), setup.pool(role="decode")) == ([B], [C])
        assert [spec.id for spec in setup.manager.refused()] == [A]


@pytest.mark.parametrize("by_url", [False, True])
async def test_configured_roles_outvote_a_majority(by_url: bool) -> None:
    models = [ModelConfig(id="m", pd=PdModelConfig(protocol="sglang" if by_url else "nixl"))]
    async with running(asking(models=models)) as setup:
        plain = [f"http://10.2.0.{n}:8000" for n in range(3)]
        for url in plain:
            setup.client.tell(url, "m", **PLAIN)
        await setup.deliver(*(Added(make_spec(url)) for url in plain))
        assert sorted(setup.pool()) == plain
        setup.client.tell(A, "m", **PREFILL)
        spec = structs.replace(make_spec(A, role="prefill"), role_is_configured=by_url)
        await setup.deliver(Added(spec))
        assert (setup.pool(), setup.pool(role="prefill")) == ([], [A])


async def test_a_worker_with_unusable_kv_events_is_warned_about_once() -> None:
    with capture_logs() as logs:
        async with running(asking(models=[ModelConfig(id="m", policy="min_ttft")])) as setup:
            setup.client.tell(A, "m", kv_events=7)
            await setup.deliver(Added(make_spec(A)))
            await setup.clock.advance(4 * INTERVAL_SECONDS)
    warned = [line["event"] for line in logs if line["log_level"] == "warning"]
    assert sorted(warned) == ["kv_events_missing", "kv_events_not_usable"]


async def test_questions_to_many_workers_are_spread_over_the_interval() -> None:
    count = 500
    async with running(asking()) as setup:
        urls = [f"http://10.1.{n // 250}.{n % 250}:8000" for n in range(count)]
        for url in urls:
            setup.client.tell(url, "m")
        await setup.deliver(*(Added(make_spec(url)) for url in urls))
        while len(setup.registry) < count:
            await settle()
        gates = {url: Gate(FakeEngineClient.info("m")) for url in urls}
        for url, gate in gates.items():
            setup.client.script(url, "/server_info", gate)
        most = asked = 0
        for _ in range(60):
            await setup.clock.advance(INTERVAL_SECONDS / 60)
            now = sum(gate.entered for gate in gates.values())
            most, asked = max(most, now - asked), now
        assert asked == count
        assert most <= count / 10
        assert {gate.entered for gate in gates.values()} == {1}


async def test_a_worker_is_not_asked_again_while_its_answer_is_pending() -> None:
    async with running(asking()) as setup:
        gate = Gate(FakeEngineClient.info("m", **DECODE))
        setup.client.script(A, "/server_info", FakeEngineClient.info("m", **PREFILL), gate)
        await setup.deliver(Added(make_spec(A)))
        await setup.clock.advance(5 * INTERVAL_SECONDS)
        assert gate.entered == 1
        gate.open()
        await settle()
        assert setup.pool(role="decode") == [A]


async def test_a_worker_with_new_models_leaves_and_joins() -> None:
    follower = Follower()
    async with running(asking(follower)) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
        worker.in_flight = 2
        worker.breaker.failure(0.0)
        setup.client.tell(A, "n")
        await setup.clock.advance(INTERVAL_SECONDS)
        assert setup.worker(A) is worker
        assert (setup.pool("m"), setup.pool("n")) == ([], [A])
        assert worker.in_flight == 2
        # The settings of model n; the failure still counts.
        assert (worker.breaker.threshold, worker.breaker.cool_down_seconds) == (7, 5.0)
        for _ in range(6):
            worker.breaker.failure(0.0)
        assert worker.breaker.state is BreakerState.OPEN
    assert follower.seen == [
        ("joined", A, ("m",), None),
        ("left", A, ("m",), None),
        ("joined", A, ("n",), None),
    ]


async def test_the_same_models_in_another_order_are_not_a_change() -> None:
    follower = Follower()
    async with running(asking(follower)) as setup:
        setup.client.script(A, "/server_info", EngineAnswer(404, b""))
        setup.client.script(
            A,
            "/v1/models",
            EngineAnswer(200, b'{"data": [{"id": "m"}, {"id": "n"}]}'),
            EngineAnswer(200, b'{"data": [{"id": "n"}, {"id": "m"}]}'),
        )
        await setup.deliver(Added(make_spec(A)))
        await setup.clock.advance(INTERVAL_SECONDS)
        assert setup.client.asked(A) == ["/server_info", "/v1/models"] * 2
        assert setup.pool("m") == setup.pool("n") == [A]
    assert len(follower.seen) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"endpoint_port_base": 6000},
        {"block_size": 32},
        {"topic": "kv"},
        {"dp_size": 2},
        {"replay_endpoint_port_base": 5600},
        {"load_endpoint_port_base": 5700},
    ],
)
async def test_a_worker_with_a_new_place_of_kv_events_leaves_and_joins(
    change: dict[str, Any],
) -> None:
    follower = Follower()
    async with running(asking(follower)) as setup:
        setup.client.tell(A, "m", kv_events=KV, **PREFILL)
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
        setup.client.tell(A, "m", kv_events=KV | change, **PREFILL)
        await setup.clock.advance(2 * INTERVAL_SECONDS)
        assert setup.worker(A) is worker
        assert [what for what, *_ in follower.seen] == ["joined", "left", "joined"]
        assert follower.seen[1][3] == 5557  # it leaves with its old spec
        assert setup.role_changes == []


async def test_a_new_role_and_a_new_place_of_kv_events_can_come_together() -> None:
    follower = Follower()
    async with running(asking(follower)) as setup:
        setup.client.tell(A, "m", kv_events=KV, **PREFILL)
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
        setup.client.tell(A, "m", kv_events=KV | {"endpoint_port_base": 6000}, **DECODE)
        await setup.clock.advance(INTERVAL_SECONDS)
        assert [(what, port) for what, _, _, port in follower.seen] == [
            ("joined", 5557),
            ("left", 5557),
            ("joined", 6000),
        ]
        assert setup.role_changes == [(worker, "prefill", "decode")]
        assert setup.pool(role="decode") == [A]


async def test_a_worker_with_only_a_new_role_does_not_leave_and_join() -> None:
    follower = Follower()
    async with running(asking(follower)) as setup:
        setup.client.tell(A, "m", kv_events=KV, **PREFILL)
        await setup.deliver(Added(make_spec(A)))
        setup.client.tell(A, "m", kv_events=KV, **DECODE)
        await setup.clock.advance(INTERVAL_SECONDS)
        assert len(follower.seen) == 1


async def test_configured_kv_events_follow_the_current_model_of_the_worker() -> None:
    models = [
        ModelConfig(
            id=name,
            policy="min_ttft",
            kv_events=[KvEventsConfig(endpoint=f"tcp://*:{port}", block_size=16)],
        )
        for name, port in (("m", 5001), ("n", 5002))
    ]
    follower = Follower()
    async with running(asking(follower, models=models)) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        await setup.clock.advance(2 * INTERVAL_SECONDS)
        setup.client.tell(A, "n")
        await setup.clock.advance(INTERVAL_SECONDS)
        setup.client.tell(A, "n", kv_events=KV)
        await setup.clock.advance(INTERVAL_SECONDS)
    assert [port for what, _, _, port in follower.seen if what == "joined"] == [5001, 5002, 5557]


async def test_a_plain_worker_whose_new_role_does_not_fit_is_removed() -> None:
    follower = Follower()
    with capture_logs() as logs:
        async with running(asking(follower)) as setup:
            setup.client.tell(A, "m", **PLAIN)
            setup.client.tell(B, "m", **PLAIN)
            await setup.deliver(Added(make_spec(A)), Added(make_spec(B)))
            setup.client.tell(A, "m", **PREFILL)
            await setup.clock.advance(INTERVAL_SECONDS)
            assert setup.registry.get(A) is None
            assert setup.pool() == [B]
            assert ("left", A, ("m",), None) in follower.seen
            await setup.clock.advance(3 * RETRY_SECONDS)
            assert setup.registry.get(A) is None
            assert setup.metric("extproc_workers_refused_total") == 1
            setup.client.tell(B, "m", **DECODE)  # the last plain worker may change
            await setup.clock.advance(INTERVAL_SECONDS + RETRY_SECONDS)
            assert (setup.pool(role="prefill"), setup.pool(role="decode")) == ([A], [B])
            assert setup.registry.is_served("m")
    assert [line["worker"] for line in logs if line["event"] == "worker_refused"] == [A]


async def test_a_refused_worker_that_returns_to_its_old_role_joins_again() -> None:
    async with running(asking()) as setup:
        setup.client.tell(A, "m", **PLAIN)
        setup.client.tell(B, "m", **PLAIN)
        await setup.deliver(Added(make_spec(A)), Added(make_spec(B)))
        setup.client.tell(A, "m", **PREFILL)
        await setup.clock.advance(INTERVAL_SECONDS)
        setup.client.tell(A, "m", **PLAIN)
        await setup.clock.advance(RETRY_SECONDS)
        assert sorted(setup.pool()) == [A, B]


async def test_a_refused_worker_that_does_not_answer_does_not_join() -> None:
    async with running(asking()) as setup:
        setup.client.tell(A, "m", **PLAIN)
        setup.client.tell(B, "m", **PREFILL)
        await setup.deliver(Added(make_spec(A)))
        await setup.deliver(Added(make_spec(B)))
        setup.client.script(B, "/server_info", EngineAnswer(503, b""))
        await setup.deliver(Removed(A))
        await setup.clock.advance(2 * RETRY_SECONDS)
        assert setup.registry.get(B) is None
        setup.client.tell(B, "m", **PREFILL)
        await setup.clock.advance(RETRY_SECONDS)
        assert setup.pool(role="prefill") == [B]


async def test_a_worker_whose_role_does_not_fit_its_new_model_is_removed() -> None:
    async with running(asking()) as setup:
        setup.client.tell(A, "m")
        setup.client.tell(B, "n", **DECODE)
        setup.client.tell(C, "n", **PREFILL)
        await setup.deliver(*(Added(make_spec(url)) for url in (A, B, C)))
        setup.client.tell(A, "n")
        await setup.clock.advance(INTERVAL_SECONDS)
        assert setup.registry.get(A) is None
        await setup.deliver(Removed(B), Removed(C))
        assert setup.pool("n") == [A]


async def test_a_refused_worker_that_is_removed_leaves_no_metric_series_and_does_not_return() -> (
    None
):
    async with running(asking()) as setup:
        setup.client.tell(A, "m", **PLAIN)
        setup.client.tell(B, "m", **PLAIN)
        await setup.deliver(Added(make_spec(A)), Added(make_spec(B)))
        setup.metrics.worker_requests(A, "m", "plain", "success").inc()
        setup.client.tell(A, "m", **PREFILL)
        await setup.clock.advance(INTERVAL_SECONDS)
        await setup.deliver(Removed(A), Removed(B))
        await setup.clock.advance(2 * RETRY_SECONDS)
        assert len(setup.registry) == 0
        labels = {"worker": A, "model": "m", "role": "plain", "outcome": "success"}
        assert setup.prometheus.get_sample_value("extproc_worker_requests_total", labels) is None


@pytest.mark.parametrize("model", ["m", "n"])
async def test_a_worker_removed_during_its_introspection_does_not_come_back(model: str) -> None:
    async with running(asking()) as setup:
        gate = Gate(FakeEngineClient.info(model, **DECODE))
        setup.client.script(A, "/server_info", FakeEngineClient.info("m", **PREFILL), gate)
        await setup.deliver(Added(make_spec(A)))
        await setup.clock.advance(INTERVAL_SECONDS)
        assert gate.entered == 1
        await setup.deliver(Removed(A))
        gate.open()
        await setup.clock.advance(2 * RETRY_SECONDS)
        assert len(setup.registry) == 0
        assert gate.entered == 1


async def test_a_recheck_asks_the_worker_at_once() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, "m", **PREFILL)
        await setup.deliver(Added(make_spec(A)))
        setup.client.tell(A, "m", **DECODE)
        setup.manager.recheck(setup.worker(A))
        await settle()
        assert setup.pool(role="decode") == [A]


async def test_rechecks_of_one_worker_are_at_least_a_second_apart() -> None:
    async with running(ManagerSetup()) as setup:
        for url in (A, B):
            setup.client.tell(url, "m")
        await setup.deliver(Added(make_spec(A)), Added(make_spec(B)))
        for _ in range(5):
            setup.manager.recheck(setup.worker(A))
            await setup.clock.advance(0.19)
        assert len(setup.client.asked(A)) == 2
        setup.manager.recheck(setup.worker(B))  # B has its own limit
        await setup.clock.advance(0.05)
        setup.manager.recheck(setup.worker(A))
        await settle()
        assert (len(setup.client.asked(A)), len(setup.client.asked(B))) == (3, 2)


async def test_rechecks_do_not_pile_up_while_an_answer_is_pending() -> None:
    async with running(ManagerSetup()) as setup:
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", FakeEngineClient.info("m"), gate)
        await setup.deliver(Added(make_spec(A)))
        for _ in range(10):
            setup.manager.recheck(setup.worker(A))
            await setup.clock.advance(1.0)
        gate.open()
        await settle()
        assert gate.entered == 2  # the pending one, and one after it


async def test_a_recheck_of_a_worker_that_has_left_does_nothing() -> None:
    setup = ManagerSetup()
    async with running(setup):
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
        setup.manager.recheck(worker)
        await setup.deliver(Removed(A))
        asked = len(setup.client.asked(A))
        setup.manager.recheck(worker)
        await setup.clock.advance(2.0)
        assert len(setup.client.asked(A)) == asked
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
    setup.manager.recheck(worker)  # the manager has stopped
    await settle()
    assert len(setup.client.asked(A)) == asked + 1


async def test_the_role_that_the_worker_reports_counts_more_than_discoverys() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, "m", **PREFILL)
        await setup.deliver(Added(make_spec(A)), RoleChanged(A, "decode"))
        assert setup.pool(role="prefill") == [A]
        setup.client.tell(A, "m", **DECODE)
        await setup.deliver(RoleChanged(A, "decode"))
        assert setup.pool(role="decode") == [A]


async def test_the_role_from_discovery_counts_while_the_worker_does_not_answer() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, "m", **DECODE)
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
        setup.client.script(A, "/server_info", EngineAnswer(503, b""))
        await setup.deliver(RoleChanged(A, "prefill"))
        assert setup.pool(role="prefill") == [A]
        assert setup.role_changes == [(worker, "decode", "prefill")]


async def test_discovery_can_set_a_role_that_does_not_fit_and_set_it_back() -> None:
    async with running(ManagerSetup()) as setup:
        for url in (A, B, C):
            setup.client.tell(url, "m")
        await setup.deliver(*(Added(make_spec(url)) for url in (A, B, C)))
        await setup.deliver(RoleChanged(C, "decode"))
        assert setup.pool() == [A, B]
        await setup.deliver(RoleChanged(C, "plain"))
        assert sorted(setup.pool()) == [A, B, C]


async def test_another_engine_at_the_same_url_joins_anew() -> None:
    """Its pages hold other tokens, so those of the first one must not count for it."""
    follower = Follower()
    async with running(asking(follower)) as setup:
        setup.client.tell(A, "m", version="0.5.23")
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
        assert (worker.engine.name, worker.spec.engine_version) == ("sglang", "0.5.23")
        setup.client.script(A, "/server_info", EngineAnswer(404, b""))
        models = b'{"data": [{"id": "m", "owned_by": "vllm"}]}'
        setup.client.script(A, "/v1/models", EngineAnswer(200, models))
        setup.client.script(A, "/version", EngineAnswer(200, b'{"version": "0.32.0"}'))
        await setup.clock.advance(1.7 * INTERVAL_SECONDS)
        assert setup.worker(A) is worker
        assert (worker.engine.name, worker.spec.engine_version) == ("vllm", "0.32.0")
        assert [what for what, *_ in follower.seen] == ["joined", "left", "joined"]


async def test_another_version_with_the_same_rules_is_only_noted() -> None:
    follower = Follower()
    async with running(asking(follower)) as setup:
        setup.client.tell(A, "m", version="0.5.22")
        await setup.deliver(Added(make_spec(A)))
        setup.client.tell(A, "m", version="0.5.23")
        await setup.clock.advance(1.7 * INTERVAL_SECONDS)
        assert setup.worker(A).spec.engine_version == "0.5.23"
        assert [what for what, *_ in follower.seen] == ["joined"]


async def test_an_engine_that_does_not_say_what_it_is_has_the_configured_one() -> None:
    async with running(asking(models=[ModelConfig(id="m", engine="vllm")])) as setup:
        setup.client.script(A, "/server_info", EngineAnswer(404, b""))
        models = b'{"data": [{"id": "m", "owned_by": "a_proxy"}]}'
        setup.client.script(A, "/v1/models", EngineAnswer(200, models))
        setup.client.tell(B, "m")
        await setup.deliver(Added(make_spec(A)), Added(make_spec(B)))
        assert [setup.worker(one).engine.name for one in (A, B)] == ["vllm", "sglang"]


async def test_an_engine_with_another_reasoning_parser_joins_anew() -> None:
    follower = Follower()
    async with running(asking(follower)) as setup:
        setup.client.tell(A, "m", version="0.5.23")
        await setup.deliver(Added(make_spec(A)))
        plain = setup.worker(A).engine
        setup.client.tell(A, "m", version="0.5.23", reasoning_parser="qwen3")
        await setup.clock.advance(1.7 * INTERVAL_SECONDS)
        assert setup.worker(A).engine is not plain
        assert [what for what, *_ in follower.seen] == ["joined", "left", "joined"]
