"""Discovery from pods, for workers without a Service: how one is read, and the source.

Only the fields that are used are decoded. The bookmarks of a watch leave required fields of a pod
empty, so that the complete type could not decode them.
"""

import re
from collections.abc import Sequence
from typing import Final

import msgspec
from lightkube.core.resource import ApiInfo, NamespacedResourceG, ResourceDef
from lightkube.models.meta_v1 import ObjectMeta
from msgspec import Struct, field

from extproc.config.schema import IP_VERSIONS, DnsLookupFamily, K8sPodsConfig
from extproc.discovery.cluster_objects import ClusterObjects
from extproc.discovery.cluster_source import SourceParts, cluster_source, role_of, roles_by_label
from extproc.discovery.ports import pick_port
from extproc.discovery.worker_union import Reading, Sighting
from extproc.label_selectors import LabelSelector
from extproc.worker_url import WorkerUrl
from extproc.workers.worker import Role, WorkerSpec

__all__ = ["PodReader", "WorkerPod", "pod_reader", "pod_source"]

_OBJECTS: Final = "pods"
# Of the pods of one LeaderWorkerSet group only the leader serves requests.
_INDEX_IN_GROUP: Final = "leaderworkerset.sigs.k8s.io/worker-index"
_LEADER: Final = "0"
# The pods of a group have the same, and those of the group that replaces it have another one.
_GROUP: Final = "leaderworkerset.sigs.k8s.io/group-key"
# As many as kv.ranks_per_worker_max can be.
_RANKS_MAX: Final = 1024
_RANKS: Final = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)
_PORT_MAX: Final = 65535


class _Port(Struct, rename="camel"):
    container_port: int | None = None
    name: str | None = None
    protocol: str | None = None


class _Container(Struct):
    ports: list[_Port] | None = None


class _Spec(Struct):
    containers: list[_Container] | None = None


class _Condition(Struct):
    type: str
    status: str


class _Address(Struct):
    ip: str | None = None


class _Status(Struct):
    phase: str | None = None
    pod_ip: str | None = field(name="podIP", default=None)
    pod_ips: list[_Address] | None = field(name="podIPs", default=None)
    conditions: list[_Condition] | None = None


class WorkerPod(NamespacedResourceG, Struct):
    """The fields of a pod that say whether and where it is a worker."""

    _api_info = ApiInfo(
        resource=ResourceDef("", "v1", "Pod"),
        plural="pods",
        verbs=["list", "watch", "global_list", "global_watch"],
    )

    metadata: ObjectMeta | None = None
    spec: _Spec | None = None
    status: _Status | None = None


class PodReader:
    """How pods are read. `roles` are tried in order; without them every worker is plain."""

    def __init__(
        self,
        *,
        roles: Sequence[tuple[Role, LabelSelector]],
        family: DnsLookupFamily,
        bootstrap_port_annotation: str,
        ranks_from: str | None = None,
        ports: Sequence[int] = (),
        port_name: str | None = None,
        port: int | None = None,
    ) -> None:
        """Each of `ports` is a worker; without them it is one port, which is looked for.

        `ranks_from` is the label or annotation with the ranks of a pod.
        """
        self._roles = roles
        self._families = IP_VERSIONS[family]
        self._bootstrap_port_annotation = bootstrap_port_annotation
        self._ranks_from = ranks_from
        self._ports = ports
        self._port_name = port_name
        self._port = port

    def read(self, pod: WorkerPod) -> Reading:
        """The workers in a pod, if it has any."""
        metadata, status = pod.metadata or ObjectMeta(), pod.status or _Status()
        labels = metadata.labels or {}
        role = role_of(labels, self._roles)
        part = self._part(metadata, status)
        if labels.get(_INDEX_IN_GROUP, _LEADER) != _LEADER:
            return part
        if role is None:
            return Reading()
        draining = metadata.deletionTimestamp is not None
        ready = _is_ready(status)
        if status.phase != "Running" or not (draining or ready):
            return Reading()
        host = self._address(status)
        if host is None:
            return Reading()
        ports = self._ports or self._port_of(pod)
        if not ports:
            return Reading(problem="port_not_found")
        bootstrap_port = None
        if role == "prefill":
            text = (metadata.annotations or {}).get(self._bootstrap_port_annotation)
            bootstrap_port = _port_number(text)
            if text is not None and bootstrap_port is None:
                return Reading(problem="bootstrap_port_invalid")
        specs = [
            WorkerSpec(
                id=f"{metadata.uid}:{port}",
                url=WorkerUrl("http", host, port),
                role=role,
                bootstrap_port=bootstrap_port,
            )
            for port in ports
        ]
        sightings = [Sighting(spec, draining, serving=ready) for spec in specs]
        return msgspec.structs.replace(part, sightings=sightings)

    def _part(self, metadata: ObjectMeta, status: _Status) -> Reading:
        """What a pod says about the ranks in it, without the worker that it may be."""
        labels = metadata.labels or {}
        group = labels.get(_GROUP)
        if self._ranks_from is None or group is None:
            return Reading()
        text = (metadata.annotations or {}).get(self._ranks_from, labels.get(self._ranks_from))
        ranks = () if text is None else _ranks(text)
        if ranks is None:
            return Reading(problem="ranks_invalid")
        host = self._address(status) if status.phase == "Running" else None
        hosts = {} if host is None else dict.fromkeys(ranks, host)
        return Reading(group=f"{metadata.namespace}/{group}", rank_hosts=hosts)

    def _address(self, status: _Status) -> str | None:
        """The pod's address of the preferred family that it has."""
        found = [one.ip for one in status.pod_ips or () if one.ip] or [status.pod_ip or ""]
        by_family = {6 if ":" in ip else 4: ip for ip in reversed(found) if ip}
        return next((by_family[one] for one in self._families if one in by_family), None)

    def _port_of(self, pod: WorkerPod) -> tuple[int, ...]:
        containers = (pod.spec.containers if pod.spec is not None else None) or ()
        named = [port for container in containers for port in container.ports or ()]
        found = pick_port(
            [(port.name, port.container_port, port.protocol) for port in named],
            name=self._port_name,
            number=self._port,
        )
        return () if found is None else (found,)


def pod_reader(config: K8sPodsConfig) -> PodReader:
    """How the configured pods are read."""
    return PodReader(
        roles=roles_by_label(config),
        family=config.address_family,
        bootstrap_port_annotation=config.bootstrap_port_annotation,
        ranks_from=config.ranks_from,
        port_name=config.port_name,
        port=config.port,
    )


def pod_source(config: K8sPodsConfig, parts: SourceParts) -> ClusterObjects[WorkerPod]:
    """A WorkerSource of the configured pods; raises ConfigError."""
    return cluster_source(WorkerPod, _OBJECTS, pod_reader(config).read, config, parts)


def _is_ready(status: _Status) -> bool:
    return any(one.type == "Ready" and one.status == "True" for one in status.conditions or ())


def _ranks(text: str) -> Sequence[int] | None:
    """The ranks in a label: a number or a range; None if it is neither."""
    found = _RANKS.fullmatch(text)
    if found is None:
        return None
    first = int(found[1])
    ranks = range(first, int(found[2] or first) + 1)
    return ranks if ranks and ranks[-1] < _RANKS_MAX else None


def _port_number(text: str | None) -> int | None:
    """The number in an annotation; None if it is no port."""
    if text is None or not (text.isascii() and text.isdigit()):
        return None
    return int(text) if 0 < int(text[:6]) <= _PORT_MAX and len(text) <= 5 else None
