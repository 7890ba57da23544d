"""The real Envoy accepts what is rendered, and what the mesh recipes put into a gateway."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from extproc.config.loading import parse_config
from extproc.envoy_config import render_bootstrap, render_yaml
from extproc.envoy_config.endpoints import Endpoint, endpoints_text
from extproc.envoy_config.merge import merge_bootstrap

ENVOY_FOLDER = Path(__file__).parents[2] / "envoy"
RECIPE_FILES = sorted(ENVOY_FOLDER.rglob("*.yaml"))
API = "type.googleapis.com/envoy"
MANAGER = "envoy.filters.network.http_connection_manager"
WORKERS = "outbound|8000||workers.default.svc.cluster.local"


def envoy_binary() -> str:
    beside = Path(sys.executable).parent / "envoy"
    found = str(beside) if beside.exists() else shutil.which("envoy")
    if found is None:
        pytest.fail("no envoy binary: run `make venv`")
    return found


def assert_accepted(text: str, folder: Path) -> None:
    """Envoy starts with this, and uses nothing that is going away."""
    file = folder / "envoy.yaml"
    file.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [envoy_binary(), "--mode", "validate", "-c", str(file), "-l", "warning"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "eprecated" not in done.stderr


@pytest.fixture(scope="module")
def pem_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pem")
    authority = trustme.CA()
    leaf = authority.issue_cert("envoy.example")
    paths = {name: str(folder / f"{name}.pem") for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(paths["ca"])
    leaf.cert_chain_pems[0].write_to_path(paths["cert"])
    leaf.private_key_pem.write_to_path(paths["key"])
    # Envoy does not start without the file that the service writes.
    paths["endpoints"] = str(folder / "endpoints.json")
    endpoints = [Endpoint("10.0.0.2:1", "http://v.example:1"), Endpoint("[::1]:1", "https://w:1")]
    Path(paths["endpoints"]).write_bytes(endpoints_text("workers", endpoints))
    return paths


CASES: dict[str, dict[str, Any]] = {
    "one address": {},
    "two models": {"models": [{"id": "a"}, {"id": "b"}]},
    "fail closed": {"envoy": {"fail_open": False}},
    "no limit of the heap": {"envoy": {"max_heap_mb": None}},
    "single destination": {"envoy": {"destination": "single"}},
    "no access log": {"envoy": {"access_log": None}},
    "access log in a file": {"envoy": {"access_log": "/dev/null"}},
    "access log on stderr": {"envoy": {"access_log": "/dev/stderr"}},
    "own names": {
        "envoy": {"cluster": "pool", "cluster_header": "x-pool", "model_header": "x-model"}
    },
    "all addresses": {"server": {"host": "::"}, "envoy": {"host": "::"}},
    "service by name": {"envoy": {"extproc": {"host": "router.example"}}},
    "unix socket": {"server": {"unix_socket": "/run/extproc.sock"}},
    "names": {"urls": ["http://worker-0.example:8000", "http://worker_1:8000"]},
    "IPv6": {"urls": ["http://[::1]:8000", "http://[2001:db8::1]:8000"]},
    "names and addresses": {"urls": ["http://w.example:1", "http://10.0.0.1:1", "http://[::1]:1"]},
    "https names": {"urls": ["https://w.example", "https://v.example"], "tls_workers": True},
    "https addresses": {"urls": ["https://10.0.0.1:1", "https://[::1]:1"], "tls_workers": True},
    "endpoints in a file": {
        "urls": ["https://w.example", "https://10.0.0.1:1", "http://v.example:1"],
        "tls_workers": True,
        "endpoints_file": True,
    },
    "endpoints over ADS": {
        "urls": ["https://w.example", "https://10.0.0.1:1", "http://v.example:1"],
        "tls_workers": True,
        "envoy": {"endpoints": "ads"},
    },
    "a name to fail open to": {
        "envoy": {"endpoints": "ads", "fail_open_host": "workers.llm.svc:30000"}
    },
    "pods to fail open to": {
        "discovery": {"backend": "k8s", "k8s": {"namespace": "n", "label_selector": "a"}},
        "envoy": {"endpoints": "ads"},
    },
    "ADS without failing open": {"envoy": {"endpoints": "ads", "fail_open": False}},
    "mixed schemes": {
        "urls": ["https://w.example", "https://10.0.0.1:1", "http://v.example:1"],
        "tls_workers": True,
    },
    "largest values": {
        "server": {"max_body_bytes": 2**30, "max_buffered_bytes": 2**40},
        "envoy": {
            "message_timeout_secs": 3600,
            "stream_idle_timeout_secs": 604800,
            "max_heap_mb": 1024 * 1024,
            "max_connections": 1_000_000_000,
        },
    },
    "smallest values": {
        "server": {"max_body_bytes": 1024, "step_deadline_secs": 0.001},
        "proxy": {"request_timeout_secs": 0.001, "connect_timeout_secs": 0.001},
        "envoy": {
            "worker_idle_timeout_secs": 0.001,
            "message_timeout_secs": 0.002,
            "max_heap_mb": 64,
            "max_connections": 1,
        },
    },
}


def raw_config(case: dict[str, Any], pem: dict[str, str]) -> dict[str, Any]:
    """The raw configuration of a case; `urls` and the like are short for longer sections."""
    raw = {"models": [{"id": "m"}], **copy.deepcopy(case)}
    urls = raw.pop("urls", ["http://10.0.0.1:8000"])
    raw.setdefault("discovery", {"backend": "static_urls", "static_urls": {"urls": urls}})
    if raw.pop("tls_workers", False):
        raw["workers"] = {"ca_file": pem["ca"]}
    if raw.pop("endpoints_file", False):
        raw["envoy"] = {"endpoints_file": pem["endpoints"]}
    return raw


@pytest.mark.parametrize("name", CASES)
def test_envoy_accepts_what_is_rendered(
    name: str, pem_files: dict[str, str], tmp_path: Path
) -> None:
    config = parse_config(raw_config(CASES[name], pem_files))
    assert_accepted(render_yaml(config), tmp_path)


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", "router.example"])
def test_envoy_accepts_tls_to_the_service(
    mutual: bool, host: str, pem_files: dict[str, str], tmp_path: Path
) -> None:
    raw = raw_config({}, pem_files)
    raw["server"] = {"tls": {"cert_file": pem_files["cert"], "key_file": pem_files["key"]}}
    raw["envoy"] = {"extproc": {"host": host, "ca_file": pem_files["ca"]}}
    if mutual:
        raw["server"]["tls"]["client_ca_file"] = pem_files["ca"]
        raw["envoy"]["extproc"] |= {"cert_file": pem_files["cert"], "key_file": pem_files["key"]}
    assert_accepted(render_yaml(parse_config(raw)), tmp_path)


@pytest.mark.parametrize("name", ["ads", "pd", "standalone"])
def test_envoy_accepts_the_shipped_file(name: str, tmp_path: Path) -> None:
    text = (ENVOY_FOLDER / name / "envoy.yaml").read_text(encoding="utf-8")
    assert_accepted(text, tmp_path)


MERGED: dict[str, dict[str, Any]] = {
    "one pass": {"pd": {"decode": "inline"}},
    "closed": {"envoy": {"fail_open": False}},
    "two models": {"models": [{"id": "a"}, {"id": "b"}]},
    "endpoints over ADS": {"envoy": {"endpoints": "ads"}},
    "endpoints in a file": {"endpoints_file": True},
    "unix socket": {"server": {"unix_socket": "/run/extproc.sock"}},
    "own names": {"envoy": {"cluster_header": "x-pool", "model_header": "x-model"}},
    "https": {"urls": ["https://w.example", "https://10.0.0.1:1"], "tls_workers": True},
    "several routes": {"routes": ["chat", "native"]},
    "a listener of its own": {"routes": ["chat", "second"]},
}


@pytest.mark.parametrize("name", MERGED)
def test_envoy_accepts_what_is_merged(name: str, pem_files: dict[str, str], tmp_path: Path) -> None:
    case = copy.deepcopy(MERGED[name])
    routes = case.pop("routes", ["chat"])
    raw = raw_config(case, pem_files)
    raw["envoy"] = {"cluster": "llm_workers"} | raw.get("envoy", {})
    text = (ENVOY_FOLDER / "merge" / "before.yaml").read_text(encoding="utf-8")
    existing = yaml.safe_load(text)
    listeners = existing["static_resources"]["listeners"]
    second = copy.deepcopy(listeners[0]) | {"name": "second"}
    second["address"]["socket_address"]["port_value"] = 8081
    for listener, renamed in ((listeners[0], "native"), (second, "second")):
        hosts = _manager_of(listener)["route_config"]["virtual_hosts"]
        route = hosts[1]["routes"][1]
        if renamed == "second":
            route["name"] = renamed
        else:
            hosts[1]["routes"].append(
                copy.deepcopy(route) | {"name": renamed, "match": {"path": "/generate"}}
            )
    listeners.append(second)
    merged_file = merge_bootstrap(parse_config(raw), existing, routes)
    assert_accepted(yaml.safe_dump(merged_file), tmp_path)


def _manager_of(listener: dict[str, Any]) -> dict[str, Any]:
    manager: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return manager


@pytest.mark.parametrize("name", ["before.yaml", "envoy.yaml"])
def test_envoy_accepts_the_files_of_the_recipe_as_they_are(name: str, tmp_path: Path) -> None:
    assert_accepted((ENVOY_FOLDER / "merge" / name).read_text(encoding="utf-8"), tmp_path)


def documents(path: Path) -> list[dict[str, Any]]:
    found = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    assert all(isinstance(document, dict) for document in found)
    return found


def in_file(name: str, kind: str) -> list[dict[str, Any]]:
    return [d for d in documents(ENVOY_FOLDER / name) if d["kind"] == kind]


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.parent.name + "/" + path.name)
def test_every_file_is_yaml(path: Path) -> None:
    assert documents(path)


@pytest.mark.parametrize(
    "name", ["istio/extproc.yaml", "envoy-gateway/extproc.yaml", "inference-pool/extproc.yaml"]
)
def test_configurations_in_config_maps_are_good(name: str) -> None:
    (config_map,) = in_file(name, "ConfigMap")
    config = parse_config(yaml.safe_load(config_map["data"]["extproc.yaml"]))
    (service,) = in_file(name, "Service")
    assert service["spec"]["ports"][0]["port"] == config.server.port
    # Where the gateway discovers the workers itself, there is no file to render.
    assert config.discovery.backend != "static_urls" or render_bootstrap(config)


def istio_patches(*names: str) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """(what is patched, where, with what) of every patch in these files."""
    for name in names:
        for document in in_file(name, "EnvoyFilter"):
            for patch in document["spec"]["configPatches"]:
                yield patch["applyTo"], patch["match"], patch["patch"]["value"]


def merged(base: Any, patch: Any) -> Any:
    """Messages merge, lists are appended, other values are replaced: as Istio does it."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {
            key: merged(base[key], patch[key]) if key in base and key in patch else value
            for key, value in {**base, **patch}.items()
        }
    return base + patch if isinstance(base, list) else patch


def gateway_cluster(name: str) -> dict[str, Any]:
    """A cluster as Istio makes it for a gateway, with its endpoints in place of discovery.

    HTTP/2 for ports whose name begins with `grpc`, as ours does.
    """
    protocol = "http2_protocol_options" if "extproc" in name else "http_protocol_options"
    http_options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    address = {"socket_address": {"address": "10.0.0.1", "port_value": 8000}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "10s",
        "lb_policy": "LEAST_REQUEST",
        "common_lb_config": {},
        "typed_extension_protocol_options": {
            http_options: {
                "@type": f"type.googleapis.com/{http_options}",
                "explicit_http_config": {protocol: {}},
            }
        },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }


def gateway_bootstrap(
    manager: dict[str, Any],
    filters: list[dict[str, Any]],
    virtual_host: dict[str, Any],
    clusters: list[dict[str, Any]],
) -> dict[str, Any]:
    host = {
        "name": "llm.example.com:80",
        "domains": ["llm.example.com"],
        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": WORKERS}}],
    }
    router = {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": f"{API}.extensions.filters.http.router.v3.Router"},
    }
    base = {
        "@type": f"{API}.extensions.filters.network.http_connection_manager"
        ".v3.HttpConnectionManager",
        "stat_prefix": "outbound_0.0.0.0_8080",
        "http_filters": [*filters, router],
        "route_config": {"virtual_hosts": [merged(host, virtual_host)]},
    }
    listener = {
        "name": "0.0.0.0_8080",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 8080}},
        "filter_chains": [{"filters": [{"name": MANAGER, "typed_config": merged(base, manager)}]}],
    }
    return {"static_resources": {"listeners": [listener], "clusters": clusters}}


def test_envoy_accepts_the_istio_patches(tmp_path: Path) -> None:
    manager: dict[str, Any] = {}
    filters: list[dict[str, Any]] = []
    host: dict[str, Any] = {}
    clusters: list[dict[str, Any]] = []
    listener: dict[str, Any] = {}
    for target, match, value in istio_patches(
        "istio/envoyfilter.yaml", "istio/route-fail-closed.yaml"
    ):
        match target:
            case "NETWORK_FILTER":
                manager = value["typed_config"]
            case "HTTP_FILTER":
                filters.append(value)
            case "VIRTUAL_HOST":
                host = value
            case "CLUSTER":
                clusters.append(merged(gateway_cluster(match["cluster"]["name"]), value))
            case "LISTENER":
                listener = value
    assert {c["name"] for c in clusters} == {
        WORKERS,
        "outbound|9002||extproc.llm.svc.cluster.local",
    }
    bootstrap = gateway_bootstrap(manager, filters, host, clusters)
    listeners = bootstrap["static_resources"]["listeners"]
    bootstrap["static_resources"]["listeners"] = [merged(listeners[0], listener)]
    assert_accepted(yaml.safe_dump(bootstrap), tmp_path)


def test_the_istio_patches_say_what_is_rendered() -> None:
    (config_map,) = in_file("istio/extproc.yaml", "ConfigMap")
    raw = yaml.safe_load(config_map["data"]["extproc.yaml"])
    # Where Istio finds the workers, only a list of them gives a file to compare with.
    raw["discovery"] = {
        "backend": "static_urls",
        "static_urls": {"urls": ["http://10.0.0.1:8000"]},
    }
    rendered = render_bootstrap(parse_config(raw))
    listener, _ = rendered["static_resources"]["listeners"]
    ours = listener["filter_chains"][0]["filters"][0]["typed_config"]
    patches: dict[str, Any] = {}
    filters: list[dict[str, Any]] = []
    for target, match, value in istio_patches("istio/envoyfilter.yaml"):
        patches[match["cluster"]["name"] if target == "CLUSTER" else target] = value
        filters += [value] if target == "HTTP_FILTER" else []
    key = "early_header_mutation_extensions"
    merged_in = patches["NETWORK_FILTER"]["typed_config"]
    assert merged_in[key] == ours[key]
    assert merged_in["http_protocol_options"] == ours["http_protocol_options"]
    windows = ours["http2_protocol_options"]
    assert merged_in["http2_protocol_options"].items() <= windows.items()
    expected = copy.deepcopy(ours["http_filters"][:-1])
    for one in expected:
        one["disabled"] = True
    grpc = expected[-1]["typed_config"]["grpc_service"]["envoy_grpc"]
    grpc["cluster_name"] = "outbound|9002||extproc.llm.svc.cluster.local"
    assert filters == expected
    switched_on = patches["VIRTUAL_HOST"]["typed_per_filter_config"]
    assert set(switched_on) == {one["name"] for one in expected}
    workers, _, service = rendered["static_resources"]["clusters"]
    assert patches[WORKERS]["load_balancing_policy"] == workers["load_balancing_policy"]
    assert patches[grpc["cluster_name"]]["health_checks"] == service["health_checks"]
    limit = listener["per_connection_buffer_limit_bytes"]
    assert patches["VIRTUAL_HOST"]["request_body_buffer_limit"] == limit
    removed = ours["route_config"]["response_headers_to_remove"]
    assert patches["VIRTUAL_HOST"]["response_headers_to_remove"] == removed


def test_envoy_accepts_the_filter_of_envoy_gateway_with_our_patch(tmp_path: Path) -> None:
    """The filter as Envoy Gateway translates the policy, then the optional JSON patch."""
    (policy,) = in_file("envoy-gateway/policies.yaml", "EnvoyExtensionPolicy")
    (settings,) = policy["spec"]["extProc"]
    external_processor: dict[str, Any] = {
        "@type": f"{API}.extensions.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {
            "envoy_grpc": {"cluster_name": "service"},
            "timeout": "10s",
            "retry_policy": {"retry_on": "unavailable", "num_retries": 3},
        },
        "failure_mode_allow": settings["failOpen"],
        "message_timeout": settings["messageTimeout"],
        "processing_mode": {
            "request_header_mode": "SEND",
            "request_body_mode": settings["processingMode"]["request"]["body"].upper(),
            "request_trailer_mode": "SKIP",
            "response_header_mode": "SEND",
            "response_trailer_mode": "SKIP",
        },
        "response_attributes": settings["processingMode"]["response"]["attributes"],
        "metadata_options": {
            "forwarding_namespaces": {"untyped": settings["metadata"]["accessibleNamespaces"]},
            "receiving_namespaces": {"untyped": settings["metadata"]["writableNamespaces"]},
        },
    }
    (patch,) = in_file("envoy-gateway/patch.yaml", "EnvoyPatchPolicy")
    prefix = "/default_filter_chain/filters/0/typed_config/http_filters/0/typed_config/"
    for entry in patch["spec"]["jsonPatches"]:
        operation = entry["operation"]
        assert operation["path"].startswith(prefix)
        *parents, last = operation["path"].removeprefix(prefix).split("/")
        target = external_processor
        for parent in parents:
            target = target[parent]
        assert (last in target) == (operation["op"] == "replace")
        target[last] = operation["value"]
    filters = [{"name": "envoy.filters.http.ext_proc", "typed_config": external_processor}]
    clusters = [gateway_cluster(WORKERS), gateway_cluster("service")]
    assert_accepted(yaml.safe_dump(gateway_bootstrap({}, filters, {}, clusters)), tmp_path)
    rendered = render_bootstrap(parse_config(raw_config({}, {})))
    listener, _ = rendered["static_resources"]["listeners"]
    ours = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][-2]
    for key in ("mutation_rules", "metadata_options", "response_attributes", "forward_rules"):
        assert external_processor[key] == ours["typed_config"][key]


def test_envoy_gateway_strips_what_is_rendered() -> None:
    (policy,) = in_file("envoy-gateway/policies.yaml", "ClientTrafficPolicy")
    rendered = render_bootstrap(parse_config(raw_config({}, {})))
    listener, _ = rendered["static_resources"]["listeners"]
    ours = listener["filter_chains"][0]["filters"][0]["typed_config"]
    (early,) = ours["early_header_mutation_extensions"]
    *names, steering = early["typed_config"]["mutations"]
    stripped = policy["spec"]["headers"]["earlyRequestHeaders"]
    assert stripped["remove"] == [one["remove"] for one in names]
    (pattern,) = stripped["removeOnMatch"]
    assert pattern["value"] == steering["remove_on_match"]["key_matcher"]["safe_regex"]["regex"]
    (route,) = in_file("envoy-gateway/route.yaml", "HTTPRoute")
    (filtered,) = route["spec"]["rules"][0]["filters"]
    removed = ours["route_config"]["response_headers_to_remove"]
    assert filtered["responseHeaderModifier"]["remove"] == [*removed, "x-router-error-code"]
    limit = listener["per_connection_buffer_limit_bytes"]
    assert policy["spec"]["connection"]["bufferLimit"] == limit
    assert policy["spec"]["http2"]["initialStreamWindowSize"] == limit
