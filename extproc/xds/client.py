"""One client's stream of clusters and endpoints, in the order in which Envoy needs them.

A cluster goes before its endpoints. Envoy makes a cluster that has changed anew, and then waits for
its endpoints although they are the same, so these are sent again. Without I/O, like the sessions of
the two types that it holds.
"""

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from extproc.xds.session import Request, Resource, Response, Session

__all__ = ["CLUSTERS_TYPE", "ENDPOINTS_TYPE", "Client", "Outgoing", "Snapshot"]

CLUSTERS_TYPE: Final = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
ENDPOINTS_TYPE: Final = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"

# A response, with the type of its resources.
Outgoing = tuple[str, Response]


class Snapshot(Struct, frozen=True):
    """All that there is to send, by the names of the clusters."""

    clusters: Mapping[str, Resource]
    endpoints: Mapping[str, Resource]


class Client:
    """What one client is sent, and what it has acknowledged."""

    def __init__(self, form: type[Session], snapshot: Snapshot | None) -> None:
        """`form` is that of the protocol; `snapshot` is None while it is not known."""
        self.clusters = form(None if snapshot is None else snapshot.clusters)
        self.endpoints = form(None if snapshot is None else snapshot.endpoints)

    @property
    def rejections(self) -> int:
        return self.clusters.rejections + self.endpoints.rejections

    @property
    def error(self) -> str | None:
        """The error of the last answer about either type, None if that was an acknowledgement."""
        return self.clusters.error or self.endpoints.error

    def asks_for(self, cluster: str) -> bool:
        """True if the client uses this cluster, or will as soon as it has it."""
        return self.clusters.subscribes_to(cluster) or self.endpoints.subscribes_to(cluster)

    def has(self, cluster: str, address: str) -> bool:
        """True if the client has acknowledged the cluster and this endpoint in it."""
        if self.clusters.subscribes_to(cluster) and cluster not in self.clusters.acknowledged:
            return False
        resource = self.endpoints.acknowledged.get(cluster)
        return resource is not None and address in resource.addresses

    def receive(self, type_url: str, request: Request) -> list[Outgoing]:
        """Take a message about one type; returns what is to be sent now, in this order."""
        if type_url == CLUSTERS_TYPE:
            return self._with_endpoints(self.clusters.receive(request))
        if type_url == ENDPOINTS_TYPE:
            return _outgoing(ENDPOINTS_TYPE, self.endpoints.receive(request))
        return []  # Envoy waits for other types only where its file asks for them.

    def update(self, snapshot: Snapshot) -> list[Outgoing]:
        """Take other resources; returns what is to be sent now, in this order."""
        sent = self._with_endpoints(self.clusters.update(snapshot.clusters))
        return sent + _outgoing(ENDPOINTS_TYPE, self.endpoints.update(snapshot.endpoints))

    def _with_endpoints(self, response: Response | None) -> list[Outgoing]:
        """The response about clusters, and the endpoints that must follow it."""
        if response is None:
            return []
        again = self.endpoints.renew(response.resources)
        return [(CLUSTERS_TYPE, response), *_outgoing(ENDPOINTS_TYPE, again)]


def _outgoing(type_url: str, response: Response | None) -> list[Outgoing]:
    return [] if response is None else [(type_url, response)]
