"""Turns discovery events into registered workers, and notices when these change.

Workers join in parallel, each in a task of its own, since asking a dead one takes seconds;
events of one worker are kept in order by letting each wait for the one before it. What a
worker says of itself later is taken up in the same queue, so that an answer on its way can not
bring back a worker that has left.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec
import structlog

from extproc.clock import Clock
from extproc.config.schema import TOKEN_POLICIES, CircuitBreakerConfig, ModelConfig
from extproc.metrics.service import Metrics
from extproc.workers.circuit_breaker import CircuitBreaker
from extproc.workers.engine_calls import IntrospectionClient
from extproc.workers.introspection import Introspection, apply_introspection, introspect
from extproc.workers.keyed_tasks import KeyedTasks
from extproc.workers.kv_announcement import configured_kv_events
from extproc.workers.registry import MixedRolesError, WorkerRegistry
from extproc.workers.resolver import Resolver
from extproc.workers.source import Added, Listed, Removed, RoleChanged, WorkerEvent, WorkerSource
from extproc.workers.worker import KvEvents, Role, Worker, WorkerSpec
from extproc.workers.worker_warnings import WorkerWarnings, shown_models

__all__ = ["WorkerFollower", "WorkerManager"]

_log = structlog.get_logger()

_INTERVAL_SECONDS: Final = 15.0
# Attempts at a worker that joins; one that is known gets its next chance soon enough.
_FIRST_ATTEMPTS: Final = 3
_LATER_ATTEMPTS: Final = 1
# Parts of the interval, each with its share of the workers.
_TURNS: Final = 16
_RECHECK_MIN_SECONDS: Final = 1.0


class WorkerFollower(Protocol):
    """Who follows what workers publish for as long as they are registered."""

    def joined(self, worker: Worker) -> None:
        """The worker can be routed to from now on."""
        ...

    async def left(self, worker: Worker) -> None:
        """The worker can no longer be routed to; returns when nothing of it is left; idempotent.

        It may join again, with other models or another place where it publishes.
        """
        ...


class WorkerManager:
    """Owns the way from WorkerSource to WorkerRegistry, and what is asked again later.

    Workers that have told no model, or were refused, are asked again every `retry_seconds`;
    all others every `interval_seconds`. `on_change` is called after each change of membership,
    models, roles or addresses; `on_role_change` gets a worker that stays registered, the role
    it had and the one it has now.
    """

    def __init__(
        self,
        *,
        source: WorkerSource,
        registry: WorkerRegistry,
        client: IntrospectionClient,
        resolver: Resolver,
        clock: Clock,
        models: Sequence[ModelConfig],
        metrics: Metrics,
        retry_seconds: float,
        dns_ttl_seconds: float,
        on_change: Callable[[], None],
        interval_seconds: float = _INTERVAL_SECONDS,
        on_role_change: Callable[[Worker, Role, Role], None] | None = None,
        follower: WorkerFollower | None = None,
    ) -> None:
        self._source = source
        self._registry = registry
        self._client = client
        self._resolver = resolver
        self._clock = clock
        self._models = {model.id: model for model in models}
        self._metrics = metrics
        self._retry_seconds = retry_seconds
        self._dns_ttl_seconds = dns_ttl_seconds
        self._interval_seconds = interval_seconds
        self._on_change = on_change
        self._on_role_change = on_role_change
        self._follower = follower
        self._next_order = 0
        self._tasks = KeyedTasks()
        self._complaints = WorkerWarnings(self._models.keys())
        # Refused workers are tried again: those in their way may have left. None of them is
        # registered.
        self._refused: dict[str, WorkerSpec] = {}
        # When a worker was last asked on demand, and which of these questions still wait.
        self._rechecked_at: dict[str, float] = {}
        self._rechecks_waiting: set[str] = set()
        self.first_round_done = False

    async def run(self) -> None:
        """Follow the source for ever; on cancellation every task of ours is awaited."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._retry_unknown())
                group.create_task(self._ask_all_again())
                group.create_task(self._refresh_addresses())
                async for event in self._source.events():
                    self._follow(event)
        finally:
            await self._tasks.close()

    def recheck(self, worker: Worker) -> None:
        """Ask the worker again at once; at most once a second, more calls are dropped."""
        worker_id, now = worker.id, self._clock.monotonic()
        if self._registry.get(worker_id) is None or worker_id in self._rechecks_waiting:
            return
        last = self._rechecked_at.get(worker_id)
        if last is not None and now - last < _RECHECK_MIN_SECONDS:
            return
        self._rechecked_at[worker_id] = now
        self._rechecks_waiting.add(worker_id)
        self._tasks.start(worker_id, self._recheck(worker_id))

    async def _recheck(self, worker_id: str) -> None:
        self._rechecks_waiting.discard(worker_id)
        await self._ask_again(worker_id)

    def _follow(self, event: WorkerEvent) -> None:
        match event:
            case Added(spec):
                self._tasks.start(spec.id, self._add(spec))
            case Removed(worker_id):
                self._tasks.start(worker_id, self._remove(worker_id))
            case RoleChanged(worker_id, role):
                self._tasks.start(worker_id, self._ask_again(worker_id, role))
            case Listed():
                self._tasks.start("", self._finish_first_round(self._tasks.tails()))

    async def _finish_first_round(self, pending: list[asyncio.Task[None]]) -> None:
        if pending:
            await asyncio.wait(pending)
        self.first_round_done = True
        self._on_change()

    async def _add(self, spec: WorkerSpec) -> None:
        told, addresses = await asyncio.gather(
            self._ask(spec, _FIRST_ATTEMPTS), self._resolve(spec)
        )
        self._complaints.answer(spec, told)
        await self._join(self._applied(spec, told), addresses)

    async def _ask(self, spec: WorkerSpec, attempts: int) -> Introspection:
        """The worker's answer; a surprise on the way is a problem like any other."""
        try:
            told = await introspect(self._client, spec.url, self._clock, attempts)
        except Exception as error:
            _log.exception("introspection_failed", worker=str(spec.url))
            told = Introspection(problem=f"unexpected {type(error).__name__}")
        self._metrics.introspections("failed" if told.problem else "answered").inc()
        return told

    async def _resolve(self, spec: WorkerSpec) -> tuple[str, ...]:
        try:
            return await self._resolver.resolve(spec.url)
        except Exception:
            _log.exception("resolution_failed", worker=str(spec.url))
            return ()

    def _applied(self, spec: WorkerSpec, told: Introspection) -> WorkerSpec:
        """The spec with what the worker said, and the configuration where it has said nothing."""
        if spec.kv_events is not None and spec.kv_events == self._configured_kv_events(spec):
            # Of the models it had so far; those it has now may be configured otherwise.
            spec = msgspec.structs.replace(spec, kv_events=None)
        spec = apply_introspection(spec, told)
        if spec.kv_events is not None:
            return spec
        found = self._configured_kv_events(spec)
        if found is None:
            for model in self._configured_models(spec):
                if model.policy in TOKEN_POLICIES:
                    self._complaints.no_kv_events(spec, model.id)
                    break
        return msgspec.structs.replace(spec, kv_events=found)

    def _configured_kv_events(self, spec: WorkerSpec) -> KvEvents | None:
        for model in self._configured_models(spec):
            if found := configured_kv_events(model.kv_events, spec.url):
                return found
        return None

    def _configured_models(self, spec: WorkerSpec) -> list[ModelConfig]:
        return [self._models[model] for model in spec.model_ids if model in self._models]

    def _breaker_settings(self, spec: WorkerSpec) -> CircuitBreakerConfig:
        """Those of the first configured model the worker serves, else the defaults."""
        models = self._configured_models(spec) or [ModelConfig(id="-")]
        return models[0].circuit_breaker

    async def _join(self, spec: WorkerSpec, addresses: tuple[str, ...]) -> None:
        """Register what discovery has named, instead of what had its id so far."""
        known = self._registry.get(spec.id)
        if known is None:
            order = self._next_order
            self._next_order += 1
        else:
            order = known.order
        settings = self._breaker_settings(spec)
        worker = Worker(
            spec,
            order=order,
            breaker=CircuitBreaker(settings.threshold, settings.cool_down_secs),
            address=addresses[0] if addresses else None,
        )
        try:
            self._registry.upsert(worker)
        except MixedRolesError as error:
            await self._refuse(spec, error)
            return
        self._refused.pop(spec.id, None)
        self._complaints.addresses(spec, addresses)
        if known is not None and self._follower is not None:
            await self._follower.left(known)
        self._registered(worker)
        self._on_change()

    def _registered(self, worker: Worker) -> None:
        self._complaints.joined(worker.id)
        if self._follower is not None:
            self._follower.joined(worker)
        if worker.model_ids:
            _log.info(
                "worker_registered",
                worker=worker.url,
                models=shown_models(worker.model_ids),
                role=worker.role,
                address=worker.address,
                kv_events=worker.spec.kv_events is not None,
            )

    async def _refuse(self, spec: WorkerSpec, error: MixedRolesError) -> None:
        """Keep it for later tries; what it was until now, it can not be any more."""
        self._refused[spec.id] = spec
        if self._complaints.refused(spec, str(error)):
            self._metrics.workers_refused.inc()
        await self._take_out(spec.id)

    async def _remove(self, worker_id: str) -> None:
        self._complaints.forget(worker_id)
        self._refused.pop(worker_id, None)
        await self._take_out(worker_id)

    async def _take_out(self, worker_id: str) -> None:
        worker = self._registry.remove(worker_id)
        if worker is None:
            return
        self._rechecked_at.pop(worker_id, None)
        if self._follower is not None:
            await self._follower.left(worker)
        if all(other.url != worker.url for other in self._registry):
            self._metrics.forget_worker(worker.url)
        _log.info("worker_removed", worker=worker.url)
        self._on_change()

    async def _retry_unknown(self) -> None:
        """Ask workers again that have told no model, or were refused, until they fit."""
        while True:
            await self._clock.sleep(self._retry_seconds)
            unknown = [worker.id for worker in self._registry if not worker.model_ids]
            for worker_id in (*unknown, *self._refused):
                self._ask_unless_busy(worker_id)

    async def _ask_all_again(self) -> None:
        """Ask each of the others once in an interval, and always in the same part of it."""
        turn = 0
        while True:
            await self._clock.sleep(self._interval_seconds / _TURNS)
            for worker in self._registry:
                if worker.model_ids and worker.order % _TURNS == turn:
                    self._ask_unless_busy(worker.id)
            turn = (turn + 1) % _TURNS

    def _ask_unless_busy(self, worker_id: str) -> None:
        if not self._tasks.is_busy(worker_id):
            self._tasks.start(worker_id, self._ask_again(worker_id))

    async def _ask_again(self, worker_id: str, discovered: Role | None = None) -> None:
        """Take up what the worker says by now, and the role that discovery has just said.

        Of the two, the worker's word counts. Without an answer nothing else changes.
        """
        worker = self._registry.get(worker_id)
        spec = worker.spec if worker is not None else self._refused.get(worker_id)
        if spec is None or spec.role == discovered:
            return
        told = await self._ask(spec, _LATER_ATTEMPTS)
        if worker is not None and worker.model_ids:
            self._complaints.later_answer(spec, told)
        else:
            self._complaints.answer(spec, told)
        if discovered is not None:
            spec = msgspec.structs.replace(spec, role=discovered)
        elif told.problem:
            return
        spec = self._applied(spec, told)
        if worker is None:
            await self._join(spec, await self._resolve(spec))
        else:
            await self._change(worker, spec)

    async def _change(self, worker: Worker, spec: WorkerSpec) -> None:
        """A registered worker is by now what the spec says; its load and breaker stay."""
        before = worker.spec
        others = set(spec.model_ids) != set(before.model_ids) or spec.kv_events != before.kv_events
        if not others and (spec.role, spec.bootstrap_port) == (before.role, before.bootstrap_port):
            return
        if others and self._follower is not None:
            await self._follower.left(worker)
        try:
            if others:
                self._registry.update(worker, spec)
            else:
                self._registry.set_role(worker, spec.role, spec.bootstrap_port)
        except MixedRolesError as error:
            await self._refuse(spec, error)
            return
        if others:
            settings = self._breaker_settings(spec)
            worker.breaker.threshold = settings.threshold
            worker.breaker.cool_down_seconds = settings.cool_down_secs
            self._registered(worker)
        self._tell_role(worker, before)
        self._on_change()

    def _tell_role(self, worker: Worker, before: WorkerSpec) -> None:
        if not before.model_ids:
            return  # It had none yet, only what was assumed.
        old, new = before.role, worker.role
        if old != new:
            _log.info("worker_role_changed", worker=worker.url, old=old, new=new)
            if self._on_role_change is not None:
                self._on_role_change(worker, old, new)
        elif worker.spec.bootstrap_port != before.bootstrap_port:
            port = worker.spec.bootstrap_port
            _log.info("worker_bootstrap_port_changed", worker=worker.url, port=port)

    async def _refresh_addresses(self) -> None:
        """Resolve host names again; a name that fails keeps its last address."""
        while True:
            await self._clock.sleep(self._dns_ttl_seconds)
            named = [worker for worker in self._registry if not worker.spec.url.is_ip]
            answers = await asyncio.gather(*(self._resolve(worker.spec) for worker in named))
            changed = False
            for worker, addresses in zip(named, answers, strict=True):
                self._complaints.addresses(worker.spec, addresses)
                if addresses and worker.address not in addresses:
                    _log.info("worker_address", worker=worker.url, address=addresses[0])
                    worker.address = addresses[0]
                    changed = True
            if changed:
                self._registry.reindex()
                self._on_change()
