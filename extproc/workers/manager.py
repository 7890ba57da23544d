"""Follows discovery, and decides when each worker is asked about itself.

Workers join in parallel, each in a task of its own, since asking a dead one takes seconds. The
events of one worker are handled one after the other. Later questions to a worker wait in the
same queue, so that a late answer cannot bring back a worker that has left.
"""

import asyncio
from collections.abc import Sequence
from itertools import islice
from typing import Final

import msgspec
import structlog
from msgspec import Struct

from extproc.clock import Clock
from extproc.config.models import ModelConfig
from extproc.metrics.service import Metrics
from extproc.workers.adapter_watch import AdapterWatch
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.engine_calls import IntrospectionClient
from extproc.workers.generating_check import GeneratingCheck
from extproc.workers.introspection import Introspection, introspect
from extproc.workers.keyed_tasks import KeyedTasks
from extproc.workers.membership import Membership
from extproc.workers.observer import WorkerObserver
from extproc.workers.registry import WorkerRegistry
from extproc.workers.resolver import Resolver
from extproc.workers.source import (
    Added,
    DrainingChanged,
    Listed,
    Removed,
    RoleChanged,
    Vanished,
    WorkerEvent,
    WorkerSource,
)
from extproc.workers.turns import Turns
from extproc.workers.vanished import VanishedWorkers
from extproc.workers.worker import Role, Worker, WorkerSpec

__all__ = ["IntrospectionSettings", "WorkerManager"]

_log = structlog.get_logger()

# A known worker is asked again soon anyway.
_JOINING_ATTEMPTS: Final = 3
_LATER_ATTEMPTS: Final = 1
# The interval has so many parts, and each part asks its share of the workers.
_TURNS: Final = 16
_RECHECK_MIN_SECONDS: Final = 1.0
# A registered worker that did not answer may come back as another engine. So many of them are
# asked within each time.
_UNANSWERED_SECONDS: Final = 1.0
_UNANSWERED_AT_ONCE: Final = 32
_LOOK_AT_HELD_SECONDS: Final = 1.0
# So many workers are dealt with in one turn of the event loop, at 0.2 ms each.
_WORKERS_AT_ONCE: Final = 8
# The key of the task that compares roles.
_ROLES: Final = "(roles)"
# Compare roles, put workers out, ask those that fit.
_SETTLING_ROUNDS: Final = 3


class IntrospectionSettings(Struct, frozen=True, kw_only=True):
    """How often workers are asked again.

    Every `retry_seconds` for workers whose model is unknown and for refused ones, every
    `interval_seconds` for all others; host names are resolved every `dns_ttl_seconds`.
    The generating check runs every `generating_check_seconds`; None turns it off.
    A worker that claims more than `ranks_max` data-parallel ranks is used without its KV events.
    One that has vanished is held for `hold_seconds` while it answers.
    """

    retry_seconds: float
    interval_seconds: float
    dns_ttl_seconds: float
    ranks_max: int
    generating_check_seconds: float | None = None
    hold_seconds: float = 0.0


class WorkerManager:
    """Leads workers from discovery into the registry, and keeps them up to date."""

    def __init__(
        self,
        *,
        source: WorkerSource,
        registry: WorkerRegistry,
        membership: Membership,
        client: IntrospectionClient,
        resolver: Resolver,
        clock: Clock,
        metrics: Metrics,
        settings: IntrospectionSettings,
    ) -> None:
        """`membership` is that of the registry."""
        self._source = source
        self._registry = registry
        self._membership = membership
        self._client = client
        self._resolver = resolver
        self._clock = clock
        self._metrics = metrics
        self._settings = settings
        self._tasks = KeyedTasks()
        self._turns = Turns(_WORKERS_AT_ONCE)
        # When a registered worker was last rechecked, and the rechecks that have not begun.
        self._rechecked_at: dict[str, float] = {}
        self._rechecks_waiting: set[str] = set()
        # Registered workers whose last answer failed, the one asked longest ago first.
        self._unanswered: dict[str, None] = {}
        self._lifeless: set[str] = set()
        self._vanished = VanishedWorkers(registry, metrics)
        self._generating_check = GeneratingCheck(registry, client, clock, metrics)
        self._generating_check.seconds = settings.generating_check_seconds
        self._adapters = AdapterWatch(registry, membership, client, self._tasks, clock, metrics)
        self._settling = False
        self.first_round_done = False

    def observe(self, observer: WorkerObserver) -> None:
        """Notify this observer of changes; observers are added before `run`."""
        self._membership.observe(observer)

    async def run(self) -> None:
        """Follow the source for ever; awaits every task of its own when it is cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._retry_unsettled())
                group.create_task(self._ask_all_again())
                group.create_task(self._ask_unanswered())
                group.create_task(self._watch_vanished())
                group.create_task(self._refresh_addresses())
                group.create_task(self._generating_check.run())
                group.create_task(self._adapters.run())
                handled = 0
                async for event in self._source.events():
                    self._handle(event)
                    handled += 1
                    if handled % _WORKERS_AT_ONCE == 0:
                        await asyncio.sleep(0)
        finally:
            await self._tasks.close()

    def refused(self) -> list[WorkerSpec]:
        """The workers that are not registered, since their role does not fit."""
        return self._membership.refused()

    def reconfigure(self, models: Sequence[ModelConfig], settings: IntrospectionSettings) -> None:
        """Take over other configured models and intervals, for registered workers, too.

        An interval holds from its next round on.
        """
        self._settings = settings
        self._generating_check.seconds = settings.generating_check_seconds
        before = self._membership.replace_models(models)
        for worker in self._registry:
            self._tasks.start(worker.id, self._membership.conform(worker.id, before))

    def recheck(self, worker: Worker) -> None:
        """Ask the worker again at once; at most once a second, further calls are dropped."""
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

    def _handle(self, event: WorkerEvent) -> None:
        match event:
            case Added(spec):
                self._added(spec)
            case Removed(worker_id):
                self._vanished.end(worker_id, "left")
                self._removed(worker_id)
            case Vanished(spec) if not self._settings.hold_seconds:
                self._removed(spec.id)
            case Vanished(spec):
                until = self._clock.monotonic() + self._settings.hold_seconds
                self._vanished.hold(spec, until)
                self._tasks.start(spec.id, self._check_vanished(spec.id))
            case RoleChanged(worker_id, role):
                self._tasks.start(worker_id, self._ask_again(worker_id, role))
            case DrainingChanged(worker_id, True):
                self._membership.drain(worker_id)
            case DrainingChanged(worker_id):
                # It may be back in another role, for which it is being asked.
                self._membership.stays(worker_id)
                self._tasks.start(worker_id, self._membership.resume(worker_id))
            case Listed():
                self._tasks.start("", self._finish_first_round(self._tasks.last_tasks()))

    def _added(self, spec: WorkerSpec) -> None:
        for other in self._vanished.at(spec.url):
            if other != spec.id:
                # Its address is that of another worker now.
                self._vanished.end(other, "left")
                self._removed(other)
        known = self._vanished.end(spec.id, "found")
        if known is not None and known == msgspec.structs.replace(spec, role=known.role):
            if spec.role != known.role:
                self._tasks.start(spec.id, self._ask_again(spec.id, spec.role))
            return
        self._membership.announce(spec.id)
        self._tasks.start(spec.id, self._add(spec))

    def _removed(self, worker_id: str) -> None:
        # The task may have to wait for an answer of the worker.
        self._membership.hold_out(worker_id)
        self._tasks.start(worker_id, self._remove(worker_id))

    async def _check_vanished(self, worker_id: str) -> None:
        """Let a held worker go if it does not answer."""
        if worker_id not in self._vanished:
            return
        answer = await self._ask_again(worker_id)
        if (answer is None or answer.problem) and self._vanished.end(worker_id, "silent"):
            self._membership.hold_out(worker_id)
            await self._remove(worker_id)

    async def _watch_vanished(self) -> None:
        while True:
            self._vanished.tell()
            await self._clock.sleep(_LOOK_AT_HELD_SECONDS)
            for worker_id in self._vanished.expired(self._clock.monotonic()):
                self._vanished.end(worker_id, "expired")
                self._removed(worker_id)
            for worker_id in self._vanished.due():
                if not self._tasks.is_busy(worker_id):
                    self._tasks.start(worker_id, self._check_vanished(worker_id))

    async def _finish_first_round(self, pending: list[asyncio.Task[None]]) -> None:
        if pending:
            await asyncio.wait(pending)
        for _ in range(_SETTLING_ROUNDS):
            own = asyncio.current_task()
            if others := [task for task in self._tasks.last_tasks() if task is not own]:
                await asyncio.wait(others)
        self.first_round_done = True
        self._membership.notify_changed()

    async def _add(self, spec: WorkerSpec) -> None:
        answer, addresses = await asyncio.gather(
            self._ask(spec, _JOINING_ATTEMPTS), self._resolve(spec)
        )
        self._membership.answered(spec, answer)
        await self._membership.join(self._membership.complete(spec, answer), addresses)
        self._vanished.mark(spec.id)
        self._settle_roles()

    async def _remove(self, worker_id: str) -> None:
        self._rechecked_at.pop(worker_id, None)
        self._unanswered.pop(worker_id, None)
        self._lifeless.discard(worker_id)
        await self._membership.leave(worker_id)
        self._settle_roles()

    def _settle_roles(self) -> None:
        """After a change: let the kind of most workers of each model serve it."""
        if self._membership.kinds_changed() and not self._settling:
            self._settling = True
            self._tasks.start(_ROLES, self._compare_roles())

    async def _compare_roles(self) -> None:
        self._settling = False
        out_of_place = self._membership.out_of_place()
        for worker_id in out_of_place:
            self._tasks.start(worker_id, self._put_out(worker_id))
        if not out_of_place:
            for worker_id in self._membership.fitting():
                self._ask_unless_busy(worker_id)

    async def _put_out(self, worker_id: str) -> None:
        await self._membership.put_out(worker_id)
        self._settle_roles()

    async def _ask(self, spec: WorkerSpec, attempts: int) -> Introspection:
        """The worker's answer; an unexpected exception is a problem like any other."""
        await self._turns.wait()
        try:
            answer = await introspect(
                self._client,
                spec.url,
                self._clock,
                attempts,
                ranks_max=self._settings.ranks_max,
                known=spec,
            )
        except Exception as error:
            _log.exception("introspection_failed", worker=str(spec.url))
            answer = Introspection(problem=f"unexpected {type(error).__name__}")
        self._metrics.introspections("failed" if answer.problem else "answered").inc()
        await self._turns.wait()
        return answer

    async def _resolve(self, spec: WorkerSpec) -> tuple[str, ...]:
        try:
            return await self._resolver.resolve(spec.url)
        except Exception:
            _log.exception("resolution_failed", worker=str(spec.url))
            return ()

    async def _retry_unsettled(self) -> None:
        while True:
            await self._clock.sleep(self._settings.retry_seconds)
            for worker_id in self._membership.unsettled():
                self._ask_unless_busy(worker_id)

    async def _ask_all_again(self) -> None:
        """Ask each worker with a model once in an interval, always in the same part of it."""
        turn = 0
        while True:
            await self._clock.sleep(self._settings.interval_seconds / _TURNS)
            for worker in self._registry:
                if worker.model_ids and worker.order % _TURNS == turn:
                    self._ask_unless_busy(worker.id)
            turn = (turn + 1) % _TURNS

    def _ask_unless_busy(self, worker_id: str) -> None:
        if not self._tasks.is_busy(worker_id):
            self._tasks.start(worker_id, self._ask_again(worker_id))

    async def _ask_again(
        self, worker_id: str, discovered: Role | None = None
    ) -> Introspection | None:
        """Take over what the worker says now, and the role that discovery has reported.

        If both give a role, the worker's answer counts. Without an answer nothing else changes.
        Returns None for a worker that was not asked.
        """
        spec = self._membership.spec_of(worker_id)
        if spec is None or spec.role == discovered:
            return None
        answer = await self._ask(spec, _LATER_ATTEMPTS)
        self._membership.answered_later(spec, answer)
        self._note_life(worker_id, answer)
        if answer.problem:
            self._unanswered[worker_id] = None
        if discovered is not None:
            spec = msgspec.structs.replace(spec, role=discovered)
        elif answer.problem:
            return answer
        spec = self._membership.complete(spec, answer)
        worker = self._registry.get(worker_id)
        if worker is None:
            await self._membership.join(spec, await self._resolve(spec))
            self._vanished.mark(worker_id)
        else:
            await self._membership.change(worker, spec)
        self._settle_roles()
        return answer

    def _note_life(self, worker_id: str, answer: Introspection) -> None:
        """A worker that does not answer its introspection loses its traffic, if no request of it
        is answered either; it is tried again as soon as it answers.
        """
        worker = self._registry.get(worker_id)
        if worker is None or not worker.model_ids:
            return
        breaker, now = worker.breaker, self._clock.monotonic()
        if not answer.unanswered:
            if worker_id in self._lifeless:
                self._lifeless.discard(worker_id)
                breaker.probe_at_once(now)
            return
        if worker_id not in self._lifeless:
            # A refused request, which has been counted, may be why it was asked.
            self._lifeless.add(worker_id)
            return
        before = breaker.state
        breaker.failure(now)
        if breaker.state is BreakerState.OPEN and before is not BreakerState.OPEN:
            _log.warning("breaker_opened", worker=worker.url, failures=breaker.threshold)

    async def _ask_unanswered(self) -> None:
        while True:
            await self._clock.sleep(_UNANSWERED_SECONDS)
            for worker_id in list(islice(self._unanswered, _UNANSWERED_AT_ONCE)):
                # To the end of the queue, if it does not answer again.
                del self._unanswered[worker_id]
                worker = self._registry.get(worker_id)
                if worker is not None and worker.model_ids:
                    self._ask_unless_busy(worker_id)

    async def _refresh_addresses(self) -> None:
        while True:
            await self._clock.sleep(self._settings.dns_ttl_seconds)
            named = [worker for worker in self._registry if not worker.spec.url.is_ip]
            answers = await asyncio.gather(*(self._resolve(worker.spec) for worker in named))
            self._membership.update_addresses(list(zip(named, answers, strict=True)))
