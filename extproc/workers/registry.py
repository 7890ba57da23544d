"""The registered workers, by id, by model and role, and by address.

Routing reads a ready tuple per model and role, which the first read after a change renews. A worker
is checked and inserted in one step of the event loop, so two workers cannot break the rule that
plain workers and prefill or decode workers of one model never mix.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from extproc.clock import Clock, SystemClock
from extproc.errors import ServiceError
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.model_names import ModelNames
from extproc.workers.worker import Role, Worker, WorkerSpec

__all__ = ["MixedRolesError", "Pool", "WorkerRegistry"]

# The workers of a model and a role.
Pool = tuple[str, Role]

_ROLES: Final[tuple[Role, ...]] = ("plain", "prefill", "decode")
# Looked up once: an enum member costs more than the comparison.
_CLOSED: Final = BreakerState.CLOSED


class MixedRolesError(ServiceError):
    """The worker's role does not fit the workers that serve the model."""

    def __init__(self, model: str, role: Role) -> None:
        others = "prefill and decode" if role == "plain" else "plain"
        super().__init__(
            f"a {role} worker cannot serve model {model}, whose other workers are {others} workers"
        )
        self.model = model


class WorkerRegistry:
    """The registered workers; one that is inserted replaces the worker with the same id.

    `names` are those by which requests can name the models and adapters of these workers.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.names = ModelNames(clock or SystemClock())
        self._by_id: dict[str, Worker] = {}
        self._pools: dict[Role, dict[str, tuple[Worker, ...]]] = {role: {} for role in _ROLES}
        self._disaggregated: frozenset[str] = frozenset()
        self._by_address: dict[str, Worker] = {}
        self._known_to_gateway: frozenset[str] | None = None
        self._known_in_pools: Mapping[Pool, frozenset[str]] | None = None
        # Set by a change, so that many of them cost one renewal.
        self._is_stale = False

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, worker_id: str) -> Worker | None:
        return self._by_id.get(worker_id)

    def pool_of(self, model: str, role: Role) -> tuple[Worker, ...]:
        """The model's workers in that role that can be reached, in registration order.

        Such a worker has an address, Envoy knows it, and it is not draining.
        """
        return self._renewed()[role].get(model, ())

    def candidates(
        self, model: str, role: Role, now: float, adapter: str | None = None
    ) -> list[Worker]:
        """The workers of `pool_of` whose circuit breaker lets a request through at `now`.

        With an `adapter` only those that have loaded it.
        If no worker is allowed, the half that has not failed for longest is tried as the last
        resort: no answer is worse than the answer of a worker that may have recovered.
        """
        pool = self._renewed()[role].get(model, ())
        if adapter is not None:
            pool = tuple([worker for worker in pool if adapter in worker.adapters])
        return [
            worker
            for worker in pool
            if worker.breaker.state is _CLOSED or worker.breaker.would_allow(now)
        ] or _last_resort(pool)

    def is_disaggregated(self, model: str) -> bool:
        """True if a worker of the model has the role prefill or decode, with or without address."""
        self._renewed()
        return model in self._disaggregated

    def is_served(self, model: str) -> bool:
        """True if workers in pools can do every part of a request for the model."""
        pools = self._renewed()
        return bool(
            pools["plain"].get(model)
            or (pools["prefill"].get(model) and pools["decode"].get(model))
        )

    def usable(self, models: Iterable[str]) -> set[Worker]:
        """The workers, in all roles, that have an address and serve at least one of the models."""
        return {
            worker
            for model in models
            for pools in self._renewed().values()
            for worker in pools.get(model, ())
        }

    def limit_to(self, addresses: frozenset[str]) -> None:
        """From now on only workers at these addresses are in pools: Envoy knows no others."""
        self._known_to_gateway = addresses
        self.reindex()

    def limit_pools_to(self, known: Mapping[Pool, frozenset[str]]) -> None:
        """From now on a pool has only workers at these addresses: Envoy knows no others there."""
        self._known_in_pools = known
        self.reindex()

    def gateway_knows(self, worker: Worker) -> bool:
        """False if Envoy does not know the worker's address, as far as we can tell."""
        if not self._known_in_pools:
            return self._known(worker, "")
        served = [one for one in worker.model_ids if (one, worker.role) in self._known_in_pools]
        return not served or any(self._known(worker, one) for one in served)

    def _known(self, worker: Worker, model: str) -> bool:
        if self._known_in_pools is not None:
            return worker.address in self._known_in_pools.get((model, worker.role), ())
        return self._known_to_gateway is None or worker.address in self._known_to_gateway

    def at_address(self, address: str) -> Worker | None:
        """The worker that Envoy knows as `ip:port`."""
        self._renewed()
        return self._by_address.get(address)

    def upsert(self, worker: Worker) -> None:
        """Insert or replace a worker; raises MixedRolesError, and then changes nothing."""
        self._check_roles(worker.spec)
        self._by_id[worker.id] = worker
        self._list_adapters(worker)
        self.reindex()

    def update(self, worker: Worker, spec: WorkerSpec) -> None:
        """Give a registered worker a new spec; the Worker object stays.

        Its id and URL must not change. Raises MixedRolesError like upsert.
        """
        self._check_roles(spec)
        worker.spec = spec
        worker.role = spec.role
        worker.model_ids = spec.model_ids
        self._list_adapters(worker)
        self.reindex()

    def set_role(self, worker: Worker, role: Role, bootstrap_port: int | None) -> None:
        """Give a registered worker a new role; raises MixedRolesError like upsert."""
        spec = msgspec.structs.replace(worker.spec, role=role, bootstrap_port=bootstrap_port)
        self.update(worker, spec)

    def set_version(self, worker: Worker, version: str) -> None:
        """The worker's engine is of another version, with the same rules."""
        worker.spec = msgspec.structs.replace(worker.spec, engine_version=version)

    def set_adapters(self, worker: Worker, spec: WorkerSpec) -> None:
        """Take over the adapters of `spec` for a registered worker; its pools stay as they are."""
        worker.spec = msgspec.structs.replace(
            worker.spec, adapters=spec.adapters, lists_adapters=spec.lists_adapters
        )
        self._list_adapters(worker)

    def _list_adapters(self, worker: Worker) -> None:
        worker.adapters = frozenset(worker.spec.adapters)
        self.names.listed(worker.id, worker.model_ids, worker.adapters)

    def set_draining(self, worker: Worker, draining: bool) -> None:
        """Take a worker out of its pools, or put it back; it stays registered."""
        worker.draining = draining
        self.reindex()

    def _check_roles(self, spec: WorkerSpec) -> None:
        for model in spec.model_ids:
            for other in self._by_id.values():
                if (
                    other.id != spec.id
                    and model in other.model_ids
                    and (other.role == "plain") != (spec.role == "plain")
                ):
                    raise MixedRolesError(model, spec.role)

    def remove(self, worker_id: str) -> Worker | None:
        worker = self._by_id.pop(worker_id, None)
        if worker is not None:
            self.names.left(worker_id)
            self.reindex()
        return worker

    def reindex(self) -> None:
        """The address, role, models or draining of a worker have changed."""
        self._is_stale = True

    def _renewed(self) -> Mapping[Role, Mapping[str, tuple[Worker, ...]]]:
        """The pools, after all look-ups have been renewed if something has changed."""
        if self._is_stale:
            self._is_stale = False
            self._renew()
        return self._pools

    def _renew(self) -> None:
        pools: dict[Role, dict[str, list[Worker]]] = {role: {} for role in _ROLES}
        disaggregated: set[str] = set()
        by_address: dict[str, Worker] = {}
        for worker in sorted(self._by_id.values(), key=lambda worker: worker.order):
            if worker.role != "plain":
                disaggregated.update(worker.model_ids)
            if worker.address is None:
                continue
            by_address.setdefault(worker.address, worker)
            if worker.draining:
                continue
            for model in worker.model_ids:
                if self._known(worker, model):
                    pools[worker.role].setdefault(model, []).append(worker)
        self._pools = {
            role: {model: tuple(workers) for model, workers in by_model.items()}
            for role, by_model in pools.items()
        }
        self._disaggregated = frozenset(disaggregated)
        self._by_address = by_address


def _last_resort(pool: Sequence[Worker]) -> list[Worker]:
    """The half of the workers, at least two, that has not failed for longest."""
    ordered = sorted(pool, key=lambda worker: worker.breaker.failed_at)
    return ordered[: max(2, (len(ordered) + 1) // 2)]
