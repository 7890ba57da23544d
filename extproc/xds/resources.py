"""Makes the resources that Envoys are sent: clusters and the endpoints in them.

A version is a hash of the content, so replicas that see the same workers agree, and an Envoy that
changes from one to the other is sent nothing again.
"""

import asyncio
import hashlib
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, Final

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from extproc._protos import llm_extproc_pb2 as pb
from extproc.envoy_config.endpoints import Endpoint, endpoint_entry
from extproc.xds.session import Resource

__all__ = ["cluster_resource", "endpoints_resource", "prepare_entries"]

_VERSION_CHARS: Final = 16
# An entry takes 40 us to make; they are made again and again for all workers.
_ENTRIES_KEPT: Final = 8192
_ENTRIES_AT_ONCE: Final = 50
_TYPED_STRUCT: Final = "type.googleapis.com/xds.type.v3.TypedStruct"


def cluster_resource(cluster: Mapping[str, Any]) -> Resource:
    """A cluster that is given in its JSON form."""
    fields = dict(cluster)
    policies = fields.pop("load_balancing_policy")["policies"]
    options = fields.pop("typed_extension_protocol_options")
    matches = fields.pop("transport_socket_matches", [])
    message = ParseDict(fields, pb.Cluster())
    for one in policies:
        extension = one["typed_extension_config"]
        policy = message.load_balancing_policy.policies.add().typed_extension_config
        policy.name = extension["name"]
        policy.typed_config.CopyFrom(_typed_config(extension["typed_config"]))
    for name, config in options.items():
        message.typed_extension_protocol_options[name].CopyFrom(_typed_config(config))
    for one in matches:
        socket = one["transport_socket"]
        match = message.transport_socket_matches.add(name=one["name"])
        match.match.update(one["match"])
        match.transport_socket.name = socket["name"]
        match.transport_socket.typed_config.CopyFrom(_typed_config(socket["typed_config"]))
    return _resource(message)


def _typed_config(config: Mapping[str, Any]) -> AnyMessage:
    """The settings of an extension. Envoy takes their JSON form, so no message is needed."""
    found = pb.TypedStruct(type_url=config["@type"])
    found.value.update({key: value for key, value in config.items() if key != "@type"})
    return AnyMessage(type_url=_TYPED_STRUCT, value=found.SerializeToString(deterministic=True))


def endpoints_resource(
    cluster: str, endpoints: Mapping[Endpoint, bool], left: Collection[Endpoint] = ()
) -> Resource:
    """The endpoints of a cluster. One is true if it gets no new requests.

    Those in `left` are sent as well, but do not count among the addresses of the resource.
    """
    # Two workers at an address, as while a pod is replaced, are one endpoint: that which serves.
    group: dict[str, pb.LbEndpoint] = {}
    for one, is_draining in sorted(endpoints.items(), key=lambda item: (item[1], item[0])):
        if one.address not in group:
            group[one.address] = _draining(one) if is_draining else _entry(one)
    entries = [group[address] for address in sorted(group)]
    assignment = pb.ClusterLoadAssignment(
        cluster_name=cluster, endpoints=[pb.LocalityLbEndpoints(lb_endpoints=entries)]
    )
    return _resource(assignment, frozenset(one.address for one in endpoints if one not in left))


async def prepare_entries(endpoints: Iterable[Endpoint]) -> None:
    """Make what resources need of new endpoints, some in each turn of the event loop."""
    for number, one in enumerate(endpoints):
        if number % _ENTRIES_AT_ONCE == 0:
            await asyncio.sleep(0)
        _entry(one)


@lru_cache(_ENTRIES_KEPT)
def _draining(one: Endpoint) -> pb.LbEndpoint:
    entry = pb.LbEndpoint(health_status=pb.HealthStatus.DRAINING)
    entry.MergeFrom(_entry(one))
    return entry


@lru_cache(_ENTRIES_KEPT)
def _entry(one: Endpoint) -> pb.LbEndpoint:
    return ParseDict(endpoint_entry(one), pb.LbEndpoint())


def _resource(message: Message, addresses: frozenset[str] = frozenset()) -> Resource:
    body = message.SerializeToString(deterministic=True)
    version = hashlib.sha256(body).hexdigest()[:_VERSION_CHARS]
    return Resource(version, body, addresses)
