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
