"""The resources in the form in which Envoy gets them."""

import asyncio
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.json_format import MessageToDict

from extproc._protos import llm_extproc_pb2 as pb
from extproc.config.loading import parse_config
from extproc.envoy_config import pool_cluster
from extproc.envoy_config.endpoints import Endpoint
from extproc.xds.resources import cluster_resource, endpoints_resource, prepare_entries
from tests.unit.configs import raw_config

ENDPOINTS = [
    Endpoint(f"10.2.{n // 100}.{n % 100}:8000", f"http://10.2.{n // 100}.{n % 100}:8000")
    for n in range(300)
]
ONE, TWO = (Endpoint(f"10.0.0.{n}:80", f"http://10.0.0.{n}:80") for n in (1, 2))


def rendered(**sections: Any) -> dict[str, Any]:
    raw = raw_config(envoy={"endpoints": "ads"}, **sections)
    return pool_cluster(parse_config(raw), "m", "plain")


def as_json(message: pb.Cluster) -> dict[str, Any]:
    """The message in its JSON form, with the settings of its extensions."""
    holders = [
        *(
            one.typed_extension_config.typed_config
            for one in message.load_balancing_policy.policies
        ),
        *message.typed_extension_protocol_options.values(),
        *(one.transport_socket.typed_config for one in message.transport_socket_matches),
    ]
    kept = [unpacked(one) for one in holders]
    for one in holders:
        one.Clear()
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    kept_in_order = iter(kept)
    for policy in found["load_balancing_policy"]["policies"]:
        policy["typed_extension_config"]["typed_config"] = next(kept_in_order)
    options = found["typed_extension_protocol_options"]
    for name in options:
        options[name] = next(kept_in_order)
    for match in found.get("transport_socket_matches", []):
        match["transport_socket"]["typed_config"] = next(kept_in_order)
    return found


def unpacked(config: AnyMessage) -> dict[str, Any]:
    """The settings of an extension, which are in a message that Envoy reads as JSON."""
    assert config.type_url == "type.googleapis.com/xds.type.v3.TypedStruct"
    found = pb.TypedStruct.FromString(config.value)
    return {"@type": found.type_url, **MessageToDict(found.value)}


def test_a_cluster_says_the_same_as_in_a_file() -> None:
    given = rendered(workers={"ca_file": "/ca.pem"})
    found = as_json(pb.Cluster.FromString(cluster_resource(given).body))
    for threshold in found["circuit_breakers"]["thresholds"]:
        threshold.setdefault("priority", "DEFAULT")  # It is 0, which is not shown.
    assert found == given


def test_replicas_agree_on_the_version() -> None:
    versions = {cluster_resource(rendered()).version for _ in range(2)}
    changed = cluster_resource(rendered(proxy={"connect_timeout_secs": 3})).version
    assert len(versions) == 1
    assert changed not in versions
    orders = ({ONE: False, TWO: True}, {TWO: True, ONE: False})
    assert len({endpoints_resource("a", one).version for one in orders}) == 1
    others: list[dict[Endpoint, bool]] = [{ONE: False, TWO: False}, {ONE: False}, {}]
    assert len({endpoints_resource("a", one).version for one in (orders[0], *others)}) == 4
    assert len({endpoints_resource(name, {}).version for name in "ab"}) == 2


def test_what_left_is_sent_as_draining_and_is_no_address_of_the_resource() -> None:
    found = endpoints_resource("a", {ONE: False, TWO: True}, [TWO])
    assert found.addresses == {ONE.address}
    assignment = pb.ClusterLoadAssignment.FromString(found.body)
    states = [one.health_status for one in assignment.endpoints[0].lb_endpoints]
    assert states == [pb.HealthStatus.UNKNOWN, pb.HealthStatus.DRAINING]


async def test_entries_of_many_workers_are_made_in_several_turns() -> None:
    others = 0

    async def count() -> None:
        nonlocal others
        while True:
            await asyncio.sleep(0)
            others += 1

    counting = asyncio.create_task(count())
    await prepare_entries(ENDPOINTS)
    counting.cancel()
    await asyncio.gather(counting, return_exceptions=True)
    assert others >= 5


async def test_a_worker_that_drains_and_serves_again_is_marked_each_time() -> None:
    one, other = ENDPOINTS[:2]
    states = [
        {one: False, other: False},
        {one: True, other: False},
        {one: False, other: True},
        {one: False, other: False},
    ]
    found = [endpoints_resource("w", state) for state in states]
    assert found[0].version == found[3].version
    assert len({resource.version for resource in found}) == 3
    marks = []
    for resource in found:
        assignment = pb.ClusterLoadAssignment.FromString(resource.body)
        entries = assignment.endpoints[0].lb_endpoints
        marks.append([entry.health_status == pb.HealthStatus.DRAINING for entry in entries])
    assert marks == [[False, False], [True, False], [False, True], [False, False]]
