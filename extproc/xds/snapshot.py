"""Makes the resources that Envoys are sent from the registered workers.

A version is a hash of the content, so replicas that see the same workers agree, and an Envoy that
changes from one to the other is sent nothing again.
"""

import asyncio
import hashlib
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Final

from google.protobuf.json_format import ParseDict

from extproc._protos import llm_extproc_pb2 as pb
from extproc.envoy_config.endpoints import Endpoint, endpoint_entry
from extproc.xds.session import Resource

__all__ = ["make_snapshot", "prepare_entries"]

_VERSION_CHARS: Final = 16
# An entry takes 40 us to make; they are made again and again for all workers.
_ENTRIES_KEPT: Final = 8192
_ENTRIES_AT_ONCE: Final = 50


def make_snapshot(
    clusters: Mapping[str, Mapping[Endpoint, bool]], left: Collection[Endpoint]
) -> dict[str, Resource]:
    """The resources by cluster. An endpoint is true if it gets no new requests.

    Those in `left` are sent as well, but do not count among the addresses of the resource.
    """
    return {name: _resource(name, endpoints, left) for name, endpoints in clusters.items()}


async def prepare_entries(endpoints: Iterable[Endpoint]) -> None:
    """Make what `make_snapshot` needs of new endpoints, some in each turn of the event loop."""
    for number, one in enumerate(endpoints):
        if number % _ENTRIES_AT_ONCE == 0:
            await asyncio.sleep(0)
        _entry(one)


def _resource(
    cluster: str, endpoints: Mapping[Endpoint, bool], left: Collection[Endpoint]
) -> Resource:
    # Two workers at an address, as while a pod is replaced, are one endpoint: that which serves.
    group: dict[str, pb.LbEndpoint] = {}
    for one, is_draining in sorted(endpoints.items(), key=lambda item: (item[1], item[0])):
        if one.address not in group:
            group[one.address] = _draining(one) if is_draining else _entry(one)
    entries = [group[address] for address in sorted(group)]
    assignment = pb.ClusterLoadAssignment(
        cluster_name=cluster, endpoints=[pb.LocalityLbEndpoints(lb_endpoints=entries)]
    )
    body = assignment.SerializeToString(deterministic=True)
    version = hashlib.sha256(body).hexdigest()[:_VERSION_CHARS]
    return Resource(version, body, frozenset(one.address for one in endpoints if one not in left))


@lru_cache(_ENTRIES_KEPT)
def _draining(one: Endpoint) -> pb.LbEndpoint:
    entry = pb.LbEndpoint(health_status=pb.HealthStatus.DRAINING)
    entry.MergeFrom(_entry(one))
    return entry


@lru_cache(_ENTRIES_KEPT)
def _entry(one: Endpoint) -> pb.LbEndpoint:
    return ParseDict(endpoint_entry(one), pb.LbEndpoint())
