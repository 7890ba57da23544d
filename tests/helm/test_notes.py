"""The notes after an installation say what is true of it, with commands that fit it."""

from typing import Any

import pytest

from helm.generate import CHART
from tests.helm.chart import render

SERVICE = CHART / "values" / "sglang-behind-a-gateway.yaml"
GATEWAY = CHART / "values" / "vllm-with-envoy.yaml"
LIST = CHART / "values" / "list-of-workers.yaml"
PREFILL = CHART / "values" / "prefill-and-decode.yaml"


def notes(values: Any, more: dict[str, Any] | None = None) -> str:
    _, text = render(values, more, notes=True)
    assert "What to check next" in text, text
    return text.partition("What to check next")[2]


def filter_of(kind: str, **more: Any) -> dict[str, Any]:
    values = {
        "kind": kind,
        "hostnames": ["chat.acme.org"],
        "gateway": {"name": "main", "namespace": "gateways", "labels": {"istio": "llm"}},
        "workers": {"service": "sglang", "namespace": "models"},
    }
    return {"gatewayObjects.filter": values | more}


def test_a_missing_admin_token_is_named_only_where_pods_reach_the_port() -> None:
    text = "The admin port has no token"
    assert text in notes(PREFILL)
    assert text not in notes(PREFILL, {"adminToken": {"name": "extproc-admin"}})
    assert text not in notes(GATEWAY)


def test_a_missing_host_is_named_only_where_envoy_fails_open() -> None:
    text = "fail_open_host is not set"
    without = {"config.envoy.fail_open_host": None}
    assert text in notes(GATEWAY, without)
    assert text not in notes(GATEWAY)
    assert text not in notes(PREFILL)
    assert text not in notes(GATEWAY, without | {"config.models[1]": {"id": "other"}})


@pytest.mark.parametrize(
    ("more", "of_gateway"),
    [
        ({}, "clienttrafficpolicy"),
        ({"patch": True}, "clienttrafficpolicy,envoypatchpolicy"),
        ({"patch": True, "wholeGateway": False}, "envoypatchpolicy"),
        ({"wholeGateway": False}, ""),
    ],
)
def test_the_objects_of_envoy_gateway_are_read_where_they_are(
    more: dict[str, Any], of_gateway: str
) -> None:
    text = notes(LIST, filter_of("envoy-gateway", **more))
    own = "httproute,envoyextensionpolicy,backendtrafficpolicy"
    label = "-l app.kubernetes.io/instance=r -o yaml\n"
    assert f"kubectl -n llm get {own} {label}" in text
    assert ("kubectl -n gateways get" in text) is bool(of_gateway)
    if of_gateway:
        assert f"kubectl -n gateways get {of_gateway} {label}" in text


def test_what_a_gateway_of_istio_has_is_read_from_its_pod() -> None:
    text = notes(LIST, filter_of("istio"))
    assert "kubectl -n gateways get envoyfilter -l app.kubernetes.io/instance=r\n" in text
    assert "kubectl -n gateways get pod -l istio=llm -o name" in text
    assert "--fqdn sglang.models.svc.cluster.local -o json | grep override_host" in text
    assert "envoyextensionpolicy" not in text


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["inferencePool"], "inferencepool"),
        (["httpRoute"], "httproute"),
        (["inferencePool", "httpRoute"], "inferencepool,httproute"),
    ],
)
def test_the_objects_of_a_pool_are_read_back(names: list[str], kinds: str) -> None:
    values: dict[str, Any] = {
        "inferencePool": {"enabled": True, "matchLabels": {"app": "sglang"}},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "main"}]},
    }
    more = {f"gatewayObjects.{name}": values[name] for name in names}
    discovery = {"backend": "inference_pool", "inference_pool": {"name": "llama"}}
    text = notes(SERVICE, {"config.discovery": discovery} | more)
    assert f"kubectl -n llm get {kinds} -l" in text
    assert "gatewayObjects.filter makes its objects" not in text
    assert "gatewayObjects.filter makes its objects" in notes(SERVICE)


def test_the_token_is_read_from_the_secret_that_has_it() -> None:
    text = notes(SERVICE, {"adminToken": {"name": "extproc-admin", "key": "admin.token"}})
    assert "get secret extproc-admin -o jsonpath='{.data.admin\\.token}' | base64 -d" in text
    assert "get secret extproc-admin -o jsonpath='{.data.token}' | base64 -d" in notes(SERVICE)
    assert "TOKEN" not in notes(GATEWAY)


def test_prefills_that_envoy_gateway_cuts_are_named() -> None:
    text = "gatewayObjects.filter.patch is false"
    more = {"mode": "service"}
    assert text in notes(PREFILL, more | filter_of("envoy-gateway"))
    assert text not in notes(PREFILL, more | filter_of("envoy-gateway", patch=True))
    assert text not in notes(PREFILL, more | filter_of("istio"))
    assert text not in notes(LIST, filter_of("envoy-gateway"))
