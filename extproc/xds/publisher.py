"""Keeps the endpoints of all Envoys up to date, and lets workers be chosen that they all know.

Separate from the gRPC service, so that tests follow every change without a connection.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import structlog

from extproc.clock import Clock, wait_for_first
from extproc.config.models import PdModelConfig
from extproc.config.schema import Config
from extproc.envoy_config import pool_cluster
from extproc.envoy_config.endpoints import Endpoint
from extproc.metrics.service import Metrics
from extproc.workers.observer import WorkerObserver
from extproc.workers.registry import Pool, WorkerRegistry
from extproc.xds.client import Client, Outgoing, Snapshot
from extproc.xds.gate import Gate
from extproc.xds.pools import Members, Pools
from extproc.xds.resources import cluster_resource, endpoints_resource, prepare_entries
from extproc.xds.session import Request, Resource

__all__ = ["Envoy", "Publisher"]

_log = structlog.get_logger()

# Several workers that change together make one update.
_GATHER_SECONDS: Final = 0.05
_LOOK_SECONDS: Final = 5.0
# An Envoy that does not acknowledge what it was sent first holds the start up no longer.
_PATIENCE_SECONDS: Final = 5.0


class Envoy:
    """One Envoy with an open stream."""

    def __init__(self, client: Client, peer: str, send: Callable[[Outgoing], None]) -> None:
        self.client = client
        self.peer = peer
        self.node = ""
        self.send = send


class Publisher(WorkerObserver):
    """The registered workers, in a cluster of Envoy for each configured model and role."""

    def __init__(
        self,
        config: Config,
        registry: WorkerRegistry,
        clock: Clock,
        metrics: Metrics,
        *,
        all_named: Callable[[], bool],
    ) -> None:
        """`all_named` is true once discovery has named all workers of the start."""
        self._config = config
        self._registry = registry
        self._clock = clock
        self._metrics = metrics
        self._gate = Gate(config.envoy.eds_settle_secs)
        self._pools = Pools(config.envoy.eds_settle_secs)
        self._members: dict[Pool, Members] | None = None
        # Clusters depend on the configuration alone.
        self._clusters: dict[Pool, Resource] = {}
        self._all_named = all_named
        # Called when other workers may be chosen than before.
        self.known_changed: Callable[[], None] = lambda: None
        self._envoys: set[Envoy] = set()
        self._workers_changed = asyncio.Event()
        self._answered = asyncio.Event()
        self._known: dict[Pool, frozenset[str]] = {}
        self.snapshot: Snapshot | None = None
        self._first_published_at = 0.0
        # True once the workers of the start may be chosen.
        self.settled = False
        registry.limit_pools_to(self._known)

    def workers_changed(self) -> None:
        self._workers_changed.set()

    def use(self, config: Config) -> None:
        """Publish the models of another configuration from now on."""
        self._config = config
        self._clusters = {}
        self._members = None
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

    def refuse(self, envoy: Envoy, reason: str) -> None:
        """Count and log a stream that is ended since it went over a limit."""
        self._metrics.xds_streams_refused.inc()
        _log.error("envoy_refused", peer=envoy.peer, reason=reason)

    def receive(self, envoy: Envoy, type_url: str, request: Request) -> None:
        """Take a message of an Envoy, and send what follows from it. Raises StreamLimitError."""
        before = envoy.client.rejections
        outgoing = envoy.client.receive(type_url, request)
        if envoy.client.rejections != before:
            self._metrics.xds_rejections.inc()
            kind = type_url.rpartition(".")[2]
            _log.error("endpoints_rejected", peer=envoy.peer, type=kind, error=request.error)
        for one in outgoing:
            envoy.send(one)
        self._answered.set()

    def show(self) -> list[dict[str, Any]]:
        """The Envoys, for operators. `rejected` is the error of the last answer, or None."""
        return [
            {
                "peer": one.peer,
                "node": one.node,
                "acknowledged": {
                    name: found.version for name, found in one.client.endpoints.acknowledged.items()
                },
                "clusters": sorted(one.client.clusters.acknowledged),
                "rejections": one.client.rejections,
                "rejected": one.client.error,
            }
            for one in sorted(self._envoys, key=lambda one: one.peer)
        ]

    async def run(self) -> None:
        """Keep the endpoints up to date, for ever."""
        while True:
            await prepare_entries(
                [Endpoint(one.address, one.url) for one in self._registry if one.address]
            )
            await self._publish()
            waits = [self._mark_known(), self._pools.until_next_leaves(self._clock.monotonic())]
            await self._change(min([_LOOK_SECONDS, *(one for one in waits if one is not None)]))

    async def _publish(self) -> None:
        """Send the workers as they are now, if all are named and something has changed.

        Other work of the event loop comes between the steps, each of which takes some
        milliseconds for a thousand workers.
        """
        if not self._all_named():
            return
        models = {
            model.id: self._config.is_disaggregated or model.pd != PdModelConfig()
            for model in self._config.models
        }
        members = self._pools.look(models, self._registry, self._clock.monotonic())
        if members == self._members:
            return
        self._members = members
        await asyncio.sleep(0)
        snapshot = await self._snapshot_of(members)
        if self.snapshot is None:
            self._first_published_at = self._clock.monotonic()
        self.snapshot = snapshot
        # What leaves is not chosen any more before Envoys hear of it.
        self._mark_known()
        for envoy in self._envoys:
            for one in envoy.client.update(self.snapshot):
                envoy.send(one)
        versions = {name: one.version for name, one in self.snapshot.endpoints.items()}
        workers = sum(len(one.addresses) for one in self.snapshot.endpoints.values())
        _log.info("endpoints_published", workers=workers, version=versions)

    async def _snapshot_of(self, members: dict[Pool, Members]) -> Snapshot:
        clusters, endpoints = {}, {}
        for pool, found in members.items():
            name = self._config.envoy.cluster_of(*pool)
            if pool not in self._clusters:
                self._clusters[pool] = cluster_resource(pool_cluster(self._config, *pool))
            clusters[name] = self._clusters[pool]
            endpoints[name] = endpoints_resource(name, found.endpoints, found.left)
            await asyncio.sleep(0)
        return Snapshot(clusters, endpoints)

    def _mark_known(self) -> float | None:
        """Let the workers be chosen that all Envoys know; see Gate.look for the seconds."""
        if self.snapshot is None or self._members is None:
            return None
        clients = [one.client for one in self._envoys]
        by_cluster, seconds = self._gate.look(
            self.snapshot.endpoints, clients, self._clock.monotonic()
        )
        known = {pool: by_cluster[self._config.envoy.cluster_of(*pool)] for pool in self._members}
        settled = self.settled or self._are_settled(by_cluster)
        if known != self._known or settled != self.settled:
            self._known, self.settled = known, settled
            self._registry.limit_pools_to(known)
            self.known_changed()
        return seconds

    def _are_settled(self, known: dict[str, frozenset[str]]) -> bool:
        """True if all Envoys have all workers, or have had the time for that."""
        assert self.snapshot is not None  # noqa: S101 (it is what `known` is of)
        if all(known[name] == one.addresses for name, one in self.snapshot.endpoints.items()):
            return True
        return self._clock.monotonic() - self._first_published_at >= _PATIENCE_SECONDS

    async def _change(self, seconds: float) -> None:
        """Return when workers have changed, when an Envoy has answered, or after this time."""
        await wait_for_first(
            self._workers_changed.wait(), self._answered.wait(), self._clock.sleep(seconds)
        )
        self._answered.clear()
        if self._workers_changed.is_set():
            await self._clock.sleep(_GATHER_SECONDS)
            self._workers_changed.clear()
