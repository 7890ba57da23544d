"""What the objects of the chart contain, and which values change them."""

import re
from typing import Any

import pytest
import yaml

from extproc.config.loading import parse_config
from helm.generate import CHART
from tests.helm.chart import VALUES_FILES, Release, render

VALUES = CHART / "values"
SERVICE = VALUES / "sglang-behind-a-gateway.yaml"
GATEWAY = VALUES / "vllm-with-envoy.yaml"
LIST = VALUES / "list-of-workers.yaml"
LARGE = VALUES / "large-fleet.yaml"


def rendered(values: Any, more: dict[str, Any] | None = None) -> Release:
    release, errors = render(values, more)
    assert release.objects, errors
    return release


# Rights at the API server.


SECTIONS: dict[str, dict[str, Any]] = {
    "k8s": {"label_selector": "app=sglang"},
    "k8s_pods": {"label_selector": "app=sglang"},
    "inference_pool": {"name": "llama"},
}


def rules_of_the_page() -> dict[str, list[dict[str, Any]]]:
    """What docs/kubernetes.md says of the rights, by backend."""
    page = (CHART.parents[1] / "docs" / "kubernetes.md").read_text()
    permissions = page.partition("## Permissions")[2].partition("\n## ")[0]
    objects, pods, pool = (
        list(yaml.safe_load_all(block))
        for block in re.findall(r"```yaml\n(.*?)```", permissions, re.S)
    )
    (role,) = [one for one in objects if one["kind"] == "Role"]
    return {"k8s": role["rules"], "k8s_pods": pods[0], "inference_pool": [*pods[0], *pool[0]]}


@pytest.mark.parametrize("backend", SECTIONS)
def test_the_role_has_what_the_page_says_of_the_backend(backend: str) -> None:
    section = {"namespace": "workers", **SECTIONS[backend]}
    more = {"config.discovery": {"backend": backend, backend: section}}
    release = rendered(SERVICE, {**more, "networkPolicy.enabled": False})
    role, binding = release.one("Role"), release.one("RoleBinding")
    assert role["rules"] == rules_of_the_page()[backend]
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == "workers"
    (subject,) = binding["subjects"]
    assert subject["namespace"] == "llm"
    assert subject["name"] == release.pod["spec"]["serviceAccountName"]
    assert parse_config(release.config).discovery.backend == backend


POOL: dict[str, Any] = {
    "config.discovery": {"backend": "inference_pool", "inference_pool": {"name": "llama"}},
    "gatewayObjects.inferencePool": {"enabled": True, "matchLabels": {"app": "sglang"}},
}


def test_a_pool_names_this_service_as_its_picker() -> None:
    route = {"enabled": True, "parentRefs": [{"name": "gw"}], "hostnames": ["llm.example.com"]}
    release = rendered(SERVICE, POOL | {"gatewayObjects.httpRoute": route})
    pool, found = release.one("InferencePool"), release.one("HTTPRoute")
    service = release.one("Service")
    picker = pool["spec"]["endpointPickerRef"]
    assert picker["name"] == service["metadata"]["name"]
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert picker["port"]["number"] == ports["grpc-extproc"]
    assert picker["failureMode"] == "FailClose"
    assert pool["spec"]["targetPorts"] == [{"number": 30000}]
    assert pool["metadata"]["name"] == release.config["discovery"]["inference_pool"]["name"]
    (rule,) = found["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", "llama")
    paths = {match["path"]["value"] for match in rule["matches"]}
    assert paths == {"/v1/chat/completions", "/v1/completions", "/v1/models"}
    assert found["spec"]["hostnames"] == ["llm.example.com"]


def test_objects_of_a_gateway_are_made_only_on_request() -> None:
    for values in VALUES_FILES:
        assert not {"InferencePool", "HTTPRoute"} & rendered(values).kinds()
    release = rendered(SERVICE, {"config.discovery": POOL["config.discovery"]})
    assert not {"InferencePool", "HTTPRoute"} & release.kinds()


def test_all_namespaces_need_a_cluster_role_with_a_name_of_its_own() -> None:
    release = rendered(LARGE)
    assert release.one("ClusterRole")["metadata"]["name"] == "llm-r-llm-extproc"
    assert release.one("ClusterRoleBinding")["roleRef"]["name"] == "llm-r-llm-extproc"
    assert "Role" not in release.kinds()


def test_discovery_is_in_the_namespace_of_the_release_by_default() -> None:
    assert rendered(SERVICE).config["discovery"]["k8s"]["namespace"] == "llm"


def test_a_token_is_mounted_only_if_discovery_reads_the_api_server() -> None:
    assert rendered(SERVICE).pod["spec"]["automountServiceAccountToken"] is True
    listed = rendered(LIST)
    section = {"backend": "dns", "dns": {"urls": ["http://workers.llm.svc:30000"]}}
    named = rendered(SERVICE, {"config.discovery": section})
    assert named.config["discovery"] == section
    for release in (listed, named):
        assert release.pod["spec"]["automountServiceAccountToken"] is False
        assert not {"Role", "ClusterRole"} & release.kinds()
    for release in (rendered(SERVICE), listed, named):
        assert release.one("ServiceAccount")["automountServiceAccountToken"] is False


# Changes of the configuration.


def annotations(release: Release) -> dict[str, str]:
    found: dict[str, str] = release.pod["metadata"]["annotations"]
    return found


@pytest.mark.parametrize(
    ("key", "value", "replaces_pods"),
    [
        ("config.proxy.fallback_workers", 1, False),
        ("config.models[0].policy", "least_load", False),
        # Memory and the time to end follow from these.
        ("config.server.max_requests", 500, True),
        ("config.server.drain_secs", 20, True),
        ("config.models[1]", {"id": "another"}, False),
        ("config.server.port", 9003, True),
        ("config.models[0].queue.tenant_header", "x-team", True),
        ("config.discovery.k8s.label_selector", "app=other", True),
        ("config.kv.replay_timeout_secs", 9, True),
        ("adminToken", None, True),
    ],
)
def test_only_keys_that_need_a_restart_or_other_resources_replace_the_pods(
    key: str, value: Any, replaces_pods: bool
) -> None:
    before, after = rendered(SERVICE), rendered(SERVICE, {key: value})
    assert (before.pod != after.pod) is replaces_pods
    assert before.config != after.config


@pytest.mark.parametrize("more", [{"reload": False}, {"mode": "gateway"}])
def test_without_a_reload_each_change_replaces_the_pods(more: dict[str, Any]) -> None:
    before = rendered(SERVICE, more)
    after = rendered(SERVICE, {**more, "config.server.max_requests": 500})
    assert annotations(before)["checksum/config"] != annotations(after)["checksum/config"]


def test_the_service_follows_its_file_only_with_reload() -> None:
    assert rendered(SERVICE).config["server"]["watch_secs"] == 1
    assert rendered(SERVICE, {"reload": False}).config["server"]["watch_secs"] == 0


# Sizes and times.


def memory(release: Release) -> tuple[int, int]:
    """Request and limit in MiB."""
    resources = release.container["resources"]
    request, limit = resources["requests"]["memory"], resources["limits"]["memory"]
    return int(request.removesuffix("Mi")), int(limit.removesuffix("Mi"))


def test_memory_follows_from_the_pages_that_workers_can_hold() -> None:
    sizing = {"workers": 200, "kvTokensPerWorker": 1_000_000, "pageSize": 16}
    small = memory(rendered(SERVICE, {"sizing": sizing | {"workers": 1}}))
    large = memory(rendered(SERVICE, {"sizing": sizing}))
    # 199 workers more, 62,500 pages each, 250 bytes a page.
    pages = 199 * 62_500
    assert large[0] - small[0] == pytest.approx(pages * 250 / 2**20, abs=2)
    # The index may grow by a quarter.
    assert large[1] - small[1] == pytest.approx(1.25 * pages * 250 / 2**20, abs=2)


def test_the_index_has_room_for_all_pages_and_a_quarter_more() -> None:
    sizing = {"workers": 10, "kvTokensPerWorker": 100_001, "pageSize": 10}
    release = rendered(SERVICE, {"sizing": sizing})
    # 10,001 pages a worker.
    assert parse_config(release.config).kv.max_pages == 125_012


def test_a_policy_without_tokens_needs_no_memory_for_an_index() -> None:
    small, large = (memory(rendered(LIST, {"sizing.workers": workers})) for workers in (1, 10_000))
    assert small == large
    assert "kv" not in rendered(LIST).config


def test_memory_can_be_given_instead() -> None:
    more = {"resources.memoryRequest": "3Gi", "resources.memoryLimit": "5Gi"}
    resources = rendered(SERVICE, more).container["resources"]
    assert resources["requests"]["memory"] == "3Gi"
    assert resources["limits"]["memory"] == "5Gi"


@pytest.mark.parametrize("values", VALUES_FILES, ids=lambda path: path.stem)
def test_a_pod_has_more_time_to_end_than_drain_and_prefill_take(values: Any) -> None:
    release = rendered(values)
    config = parse_config(release.config)
    grace = release.pod["spec"]["terminationGracePeriodSeconds"]
    pre_stop = release.container["lifecycle"]["preStop"]
    before = (
        pre_stop["sleep"]["seconds"]
        if "sleep" in pre_stop
        else sum(int(text) for text in pre_stop["exec"]["command"][-2:])
    )
    assert grace > before + config.server.drain_secs + config.pd.prefill_timeout_secs


def test_the_time_to_end_can_be_given_instead() -> None:
    pod = rendered(SERVICE, {"graceSecs": 33}).pod["spec"]
    assert pod["terminationGracePeriodSeconds"] == 33


# The two modes.


def test_a_gateway_finds_each_pod_and_speaks_http2_to_it() -> None:
    service = rendered(SERVICE).one("Service")["spec"]
    assert service["clusterIP"] == "None"
    ports = {port["name"]: port for port in service["ports"]}
    assert ports["grpc-extproc"]["appProtocol"] == "kubernetes.io/h2c"
    assert ports["grpc-extproc"]["port"] == 9002


def test_probes_speak_grpc_where_the_kubelet_can() -> None:
    plain = rendered(SERVICE).container
    assert plain["startupProbe"]["grpc"] == {"port": 9002, "service": "liveness"}
    assert plain["readinessProbe"]["grpc"] == {"port": 9002, "service": "readiness"}
    assert plain["livenessProbe"]["grpc"] == {"port": 9002, "service": "liveness"}
    for values in (GATEWAY, LARGE):  # a Unix socket, and TLS
        container = rendered(values).container
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "admin"}
        assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "admin"}


def test_envoy_is_a_native_sidecar_that_reaches_the_service_by_a_unix_socket() -> None:
    release = rendered(GATEWAY)
    files, envoy = release.pod["spec"]["initContainers"]
    assert files["name"] == "envoy-file"
    assert envoy["restartPolicy"] == "Always"
    assert "startupProbe" in envoy
    server = release.config["server"]
    assert server["host"] == "127.0.0.1"
    folders = {
        mount["mountPath"]
        for container in (files, envoy, release.container)
        for mount in container["volumeMounts"]
        if mount["name"] == "run"
    }
    assert folders == {"/run/llm-extproc"}
    assert server["unix_socket"].startswith("/run/llm-extproc/")
    assert release.config["envoy"]["endpoints"] == "ads"


def test_envoy_refuses_requests_before_its_container_is_full() -> None:
    release = rendered(GATEWAY, {"gateway.memoryMib": 3000})
    assert release.config["envoy"]["max_heap_mb"] == 1500
    envoy = release.pod["spec"]["initContainers"][1]
    assert envoy["resources"]["limits"]["memory"] == "3000Mi"
    own = {"gateway.memoryMib": 3000, "config.envoy.max_heap_mb": 600}
    assert rendered(GATEWAY, own).config["envoy"]["max_heap_mb"] == 600


def test_tls_brings_certificates_for_both_sides() -> None:
    config = rendered(LARGE).config
    assert config["server"]["tls"]["client_ca_file"] == "/etc/extproc-tls/ca.crt"
    assert config["envoy"]["extproc"]["ca_file"] == "/etc/extproc-tls/ca.crt"


# Tokenizers.


def test_a_tokenizer_comes_from_a_volume_an_image_or_a_download() -> None:
    claim = {volume["name"]: volume for volume in rendered(GATEWAY).pod["spec"]["volumes"]}
    assert claim["tokenizer-qwen"]["persistentVolumeClaim"]["claimName"] == "models"
    images = {volume["name"]: volume for volume in rendered(LARGE).pod["spec"]["volumes"]}
    assert images["tokenizer-qwen"]["image"]["pullPolicy"] == "Always"
    (download,) = rendered(SERVICE).pod["spec"]["initContainers"]
    command = " ".join(download["command"])
    assert command.startswith("hf download meta-llama/Llama-3.1-8B-Instruct --revision 0e9e39f")
    (token,) = [one for one in download["env"] if one["name"] == "HF_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"] == {"name": "hugging-face", "key": "token"}


def test_no_secret_is_part_of_the_configuration() -> None:
    release = rendered(LIST, {"adminToken": {"name": "extproc-admin", "key": "t"}})
    config = release.config
    assert config["workers"] == {"api_key_file": "/etc/extproc-worker-key/key"}
    assert config["server"]["admin_token_env"] == "EXTPROC_ADMIN_TOKEN"
    (variable,) = release.container["env"]
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "extproc-admin", "key": "t"}


# Number of pods, network, monitoring.


def test_the_number_of_pods_is_left_to_the_autoscaler() -> None:
    assert rendered(SERVICE).one("Deployment")["spec"]["replicas"] == 2
    for values, kind in ((LIST, "HorizontalPodAutoscaler"), (LARGE, "ScaledObject")):
        release = rendered(values)
        assert "replicas" not in release.one("Deployment")["spec"]
        target = release.one(kind)["spec"]["scaleTargetRef"]
        assert target["name"] == release.one("Deployment")["metadata"]["name"]


def test_keda_counts_the_requests_of_this_release() -> None:
    (trigger,) = rendered(LARGE).one("ScaledObject")["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    assert query == 'sum(extproc_requests_open{namespace="llm",pod=~"r-llm-extproc-.*"})'


def test_a_single_pod_may_be_evicted() -> None:
    assert "PodDisruptionBudget" in rendered(SERVICE).kinds()
    assert "PodDisruptionBudget" not in rendered(SERVICE, {"replicas": 1}).kinds()


def test_the_network_policy_lets_in_gateways_and_out_to_workers() -> None:
    policy = rendered(LARGE).one("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    grpc, admin = policy["ingress"]
    assert grpc["ports"] == [{"port": "grpc-extproc"}]
    assert admin["ports"] == [{"port": "admin"}]
    dns, workers, api_server = policy["egress"]
    assert [port["port"] for port in dns["ports"]] == [53, 53]
    assert {"port": 5557, "endPort": 5572} in workers["ports"]
    assert {"port": 443} in api_server["ports"]
    assert policy["podSelector"]["matchLabels"].items() <= (
        rendered(LARGE).pod["metadata"]["labels"].items()
    )


def test_the_network_policy_lets_the_test_pod_in() -> None:
    release = rendered(SERVICE)
    peers = release.one("NetworkPolicy")["spec"]["ingress"][0]["from"]
    labels = release.one("Pod", "-test")["metadata"]["labels"]
    assert any(peer["podSelector"]["matchLabels"].items() <= labels.items() for peer in peers[:1])
    # The test pod is no endpoint of the Service.
    selector = release.one("Service")["spec"]["selector"]
    assert not selector.items() <= labels.items()


def test_prometheus_reads_the_metrics_with_the_admin_token() -> None:
    release = rendered(SERVICE)
    monitor = release.one("ServiceMonitor")["spec"]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "extproc-admin", "key": "token"}
    labels = release.one("Service")["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()


def test_in_gateway_mode_only_one_service_is_scraped() -> None:
    more = {"monitoring.serviceMonitor.enabled": True, "networkPolicy.enabled": False}
    release = rendered(GATEWAY, more)
    wanted = release.one("ServiceMonitor")["spec"]["selector"]["matchLabels"]
    services = [one for one in release if one["kind"] == "Service"]
    scraped = [one for one in services if wanted.items() <= one["metadata"]["labels"].items()]
    assert len(services) == 2
    assert [one["spec"]["clusterIP"] for one in scraped] == ["None"]


def test_alerts_are_about_this_release() -> None:
    (group,) = rendered(SERVICE).one("PrometheusRule")["spec"]["groups"]
    scope = 'namespace="llm",pod=~"r-llm-extproc-.*"'
    assert all(scope in rule["expr"] for rule in group["rules"])
    assert len([rule for rule in group["rules"] if "alert" in rule]) >= 10
    recorded = {rule["record"]: rule["expr"] for rule in group["rules"] if "record" in rule}
    for name, expression in recorded.items():
        # Signals of pools: every replica estimates the whole.
        assert name.startswith("model_role:extproc_pool_")
        assert expression.startswith("max by (model, role)")
    assert len(recorded) == 2
