"""The three listeners differ in the filter and in nothing else."""

from typing import Any

import msgspec
import pytest

from benchmarks.bare_responder import body_replies
from benchmarks.rig import derive_listeners
from extproc._protos import llm_extproc_pb2 as pb
from extproc.config.schema import Config
from extproc.envoy_config import render_bootstrap


@pytest.fixture
def bootstrap() -> dict[str, Any]:
    config = msgspec.convert(
        {
            "models": [{"id": "m"}],
            "discovery": {
                "backend": "static_urls",
                "static_urls": {"urls": ["http://127.0.0.1:7001"]},
            },
        },
        Config,
    )
    rendered = render_bootstrap(config)
    derive_listeners(rendered, no_filter_port=7101, with_bare_port=7102, bare_port=7103)
    return rendered


def manager(bootstrap: dict[str, Any], name: str) -> dict[str, Any]:
    (listener,) = (
        each for each in bootstrap["static_resources"]["listeners"] if each["name"] == name
    )
    found: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return found


def test_the_bare_arm_differs_by_its_cluster_only(bootstrap: dict[str, Any]) -> None:
    ours, bare = manager(bootstrap, "ingress"), manager(bootstrap, "with_bare")
    grpc_service = bare["http_filters"][-2]["typed_config"]["grpc_service"]
    assert grpc_service["envoy_grpc"]["cluster_name"] == "bare_responder"
    grpc_service["envoy_grpc"]["cluster_name"] = "extproc"
    bare["stat_prefix"] = ours["stat_prefix"]
    assert bare == ours


def test_without_the_filter_requests_go_straight_to_the_workers(
    bootstrap: dict[str, Any],
) -> None:
    plain = manager(bootstrap, "no_filter")
    assert [each["name"] for each in plain["http_filters"]] == ["envoy.filters.http.router"]
    (route,) = plain["route_config"]["virtual_hosts"][0]["routes"]
    assert route["match"] == {"prefix": "/"}
    assert route["route"]["cluster"] == "workers"
    assert "cluster_header" not in route["route"]


def test_the_bare_responder_has_the_same_kind_of_cluster(bootstrap: dict[str, Any]) -> None:
    clusters = {each["name"]: each for each in bootstrap["static_resources"]["clusters"]}
    ours, bare = clusters["extproc"], clusters["bare_responder"]
    assert {
        key: value for key, value in bare.items() if key not in ("name", "load_assignment")
    } == {key: value for key, value in ours.items() if key not in ("name", "load_assignment")}


def test_the_bare_responder_names_each_worker_first_in_turn() -> None:
    addresses = ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]
    named = []
    for reply in body_replies("m", addresses):
        mutation = pb.ProcessingResponse.FromString(reply).request_body.response.header_mutation
        headers = {each.header.key: each.header.raw_value for each in mutation.set_headers}
        named.append(headers["x-gateway-destination-endpoint"].decode().split(","))
    assert [addresses_in_order[0] for addresses_in_order in named] == addresses
    assert all(sorted(addresses_in_order) == addresses for addresses_in_order in named)
