"""Registers workers, changes and removes them, and notifies the observers.

It is separate from the manager so that one module decides what a change means, and the other
decides when a worker is asked. All calls for one worker come one after the other.
"""

import asyncio
from collections.abc import Mapping, Sequence

import structlog

from extproc.config.models import ModelConfig
from extproc.engines.engine import engine_named
from extproc.metrics.service import Metrics
from extproc.workers.circuit_breaker import CircuitBreaker
from extproc.workers.configured_models import ConfiguredModels
from extproc.workers.introspection import Introspection
from extproc.workers.kinds import is_for_plain
from extproc.workers.observer import WorkerObserver
from extproc.workers.registry import MixedRolesError, WorkerRegistry
from extproc.workers.worker import Worker, WorkerSpec
from extproc.workers.worker_warnings import WorkerWarnings, shown_models

__all__ = ["Membership"]

_log = structlog.get_logger()


class Membership:
    """The registered workers, and those that were refused for their role.

    A refused worker is never registered. It is tried again, since the workers that it did not
    fit may have left. Where most workers of a model are among the refused ones, those registered
    are `out_of_place`.
    """

    def __init__(
        self, registry: WorkerRegistry, models: ConfiguredModels, metrics: Metrics
    ) -> None:
        self._registry = registry
        self._models = models
        self._metrics = metrics
        self._observers: list[WorkerObserver] = []
        self._warnings = WorkerWarnings(models.ids)
        self._refused: dict[str, WorkerSpec] = {}
        self._next_order = 0
        # The ids of workers that drain, registered or not, and of those that are about to leave.
        self._draining: set[str] = set()
        self._held_out: set[str] = set()
        # Set when a worker was registered, removed or refused with another role.
        self._kinds_changed = False
        self._is_telling = False

    def observe(self, observer: WorkerObserver) -> None:
        """Notify this observer, too; observers are notified in the order of these calls."""
        self._observers.append(observer)

    def notify_changed(self) -> None:
        """Tell the observers that workers changed, once for all changes of a turn of the loop."""
        if not self._is_telling:
            self._is_telling = True
            asyncio.get_running_loop().call_soon(self._tell_changed)

    def _tell_changed(self) -> None:
        self._is_telling = False
        for observer in self._observers:
            observer.workers_changed()

    def replace_models(self, models: Sequence[ModelConfig]) -> ConfiguredModels:
        """Take over other configured models; returns those so far, for `conform`."""
        return self._models.replace(models)

    async def conform(self, worker_id: str, before: ConfiguredModels) -> None:
        """Apply what the configured models say now about a registered worker, instead of `before`.

        Its load stays, and its pages unless they are read from elsewhere or for another model.
        """
        worker = self._registry.get(worker_id)
        if worker is None:
            return
        models, spec = self._models, worker.spec
        rejoins = models.token_model(spec) != before.token_model(spec)
        settings = models.breaker_of(spec)
        worker.breaker.threshold = settings.threshold
        worker.breaker.cool_down_seconds = settings.cool_down_secs
        await self.change(worker, models.moved(spec, before), rejoins=rejoins)

    def spec_of(self, worker_id: str) -> WorkerSpec | None:
        """The spec of a registered or refused worker."""
        worker = self._registry.get(worker_id)
        return worker.spec if worker is not None else self._refused.get(worker_id)

    def refused(self) -> list[WorkerSpec]:
        """The workers that were refused."""
        return list(self._refused.values())

    def kinds_changed(self) -> bool:
        """True if `out_of_place` and `fitting` may have changed since the last call."""
        changed, self._kinds_changed = self._kinds_changed, False
        return changed and bool(self._refused)

    def out_of_place(self) -> list[str]:
        """The ids of registered workers whose kind is not that of most workers of their model."""
        models = self._models_of_refused()
        return [
            worker.id
            for worker in self._registry
            if self._odd_model(worker.spec, models) is not None
        ]

    def fitting(self) -> list[str]:
        """The ids of refused workers whose kind is that of most workers of their models."""
        models = self._models_of_refused()
        return [spec.id for spec in self._refused.values() if self._odd_model(spec, models) is None]

    async def put_out(self, worker_id: str) -> None:
        """Refuse a registered worker that is out of place, if it still is."""
        worker = self._registry.get(worker_id)
        if worker is None:
            return
        model = self._odd_model(worker.spec, self._models_of_refused())
        if model is not None:
            await self._refuse(worker.spec, MixedRolesError(model, worker.role))

    def _models_of_refused(self) -> dict[str, bool]:
        """The models of refused workers; True for those that plain workers should serve."""
        found: dict[str, bool] = {}
        for refused in self._refused.values():
            for model in refused.model_ids:
                if model not in found:
                    found[model] = self._is_for_plain(model)
        return found

    def _is_for_plain(self, model: str) -> bool:
        registered = [worker.spec for worker in self._registry if model in worker.model_ids]
        refused = [spec for spec in self._refused.values() if model in spec.model_ids]
        return is_for_plain(
            registered + refused,
            configured=self._models.is_disaggregated(model),
            now_plain=bool(registered) and registered[0].role == "plain",
        )

    @staticmethod
    def _odd_model(spec: WorkerSpec, models: Mapping[str, bool]) -> str | None:
        """The first of the worker's models that workers of the other kind should serve."""
        plain = spec.role == "plain"
        for model in spec.model_ids:
            if models.get(model, plain) != plain:
                return model
        return None

    def unsettled(self) -> list[str]:
        """The ids of workers whose model is unknown, and of refused ones."""
        unknown = [worker.id for worker in self._registry if not worker.model_ids]
        return [*unknown, *self._refused]

    def complete(self, spec: WorkerSpec, answer: Introspection) -> WorkerSpec:
        """The spec with the worker's answer and the configuration; warns of missing KV events."""
        spec = self._models.complete(spec, answer)
        if model := self._models.model_without_kv_events(spec):
            self._warnings.no_kv_events(spec, model)
        return spec

    def answered(self, spec: WorkerSpec, answer: Introspection) -> None:
        """A worker that is about to join, or could not so far, has answered or failed to."""
        self._warnings.answered(spec, answer)

    def answered_later(self, spec: WorkerSpec, answer: Introspection) -> None:
        """A registered or refused worker was asked again."""
        worker = self._registry.get(spec.id)
        if worker is not None and worker.model_ids:
            self._warnings.answered_later(spec, answer)
        else:
            self._warnings.answered(spec, answer)

    async def join(self, spec: WorkerSpec, addresses: tuple[str, ...]) -> None:
        """Register a worker; it replaces the one that had its id so far."""
        known = self._registry.get(spec.id)
        if known is None:
            order = self._next_order
            self._next_order += 1
        else:
            order = known.order
        settings = self._models.breaker_of(spec)
        worker = Worker(
            spec,
            order=order,
            breaker=CircuitBreaker(settings.threshold, settings.cool_down_secs),
            address=addresses[0] if addresses else None,
        )
        worker.unused_addresses = addresses[1:]
        try:
            self._registry.upsert(worker)
        except MixedRolesError as error:
            await self._refuse(spec, error)
            return
        self._refused.pop(spec.id, None)
        self._kinds_changed = True
        if spec.id in self._draining or spec.id in self._held_out:
            self._registry.set_draining(worker, True)
        self._warnings.addresses(spec, addresses)
        if known is not None:
            await self._notify_left(known)
        self._registered(worker)
        self.notify_changed()

    async def adapters_listed(self, worker_id: str, adapters: tuple[str, ...]) -> None:
        """A registered worker lists these adapters now."""
        worker = self._registry.get(worker_id)
        if worker is not None and worker.spec.adapters != adapters:
            await self.change(worker, self._models.with_adapters(worker.spec, adapters))

    async def change(self, worker: Worker, spec: WorkerSpec, *, rejoins: bool = False) -> None:
        """Give a registered worker a new spec; its load and its breaker's state stay.

        `rejoins`: the observers see it leave and join, even where the spec does not ask for that.
        """
        before = worker.spec
        rejoins = (
            rejoins
            or set(spec.model_ids) != set(before.model_ids)
            or spec.kv_events != before.kv_events
            # Its pages hold the tokens of the other engine.
            or engine_named(spec.engine, spec.engine_version, spec.reasoning_parser)
            is not worker.engine
        )
        if not rejoins and spec.engine_version != before.engine_version:
            self._registry.set_version(worker, spec.engine_version)
        if (spec.adapters, spec.lists_adapters) != (before.adapters, before.lists_adapters):
            self._registry.set_adapters(worker, spec)
            self._warnings.adapters_changed(before, spec)
        if not rejoins and (spec.role, spec.bootstrap_port) == (before.role, before.bootstrap_port):
            return
        if rejoins:
            await self._notify_left(worker)
        try:
            if rejoins:
                self._registry.update(worker, spec)
            else:
                self._registry.set_role(worker, spec.role, spec.bootstrap_port)
        except MixedRolesError as error:
            await self._refuse(spec, error)
            return
        self._kinds_changed = True
        if rejoins:
            settings = self._models.breaker_of(spec)
            worker.breaker.threshold = settings.threshold
            worker.breaker.cool_down_seconds = settings.cool_down_secs
            self._registered(worker)
        self._compare_roles(worker, before)
        self.notify_changed()

    def announce(self, worker_id: str) -> None:
        """A worker of this id is about to join: an earlier one's draining is not its own."""
        self._draining.discard(worker_id)

    def drain(self, worker_id: str) -> None:
        """A worker gets no new requests from now on; at once.

        One that has not joined yet is then draining when it does.
        """
        self._draining.add(worker_id)
        self._set_draining(worker_id, True)

    def stays(self, worker_id: str) -> None:
        """A worker that drained stays after all; `resume` gives it requests again."""
        self._draining.discard(worker_id)

    async def resume(self, worker_id: str) -> None:
        """Give a worker requests again, unless it is to drain or to leave by now."""
        if worker_id not in self._draining and worker_id not in self._held_out:
            self._set_draining(worker_id, False)

    def hold_out(self, worker_id: str) -> None:
        """A worker is about to leave; until then it gets no new requests."""
        self._draining.discard(worker_id)
        self._held_out.add(worker_id)
        self._set_draining(worker_id, True)

    def _set_draining(self, worker_id: str, draining: bool) -> None:
        worker = self._registry.get(worker_id)
        if worker is None or worker.draining == draining:
            return
        self._registry.set_draining(worker, draining)
        self.notify_changed()

    async def leave(self, worker_id: str) -> None:
        """Remove a worker, whether it was registered or refused."""
        self._held_out.discard(worker_id)
        self._warnings.left(worker_id)
        self._kinds_changed = self._refused.pop(worker_id, None) is not None or self._kinds_changed
        await self._remove(worker_id)

    def update_addresses(self, answers: list[tuple[Worker, tuple[str, ...]]]) -> None:
        """Take over new addresses; a worker whose name has no address now keeps its last one."""
        changed = False
        for worker, addresses in answers:
            self._warnings.addresses(worker.spec, addresses)
            if addresses and worker.address not in addresses:
                _log.info("worker_address_changed", worker=worker.url, address=addresses[0])
                worker.address = addresses[0]
                changed = True
            if addresses:
                worker.unused_addresses = tuple([one for one in addresses if one != worker.address])
        if changed:
            self._registry.reindex()
            self.notify_changed()

    def _registered(self, worker: Worker) -> None:
        self._warnings.joined(worker.spec)
        for observer in self._observers:
            observer.joined(worker)
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
        before = self._refused.get(spec.id)
        if before is None or (before.role, before.model_ids) != (spec.role, spec.model_ids):
            self._kinds_changed = True
        self._refused[spec.id] = spec
        if self._warnings.refused(spec, error):
            self._metrics.workers_refused.inc()
        await self._remove(spec.id)

    async def _remove(self, worker_id: str) -> None:
        worker = self._registry.remove(worker_id)
        if worker is None:
            return
        self._kinds_changed = True
        await self._notify_left(worker)
        if all(other.url != worker.url for other in self._registry):
            self._metrics.forget_worker(worker.url)
        _log.info("worker_removed", worker=worker.url)
        self.notify_changed()

    async def _notify_left(self, worker: Worker) -> None:
        for observer in self._observers:
            await observer.left(worker)

    def _compare_roles(self, worker: Worker, before: WorkerSpec) -> None:
        if not before.model_ids:
            return  # Its role was only assumed.
        old, new = before.role, worker.role
        if old != new:
            _log.info("worker_role_changed", worker=worker.url, old=old, new=new)
            for observer in self._observers:
                observer.role_changed(worker, old, new)
        elif worker.spec.bootstrap_port != before.bootstrap_port:
            port = worker.spec.bootstrap_port
            _log.info("worker_bootstrap_port_changed", worker=worker.url, port=port)
