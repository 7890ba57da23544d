"""Wrong values are refused before anything is installed, and the refusal names the value."""

from pathlib import Path
from typing import Any

import pytest

from helm.generate import CHART
from tests.helm.chart import render

SERVICE = CHART / "values" / "sglang-behind-a-gateway.yaml"
GATEWAY = CHART / "values" / "vllm-with-envoy.yaml"
LIST = CHART / "values" / "list-of-workers.yaml"

POOL = {"config.discovery": {"backend": "inference_pool", "inference_pool": {"name": "llama"}}}

MATCHED = {"enabled": True, "matchLabels": {"app": "a"}}
PICKED = {"gatewayObjects.inferencePool": MATCHED}
PICKED_OPEN = {"gatewayObjects.inferencePool": MATCHED | {"failureMode": "FailOpen"}}

TWO_MODELS = [{"id": "m"}, {"id": "n"}]


def gateway(**changes: Any) -> dict[str, Any]:
    """Values that are right but for these."""
    values: dict[str, Any] = {
        "kind": "envoy-gateway",
        "hostnames": ["llm.example.org"],
        "gateway": {"name": "main"},
        "workers": {"service": "workers"},
    }
    return {"gatewayObjects.filter": values | changes}


# What each refusal must name, the file, and the values that it gets.
WRONG: list[tuple[str, Path, dict[str, Any]]] = [
    ("replica", SERVICE, {"replica": 3}),
    ("/replicas", SERVICE, {"replicas": 0}),
    ("/replicas", SERVICE, {"replicas": "three"}),
    ("/mode", SERVICE, {"mode": "sidecar"}),
    (
        "gatewayObjects.inferencePool.enabled",
        SERVICE,
        {"gatewayObjects.inferencePool.enabled": True},
    ),
    (
        "gatewayObjects.httpRoute.enabled",
        GATEWAY,
        {**POOL, "gatewayObjects.httpRoute.enabled": True},
    ),
    (
        "gatewayObjects.inferencePool.matchLabels",
        SERVICE,
        {**POOL, "gatewayObjects.inferencePool.enabled": True},
    ),
    (
        "config.discovery.inference_pool.namespace",
        SERVICE,
        {
            **POOL,
            "config.discovery.inference_pool.namespace": "elsewhere",
            "gatewayObjects.inferencePool": {"enabled": True, "matchLabels": {"app": "a"}},
        },
    ),
    (
        "gatewayObjects.httpRoute.parentRefs",
        SERVICE,
        {**POOL, "gatewayObjects.httpRoute.enabled": True},
    ),
    (
        "/gatewayObjects/inferencePool/targetPorts",
        SERVICE,
        {**POOL, "gatewayObjects.inferencePool.targetPorts": []},
    ),
    ("/image/pullPolicy", SERVICE, {"image.pullPolicy": "Sometimes"}),
    ("/image/digest", SERVICE, {"image.digest": "sha256:12"}),
    ("'prot'", SERVICE, {"config.server.prot": 9002}),
    ("/config/server/port", SERVICE, {"config.server.port": 70000}),
    ("'unix_socket'", SERVICE, {"config.server.unix_socket": "/run/x.sock"}),
    ("'admin_token_env'", SERVICE, {"config.server.admin_token_env": "X"}),
    ("'api_key'", SERVICE, {"config.workers.api_key": "secret"}),
    ("'endpoints_file'", SERVICE, {"config.envoy.endpoints_file": "/x.json"}),
    ("'kubeconfig'", SERVICE, {"config.discovery.k8s.kubeconfig": "/x"}),
    ("/config/models/0/policy", SERVICE, {"config.models[0].policy": "fastest"}),
    ("/config/models", SERVICE, {"config.models": []}),
    ("'id'", SERVICE, {"config.models": [{"policy": "random"}]}),
    ("'tokenizer_path'", SERVICE, {"config.models": [{"id": "m", "policy": "min_ttft"}]}),
    ("/config/discovery/backend", SERVICE, {"config.discovery.backend": "consul"}),
    ("'static_urls'", SERVICE, {"config.discovery.backend": "static_urls"}),
    ("/config/kv/max_pages", SERVICE, {"config.kv.max_pages": 10}),
    ("'zones'", SERVICE, {"sizing.zones": 3}),
    ("/sizing/pageSize", SERVICE, {"sizing.pageSize": 0}),
    ("/tokenizers/0/name", SERVICE, {"tokenizers[0].name": "My Model"}),
    ("/tokenizers/0/download/revision", SERVICE, {"tokenizers[0].download.revision": "main"}),
    ("/tokenizers/0'", SERVICE, {"tokenizers[0].image": {"reference": "x"}}),
    ("/tokenizers/0'", SERVICE, {"tokenizers": [{"name": "llama"}]}),
    ("/gateway/service/type", GATEWAY, {"gateway.service.type": "ExternalName"}),
    ("/gateway/memoryMib", GATEWAY, {"gateway.memoryMib": "much"}),
    ("gateway.memoryMib", GATEWAY, {"config.envoy.max_heap_mb": 1500}),
    ("/topologySpread/zones", SERVICE, {"topologySpread.zones": "Never"}),
    ("/monitoring/serviceMonitor/interval", SERVICE, {"monitoring.serviceMonitor.interval": "x"}),
    ("'name'", SERVICE, {"adminToken": {"key": "token"}}),
    ("/runAsUser", SERVICE, {"runAsUser": 0}),
    # Rules between values.
    ("autoscaling.keda.enabled", LIST, {"autoscaling.keda.enabled": True}),
    (
        "autoscaling.keda.prometheusAddress",
        SERVICE,
        {"autoscaling.keda.enabled": True},
    ),
    ("autoscaling.hpa.maxReplicas", LIST, {"autoscaling.hpa.minReplicas": 9}),
    ("monitoring.podMonitor.enabled", SERVICE, {"monitoring.podMonitor.enabled": True}),
    ("networkPolicy.monitoring", GATEWAY, {"monitoring.podMonitor.enabled": True}),
    ("tls", GATEWAY, {"tls.secretName": "x"}),
    (
        "tokenizers[1].name",
        GATEWAY,
        {"tokenizers[1]": {"name": "qwen", "image": {"reference": "x"}}},
    ),
    ("config.models[0].tokenizer_path", SERVICE, {"config.models[0].tokenizer_path": "/models/x"}),
    ("config.kv.max_pages", SERVICE, {"config.kv.max_pages": 1000}),
    ("sizing.openFilesMax", SERVICE, {"sizing.openFilesMax": 1024}),
    ("config.server.port", SERVICE, {"config.server.port": 9090}),
    ("serviceAccount.name", SERVICE, {"serviceAccount.create": False}),
    ("config.server.step_deadline_secs", SERVICE, {"config.server.step_deadline_secs": 20}),
    # Objects for a filter of a gateway.
    ("/gatewayObjects/filter/kind", LIST, gateway(kind="traefik")),
    ("gatewayObjects.filter.kind", LIST, gateway() | {"mode": "gateway"}),
    (
        "gatewayObjects.filter.kind",
        SERVICE,
        gateway()
        | POOL
        | {"gatewayObjects.httpRoute": {"enabled": True, "parentRefs": [{"name": "gw"}]}},
    ),
    ("gatewayObjects.filter.hostnames", LIST, gateway(hostnames=[])),
    ("gatewayObjects.filter.hostnames", LIST, gateway(kind="istio", hostnames=["a.com", "b.com"])),
    ("gatewayObjects.filter.gateway.name", LIST, gateway(gateway={})),
    ("gatewayObjects.filter.workers.service", LIST, gateway(workers={})),
    ("gatewayObjects.filter.patch", LIST, gateway(kind="istio", patch=True)),
    (
        "gatewayObjects.filter.failOpen",
        LIST,
        gateway(failOpen=True) | {"config.models": TWO_MODELS},
    ),
    ("config.proxy.retry_busy", LIST, gateway() | {"config.proxy.retry_busy": True}),
    ("config.load.release", LIST, gateway() | {"config.load.release": "stream_end"}),
    ("config.pd.decode", LIST, gateway() | {"config.pd.decode": "two_pass"}),
    ("config.pd.decode", SERVICE, POOL | PICKED | {"config.pd.decode": "two_pass"}),
    ("config.proxy.retry_busy", SERVICE, POOL | PICKED | {"config.proxy.retry_busy": True}),
    (
        "gatewayObjects.inferencePool.failureMode",
        SERVICE,
        POOL | PICKED_OPEN | {"config.models": TWO_MODELS},
    ),
    # A NetworkPolicy that shuts out what the release needs.
    ("networkPolicy.gateways", LIST, gateway() | {"networkPolicy.enabled": True}),
    (
        "networkPolicy.gateways",
        LIST,
        gateway(kind="istio", gateway={"name": "main", "namespace": "gateways"})
        | {"networkPolicy.enabled": True},
    ),
    (
        "networkPolicy.gateways",
        SERVICE,
        {
            **POOL,
            "gatewayObjects.httpRoute": {
                "enabled": True,
                "parentRefs": [{"name": "llm", "namespace": "gateways"}],
            },
            "networkPolicy.gateways": [],
        },
    ),
    ("networkPolicy.workers", GATEWAY, {"config.discovery.k8s.namespace": "models"}),
    ("networkPolicy.workers", SERVICE, {"config.discovery.k8s.namespace": ""}),
]


@pytest.mark.parametrize(
    ("key", "values", "more"), WRONG, ids=[f"{one[0]}-{next(iter(one[2]))}" for one in WRONG]
)
def test_a_wrong_value_is_refused_by_name(key: str, values: Path, more: dict[str, Any]) -> None:
    release, errors = render(values, more)
    assert release.objects == []
    assert key in errors
    assert "panic" not in errors


def test_the_chart_needs_models_and_discovery() -> None:
    release, errors = render()
    assert release.objects == []
    assert "'/config': missing properties 'models', 'discovery'" in errors


def test_values_of_a_parent_chart_are_allowed() -> None:
    release, errors = render(SERVICE, {"global.imageRegistry": "registry.example.com"})
    assert release.objects, errors
