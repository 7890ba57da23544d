"""A NetworkPolicy lets the gateway in and the service out to its workers, or the chart warns."""

from typing import Any

import pytest

from helm.generate import CHART
from tests.helm.chart import render

SERVICE = CHART / "values" / "sglang-behind-a-gateway.yaml"
GATEWAY = CHART / "values" / "vllm-with-envoy.yaml"
LIST = CHART / "values" / "list-of-workers.yaml"


def filter_of(kind: str, namespace: str = "") -> dict[str, Any]:
    """Values of a gateway whose Gateway is in this namespace, or in that of the release."""
    return {
        "gatewayObjects.filter": {
            "kind": kind,
            "hostnames": ["chat.acme.org"],
            "gateway": {"name": "main", "namespace": namespace},
            "workers": {"service": "sglang", "port": 30000},
        }
    }


@pytest.mark.parametrize("kind", ["envoy-gateway", "istio"])
def test_the_values_file_lets_in_a_gateway_of_another_namespace(kind: str) -> None:
    release, errors = render(SERVICE, filter_of(kind, "gateways"))
    assert release.objects, errors
    peers = release.one("NetworkPolicy")["spec"]["ingress"][0]["from"]
    namespace = {"kubernetes.io/metadata.name": "gateways"}
    assert {"namespaceSelector": {"matchLabels": namespace}} in peers


def test_a_gateway_in_the_namespace_of_the_release_needs_no_peers() -> None:
    release, errors = render(LIST, filter_of("istio") | {"networkPolicy.enabled": True})
    assert release.objects, errors


def test_the_notes_say_that_a_gateway_elsewhere_is_shut_out() -> None:
    text = "networkPolicy.gateways is empty"
    _, without = render(SERVICE, {"networkPolicy.gateways": []}, notes=True)
    assert text in without
    for values in (SERVICE, GATEWAY, LIST):
        _, notes = render(values, notes=True)
        assert text not in notes


ELSEWHERE = {
    "config.discovery.k8s.namespace": "models",
    "networkPolicy.workers": [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "models"}},
            "podSelector": {"matchLabels": {"app": "vllm"}},
        }
    ],
}


def test_the_policy_lets_the_service_out_to_workers_of_another_namespace() -> None:
    release, errors = render(GATEWAY, ELSEWHERE)
    assert release.objects, errors
    _, workers, *_ = release.one("NetworkPolicy")["spec"]["egress"]
    assert workers["to"] == ELSEWHERE["networkPolicy.workers"]


def test_workers_may_be_named_by_their_addresses() -> None:
    peers = [{"ipBlock": {"cidr": "10.0.0.0/8"}}]
    release, errors = render(GATEWAY, ELSEWHERE | {"networkPolicy.workers": peers})
    assert release.objects, errors


def test_the_notes_say_that_envoy_would_fail_open_to_another_namespace() -> None:
    text = "fail_open_host names a Service in the namespace llm, and discovery follows models"
    host = "config.envoy.fail_open_host"
    _, notes = render(GATEWAY, ELSEWHERE, notes=True)
    assert text in notes
    _, right = render(GATEWAY, ELSEWHERE | {host: "vllm.models.svc:8000"}, notes=True)
    _, own = render(GATEWAY, notes=True)
    _, outside = render(GATEWAY, ELSEWHERE | {host: "vllm.example.com:8000"}, notes=True)
    for other in (right, own, outside):
        assert "What to check next" in other, other
        assert "names a Service in the namespace" not in other


def test_the_page_names_each_key_that_workers_of_another_namespace_need() -> None:
    page = (CHART / "README.md").read_text(encoding="utf-8")
    _, _, text = page.partition("**Workers in another namespace**")
    paragraph = text.partition("\n\n")[0]
    keys = (
        "config.discovery.k8s.namespace",
        "config.envoy.fail_open_host",
        "networkPolicy.workers",
    )
    assert [key for key in keys if f"`{key}`" not in paragraph] == []
