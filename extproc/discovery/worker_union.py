"""Unites what several objects of a cluster say about workers, and tells what has changed.

A worker can be named by more than one object: its Service is spread over endpoint slices, a
dual-stack pod is in one of each family, and an endpoint moves from one slice to another. So the
state is kept by object, and only the union over all objects is compared. There is no I/O here.

The API server promises no order between objects. A worker that moves may be in no object for a
moment: it gets no new requests, but is removed only when it has not appeared again in time.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

import msgspec
from msgspec import Struct

from extproc.workers.source import Added, DrainingChanged, Removed, RoleChanged, WorkerEvent
from extproc.workers.worker import Role, WorkerSpec

__all__ = ["Reading", "Sighting", "WorkerUnion"]

_ROLE_ORDER: Final[dict[Role, int]] = {"prefill": 0, "decode": 1, "plain": 2}


class Sighting(Struct, frozen=True):
    """What one object says about one worker. The sighting with the lowest `rank` gives the URL."""

    spec: WorkerSpec
    draining: bool = False
    rank: int = 0

    def _order(self) -> tuple[int, int, str]:
        return (_ROLE_ORDER[self.spec.role], self.rank, str(self.spec.url))


class Reading(Struct, frozen=True):
    """The workers that an object names; `problem` says why it names no usable worker."""

    sightings: Sequence[Sighting] = ()
    problem: Literal["bootstrap_port_invalid", "fqdn_addresses", "port_not_found"] | None = None


class WorkerUnion:
    """The workers that the objects name, as they were reported last."""

    def __init__(self) -> None:
        self._by_object: dict[str, Sequence[Sighting]] = {}
        # By id of the worker, then by object.
        self._by_worker: dict[str, dict[str, Sighting]] = {}
        self._told: dict[str, Sighting] = {}
        # Those that no object names now, and when they are removed. They were reported as draining.
        self._leaving: dict[str, float] = {}

    def replace(self, objects: Mapping[str, Sequence[Sighting]]) -> list[WorkerEvent]:
        """Take over a complete list of objects, by key; all others are gone at once."""
        gone: dict[str, Sequence[Sighting]] = {
            key: () for key in self._by_object if key not in objects
        }
        return self._compare(self._take(gone | dict(objects)) | dict.fromkeys(self._leaving), None)

    def put(self, key: str, sightings: Sequence[Sighting], hold_until: float) -> list[WorkerEvent]:
        """Take over one object that is new or has changed; without sightings it is forgotten.

        A worker that no object names any more is removed by `expire` at that time.
        """
        return self._compare(self._take({key: sightings}), hold_until)

    @property
    def next_expiry(self) -> float | None:
        """When the next worker is to be removed."""
        return min(self._leaving.values(), default=None)

    def expire(self, now: float) -> list[WorkerEvent]:
        """Remove the workers that have not appeared again in time."""
        return [self._remove(one) for one, at in list(self._leaving.items()) if at <= now]

    def _take(self, objects: Mapping[str, Sequence[Sighting]]) -> dict[str, None]:
        """Returns the ids of workers that may have changed."""
        touched: dict[str, None] = {}
        for key, sightings in objects.items():
            before = self._by_object.pop(key, ())
            if sightings:
                self._by_object[key] = sightings
            if before == sightings:
                continue
            for one in before:
                touched[one.spec.id] = None
                self._by_worker[one.spec.id].pop(key, None)
            for one in sightings:
                touched[one.spec.id] = None
                known = self._by_worker.setdefault(one.spec.id, {})
                known[key] = _united([one, known[key]]) if key in known else one
        return touched

    def _compare(self, touched: Iterable[str], hold_until: float | None) -> list[WorkerEvent]:
        """The events for workers that may have changed; an address is freed before it is reused."""
        leaving: list[WorkerEvent] = []
        staying: list[WorkerEvent] = []
        for worker_id in touched:
            found = self._by_worker.get(worker_id)
            told = self._told.get(worker_id)
            if not found:
                self._by_worker.pop(worker_id, None)
                if told is not None:
                    leaving += self._leave(told, hold_until)
                continue
            self._leaving.pop(worker_id, None)
            now = _united(list(found.values()))
            if told is None and now.draining:
                continue  # It is not worth while to join.
            if now == told:
                continue
            if told is None or _is_other(told.spec, now.spec):
                if told is not None:
                    leaving.append(Removed(worker_id))
                staying.append(Added(now.spec))
                if now.draining:
                    staying.append(DrainingChanged(worker_id, True))
            else:
                if told.spec.role != now.spec.role:
                    staying.append(RoleChanged(worker_id, now.spec.role))
                if told.draining != now.draining:
                    staying.append(DrainingChanged(worker_id, now.draining))
            self._told[worker_id] = now
        urls = {event.spec.url for event in staying if isinstance(event, Added)}
        replaced = [one for one in self._leaving if self._told[one].spec.url in urls]
        return [*leaving, *(self._remove(one) for one in replaced), *staying]

    def _leave(self, told: Sighting, hold_until: float | None) -> list[WorkerEvent]:
        worker_id = told.spec.id
        if hold_until is None or (told.draining and worker_id not in self._leaving):
            return [self._remove(worker_id)]
        if worker_id in self._leaving:
            return []
        self._leaving[worker_id] = hold_until
        self._told[worker_id] = msgspec.structs.replace(told, draining=True)
        return [DrainingChanged(worker_id, True)]

    def _remove(self, worker_id: str) -> Removed:
        self._leaving.pop(worker_id, None)
        del self._told[worker_id]
        return Removed(worker_id)


def _united(sightings: Sequence[Sighting]) -> Sighting:
    """One sighting of several of the same worker: a pod that terminates does not come back."""
    if len(sightings) == 1:
        return sightings[0]
    found = sorted(sightings, key=Sighting._order)
    return msgspec.structs.replace(found[0], draining=any(one.draining for one in found))


def _is_other(before: WorkerSpec, now: WorkerSpec) -> bool:
    """True if more than the role differs: the worker has to be asked as a new one."""
    return before != msgspec.structs.replace(now, role=before.role)
