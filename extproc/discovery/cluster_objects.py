"""Discovery in a Kubernetes cluster: what its objects say becomes events about workers.

The backends differ in the kind of object and in how one is read. Following the objects, uniting
them and warning of those that name no usable worker is the same for all.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final, Generic, TypeVar

import structlog
from lightkube.core.resource import NamespacedResource
from lightkube.models.meta_v1 import ObjectMeta

from extproc.clock import Clock
from extproc.discovery.kube_api import WatchEvent
from extproc.discovery.list_watch import ListWatch, Snapshot
from extproc.discovery.rank_map import RankMap
from extproc.discovery.worker_union import Reading, WorkerUnion
from extproc.workers.source import Listed, WorkerEvent

__all__ = ["ClusterObjects"]

_log = structlog.get_logger()

_KindT = TypeVar("_KindT", bound=NamespacedResource)

# How long a worker of a deleted object may take to appear in another one. A controller writes two
# objects, one after the other, and may be slowed down by the API server in between.
_MOVE_SECONDS: Final = 3.0
# So many workers of a list are read in one turn of the event loop.
_READ_AT_ONCE: Final = 100
_FIXES: Final = {
    "bootstrap_port_invalid": "write the number of a port into the annotation",
    "fqdn_addresses": "give the Service IP addresses; slices of host names cannot be used",
    "port_not_found": "set port_name to a port of the Service or the pod, or set port",
    "ranks_invalid": "write a number, or a range such as 4-7, into the label or annotation",
}


class ClusterObjects(Generic[_KindT]):
    """A WorkerSource: the workers that objects of one kind name."""

    def __init__(
        self,
        list_watch: ListWatch[_KindT],
        read: Callable[[_KindT], Reading],
        what: str,
        clock: Clock,
        union: WorkerUnion | None = None,
    ) -> None:
        """`read` gives the workers that one object names; `what` is the kind in logs.

        A `union` knows what was reported before.
        """
        self._list_watch = list_watch
        self._read = read
        self._what = what
        self._clock = clock
        self._union = union or WorkerUnion()
        self._rank_map = RankMap()
        self._is_first = True
        # The problem of which was warned, by object.
        self._warned: dict[str, str] = {}

    async def events(self) -> AsyncGenerator[WorkerEvent, None]:
        listed = False
        async with aclosing(self._list_watch.follow()) as steps:
            while True:
                coming = asyncio.ensure_future(anext(steps))
                try:
                    while not await self._is_next(coming):
                        for event in self._union.expire(self._clock.monotonic()):
                            yield event
                    step = await coming
                finally:
                    if not coming.done():
                        coming.cancel()
                        await asyncio.gather(coming, return_exceptions=True)
                for event in await self._take(step):
                    yield event
                for event in self._union.expire(self._clock.monotonic()):
                    yield event
                if not listed and isinstance(step, Snapshot):
                    listed = True
                    yield Listed()

    async def _is_next(self, coming: asyncio.Future[Snapshot[_KindT] | WatchEvent[_KindT]]) -> bool:
        """Wait for the next step, or until a worker is to be removed; returns which it was."""
        at = self._union.next_expiry
        if at is None:
            await asyncio.wait([coming])
            return True
        timer = asyncio.create_task(self._clock.sleep(max(0.0, at - self._clock.monotonic())))
        waits: list[asyncio.Future[Any]] = [coming, timer]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            await asyncio.gather(timer, return_exceptions=True)
        # A step comes first: it may name the worker again.
        return coming.done()

    async def _take(self, step: Snapshot[_KindT] | WatchEvent[_KindT]) -> list[WorkerEvent]:
        if isinstance(step, Snapshot):
            found = {_key(one): one for one in step.objects}
            self._warned = {key: text for key, text in self._warned.items() if key in found}
            # What was reported before was selected by other rules.
            others_left, self._is_first = self._is_first, False
            readings = self._rank_map.replace(await self._read_all(found))
            return self._union.replace(readings, others_left=others_left)
        key = _key(step.object)
        if step.type != "DELETED":
            return self._put(key, self._read_one(key, step.object))
        self._warned.pop(key, None)
        if self._read(step.object).shared:
            return self._union.delete(key, self._clock.monotonic() + _MOVE_SECONDS)
        return self._put(key, Reading())

    def _put(self, key: str, reading: Reading) -> list[WorkerEvent]:
        changed = self._rank_map.put(key, reading)
        return [event for one, found in changed.items() for event in self._union.put(one, found)]

    async def _read_all(self, objects: Mapping[str, _KindT]) -> dict[str, Reading]:
        readings: dict[str, Reading] = {}
        read = 0
        for key, one in objects.items():
            readings[key] = self._read_one(key, one)
            read += max(1, len(readings[key].sightings))
            if read >= _READ_AT_ONCE:
                read = 0
                await asyncio.sleep(0)
        return readings

    def _read_one(self, key: str, one: _KindT) -> Reading:
        reading = self._read(one)
        if reading.problem is None:
            self._warned.pop(key, None)
        elif self._warned.get(key) != reading.problem:
            self._warned[key] = reading.problem
            _log.warning(
                "cluster_object_not_usable",
                objects=self._what,
                name=_name(one),
                reason=reading.problem,
                fix=_FIXES[reading.problem],
            )
        return reading


def _key(one: NamespacedResource) -> str:
    """The uid, which differs when an object of the same name is made again."""
    metadata = _metadata(one)
    return (metadata.uid if metadata is not None else None) or _name(one)


def _name(one: NamespacedResource) -> str:
    metadata = _metadata(one)
    return "" if metadata is None else f"{metadata.namespace}/{metadata.name}"


def _metadata(one: NamespacedResource) -> ObjectMeta | None:
    """Every kind has it, but lightkube's base class does not say so."""
    found: ObjectMeta | None = getattr(one, "metadata", None)
    return found
