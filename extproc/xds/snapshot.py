"""Makes the resources that Envoys are sent from the registered workers.

A version is a hash of the content, so replicas that see the same workers agree, and an Envoy that
changes from one to the other is sent nothing again.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Final

from google.protobuf.json_format import ParseDict

from extproc._protos import llm_extproc_pb2 as pb
from extproc.envoy_config.endpoints import Endpoint, endpoint_entry
from extproc.workers.worker import Worker
from extproc.xds.session import Resource

__all__ = ["make_snapshot"]

_VERSION_CHARS: Final = 16


def make_snapshot(
    workers: Iterable[Worker],
    clusters_of: Callable[[Worker], Iterable[str]],
    clusters: Iterable[str],
    is_draining: Callable[[Worker], bool],
) -> dict[str, Resource]:
    """The endpoints of each cluster, by its name. `clusters` are there even without a worker."""
    # By address: two names of one host are one endpoint.
    members: dict[str, dict[str, tuple[Endpoint, bool]]] = {name: {} for name in clusters}
    for worker in workers:
        if worker.address is None:
            continue
        found = (Endpoint(worker.address, worker.url), is_draining(worker))
        for name in clusters_of(worker):
            known = members.setdefault(name, {}).setdefault(worker.address, found)
            # Of two workers at an address, as while a pod is replaced, the one that serves counts.
            members[name][worker.address] = min(known, found, key=lambda one: (one[1], one[0]))
    return {name: _resource(name, sorted(found.values())) for name, found in members.items()}


def _resource(cluster: str, endpoints: list[tuple[Endpoint, bool]]) -> Resource:
    group = pb.LocalityLbEndpoints()
    for one, is_draining in endpoints:
        entry = ParseDict(endpoint_entry(one), pb.LbEndpoint())
        if is_draining:
            entry.health_status = pb.HealthStatus.DRAINING
        group.lb_endpoints.append(entry)
    assignment = pb.ClusterLoadAssignment(cluster_name=cluster, endpoints=[group])
    body = assignment.SerializeToString(deterministic=True)
    return Resource(
        hashlib.sha256(body).hexdigest()[:_VERSION_CHARS],
        body,
        frozenset(one.address for one, _ in endpoints),
    )
