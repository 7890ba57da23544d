"""Unites what several objects of a cluster say about workers, and tells what has changed.

A worker can be named by more than one object: its Service is spread over endpoint slices, a
dual-stack pod is in one of each family, and an endpoint moves from one slice to another. So the
state is kept by object, and only the union over all objects is compared. There is no I/O here.

A worker that no object names any more has left, if an object has said so: that it is not ready, or
that it ends. Without that it has vanished, which may be a mistake: the consumer decides what it
does with such a worker, and here it is forgotten.

The API server promises no order between objects. A worker whose object was deleted may appear in
another one: it gets no new requests, but is removed only when it has not appeared again in time.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, Literal

import msgspec
from msgspec import Struct

from extproc.worker_url import WorkerUrl
from extproc.workers.source import (
    Added,
    DrainingChanged,
    Removed,
    RoleChanged,
    Vanished,
    WorkerEvent,
)
from extproc.workers.worker import Role, WorkerSpec

__all__ = ["Reading", "Sighting", "WorkerUnion"]

# The oldest of more is removed at once: names whose addresses change all the time add up.
_LEAVING_MAX: Final = 2_000
# Far more than are held at a time.
_VANISHED_MAX: Final = 10_000
_ROLE_ORDER: Final[dict[Role, int]] = {"prefill": 0, "decode": 1, "plain": 2}


class Sighting(Struct, frozen=True):
    """What one object says about one worker. The sighting with the lowest `rank` gives the URL.

    One that is draining and not `serving` need not join; if it has joined, it may have streams.
    """

    spec: WorkerSpec
    draining: bool = False
    rank: int = 0
    serving: bool = True

    def _order(self) -> tuple[int, int, str]:
        return (_ROLE_ORDER[self.spec.role], self.rank, str(self.spec.url))


class Reading(Struct, frozen=True):
    """The workers that an object names; `problem` says why it names no usable worker.

    One that is `shared` with other objects names only a part of their workers. So a worker that it
    does not name any more may have moved or vanished; those that it says are not to be used now
    are in `left`, by id. An object that is not shared says by itself that all others have left.

    Objects of one `group` are parts of one worker, and `rank_hosts` are the addresses of the
    data-parallel ranks that run in this one: see RankMap.
    """

    sightings: Sequence[Sighting] = ()
    shared: bool = False
    left: Collection[str] = ()
    group: str = ""
    rank_hosts: Mapping[int, str] = msgspec.field(default_factory=dict)
    problem: (
        Literal["bootstrap_port_invalid", "fqdn_addresses", "port_not_found", "ranks_invalid"]
        | None
    ) = None


class WorkerUnion:
    """The workers that the objects name, as they were reported last."""

    def __init__(self) -> None:
        self._by_object: dict[str, Sequence[Sighting]] = {}
        # By id of the worker, then by object.
        self._by_worker: dict[str, dict[str, Sighting]] = {}
        self._told: dict[str, Sighting] = {}
        # Reported as vanished, in this order, and neither named nor removed since then.
        self._vanished: dict[str, None] = {}
        # Those that no object names now, and when they are removed. They were reported as draining.
        self._leaving: dict[str, float] = {}
        self._leaving_at: dict[WorkerUrl, dict[str, None]] = {}

    def replace(
        self, objects: Mapping[str, Reading], *, others_left: bool = False
    ) -> list[WorkerEvent]:
        """Take over a complete list of objects, by key, at once.

        Workers of other objects have vanished; with `others_left` they have left.
        """
        gone = {key: Reading(shared=not others_left) for key in self._by_object}
        touched, left = self._take(gone | dict(objects))
        left.update(self._leaving)
        if others_left:
            left.update(self._vanished)
        return self._compare(touched | dict.fromkeys(self._leaving), left, None)

    def put(self, key: str, reading: Reading) -> list[WorkerEvent]:
        """Take over one object that is new or has changed."""
        touched, left = self._take({key: reading})
        return self._compare(touched, left, None)

    def delete(self, key: str, hold_until: float) -> list[WorkerEvent]:
        """Forget an object; a worker that is in no other one by that time is then removed."""
        touched, _ = self._take({key: Reading()})
        return self._compare(touched, (), hold_until)

    @property
    def next_expiry(self) -> float | None:
        """When the next worker is to be removed."""
        return min(self._leaving.values(), default=None)

    def expire(self, now: float) -> list[WorkerEvent]:
        """Remove the workers that have not appeared again in time."""
        return [self._remove(one) for one, at in list(self._leaving.items()) if at <= now]

    def _take(self, objects: Mapping[str, Reading]) -> tuple[dict[str, None], set[str]]:
        """Returns the ids of workers that may have changed, and of those that have left."""
        touched: dict[str, None] = {}
        left: set[str] = set()
        for key, reading in objects.items():
            before, sightings = self._by_object.pop(key, ()), reading.sightings
            if sightings:
                self._by_object[key] = sightings
            left.update(reading.left)
            if before == sightings:
                continue
            for one in before:
                touched[one.spec.id] = None
                self._by_worker[one.spec.id].pop(key, None)
            if not reading.shared:
                left.update(one.spec.id for one in before)
            for one in sightings:
                touched[one.spec.id] = None
                known = self._by_worker.setdefault(one.spec.id, {})
                known[key] = _united([one, known[key]]) if key in known else one
        return touched, left

    def _compare(
        self, touched: Iterable[str], left: Collection[str], hold_until: float | None
    ) -> list[WorkerEvent]:
        """The events for workers that may have changed; an address is freed before it is reused."""
        leaving: list[WorkerEvent] = []
        for worker_id in left:
            if worker_id in self._vanished and not self._by_worker.get(worker_id):
                del self._vanished[worker_id]
                leaving.append(Removed(worker_id))
        staying: list[WorkerEvent] = []
        for worker_id in touched:
            found = self._by_worker.get(worker_id)
            told = self._told.get(worker_id)
            if not found:
                self._by_worker.pop(worker_id, None)
                if told is not None:
                    leaving += self._leave(told, told.spec.id in left, hold_until)
                continue
            self._stay(worker_id)
            now = _united(list(found.values()))
            if now == told:
                continue
            if told is None and not now.serving and worker_id not in self._vanished:
                continue
            if told is None or _is_other(told.spec, now.spec):
                if told is not None:
                    leaving.append(Removed(worker_id))
                self._vanished.pop(worker_id, None)
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
        replaced = [one for url in urls for one in self._leaving_at.get(url, ())]
        return [*leaving, *(self._remove(one) for one in replaced), *staying]

    def _leave(self, told: Sighting, left: bool, hold_until: float | None) -> list[WorkerEvent]:
        worker_id = told.spec.id
        if left or (told.draining and worker_id not in self._leaving):
            return [self._remove(worker_id)]
        if worker_id in self._leaving:
            return []
        if hold_until is None:
            del self._told[worker_id]
            self._vanished[worker_id] = None
            if len(self._vanished) > _VANISHED_MAX:
                del self._vanished[next(iter(self._vanished))]
            return [Vanished(told.spec)]
        self._leaving[worker_id] = hold_until
        self._leaving_at.setdefault(told.spec.url, {})[worker_id] = None
        self._told[worker_id] = msgspec.structs.replace(told, draining=True)
        events: list[WorkerEvent] = [DrainingChanged(worker_id, True)]
        if len(self._leaving) > _LEAVING_MAX:
            events.append(self._remove(next(iter(self._leaving))))
        return events

    def _stay(self, worker_id: str) -> None:
        if self._leaving.pop(worker_id, None) is not None:
            url = self._told[worker_id].spec.url
            at_url = self._leaving_at[url]
            del at_url[worker_id]
            if not at_url:
                del self._leaving_at[url]

    def _remove(self, worker_id: str) -> Removed:
        self._stay(worker_id)
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
