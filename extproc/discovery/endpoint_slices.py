"""Discovery from EndpointSlices: how one is read, and the source that follows them.

The meaning of the conditions is that of Kubernetes' own proxy: without `ready` an endpoint is
ready, and one that terminates still serves the connections that it has.
"""

from collections.abc import Sequence
from typing import Final

from lightkube.models.discovery_v1 import Endpoint
from lightkube.resources.discovery_v1 import EndpointSlice

from extproc.config.schema import IP_VERSIONS, DnsLookupFamily, K8sConfig
from extproc.discovery.cluster_objects import ClusterObjects
from extproc.discovery.cluster_source import SourceParts, cluster_source, role_of, roles_by_label
from extproc.discovery.ports import pick_port
from extproc.discovery.worker_union import Reading, Sighting
from extproc.label_selectors import LabelSelector
from extproc.worker_url import WorkerUrl
from extproc.workers.worker import Role, WorkerSpec

__all__ = ["SliceReader", "slice_source"]

_OBJECTS: Final = "endpointslices"


class SliceReader:
    """How slices are read. `roles` are tried in order; without them every worker is plain."""

    def __init__(
        self,
        *,
        roles: Sequence[tuple[Role, LabelSelector]],
        port_name: str | None,
        port: int | None,
        family: DnsLookupFamily,
    ) -> None:
        self._roles = roles
        self._port_name = port_name
        self._port = port
        self._families = [f"IPv{version}" for version in IP_VERSIONS[family]]

    def read(self, found: EndpointSlice) -> Reading:
        """The workers of a slice: by the labels of the slice, which are those of its Service."""
        labels = found.metadata.labels if found.metadata is not None else None
        role = role_of(labels, self._roles)
        if role is None:
            return Reading()
        if found.addressType == "FQDN":
            return Reading(problem="fqdn_addresses")
        if found.addressType not in self._families:
            return Reading()
        port = pick_port(
            [(one.name, one.port, one.protocol) for one in found.ports or ()],
            name=self._port_name,
            number=self._port,
        )
        if port is None:
            if not found.endpoints:  # the slice of a Service without pods has no ports
                return Reading(shared=True)
            return Reading(problem="port_not_found")
        rank = self._families.index(found.addressType)
        namespace = (found.metadata and found.metadata.namespace) or ""
        sightings, left = [], []
        for endpoint in found.endpoints or ():
            if not endpoint.addresses:
                continue
            # No meaning is defined for further addresses of one endpoint.
            url = WorkerUrl("http", endpoint.addresses[0], port)
            uid = endpoint.targetRef.uid if endpoint.targetRef is not None else None
            # Without a pod the address is all that stays when the endpoint moves.
            worker_id = f"{uid}:{port}" if uid else f"{namespace}/{url}"
            draining = _is_draining(endpoint)
            if draining is None:
                left.append(worker_id)
                continue
            spec = WorkerSpec(id=worker_id, url=url, role=role)
            sightings.append(Sighting(spec, draining, rank))
        return Reading(sightings, shared=True, left=left)


def slice_source(config: K8sConfig, parts: SourceParts) -> ClusterObjects[EndpointSlice]:
    """A WorkerSource of the configured slices; raises ConfigError."""
    reader = SliceReader(
        roles=roles_by_label(config),
        port_name=config.port_name,
        port=config.port,
        family=config.address_family,
    )
    return cluster_source(EndpointSlice, _OBJECTS, reader.read, config, parts)


def _is_draining(endpoint: Endpoint) -> bool | None:
    """Whether the endpoint drains; None if it is no worker now."""
    conditions = endpoint.conditions
    if conditions is None:
        return False
    if conditions.terminating:
        return None if conditions.serving is False else True
    return None if conditions.ready is False else False
