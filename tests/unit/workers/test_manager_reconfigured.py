"""Registered workers get what another configuration says about their models."""

from extproc.config.models import CircuitBreakerConfig, KvEventsConfig, ModelConfig
from extproc.workers.manager import IntrospectionSettings
from extproc.workers.observer import WorkerObserver
from extproc.workers.source import Added
from extproc.workers.worker import KvEvents, Worker
from tests.builders import make_spec
from tests.fakes import FakeEngineClient, settle

from .manager_setup import DNS_TTL_SECONDS, NEVER_SECONDS, A, B, Gate, ManagerSetup, running

SETTINGS = IntrospectionSettings(
    retry_seconds=1.0,
    interval_seconds=NEVER_SECONDS,
    dns_ttl_seconds=DNS_TTL_SECONDS,
    ranks_max=128,
)


class Moves(WorkerObserver):
    """Notes the workers that join and leave, with their KV events."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, KvEvents | None]] = []

    def joined(self, worker: Worker) -> None:
        self.seen.append(("joined", worker.url, worker.spec.kv_events))

    async def left(self, worker: Worker) -> None:
        self.seen.append(("left", worker.url, None))


def kv_model(port: int | None, policy: str = "min_ttft") -> ModelConfig:
    entries = []
    if port is not None:
        entries = [KvEventsConfig(endpoint=f"tcp://*:{port}", block_size=16)]
    return ModelConfig(id="m", policy=policy, tokenizer_path="-", kv_events=entries)  # type: ignore[arg-type]


async def test_the_breaker_gets_the_new_settings_and_keeps_its_state() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
        for _ in range(3):
            worker.breaker.failure(setup.clock.monotonic())
        state = worker.breaker.state
        model = ModelConfig(
            id="m", circuit_breaker=CircuitBreakerConfig(threshold=9, cool_down_secs=4)
        )
        setup.manager.reconfigure([model], SETTINGS)
        await settle()
        assert setup.worker(A) is worker
        assert (worker.breaker.threshold, worker.breaker.cool_down_seconds) == (9, 4)
        assert worker.breaker.state is state


async def test_workers_move_to_the_new_place_of_kv_events_and_no_others_move() -> None:
    moves = Moves()
    models = [kv_model(5557), ModelConfig(id="n")]
    async with running(ManagerSetup(models, observers=[moves])) as setup:
        setup.client.tell(A, "m")
        setup.client.tell(B, "n")
        await setup.deliver(Added(make_spec(A)), Added(make_spec(B)))
        worker = setup.worker(A)
        worker.in_flight = 3
        moves.seen.clear()
        setup.manager.reconfigure(models, SETTINGS)
        await settle()
        assert moves.seen == []
        setup.manager.reconfigure([kv_model(6000), models[1]], SETTINGS)
        await settle()
        (left, joined) = moves.seen
        assert left == ("left", A, None)
        assert joined[:2] == ("joined", A)
        assert joined[2] is not None
        assert joined[2].port == 6000
        assert setup.worker(A) is worker
        assert worker.in_flight == 3


async def test_a_policy_that_begins_or_ends_to_look_at_tokens_makes_workers_rejoin() -> None:
    moves = Moves()
    async with running(ManagerSetup([kv_model(None)], observers=[moves])) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        for policy in ("random", "cache_aware_zmq"):
            moves.seen.clear()
            setup.manager.reconfigure([kv_model(None, policy)], SETTINGS)
            await settle()
            assert [what for what, _, _ in moves.seen] == ["left", "joined"]
        moves.seen.clear()
        setup.manager.reconfigure([kv_model(None, "min_ttft")], SETTINGS)
        await settle()
        assert moves.seen == []
        # No configured model is left on the worker.
        setup.manager.reconfigure([ModelConfig(id="other")], SETTINGS)
        await settle()
        assert [what for what, _, _ in moves.seen] == ["left", "joined"]


async def test_a_worker_that_is_being_asked_joins_by_the_new_configuration() -> None:
    moves = Moves()
    async with running(ManagerSetup([kv_model(5557)], observers=[moves])) as setup:
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", gate)
        await setup.deliver(Added(make_spec(A)))
        setup.manager.reconfigure([kv_model(6000)], SETTINGS)
        gate.open()
        await settle()
        (joined,) = moves.seen
        assert joined[2] is not None
        assert joined[2].port == 6000


async def test_the_new_interval_holds_after_the_round_that_waits() -> None:
    async with running(ManagerSetup()) as setup:
        await setup.deliver(Added(make_spec(A)))
        await setup.clock.advance(2.0)
        setup.manager.reconfigure([ModelConfig(id="m")], SETTINGS)
        await setup.clock.advance(30.0)
        asked = len(setup.client.asked(A))
        await setup.clock.advance(1.0)
        assert len(setup.client.asked(A)) > asked
