"""The objects by which a gateway asks the service are those of the recipes, with other names."""

from collections import Counter
from typing import Any

import pytest
import yaml

from extproc.config.loading import parse_config
from helm.gateway_objects import RECIPES, render_recipe
from helm.generate import CHART
from tests.helm.chart import Release, render

LIST = CHART / "values" / "list-of-workers.yaml"
NAMES_OF_RECIPES = ("example.com", "workers.default", "|extproc.llm", "istio-system", "default/llm")


def objects(kind: str, **more: Any) -> Release:
    """The objects of gateways in a release named r, in the namespace llm."""
    values = {
        "kind": kind,
        "hostnames": ["chat.acme.org"],
        "gateway": {"name": "main", "namespace": "gateways", "port": 8080},
        "workers": {"service": "sglang", "namespace": "models", "port": 30000},
    }
    release, errors = render(LIST, {"gatewayObjects.filter": values | more})
    assert release.objects, errors
    return release


def of_gateways(release: Release) -> list[dict[str, Any]]:
    groups = ("gateway", "networking.istio.io", "inference.networking")
    return [one for one in release if one["apiVersion"].startswith(groups)]


def kinds(release: Release) -> Counter[str]:
    return Counter(one["kind"] for one in of_gateways(release))


def test_without_a_chosen_kind_there_is_no_object_of_a_gateway() -> None:
    release, _ = render(LIST)
    assert of_gateways(release) == []


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        (
            "envoy-gateway",
            {},
            "HTTPRoute EnvoyExtensionPolicy BackendTrafficPolicy ClientTrafficPolicy",
        ),
        (
            "envoy-gateway",
            {"wholeGateway": False, "patch": True},
            "HTTPRoute EnvoyExtensionPolicy BackendTrafficPolicy EnvoyPatchPolicy",
        ),
        (
            "envoy-gateway",
            {"failOpen": False},
            "HTTPRoute HTTPRouteFilter EnvoyExtensionPolicy BackendTrafficPolicy "
            "ClientTrafficPolicy",
        ),
        ("istio", {}, "VirtualService DestinationRule EnvoyFilter EnvoyFilter EnvoyFilter"),
        (
            "istio",
            {"wholeGateway": False, "failOpen": False},
            "VirtualService DestinationRule EnvoyFilter EnvoyFilter EnvoyFilter",
        ),
    ],
)
def test_each_kind_has_the_objects_of_its_recipe(
    kind: str, more: dict[str, Any], expected: str
) -> None:
    release = objects(kind, **more)
    assert kinds(release) == Counter(expected.split())
    text = yaml.safe_dump(of_gateways(release))
    assert [name for name in NAMES_OF_RECIPES if name in text] == []
    names = [(one["kind"], one["metadata"]["name"]) for one in release]
    assert len(names) == len(set(names))


def test_only_names_differ_from_the_recipe() -> None:
    """Every part of every spec is in the chart as in the recipe, but for what names something."""
    recipe = yaml.safe_load(render_recipe("istio"))["objects"]
    release = of_gateways(objects("istio"))
    for one in recipe:
        if one["kind"] == "EnvoyFilter":
            name = one["metadata"]["name"].replace("llm-extproc", "r-llm-extproc")
            (found,) = [
                other
                for other in release
                if (other["kind"], other["metadata"]["name"]) == ("EnvoyFilter", name)
            ]
            before, after = one["spec"]["configPatches"], found["spec"]["configPatches"]
            renamed = (
                yaml.safe_dump(before)
                .replace("outbound|9002||extproc.llm", "outbound|9002||r-llm-extproc.llm")
                .replace("outbound|8000||workers.default", "outbound|30000||sglang.models")
                .replace("llm.example.com:80", "chat.acme.org:8080")
            )
            assert yaml.safe_load(renamed) == after


def test_envoy_gateway_asks_the_service_of_the_release() -> None:
    release = objects("envoy-gateway", patch=True)
    route = release.one("HTTPRoute")
    assert route["metadata"] | {"labels": {}} == {
        "name": "r-llm-extproc",
        "namespace": "llm",
        "labels": {},
    }
    assert route["spec"]["parentRefs"] == [{"name": "main", "namespace": "gateways"}]
    assert route["spec"]["hostnames"] == ["chat.acme.org"]
    backend = {"name": "sglang", "namespace": "models", "port": 30000}
    assert [rule["backendRefs"] for rule in route["spec"]["rules"]] == [[backend]]
    closed = objects("envoy-gateway", failOpen=False)
    decided, unavailable = closed.one("HTTPRoute")["spec"]["rules"]
    assert decided["backendRefs"] == [backend]
    assert "backendRefs" not in unavailable
    (reference,) = [one["extensionRef"] for one in unavailable["filters"] if "extensionRef" in one]
    assert reference["name"] == closed.one("HTTPRouteFilter")["metadata"]["name"]
    policy = release.one("EnvoyExtensionPolicy")["spec"]
    service = release.one("Service")
    (port,) = [one["port"] for one in service["spec"]["ports"] if one["name"] == "grpc-extproc"]
    assert policy["extProc"][0]["backendRefs"] == [
        {"name": service["metadata"]["name"], "port": port}
    ]
    assert policy["targetRefs"][0]["name"] == route["metadata"]["name"]
    client = release.one("ClientTrafficPolicy")
    assert client["metadata"]["namespace"] == "gateways"
    assert client["spec"]["targetRefs"][0]["name"] == "main"
    patches = release.one("EnvoyPatchPolicy")["spec"]["jsonPatches"]
    assert {one["name"] for one in patches} == {"gateways/main/http"}


def test_buffers_of_gateways_hold_the_bodies_that_the_service_takes() -> None:
    release, _ = render(
        LIST,
        {
            "gatewayObjects.filter": {
                "kind": "envoy-gateway",
                "hostnames": ["a.org"],
                "gateway": {"name": "main"},
                "workers": {"service": "w"},
            },
            "config.server.max_body_bytes": 1_000_000,
        },
    )
    client = release.one("ClientTrafficPolicy")["spec"]
    assert client["connection"]["bufferLimit"] == 1_000_000 + 1_310_720


def test_a_route_of_istio_has_no_time_out_of_zero() -> None:
    for closed in (False, True):
        release = objects("istio", failOpen=not closed)
        spec = release.one("VirtualService")["spec"]
        assert all("timeout" not in route for route in spec["http"])
        assert spec["gateways"] == ["gateways/main"]
        destinations = [
            one["destination"] for route in spec["http"] for one in route.get("route", [])
        ]
        assert destinations == [
            {"host": "sglang.models.svc.cluster.local", "port": {"number": 30000}}
        ]
        assert any("directResponse" in route for route in spec["http"]) is closed
        assert release.one("DestinationRule")["metadata"]["namespace"] == "models"


@pytest.mark.parametrize(
    ("more", "closed"),
    [
        ({}, False),
        ({"config.models": [{"id": "m"}, {"id": "n"}]}, True),
        ({"config.discovery.static_urls.prefill_urls": ["http://workers-0.workers:8000"]}, True),
        ({"config.discovery.static_urls.decode_urls": ["http://workers-0.workers:8000"]}, True),
        ({"config.models": [{"id": "m", "pd": {"protocol": "nixl"}}]}, True),
    ],
)
def test_a_route_fails_closed_where_another_worker_would_be_wrong(
    more: dict[str, Any], closed: bool
) -> None:
    values = {
        "kind": "istio",
        "hostnames": ["a.org"],
        "gateway": {"name": "main"},
        "workers": {"service": "w"},
    }
    release, errors = render(LIST, {"gatewayObjects.filter": values} | more)
    assert release.objects, errors
    routes = release.one("VirtualService")["spec"]["http"]
    assert any("directResponse" in route for route in routes) is closed


@pytest.mark.parametrize("kind", ["envoy-gateway", "istio"])
def test_the_configuration_fits_the_gateway_unless_it_says_otherwise(kind: str) -> None:
    values = {
        "gatewayObjects.filter": {
            "kind": kind,
            "hostnames": ["a.org"],
            "gateway": {"name": "main"},
            "workers": {"service": "w"},
        },
        "config.proxy": {},
        "config.load": {},
    }
    release, errors = render(LIST, values)
    assert release.objects, errors
    config = parse_config(release.config)
    assert config.proxy.retry_busy is False
    assert config.load.release == ("estimate" if kind == "envoy-gateway" else "stream_end")


@pytest.mark.parametrize("kind", ["envoy-gateway", "istio"])
def test_a_filter_chooses_the_decode_worker_in_its_only_pass(kind: str) -> None:
    values = {
        "kind": kind,
        "hostnames": ["a.org"],
        "gateway": {"name": "main"},
        "workers": {"service": "decode"},
    }
    more = {"mode": "service", "gatewayObjects.filter": values}
    release, errors = render(CHART / "values" / "prefill-and-decode.yaml", more)
    assert release.objects, errors
    config = parse_config(release.config)
    assert config.is_disaggregated
    assert config.pd.decode == "inline"


POOL: dict[str, Any] = {
    "config.discovery": {"backend": "inference_pool", "inference_pool": {"name": "llama"}},
    "config.proxy": {},
    "config.load": {},
}


@pytest.mark.parametrize(
    "more",
    [
        {"inferencePool": {"enabled": True, "matchLabels": {"app": "sglang"}}},
        {"httpRoute": {"enabled": True, "parentRefs": [{"name": "main"}]}},
    ],
    ids=["pool", "route"],
)
def test_the_configuration_fits_the_gateway_of_a_pool(more: dict[str, Any]) -> None:
    values = {f"gatewayObjects.{name}": one for name, one in more.items()}
    release, errors = render(LIST, POOL | values)
    assert release.objects, errors
    config = parse_config(release.config)
    assert config.proxy.retry_busy is False
    assert config.pd.decode == "inline"
    assert config.envoy.destination == "single"
    listed, errors = render(LIST, POOL | values | {"config.envoy": {"destination": "list"}})
    assert parse_config(listed.config).envoy.destination == "list", errors


def test_without_objects_of_a_gateway_the_defaults_of_the_service_stay() -> None:
    release, errors = render(LIST, POOL)
    assert release.objects, errors
    config = parse_config(release.config)
    assert config.proxy.retry_busy is True
    assert config.pd.decode == "two_pass"


def test_every_recipe_has_a_file() -> None:
    assert {path.stem for path in (CHART / "files" / "gateways").glob("*.yaml")} == RECIPES.keys()
