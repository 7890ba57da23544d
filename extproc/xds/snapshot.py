"""Makes the resources that Envoys are sent from the registered workers.

A version is a hash of the content, so replicas that see the same workers agree, and an Envoy that
changes from one to the other is sent nothing again.
"""

import hashlib
from collections.abc import Collection, Mapping
from typing import Final

from google.protobuf.json_format import ParseDict

from extproc._protos import llm_extproc_pb2 as pb
from extproc.envoy_config.endpoints import Endpoint, endpoint_entry
from extproc.xds.session import Resource

__all__ = ["make_snapshot"]

_VERSION_CHARS: Final = 16


def make_snapshot(
    clusters: Mapping[str, Mapping[Endpoint, bool]], left: Collection[Endpoint]
) -> dict[str, Resource]:
    """The resources by cluster. An endpoint is true if it gets no new requests.

    Those in `left` are sent as well, but do not count among the addresses of the resource.
    """
    return {name: _resource(name, endpoints, left) for name, endpoints in clusters.items()}


def _resource(
    cluster: str, endpoints: Mapping[Endpoint, bool], left: Collection[Endpoint]
) -> Resource:
    # Two workers at an address, as while a pod is replaced, are one endpoint: that which serves.
    group: dict[str, pb.LbEndpoint] = {}
    for one, is_draining in sorted(endpoints.items(), key=lambda item: (item[1], item[0])):
        if one.address not in group:
            entry = group[one.address] = ParseDict(endpoint_entry(one), pb.LbEndpoint())
            if is_draining:
                entry.health_status = pb.HealthStatus.DRAINING
    entries = [group[address] for address in sorted(group)]
    assignment = pb.ClusterLoadAssignment(
        cluster_name=cluster, endpoints=[pb.LocalityLbEndpoints(lb_endpoints=entries)]
    )
    body = assignment.SerializeToString(deterministic=True)
    version = hashlib.sha256(body).hexdigest()[:_VERSION_CHARS]
    return Resource(version, body, frozenset(one.address for one in endpoints if one not in left))
