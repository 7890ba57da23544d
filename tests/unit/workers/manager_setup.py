"""A WorkerManager with fake discovery, engines, names and time."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from extproc.config.models import CircuitBreakerConfig, ModelConfig
from extproc.metrics.service import Metrics
from extproc.workers.configured_models import ConfiguredModels
from extproc.workers.engine_calls import EngineAnswer
from extproc.workers.manager import IntrospectionSettings, WorkerManager
from extproc.workers.membership import Membership
from extproc.workers.observer import WorkerObserver
from extproc.workers.registry import WorkerRegistry
from extproc.workers.source import WorkerEvent
from extproc.workers.worker import Role, Worker
from tests.fakes import FakeClock, FakeEngineClient, FakeResolver, FakeWorkerSource

A, B, C = (f"http://10.0.0.{n}:8000" for n in (1, 2, 3))
NAMED = "http://name:8000"
RETRY_SECONDS = 30.0
INTERVAL_SECONDS = 15.0
# For tests that count other questions.
NEVER_SECONDS = 1e6
DNS_TTL_SECONDS = 20.0
MODELS = (
    ModelConfig(id="m"),
    ModelConfig(id="n", circuit_breaker=CircuitBreakerConfig(threshold=7, cool_down_secs=5)),
)


class _Changes(WorkerObserver):
    """Records changes of roles, and counts all changes."""

    def __init__(self) -> None:
        self.count = 0
        self.roles: list[tuple[Worker, Role, Role]] = []

    def role_changed(self, worker: Worker, old: Role, new: Role) -> None:
        self.roles.append((worker, old, new))

    def workers_changed(self) -> None:
        self.count += 1


class ManagerSetup:
    """The manager, and everything that a test sets or reads."""

    def __init__(
        self,
        models: Sequence[ModelConfig] = MODELS,
        *,
        interval_seconds: float = NEVER_SECONDS,
        hold_seconds: float = 0.0,
        observers: Sequence[WorkerObserver] = (),
    ) -> None:
        self.clock = FakeClock()
        self.client = FakeEngineClient()
        self.resolver = FakeResolver()
        self.source = FakeWorkerSource()
        self.registry = WorkerRegistry()
        self.prometheus = CollectorRegistry()
        self.metrics = Metrics(self.prometheus)
        self._changes = _Changes()
        self.manager = WorkerManager(
            source=self.source,
            registry=self.registry,
            membership=Membership(self.registry, ConfiguredModels(models), self.metrics),
            client=self.client,
            resolver=self.resolver,
            clock=self.clock,
            metrics=self.metrics,
            settings=IntrospectionSettings(
                retry_seconds=RETRY_SECONDS,
                interval_seconds=interval_seconds,
                dns_ttl_seconds=DNS_TTL_SECONDS,
                ranks_max=64,
                hold_seconds=hold_seconds,
            ),
        )
        for observer in (*observers, self._changes):
            self.manager.observe(observer)

    @property
    def changes(self) -> int:
        return self._changes.count

    @property
    def role_changes(self) -> list[tuple[Worker, Role, Role]]:
        """Every change of a role so far: the worker, its old role and its new one."""
        return self._changes.roles

    async def deliver(self, *events: WorkerEvent) -> None:
        self.source.push(*events)
        await self.clock.advance(0.0)

    def worker(self, worker_id: str) -> Worker:
        worker = self.registry.get(worker_id)
        assert worker is not None
        return worker

    def pool(self, model: str = "m", role: Role = "plain") -> list[str]:
        return [worker.url for worker in self.registry.pool_of(model, role)]

    def metric(self, name: str, **labels: str) -> float:
        return self.prometheus.get_sample_value(name, labels) or 0.0


class Gate:
    """An engine that answers when the test opens it."""

    def __init__(self, answer: EngineAnswer) -> None:
        self._answer = answer
        self._open = asyncio.Event()
        self.entered = 0
        self.cancelled = 0

    def open(self) -> None:
        self._open.set()

    async def __call__(self) -> EngineAnswer:
        self.entered += 1
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self._answer


@asynccontextmanager
async def running(setup: ManagerSetup) -> AsyncIterator[ManagerSetup]:
    """Run the manager; on leaving, cancel it and check that no task of its own is left."""
    before = asyncio.all_tasks()
    task = asyncio.create_task(setup.manager.run())
    try:
        await setup.clock.advance(0.0)
        yield setup
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        left = asyncio.all_tasks() - before - {task}
        for leaked in left:
            leaked.cancel()
        await asyncio.gather(*left, return_exceptions=True)
    assert task.cancelled()
    assert not left, f"tasks left behind: {left}"
