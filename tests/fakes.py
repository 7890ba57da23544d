"""Fakes for time, engines, names and discovery, and small builders for tests."""

import asyncio
import heapq
import itertools
import json
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Any, Final

import msgspec
from msgspec import Struct
from prometheus_client import CollectorRegistry

from extproc import build
from extproc.build import RoutingSettings, Shared, assemble_routing
from extproc.clock import Clock
from extproc.config.models import PolicyName
from extproc.config.schema import LoadConfig
from extproc.metrics.service import Metrics
from extproc.policies.base import Policy
from extproc.policies.factory import create_policy
from extproc.routing.chooser import WorkerChooser
from extproc.routing.claim import Claims
from extproc.routing.lease import Lease, LeaseParts
from extproc.routing.local_endpoints import LocalEndpoints
from extproc.routing.pd.prefill_leg import LegParts
from extproc.routing.pd.settings import PdSettings
from extproc.routing.rank import Rank
from extproc.routing.request import Request, find_endpoint
from extproc.routing.router import Router
from extproc.worker_url import WorkerUrl, format_endpoint, parse_worker_url
from extproc.workers.circuit_breaker import CircuitBreaker
from extproc.workers.engine_calls import EngineAnswer, EngineUnreachableError, PrefillCall
from extproc.workers.registry import WorkerRegistry
from extproc.workers.source import WorkerEvent
from extproc.workers.tickets import Tickets
from extproc.workers.worker import KvEvents, Role, Worker, WorkerSpec

__all__ = [
    "FakeClock",
    "FakeEngineClient",
    "FakeResolver",
    "FakeWorkerSource",
    "NoPrefillClient",
    "NoRanks",
    "Routing",
    "make_router",
    "make_shared",
    "make_spec",
    "make_worker",
    "pd_settings",
    "plain_routing",
    "routing_settings",
    "settle",
]

# More turns than any chain of tasks in the package needs.
_SETTLE_TURNS: Final = 50
# Sums of floats must not leave a sleeper a rounding error short of its time.
_ROUNDING_SECONDS: Final = 1e-9


async def settle() -> None:
    """Let every task run until it waits for something the test controls."""
    for _ in range(_SETTLE_TURNS):
        await asyncio.sleep(0)


class FakeClock:
    """Time stands still until the test advances it.

    `slept` are the durations asked for, in order; `sleeping` is how many sleep now.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._sequence = itertools.count()
        self.slept: list[float] = []

    @property
    def sleeping(self) -> int:
        return len(self._sleepers)

    def monotonic(self) -> float:
        return self._now

    def tick(self, seconds: float) -> None:
        """Move time without waking sleepers, for tests that have no tasks."""
        self._now += seconds

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (self._now + seconds, next(self._sequence), woken)
        heapq.heappush(self._sleepers, entry)
        try:
            await woken
        finally:
            if entry in self._sleepers:  # cancelled
                self._sleepers.remove(entry)
                heapq.heapify(self._sleepers)

    async def advance(self, seconds: float) -> None:
        """Move time on, waking sleepers one by one at their own time."""
        target = self._now + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= target + _ROUNDING_SECONDS:
            due, _, woken = heapq.heappop(self._sleepers)
            self._now = max(self._now, due)
            if not woken.done():
                woken.set_result(None)
            await settle()
        self._now = max(self._now, target)
        await settle()


_Scripted = EngineAnswer | Exception | Callable[[], Awaitable[EngineAnswer]]


class FakeEngineClient:
    """Answers as scripted per URL and path; the last answer of a script repeats.

    Nothing scripted = nobody listens there. `calls` are (url, path, timeout in seconds).
    """

    def __init__(self) -> None:
        self._scripts: dict[tuple[str, str], deque[_Scripted]] = {}
        self.calls: list[tuple[str, str, float]] = []

    def script(self, url: str, path: str, *answers: _Scripted) -> None:
        self._scripts[url, path] = deque(answers)

    def tell(self, url: str, name: str | None, **fields: Any) -> None:
        """Script a `/server_info` with that served model name."""
        self.script(url, "/server_info", self.info(name, **fields))

    @staticmethod
    def info(name: str | None, **fields: Any) -> EngineAnswer:
        body = {} if name is None else {"served_model_name": name}
        return EngineAnswer(200, json.dumps(body | fields).encode())

    def asked(self, url: str) -> list[str]:
        """The paths asked of one worker, in order."""
        return [path for called, path, _ in self.calls if called == url]

    async def get(self, url: WorkerUrl, path: str, timeout_seconds: float) -> EngineAnswer:
        self.calls.append((str(url), path, timeout_seconds))
        script = self._scripts.get((str(url), path))
        if not script:
            raise EngineUnreachableError("connection refused")
        answer = script.popleft() if len(script) > 1 else script[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, EngineAnswer):
            return answer
        return await answer()


class FakeResolver:
    """IP literals are themselves; names answer as the test has set, else with nothing."""

    def __init__(self, names: Mapping[str, Sequence[str] | Exception] | None = None) -> None:
        self.names = dict(names or {})
        self.calls: list[str] = []

    async def resolve(self, url: WorkerUrl) -> tuple[str, ...]:
        self.calls.append(url.host)
        if url.is_ip:
            return (format_endpoint(url.host, url.port),)
        answer = self.names.get(url.host, ())
        if isinstance(answer, Exception):
            raise answer
        return tuple(answer)


class FakeWorkerSource:
    """A source whose events the test pushes."""

    def __init__(self, *events: WorkerEvent) -> None:
        self._queue: asyncio.Queue[WorkerEvent] = asyncio.Queue()
        self.push(*events)

    def push(self, *events: WorkerEvent) -> None:
        for event in events:
            self._queue.put_nowait(event)

    async def events(self) -> AsyncIterator[WorkerEvent]:
        while True:
            yield await self._queue.get()


def make_spec(
    url: str = "http://10.0.0.1:8000",
    *,
    id: str | None = None,  # noqa: A002 (the field's name)
    role: Role = "plain",
    model_ids: Sequence[str] = (),
    bootstrap_port: int | None = None,
    kv_events: KvEvents | None = None,
) -> WorkerSpec:
    """A spec as discovery gives it: no model unless said; the id is the URL."""
    parsed = parse_worker_url(url)
    return WorkerSpec(
        id=id if id is not None else str(parsed),
        url=parsed,
        role=role,
        model_ids=tuple(model_ids),
        bootstrap_port=bootstrap_port,
        kv_events=kv_events,
    )


def make_worker(
    url: str = "http://10.0.0.1:8000",
    *,
    order: int = 0,
    id: str | None = None,  # noqa: A002 (the field's name)
    role: Role = "plain",
    model_ids: Sequence[str] = ("m",),
    threshold: int = 3,
    cool_down_seconds: float = 30.0,
    in_flight: int = 0,
    resolved: bool = True,
    kv_events: KvEvents | None = None,
) -> Worker:
    """A worker of model `m` whose address is its URL's host and port."""
    spec = make_spec(url, id=id, role=role, model_ids=model_ids, kv_events=kv_events)
    worker = Worker(
        spec,
        order=order,
        breaker=CircuitBreaker(threshold, cool_down_seconds),
        address=format_endpoint(spec.url.host, spec.url.port) if resolved else None,
    )
    worker.in_flight = in_flight
    return worker


class NoRanks:
    """For models without a KV-aware policy."""

    def of(self, worker: Worker) -> Sequence[Rank]:
        return ()


class NoPrefillClient:
    """For models without prefill workers."""

    async def post(self, url: WorkerUrl, path: str, *_: Any, **__: Any) -> PrefillCall:
        raise AssertionError(f"a prefill was sent to {url}{path}")


def make_shared(
    workers: Iterable[Worker] = (),
    *,
    clock: Clock | None = None,
    seed: int = 0,
    stale_seconds: float = 600.0,
) -> Shared:
    """What the parts of a router share; the time stands still unless a clock is given."""
    clock, registry, prometheus = clock or FakeClock(), WorkerRegistry(), CollectorRegistry()
    for worker in workers:
        registry.upsert(worker)
    metrics = Metrics(prometheus)
    return Shared(
        clock=clock,
        random=Random(seed),
        prometheus=prometheus,
        metrics=metrics,
        registry=registry,
        tickets=Tickets(clock, stale_seconds, metrics.stale_requests),
    )


def pd_settings(**changes: Any) -> PdSettings:
    """Settings for prefill and decode workers of model `m`."""
    settings = PdSettings(
        inline=False,
        protocols={"m": "sglang"},
        min_prefill_tokens={"m": 0},
        decode_attempts=3,
        connect_seconds=1.5,
        prefill_seconds=120.0,
        kv_seconds=120.0,
        linger_seconds=0.0,
        request_timeout_ms=300_000,
    )
    return msgspec.structs.replace(settings, **changes)


def routing_settings(
    *,
    destinations_max: int = 3,
    request_timeout_seconds: float = 300.0,
    load: LoadConfig | None = None,
    pd: PdSettings | None = None,
) -> RoutingSettings:
    estimated = load is not None and load.release == "estimate"
    return RoutingSettings(
        request_timeout_seconds=request_timeout_seconds,
        destinations_max=destinations_max,
        estimated_stream_seconds=load.estimated_stream_secs if load and estimated else None,
        pd=pd or pd_settings(),
    )


class Routing(Struct, kw_only=True):
    """A router with everything around it that a test looks at."""

    clock: FakeClock
    registry: WorkerRegistry
    active_load: Tickets
    prometheus: CollectorRegistry
    metrics: Metrics
    claims: Claims
    lease_parts: LeaseParts
    leg_parts: LegParts
    router: Router

    async def route(self, model: str | None = "m", *, stream: bool = False) -> Lease:
        endpoint = find_endpoint("POST", "/generate")
        lease = await self.router.route(Request(endpoint, model, stream))
        assert isinstance(lease, Lease)
        return lease

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample, 0 when it was never counted."""
        return self.prometheus.get_sample_value(name, labels) or 0.0

    def outcomes(self) -> dict[str, list[str]]:
        """Outcomes counted so far, by worker URL."""
        found: dict[str, list[str]] = defaultdict(list)
        for family in self.prometheus.collect():
            for sample in family.samples:
                if sample.name == "extproc_worker_requests_total":
                    found[sample.labels["worker"]] += [sample.labels["outcome"]] * int(sample.value)
        return {worker: sorted(outcomes) for worker, outcomes in found.items()}


def plain_routing(
    settings: RoutingSettings,
    shared: Shared,
    *,
    policy: PolicyName | Policy,
    models: Sequence[str],
) -> build.Routing:
    """A router over whole workers; every model has the same policy."""

    def make_policy() -> Policy:
        return create_policy(policy, shared.random) if isinstance(policy, str) else policy

    return assemble_routing(
        settings,
        shared,
        NoRanks(),
        {model: WorkerChooser(make_policy()) for model in models},
        LocalEndpoints({}),
        NoPrefillClient(),
        lambda worker: None,
    )


def make_router(
    workers: Iterable[Worker] = (),
    *,
    policy: PolicyName | Policy = "round_robin",
    models: Sequence[str] = ("m",),
    destinations_max: int = 3,
    request_timeout_seconds: float = 300.0,
    stale_seconds: float = 600.0,
    load: LoadConfig | None = None,
    seed: int = 0,
) -> Routing:
    """A router over the workers; every model has the same policy, the draws are seeded."""
    clock = FakeClock()
    shared = make_shared(workers, clock=clock, seed=seed, stale_seconds=stale_seconds)
    settings = routing_settings(
        destinations_max=destinations_max,
        request_timeout_seconds=request_timeout_seconds,
        load=load,
    )
    routing = plain_routing(settings, shared, policy=policy, models=models)
    return Routing(
        clock=clock,
        registry=shared.registry,
        active_load=shared.tickets,
        prometheus=shared.prometheus,
        metrics=shared.metrics,
        claims=routing.claims,
        lease_parts=routing.lease_parts,
        leg_parts=routing.leg_parts,
        router=routing.router,
    )
