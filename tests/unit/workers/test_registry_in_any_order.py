"""After any changes, the look-ups give what a search of all workers would give."""

from typing import get_args

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from extproc.workers.registry import MixedRolesError, WorkerRegistry
from extproc.workers.worker import Role, Worker
from tests.builders import make_spec, make_worker

_ALL_ROLES: tuple[Role, ...] = get_args(Role)
_ALL_MODELS = ("m", "n")
_NUMBERS = st.integers(1, 6)
_ROLES = st.sampled_from(_ALL_ROLES)
_MODELS = st.lists(st.sampled_from(_ALL_MODELS), unique=True)


def _url(number: int) -> str:
    return f"http://10.0.0.{number}:8000"


class Fleet(RuleBasedStateMachine):
    """A registry, and a plain list of the workers that it should contain."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = WorkerRegistry()
        self.workers: dict[str, Worker] = {}
        self.next_order = 0

    def fits(self, worker_id: str, models: tuple[str, ...], role: Role) -> bool:
        return all(
            worker.id == worker_id
            or not set(models) & set(worker.model_ids)
            or (worker.role == "plain") == (role == "plain")
            for worker in self.workers.values()
        )

    @rule(number=_NUMBERS, role=_ROLES, models=_MODELS, resolved=st.booleans())
    def join(self, number: int, role: Role, models: list[str], resolved: bool) -> None:
        worker = make_worker(
            _url(number), order=self.next_order, role=role, model_ids=models, resolved=resolved
        )
        self.next_order += 1
        fits = self.fits(worker.id, worker.model_ids, role)
        try:
            self.registry.upsert(worker)
        except MixedRolesError:
            assert not fits
        else:
            assert fits
            self.workers[worker.id] = worker

    @rule(number=_NUMBERS)
    def leave(self, number: int) -> None:
        assert self.registry.remove(_url(number)) is self.workers.pop(_url(number), None)

    @rule(number=_NUMBERS, role=_ROLES, port=st.none() | st.integers(1, 65535))
    def flip(self, number: int, role: Role, port: int | None) -> None:
        worker = self.workers.get(_url(number))
        if worker is None:
            return
        before, fits = worker.spec, self.fits(worker.id, worker.model_ids, role)
        try:
            self.registry.set_role(worker, role, port)
        except MixedRolesError:
            assert not fits
            assert (worker.role, worker.spec) == (before.role, before)
        else:
            assert fits
            assert (worker.role, worker.spec.role, worker.spec.bootstrap_port) == (role, role, port)

    @rule(number=_NUMBERS, role=_ROLES, models=_MODELS)
    def update(self, number: int, role: Role, models: list[str]) -> None:
        worker = self.workers.get(_url(number))
        if worker is None:
            return
        fits = self.fits(worker.id, tuple(models), role)
        try:
            self.registry.update(worker, make_spec(_url(number), role=role, model_ids=models))
        except MixedRolesError:
            assert not fits
        else:
            assert fits
            assert (worker.role, worker.model_ids) == (role, tuple(models))

    @rule(number=_NUMBERS, has_address=st.booleans())
    def resolve(self, number: int, has_address: bool) -> None:
        if worker := self.workers.get(_url(number)):
            worker.address = f"10.0.0.{number}:8000" if has_address else None
            self.registry.reindex()

    @invariant()
    def look_ups_agree(self) -> None:
        registry = self.registry
        in_order = sorted(self.workers.values(), key=lambda worker: worker.order)
        assert set(registry) == set(in_order)
        usable: set[Worker] = set()
        for model in _ALL_MODELS:
            pools = {
                role: tuple(
                    worker
                    for worker in in_order
                    if worker.role == role and model in worker.model_ids and worker.address
                )
                for role in _ALL_ROLES
            }
            for role, pool in pools.items():
                assert registry.pool_of(model, role) == pool
                usable.update(pool)
            assert registry.pool_of(model, "plain") == pools["plain"]
            assert not (pools["plain"] and (pools["prefill"] or pools["decode"]))
            assert registry.is_served(model) is bool(
                pools["plain"] or (pools["prefill"] and pools["decode"])
            )
            assert registry.is_disaggregated(model) is any(
                model in worker.model_ids and worker.role != "plain" for worker in in_order
            )
        assert registry.usable(_ALL_MODELS) == usable


TestFleet = Fleet.TestCase
