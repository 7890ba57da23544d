"""Our subset of Envoy's API against its sources and against two published sets of stubs.

What decides on the wire is the number and the type of each field; a wrong one is read as
garbage or not at all, without an error.
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

from extproc._protos import llm_extproc_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
# Installed apart (`make venv`): its `envoy` package would hide the one with the binary.
XDS_PROTOS = Path(sys.prefix) / "xds-protos"

EXT_PROC = "envoy.service.ext_proc.v3"
CORE = "envoy.config.core.v3"
DISCOVERY = "envoy.service.discovery.v3"
ENDPOINT = "envoy.config.endpoint.v3"
CLUSTER = "envoy.config.cluster.v3"
PUBLISHED = {
    "HeaderValue": CORE,
    "HeaderMap": CORE,
    "HeaderValueOption": CORE,
    "Metadata": CORE,
    "HttpStatus": "envoy.type.v3",
    "ProtocolConfiguration": EXT_PROC,
    "HttpHeaders": EXT_PROC,
    "HttpBody": EXT_PROC,
    "HttpTrailers": EXT_PROC,
    "ProcessingRequest": EXT_PROC,
    "HeaderMutation": EXT_PROC,
    "StreamedBodyResponse": EXT_PROC,
    "BodyMutation": EXT_PROC,
    "CommonResponse": EXT_PROC,
    "HeadersResponse": EXT_PROC,
    "BodyResponse": EXT_PROC,
    "TrailersResponse": EXT_PROC,
    "ImmediateResponse": EXT_PROC,
    "ProcessingResponse": EXT_PROC,
    "Node": CORE,
    "SocketAddress": CORE,
    "Address": CORE,
    "Status": "google.rpc",
    "DiscoveryRequest": DISCOVERY,
    "DiscoveryResponse": DISCOVERY,
    "DeltaDiscoveryRequest": DISCOVERY,
    "DeltaDiscoveryResponse": DISCOVERY,
    "Resource": DISCOVERY,
    "Endpoint": ENDPOINT,
    "LbEndpoint": ENDPOINT,
    "LocalityLbEndpoints": ENDPOINT,
    "ClusterLoadAssignment": ENDPOINT,
    "TypedStruct": "xds.type.v3",
    "TypedExtensionConfig": CORE,
    "TransportSocket": CORE,
    "AggregatedConfigSource": CORE,
    "ConfigSource": CORE,
    "TcpKeepalive": CORE,
    "UpstreamConnectionOptions": CLUSTER,
    "Percent": "envoy.type.v3",
    "CircuitBreakersThresholdsRetryBudget": CLUSTER,
    "CircuitBreakersThresholds": CLUSTER,
    "CircuitBreakers": CLUSTER,
    "LoadBalancingPolicyPolicy": CLUSTER,
    "LoadBalancingPolicy": CLUSTER,
    "ClusterEdsClusterConfig": CLUSTER,
    "ClusterTransportSocketMatch": CLUSTER,
    "Cluster": CLUSTER,
}
# (our message, field): the published type, where ours is another with the same encoding.
SAME_ON_THE_WIRE = {("HttpStatus", "code"): "enum"}

TYPE_NAMES = {
    value: name.removeprefix("TYPE_").lower()
    for name, value in vars(FieldDescriptor).items()
    if name.startswith("TYPE_")
}


def our_messages() -> dict[str, Descriptor]:
    return dict(pb.DESCRIPTOR.message_types_by_name)


def our_fields(message: Descriptor) -> dict[str, tuple[int, str]]:
    """Name to number and type name; enums are varints like int32."""
    fields = {}
    for field in message.fields:
        kind = TYPE_NAMES[field.type]
        fields[field.name] = (field.number, SAME_ON_THE_WIRE.get((message.name, field.name), kind))
    return fields


def test_every_message_but_the_enum_holder_has_a_published_original() -> None:
    assert set(our_messages()) - set(PUBLISHED) == {"ProcessingMode"}


def clear_json_names(message: DescriptorProto) -> None:
    """protoc adds them to a descriptor set; the runtime derives them."""
    for field in message.field:
        field.ClearField("json_name")
    for nested in message.nested_type:
        clear_json_names(nested)


def published_stubs(module: str) -> ModuleType:
    """A module of envoy-data-plane, whose dependency warns on import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"envoy_data_plane.{module}")


def test_the_committed_modules_are_what_the_sources_compile_to(tmp_path: Path) -> None:
    from grpc_tools import protoc

    # protoc takes no working directory: the well-known types are beside it.
    include = Path(str(importlib.util.find_spec("grpc_tools").origin)).parent / "_proto"  # type: ignore[union-attr]
    out = tmp_path / "set.pb"
    assert not protoc.main(
        [
            "protoc",
            f"--proto_path={ROOT / 'protos'}",
            f"--proto_path={include}",
            f"--descriptor_set_out={out}",
            str(ROOT / "protos" / "llm_extproc.proto"),
        ]
    )
    (compiled,) = FileDescriptorSet.FromString(out.read_bytes()).file
    for message in compiled.message_type:
        clear_json_names(message)
    committed = FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(committed)
    assert committed.message_type == compiled.message_type
    assert committed.package == compiled.package


# envoy-data-plane has no TypedStruct.
@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"TypedStruct"}))
def test_fields_agree_with_envoy_data_plane(name: str) -> None:
    module = published_stubs(PUBLISHED[name])
    original = {
        field.name.rstrip("_"): field.metadata["betterproto"]
        for field in dataclasses.fields(getattr(module, name))
    }
    for field, (number, kind) in our_fields(our_messages()[name]).items():
        meta = original[field]
        assert meta.number == number, field
        published = "message" if meta.proto_type == "map" else meta.proto_type
        assert published == kind, field


def xds_fields() -> dict[str, dict[str, tuple[int, str]]]:
    """Fields of the originals as xds-protos has them, read in a process of its own."""
    program = """
import importlib, json
wanted = json.loads(input())
found = {}
for name, package in wanted.items():
    # A nested message is named after those around it: Cluster.EdsClusterConfig without the dot.
    messages = {}
    def note(prefix, by_name):
        for inner, message in by_name.items():
            messages[prefix + inner] = message
            note(prefix + inner, message.nested_types_by_name)
    for module in {
        "envoy.service.ext_proc.v3": ["external_processor_pb2"],
        "envoy.config.core.v3": [
            "base_pb2", "address_pb2", "config_source_pb2", "extension_pb2",
        ],
        "envoy.type.v3": ["http_status_pb2", "percent_pb2"],
        "envoy.service.discovery.v3": ["discovery_pb2"],
        "envoy.config.endpoint.v3": ["endpoint_components_pb2", "endpoint_pb2"],
        "envoy.config.cluster.v3": ["cluster_pb2", "circuit_breaker_pb2"],
        "xds.type.v3": ["typed_struct_pb2"],
        "google.rpc": ["status_pb2"],
    }[package]:
        note("", importlib.import_module(f"{package}.{module}").DESCRIPTOR.message_types_by_name)
    message = messages[name]
    found[name] = {field.name: [field.number, field.type] for field in message.fields}
print(json.dumps(found))
"""
    assert XDS_PROTOS.is_dir(), f"{XDS_PROTOS} is missing: run `make venv`"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(PUBLISHED),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(XDS_PROTOS)},
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return {
        message: {field: (number, TYPE_NAMES[kind]) for field, (number, kind) in fields.items()}
        for message, fields in found.items()
    }


def test_fields_agree_with_xds_protos() -> None:
    originals = xds_fields()
    for name in PUBLISHED:
        for field, ours in our_fields(our_messages()[name]).items():
            assert originals[name][field] == ours, (name, field)


def test_enum_values_agree_with_envoy_data_plane() -> None:
    ext_proc = published_stubs("envoy.extensions.filters.http.ext_proc.v3")
    core = published_stubs("envoy.config.core.v3")
    cluster = published_stubs("envoy.config.cluster.v3")
    for ours, original in (
        (pb.ProcessingMode.BodySendMode, ext_proc.ProcessingModeBodySendMode),
        (pb.HeaderValueOption.HeaderAppendAction, core.HeaderValueOptionHeaderAppendAction),
        (pb.HealthStatus, core.HealthStatus),
        (pb.ConfigSource.ApiVersion, core.ApiVersion),
        (pb.CircuitBreakersThresholds.RoutingPriority, core.RoutingPriority),
        (pb.Cluster.DiscoveryType, cluster.ClusterDiscoveryType),
    ):
        assert dict(ours.items()) == {value.name: value.value for value in original}
