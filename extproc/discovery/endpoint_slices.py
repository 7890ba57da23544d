"""Discovery from EndpointSlices: how one is read, and the source that follows them.

The meaning of the conditions is that of Kubernetes' own proxy: without `ready` an endpoint is
ready, and one that terminates still serves the connections that it has.
"""

from collections.abc import Sequence
from random import Random
from typing import Final

from lightkube.models.discovery_v1 import Endpoint, EndpointPort
from lightkube.resources.discovery_v1 import EndpointSlice

from extproc.clock import Clock
from extproc.config.schema import DnsLookupFamily, K8sConfig
from extproc.discovery.cluster_objects import ClusterObjects
from extproc.discovery.kube_api import KubeApi, WatchLimits, open_client
from extproc.discovery.list_watch import ListWatch
from extproc.discovery.worker_union import Reading, Sighting
from extproc.label_selectors import LabelSelector, parse_selector
from extproc.metrics.service import DiscoveryMetrics
from extproc.worker_url import WorkerUrl
from extproc.workers.worker import Role, WorkerSpec

__all__ = ["SliceReader", "slice_source"]

_OBJECTS: Final = "endpointslices"
# SGLang's own port, used where neither the slice nor the configuration names one.
_DEFAULT_PORT: Final = 30000
# The families in the order of preference.
_FAMILIES: Final[dict[DnsLookupFamily, tuple[str, ...]]] = {
    "v4_preferred": ("IPv4", "IPv6"),
    "v6_preferred": ("IPv6", "IPv4"),
    "v4_only": ("IPv4",),
    "v6_only": ("IPv6",),
}


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
        self._families = _FAMILIES[family]

    def read(self, found: EndpointSlice) -> Reading:
        """The workers of a slice: by the labels of the slice, which are those of its Service."""
        role = self._role(found)
        if role is None:
            return Reading()
        if found.addressType == "FQDN":
            return Reading(problem="fqdn_addresses")
        if found.addressType not in self._families:
            return Reading()
        port = self._port_of(found.ports or ())
        if port is None:
            return Reading(problem="port_not_found")
        rank = self._families.index(found.addressType)
        namespace = (found.metadata and found.metadata.namespace) or ""
        sightings = []
        for endpoint in found.endpoints or ():
            draining = _is_draining(endpoint)
            if draining is None or not endpoint.addresses:
                continue
            # No meaning is defined for further addresses of one endpoint.
            url = WorkerUrl("http", endpoint.addresses[0], port)
            uid = endpoint.targetRef.uid if endpoint.targetRef is not None else None
            spec = WorkerSpec(
                # Without a pod the address is all that stays when the endpoint moves.
                id=f"{uid}:{port}" if uid else f"{namespace}/{url}",
                url=url,
                role=role,
            )
            sightings.append(Sighting(spec, draining, rank))
        return Reading(sightings)

    def _role(self, found: EndpointSlice) -> Role | None:
        if not self._roles:
            return "plain"
        labels = found.metadata.labels if found.metadata is not None else None
        return next((role for role, selector in self._roles if selector.matches(labels)), None)

    def _port_of(self, ports: Sequence[EndpointPort]) -> int | None:
        """By name, then by number, then the first of the slice; None if the name is not there."""
        usable = [port for port in ports if port.port and (port.protocol or "TCP") == "TCP"]
        if self._port_name is not None:
            for port in usable:
                if port.name == self._port_name:
                    return port.port
            return self._port
        if self._port is not None:
            return self._port
        return usable[0].port if usable else _DEFAULT_PORT


def slice_source(
    config: K8sConfig,
    *,
    clock: Clock,
    random: Random,
    metrics: DiscoveryMetrics,
    limits: WatchLimits | None = None,
) -> ClusterObjects[EndpointSlice]:
    """A WorkerSource of the configured slices; raises ConfigError."""
    roles: list[tuple[Role, LabelSelector]] = []
    if config.prefill_selector is not None and config.decode_selector is not None:
        roles.append(("prefill", parse_selector(config.prefill_selector)))
        roles.append(("decode", parse_selector(config.decode_selector)))
    reader = SliceReader(
        roles=roles,
        port_name=config.port_name,
        port=config.port,
        family=config.address_family,
    )
    api = KubeApi(
        open_client(config.kubeconfig),
        EndpointSlice,
        namespace=config.namespace,
        selector=config.label_selector,
        limits=limits,
    )
    list_watch = ListWatch(api, _OBJECTS, clock=clock, random=random, metrics=metrics)
    return ClusterObjects(list_watch, reader.read, _OBJECTS, clock)


def _is_draining(endpoint: Endpoint) -> bool | None:
    """Whether the endpoint drains; None if it is no worker now."""
    conditions = endpoint.conditions
    if conditions is None:
        return False
    if conditions.terminating:
        return None if conditions.serving is False else True
    return None if conditions.ready is False else False
