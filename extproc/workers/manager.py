"""Turns discovery events into registered workers.

Workers join in parallel, each in a task of its own, since asking a dead one takes seconds;
events of one worker are kept in order by letting each wait for the one before it.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import msgspec
import structlog

from extproc.clock import Clock
from extproc.config import TOKEN_POLICIES, ModelConfig
from extproc.metrics import Metrics
from extproc.workers.circuit_breaker import CircuitBreaker
from extproc.workers.client import EngineClient
from extproc.workers.introspection import Introspection, apply_introspection, introspect
from extproc.workers.kv_announcement import configured_kv_events
from extproc.workers.registry import MixedModesError, WorkerRegistry
from extproc.workers.resolver import Resolver
from extproc.workers.source import Added, Listed, ModeChanged, Removed, WorkerEvent, WorkerSource
from extproc.workers.worker import Mode, Worker, WorkerSpec

__all__ = ["WorkerFollower", "WorkerManager"]

_log = structlog.get_logger()

_SHOWN_CHARS = 200


class WorkerFollower(Protocol):
    """Who follows what workers publish for as long as they are registered."""

    def joined(self, worker: Worker) -> None:
        """The worker can be routed to from now on."""
        ...

    async def left(self, worker: Worker) -> None:
        """The worker can no longer be routed to; returns when nothing of it is left."""
        ...


class WorkerManager:
    """Owns the way from WorkerSource to WorkerRegistry, and what is asked again later.

    `on_change` is called after each change of membership, models or addresses.
    """

    def __init__(
        self,
        *,
        source: WorkerSource,
        registry: WorkerRegistry,
        client: EngineClient,
        resolver: Resolver,
        clock: Clock,
        models: Sequence[ModelConfig],
        metrics: Metrics,
        retry_seconds: float,
        dns_ttl_seconds: float,
        on_change: Callable[[], None],
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
        self._on_change = on_change
        self._follower = follower
        self._next_order = 0
        # The last task of each worker, and all that have not ended.
        self._tails: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Refused workers are tried again: those in their way may have left.
        self._refused: dict[str, WorkerSpec] = {}
        # What was last warned about, by worker and subject.
        self._warned: dict[tuple[str, str], str] = {}
        self.first_round_done = False

    async def run(self) -> None:
        """Follow the source for ever; on cancellation every task of ours is awaited."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._retry_unknown())
                group.create_task(self._refresh_addresses())
                async for event in self._source.events():
                    self._follow(event)
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _follow(self, event: WorkerEvent) -> None:
        match event:
            case Added(spec):
                self._enqueue(spec.id, self._add(spec))
            case Removed(worker_id):
                self._enqueue(worker_id, self._remove(worker_id))
            case ModeChanged(worker_id, mode):
                self._enqueue(worker_id, self._change_mode(worker_id, mode))
            case Listed():
                self._enqueue("", self._finish_first_round(list(self._tails.values())))

    def _enqueue(self, worker_id: str, work: Coroutine[Any, Any, None]) -> None:
        """Run the work after what was enqueued before for the same worker."""
        before = self._tails.get(worker_id)
        task = asyncio.create_task(self._after(before, work))
        self._tails[worker_id] = task
        self._tasks.add(task)

        def forget(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if self._tails.get(worker_id) is done:
                del self._tails[worker_id]

        task.add_done_callback(forget)

    async def _after(
        self, before: asyncio.Task[None] | None, work: Coroutine[Any, Any, None]
    ) -> None:
        try:
            if before is not None:
                await asyncio.wait([before])
            await work
        except Exception:
            # One worker's surprise must not stop the others from joining.
            _log.exception("worker_event_failed")
        finally:
            work.close()

    async def _finish_first_round(self, pending: list[asyncio.Task[None]]) -> None:
        if pending:
            await asyncio.wait(pending)
        self.first_round_done = True
        self._on_change()

    async def _add(self, spec: WorkerSpec) -> None:
        told, addresses = await asyncio.gather(self._ask(spec), self._resolve(spec))
        self._report(spec, told)
        await self._register(apply_introspection(spec, told), addresses)

    async def _ask(self, spec: WorkerSpec) -> Introspection:
        """The worker's answer; a surprise on the way is a problem like any other."""
        try:
            return await introspect(self._client, spec.url, self._clock)
        except Exception as error:
            _log.exception("introspection_failed", worker=str(spec.url))
            return Introspection(problem=f"unexpected {type(error).__name__}")

    async def _resolve(self, spec: WorkerSpec) -> tuple[str, ...]:
        try:
            return await self._resolver.resolve(spec.url)
        except Exception:
            _log.exception("resolution_failed", worker=str(spec.url))
            return ()

    async def _register(self, spec: WorkerSpec, addresses: tuple[str, ...]) -> None:
        known = self._registry.get(spec.id)
        spec = self._with_kv_events(spec)
        if known is None:
            order = self._next_order
            self._next_order += 1
        else:
            order = known.order
        worker = Worker(
            spec,
            order=order,
            breaker=self._breaker(spec.model_ids),
            address=addresses[0] if addresses else None,
        )
        try:
            self._registry.upsert(worker)
        except MixedModesError as error:
            self._refuse(spec, error)
            return
        self._refused.pop(spec.id, None)
        self._warned.pop((spec.id, "mode"), None)
        self._report_addresses(spec, addresses)
        if self._follower is not None:
            if known is not None:
                await self._follower.left(known)
            self._follower.joined(worker)
        if worker.model_ids:
            _log.info(
                "worker_registered",
                worker=worker.url,
                models=_shown(worker.model_ids),
                mode=worker.mode,
                address=worker.address,
                kv_events=spec.kv_events is not None,
            )
        self._on_change()

    def _refuse(self, spec: WorkerSpec, error: MixedModesError) -> None:
        self._refused[spec.id] = spec
        if self._is_news(spec.id, "mode", str(error)):
            self._metrics.workers_refused.inc()
            _log.error("worker_refused", worker=str(spec.url), mode=spec.mode, reason=str(error))

    def _with_kv_events(self, spec: WorkerSpec) -> WorkerSpec:
        """The spec with what the configuration says where the worker has said nothing."""
        if spec.kv_events is not None:
            return spec
        for model_id in spec.model_ids:
            model = self._models.get(model_id)
            if model is None:
                continue
            if found := configured_kv_events(model.kv_events, spec.url):
                return msgspec.structs.replace(spec, kv_events=found)
            if model.policy in TOKEN_POLICIES and self._is_news(spec.id, "kv_events", "none"):
                _log.warning("kv_events_missing", worker=str(spec.url), model=model.id)
        return spec

    def _breaker(self, model_ids: tuple[str, ...]) -> CircuitBreaker:
        """The settings of the first configured model the worker serves, else the defaults."""
        for model_id in model_ids:
            if model := self._models.get(model_id):
                settings = model.circuit_breaker
                return CircuitBreaker(settings.threshold, settings.cool_down_secs)
        settings = ModelConfig(id="-").circuit_breaker
        return CircuitBreaker(settings.threshold, settings.cool_down_secs)

    async def _remove(self, worker_id: str) -> None:
        worker = self._registry.remove(worker_id)
        self._refused.pop(worker_id, None)
        for key in [key for key in self._warned if key[0] == worker_id]:
            del self._warned[key]
        if worker is None:
            return
        if self._follower is not None:
            await self._follower.left(worker)
        if all(other.url != worker.url for other in self._registry):
            self._metrics.forget_worker(worker.url)
        _log.info("worker_removed", worker=worker.url)
        self._on_change()

    async def _change_mode(self, worker_id: str, mode: Mode) -> None:
        worker = self._registry.get(worker_id)
        if worker is None or worker.mode == mode:
            return
        try:
            self._registry.set_mode(worker, mode)
        except MixedModesError as error:
            self._metrics.workers_refused.inc()
            _log.error("mode_refused", worker=worker.url, mode=mode, reason=str(error))
            return
        _log.info("worker_mode_changed", worker=worker.url, mode=mode)
        self._on_change()

    async def _retry_unknown(self) -> None:
        """Ask workers again that have told no model, or were refused, until they fit."""
        while True:
            await self._clock.sleep(self._retry_seconds)
            specs = {worker.id: worker.spec for worker in self._registry if not worker.model_ids}
            for spec in (specs | self._refused).values():
                if spec.id not in self._tails:
                    self._enqueue(spec.id, self._ask_again(spec))

    async def _ask_again(self, spec: WorkerSpec) -> None:
        told, addresses = await asyncio.gather(self._ask(spec), self._resolve(spec))
        worker = self._registry.get(spec.id)
        if worker is not None:
            spec = worker.spec  # its role may have changed in the meantime
        elif spec.id not in self._refused:
            return
        self._report(spec, told)
        if told.model_ids or spec.model_ids:
            await self._register(apply_introspection(spec, told), addresses)

    async def _refresh_addresses(self) -> None:
        """Resolve host names again; a name that fails keeps its last address."""
        while True:
            await self._clock.sleep(self._dns_ttl_seconds)
            named = [worker for worker in self._registry if not worker.spec.url.is_ip]
            answers = await asyncio.gather(*(self._resolve(worker.spec) for worker in named))
            changed = False
            for worker, addresses in zip(named, answers, strict=True):
                self._report_addresses(worker.spec, addresses)
                if addresses and worker.address not in addresses:
                    _log.info("worker_address", worker=worker.url, address=addresses[0])
                    worker.address = addresses[0]
                    changed = True
            if changed:
                self._registry.reindex()
                self._on_change()

    def _report_addresses(self, spec: WorkerSpec, addresses: tuple[str, ...]) -> None:
        if not addresses:
            self._warn(spec, "address", "the host name has no address")
        elif len(addresses) > 1:
            self._warn(
                spec, "address", "the host name has several addresses, the first one is used"
            )
        else:
            self._warned.pop((spec.id, "address"), None)

    def _report(self, spec: WorkerSpec, told: Introspection) -> None:
        """Count the answer and warn about what the operator should look at."""
        self._metrics.introspections("failed" if told.problem else "answered").inc()
        reason = self._complaint(spec, told)
        if reason:
            self._warn(spec, "answer", reason)
        else:
            self._warned.pop((spec.id, "answer"), None)
        if told.kv_problem and self._is_news(spec.id, "kv_events", told.kv_problem):
            _log.warning("kv_events_not_usable", worker=str(spec.url), reason=told.kv_problem)

    def _complaint(self, spec: WorkerSpec, told: Introspection) -> str:
        """Why the worker can not be used as it answered; empty when it can."""
        models = told.model_ids or spec.model_ids
        if told.problem:
            return told.problem
        if not models:
            return "the worker told no served_model_name"
        if not any(model in self._models for model in models):
            return f"none of its models is configured: {_shown(models)}"
        if told.mode in ("prefill", "decode"):
            return f"a {told.mode} worker can not serve requests in this version"
        return told.warning

    def _warn(self, spec: WorkerSpec, subject: str, reason: str) -> None:
        if self._is_news(spec.id, subject, reason):
            _log.warning("worker_not_usable", worker=str(spec.url), reason=reason)

    def _is_news(self, worker_id: str, subject: str, reason: str) -> bool:
        """Once for each new reason: a worker that stays dead must not fill the log."""
        if self._warned.get((worker_id, subject)) == reason:
            return False
        self._warned[worker_id, subject] = reason
        return True


def _shown(models: Sequence[str]) -> str:
    """Names for the log, not longer than an operator reads."""
    text = ",".join(models)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
