"""Keeps the endpoints of all Envoys up to date, and lets workers be chosen that they all know.

Separate from the gRPC service, so that tests follow every change without a connection.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog

from extproc.clock import Clock, wait_for_first
from extproc.envoy_config.endpoints import Endpoint
from extproc.metrics.service import Metrics
from extproc.workers.observer import WorkerObserver
from extproc.workers.registry import WorkerRegistry
from extproc.xds.gate import Gate
from extproc.xds.session import Request, Resource, Response, Session
from extproc.xds.snapshot import make_snapshot, prepare_entries

__all__ = ["Envoy", "Publisher"]

_log = structlog.get_logger()

# Several workers that change together make one update. A request that was just decided for a
# worker that has left reaches Envoy before the update does.
_GATHER_SECONDS: Final = 0.2
_LOOK_SECONDS: Final = 5.0


class Envoy:
    """One Envoy with an open stream."""

    def __init__(self, session: Session, peer: str, send: Callable[[Response], None]) -> None:
        self.session = session
        self.peer = peer
        self.node = ""
        self.send = send


class Publisher(WorkerObserver):
    """The endpoints of the registered workers, in one cluster of Envoy."""

    def __init__(
        self,
        cluster: str,
        registry: WorkerRegistry,
        clock: Clock,
        metrics: Metrics,
        *,
        settle_seconds: float,
        all_named: Callable[[], bool],
    ) -> None:
        """`all_named` is true once discovery has named all workers of the start."""
        self._cluster = cluster
        self._registry = registry
        self._clock = clock
        self._metrics = metrics
        self._gate = Gate(settle_seconds)
        self._settle_seconds = settle_seconds
        self._serving: frozenset[Endpoint] = frozenset()
        # Workers that left, and until when they are still served.
        self._leaving: dict[Endpoint, float] = {}
        self._all_named = all_named
        # Called when other workers may be chosen than before.
        self.known_changed: Callable[[], None] = lambda: None
        self._envoys: set[Envoy] = set()
        self._workers_changed = asyncio.Event()
        self._answered = asyncio.Event()
        self._known: frozenset[str] = frozenset()
        self.snapshot: Mapping[str, Resource] | None = None
        # True once the workers of the start may be chosen.
        self.settled = False
        registry.limit_to(self._known)

    def workers_changed(self) -> None:
        self._workers_changed.set()

    def connect(self, envoy: Envoy) -> None:
        self._envoys.add(envoy)
        self._metrics.xds_streams.set(len(self._envoys))
        _log.info("envoy_connected", peer=envoy.peer, open_streams=len(self._envoys))

    def disconnect(self, envoy: Envoy) -> None:
        self._envoys.discard(envoy)
        self._metrics.xds_streams.set(len(self._envoys))
        self._answered.set()
        _log.info("envoy_disconnected", peer=envoy.peer, open_streams=len(self._envoys))

    def receive(self, envoy: Envoy, request: Request) -> None:
        """Take a message of an Envoy, and send what follows from it."""
        before = envoy.session.rejections
        response = envoy.session.receive(request)
        if envoy.session.rejections != before:
            self._metrics.xds_rejections.inc()
            _log.error("endpoints_rejected", peer=envoy.peer, error=request.error)
        if response is not None:
            envoy.send(response)
        self._answered.set()

    def show(self) -> list[dict[str, Any]]:
        """The Envoys, for operators. `rejected` is the error of the last answer, or None."""
        return [
            {
                "peer": one.peer,
                "node": one.node,
                "acknowledged": {
                    name: resource.version for name, resource in one.session.acknowledged.items()
                },
                "rejections": one.session.rejections,
                "rejected": one.session.error,
            }
            for one in sorted(self._envoys, key=lambda one: one.peer)
        ]

    async def run(self) -> None:
        """Keep the endpoints up to date, for ever."""
        while True:
            await prepare_entries(
                [Endpoint(one.address, one.url) for one in self._registry if one.address]
            )
            self._publish()
            seconds = self._mark_known()
            now = self._clock.monotonic()
            leaving = [max(0.0, until - now) for until in self._leaving.values()]
            await self._change(
                min(_LOOK_SECONDS if seconds is None else seconds, *leaving, _LOOK_SECONDS)
            )

    def _publish(self) -> None:
        """Send the workers as they are now, if all are named and something has changed."""
        if not self._all_named():
            return
        snapshot = make_snapshot({self._cluster: self._endpoints()}, self._leaving)
        if snapshot == self.snapshot:
            return
        self.snapshot = snapshot
        # What leaves is not chosen any more before Envoys hear of it.
        self._mark_known()
        for envoy in self._envoys:
            if (response := envoy.session.update(snapshot)) is not None:
                envoy.send(response)
        versions = {name: one.version for name, one in snapshot.items()}
        workers = sum(len(one.addresses) for one in snapshot.values())
        _log.info("endpoints_published", workers=workers, version=versions)

    def _endpoints(self) -> dict[Endpoint, bool]:
        """The workers, and those that have just left: another replica may still choose them.

        True for those that get no new requests.
        """
        now = self._clock.monotonic()
        serving: dict[Endpoint, bool] = {}
        for worker in self._registry:
            if worker.address is not None:
                one = Endpoint(worker.address, worker.url)
                serving[one] = worker.draining and serving.get(one, True)
        for one in self._serving - serving.keys():
            self._leaving[one] = now + self._settle_seconds
        self._serving = frozenset(serving)
        self._leaving = {
            one: until for one, until in self._leaving.items() if until > now and one not in serving
        }
        return serving | dict.fromkeys(self._leaving, True)

    def _mark_known(self) -> float | None:
        """Let the workers be chosen that all Envoys know; see Gate.look for the seconds."""
        if self.snapshot is None:
            return None
        sessions = [one.session for one in self._envoys]
        known, seconds = self._gate.look(self.snapshot, sessions, self._clock.monotonic())
        settled = self.settled or seconds is None
        if known != self._known or settled != self.settled:
            self._known, self.settled = known, settled
            self._registry.limit_to(known)
            self.known_changed()
        return seconds

    async def _change(self, seconds: float) -> None:
        """Return when workers have changed, when an Envoy has answered, or after this time."""
        await wait_for_first(
            self._workers_changed.wait(), self._answered.wait(), self._clock.sleep(seconds)
        )
        self._answered.clear()
        if self._workers_changed.is_set():
            await self._clock.sleep(_GATHER_SECONDS)
            self._workers_changed.clear()
