"""Who is there, by id, by model and by address.

Routing reads a ready tuple per model; all work is done when membership changes. Validation
and insertion happen in one step of the event loop, so two workers can not slip past the rule
that plain and PD workers of one model never mix.
"""

from collections.abc import Iterable, Iterator

import msgspec

from extproc.workers.worker import Mode, Worker

__all__ = ["MixedModesError", "WorkerRegistry"]


class MixedModesError(Exception):
    """The worker's role does not fit those already serving the model."""

    def __init__(self, model: str, mode: Mode) -> None:
        super().__init__(
            f"a {mode} worker can not join model {model}: its workers are of "
            "the other kind (plain and prefill/decode do not mix)"
        )
        self.model = model


class WorkerRegistry:
    """The live workers. Insertion is an upsert by id; memberships of the old one go first."""

    def __init__(self) -> None:
        self._by_id: dict[str, Worker] = {}
        self._pools: dict[str, tuple[Worker, ...]] = {}
        self._by_address: dict[str, Worker] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, worker_id: str) -> Worker | None:
        return self._by_id.get(worker_id)

    def pool(self, model: str) -> tuple[Worker, ...]:
        """The workers that can serve a plain request for the model, in registration order."""
        return self._pools.get(model, ())

    def usable(self, models: Iterable[str]) -> set[Worker]:
        """Every worker in the pool of at least one of the models."""
        return {worker for model in models for worker in self.pool(model)}

    def at_address(self, address: str) -> Worker | None:
        """The worker Envoy knows as `ip:port`."""
        return self._by_address.get(address)

    def upsert(self, worker: Worker) -> None:
        """Insert or replace; raises MixedModesError and changes nothing when refused."""
        self._check_modes(worker, worker.mode)
        self._by_id[worker.id] = worker
        self.reindex()

    def set_mode(self, worker: Worker, mode: Mode) -> None:
        """Change a registered worker's role; raises MixedModesError like upsert."""
        self._check_modes(worker, mode)
        worker.mode = mode
        worker.spec = msgspec.structs.replace(worker.spec, mode=mode)
        self.reindex()

    def _check_modes(self, worker: Worker, mode: Mode) -> None:
        for model in worker.model_ids:
            for other in self._by_id.values():
                if (
                    other.id != worker.id
                    and model in other.model_ids
                    and (other.mode == "plain") != (mode == "plain")
                ):
                    raise MixedModesError(model, mode)

    def remove(self, worker_id: str) -> Worker | None:
        worker = self._by_id.pop(worker_id, None)
        if worker is not None:
            self.reindex()
        return worker

    def reindex(self) -> None:
        """Rebuild the look-ups after a worker's address, mode or models changed in place."""
        pools: dict[str, list[Worker]] = {}
        by_address: dict[str, Worker] = {}
        for worker in sorted(self._by_id.values(), key=lambda worker: worker.order):
            if worker.address is None:
                continue
            by_address.setdefault(worker.address, worker)
            if worker.mode == "plain":
                for model in worker.model_ids:
                    pools.setdefault(model, []).append(worker)
        self._pools = {model: tuple(workers) for model, workers in pools.items()}
        self._by_address = by_address
