"""The service as the endpoint picker of an InferencePool, behind Envoys as gateways set them up.

These are the filter, the clusters and the limits that Istio and Envoy AI Gateway make of a pool. No
controller of theirs runs here.
"""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
import trustme

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running
from tests.e2e.pd_fleet import pd_stack
from tests.e2e.raw_http import completion, port_of, post

API = "type.googleapis.com/envoy"
EXTENSIONS = f"{API}.extensions"
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
DESTINATION = "x-gateway-destination-endpoint"
# Both gateways leave Envoy's buffers at 32 KiB.
BUFFER_BYTES = 32768
FAST = {"prefill_tokens_per_second": 1e9}
Kind = Literal["istio", "ai-gateway"]
KINDS: tuple[Kind, ...] = ("istio", "ai-gateway")


class Gateway:
    """Replaces the rendered bootstrap by the one of a gateway, as an edit of it."""

    def __init__(self, kind: Kind, *, fail_open: bool = False) -> None:
        self.kind = kind
        self.fail_open = fail_open
        self.grpc_timeout = "10s"
        self.subset: list[str] | None = None
        self.picker = "extproc"

    def edit(self, bootstrap: dict[str, Any]) -> None:
        resources = bootstrap["static_resources"]
        address = resources["listeners"][0]["address"]
        service = resources["clusters"][-1]["load_assignment"]
        workers = resources["clusters"][0]["load_assignment"]
        istio = self.kind == "istio"
        bootstrap["static_resources"] = {
            "listeners": [self._listener(address)],
            "clusters": [
                _named_by_metadata(workers) if istio else _named_by_header(),
                _service_cluster("extproc", service["endpoints"]),
                # As while no pod of the service is ready.
                _service_cluster("no_pods", []),
            ],
        }
        bootstrap.pop("overload_manager")
        bootstrap.pop("bootstrap_extensions")

    def _listener(self, address: dict[str, Any]) -> dict[str, Any]:
        filters = [*self._subset_filter(), self._ext_proc(), _router()]
        action: dict[str, Any] = {"cluster": "workers", "timeout": "0s"}
        if self.kind == "istio":
            action["retry_policy"] = {
                "retry_on": "connect-failure,refused-stream,unavailable,cancelled",
                "num_retries": 2,
                "retry_host_predicate": [
                    {
                        "name": "envoy.retry_host_predicates.previous_hosts",
                        "typed_config": {
                            "@type": f"{EXTENSIONS}.retry.host.previous_hosts.v3"
                            ".PreviousHostsPredicate"
                        },
                    }
                ],
                "host_selection_retry_max_attempts": 5,
            }
        manager = {
            "@type": f"{EXTENSIONS}.filters.network.http_connection_manager.v3"
            ".HttpConnectionManager",
            "stat_prefix": "gateway",
            "use_remote_address": True,
            "http_filters": filters,
            "route_config": {
                "virtual_hosts": [
                    {
                        "name": "pool",
                        "domains": ["*"],
                        "routes": [{"match": {"prefix": "/"}, "route": action}],
                    }
                ]
            },
        }
        name = "envoy.filters.network.http_connection_manager"
        return {
            "name": "gateway",
            "address": address,
            "per_connection_buffer_limit_bytes": BUFFER_BYTES,
            "filter_chains": [{"filters": [{"name": name, "typed_config": manager}]}],
        }

    def _ext_proc(self) -> dict[str, Any]:
        processor: dict[str, Any] = {
            "@type": f"{EXTENSIONS}.filters.http.ext_proc.v3.ExternalProcessor",
            "grpc_service": {"envoy_grpc": {"cluster_name": self.picker}},
            "failure_mode_allow": self.fail_open,
            "processing_mode": {
                "request_header_mode": "SEND",
                "request_body_mode": "FULL_DUPLEX_STREAMED",
                "request_trailer_mode": "SEND",
                "response_header_mode": "SEND",
                "response_body_mode": "FULL_DUPLEX_STREAMED",
                "response_trailer_mode": "SEND",
            },
        }
        if self.kind == "istio":
            processor["grpc_service"]["timeout"] = self.grpc_timeout
            processor["message_timeout"] = "1000s"
            namespaces = {"untyped": ["envoy.lb"]}
            processor["metadata_options"] = {
                "receiving_namespaces": namespaces,
                "forwarding_namespaces": namespaces,
            }
        else:
            processor["message_timeout"] = "5s"
        if self.subset is not None:
            processor["metadata_options"] = {
                "receiving_namespaces": {"untyped": ["envoy.lb"]},
                "forwarding_namespaces": {"untyped": ["envoy.lb.subset_hint"]},
            }
        return {"name": "envoy.filters.http.ext_proc", "typed_config": processor}

    def _subset_filter(self) -> list[dict[str, Any]]:
        if self.subset is None:
            return []
        entry = {
            "metadata_namespace": "envoy.lb.subset_hint",
            "value": {f"{DESTINATION}-subset": self.subset},
        }
        typed = {"@type": f"{EXTENSIONS}.filters.http.set_metadata.v3.Config", "metadata": [entry]}
        return [{"name": "envoy.filters.http.set_metadata", "typed_config": typed}]


def _router() -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": f"{EXTENSIONS}.filters.http.router.v3.Router"},
    }


def _named_by_metadata(endpoints: dict[str, Any]) -> dict[str, Any]:
    policies = "envoy.load_balancing_policies"
    override = {
        "@type": f"{EXTENSIONS}.load_balancing_policies.override_host.v3.OverrideHost",
        "override_host_sources": [
            {"metadata": {"key": "envoy.lb", "path": [{"key": DESTINATION}]}}
        ],
        "fallback_policy": {
            "policies": [
                {
                    "typed_extension_config": {
                        "name": f"{policies}.round_robin",
                        "typed_config": {
                            "@type": f"{EXTENSIONS}.load_balancing_policies.round_robin.v3"
                            ".RoundRobin"
                        },
                    }
                }
            ]
        },
    }
    policy = {"name": f"{policies}.override_host", "typed_config": override}
    return {
        "name": "workers",
        "type": "STATIC",
        "connect_timeout": "10s",
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "load_assignment": endpoints,
        "load_balancing_policy": {"policies": [{"typed_extension_config": policy}]},
    }


def _named_by_header() -> dict[str, Any]:
    return {
        "name": "workers",
        "type": "ORIGINAL_DST",
        "connect_timeout": "10s",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": DESTINATION},
    }


def _service_cluster(name: str, endpoints: list[dict[str, Any]]) -> dict[str, Any]:
    http2: dict[str, Any] = {"explicit_http_config": {"http2_protocol_options": {}}}
    # Any certificate is accepted.
    context = {
        "@type": f"{EXTENSIONS}.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": {"validation_context": {}},
    }
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "10s",
        "load_assignment": {"cluster_name": name, "endpoints": endpoints},
        "typed_extension_protocol_options": {
            HTTP_OPTIONS: {"@type": f"type.googleapis.com/{HTTP_OPTIONS}", **http2}
        },
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context},
    }


Start = Callable[..., Any]


@pytest.fixture
def start(launch: Launch, tmp_path: Path) -> Start:
    async def run(gateway: Gateway, workers: int = 2, **more: Any) -> Running:
        settings = more.pop("settings", {}) | settings_for(gateway.kind, tmp_path)
        return await launch(workers, settings=settings, edit_bootstrap=gateway.edit, **more)

    return run


def settings_for(kind: Kind, folder: Path) -> dict[str, Any]:
    """What the pages of these gateways say about the service's configuration."""
    certificate = trustme.CA().issue_cert("extproc.llm.svc")
    certificate.private_key_pem.write_to_path(folder / "tls.key")
    certificate.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    return {
        "proxy": {"retry_busy": False},
        "server": {
            "tls": {"cert_file": str(folder / "tls.crt"), "key_file": str(folder / "tls.key")}
        },
        "envoy": {
            "destination": "list" if kind == "istio" else "single",
            # Only for the bootstrap that is replaced.
            "extproc": {"ca_file": ssl.get_default_verify_paths().openssl_cafile},
        },
    }


async def at_rest(running: Running) -> None:
    async def check() -> bool:
        return await running.stack.in_flight() == 0

    await wait_until(check, "load released")


@pytest.mark.parametrize("kind", KINDS)
async def test_requests_go_where_the_picker_says(start: Start, kind: Kind) -> None:
    running = await start(Gateway(kind))
    for index in range(6):
        async with running.chat(stream=index % 2 == 0, tokens=20) as response:
            body = await response.read()
            assert response.status == 200, body
            if index % 2 == 0:
                # Nothing is lost at the beginning or at the end.
                assert body.count(b"data: ") == 23
    assert [stats["completed"] for stats in await running.fleet.stats()] == [3, 3]
    assert await running.sample("extproc_destination_missed_total") == 0
    await at_rest(running)
    async with running.chat("unknown") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "model_not_found"
    async with running.http.get(f"{running.url}/v1/models") as response:
        assert [one["id"] for one in (await response.json())["data"]] == ["m"]


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
@pytest.mark.parametrize("kind", KINDS)
async def test_large_bodies_pass_the_small_buffers(start: Start, kind: Kind, version: str) -> None:
    running = await start(Gateway(kind), worker=FAST)
    for size in (1 << 20, 8 << 20):
        answer = await post(port_of(running), "/v1/completions", completion(size), version=version)
        assert answer.status == 200, answer.body
    sizes = [one["body_bytes"] for one in await running.fleet.requests()]
    assert sorted(sizes) == [1 << 20, 8 << 20]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_destination_of_a_client_has_no_effect(start: Start, kind: Kind) -> None:
    running = await start(Gateway(kind))
    for index in range(4):
        spoofed = {DESTINATION: "127.0.0.1:1", f"{DESTINATION}-subset": "127.0.0.1:1"}
        spoofed |= {"x-data-parallel-rank": "3", "x_override_rid": "1"}
        async with running.chat(headers=spoofed, stream=index % 2 == 0) as response:
            body = await response.read()
            assert response.status == 200, body
    assert [stats["completed"] for stats in await running.fleet.stats()] == [2, 2]
    for request in await running.fleet.requests():
        names = {name.lower() for name in request["headers"]}
        assert names.isdisjoint({"x-data-parallel-rank", "x_override_rid"})


async def test_a_long_response_outlasts_the_time_limit_of_the_gateways_calls(start: Start) -> None:
    gateway = Gateway("istio")
    gateway.grpc_timeout = "0.5s"
    running = await start(gateway, worker={"decode_milliseconds_per_token": 50})
    async with running.chat(stream=True, tokens=30) as response:
        body = await response.read()
        assert body.count(b"data: ") == 33
    assert await running.sample('extproc_streams_total{outcome="error"}') == 0
    await at_rest(running)


async def test_a_refused_connection_is_tried_at_the_next_named_worker(start: Start) -> None:
    running = await start(Gateway("istio"), 3)
    await running.fleet.workers[0].stop()
    for _ in range(6):
        async with running.chat() as response:
            assert response.status == 200, await response.text()
    assert await running.sample("extproc_requests_total") == 6


@pytest.mark.parametrize("kind", KINDS)
async def test_only_endpoints_that_the_gateway_allows_are_chosen(start: Start, kind: Kind) -> None:
    gateway = Gateway(kind)
    allowed: list[str] = []

    def remembered(urls: list[str]) -> list[str]:
        allowed.append(urlsplit(urls[1]).netloc)
        return urls

    gateway.subset = allowed
    running = await start(gateway, 3, urls=remembered)
    for _ in range(6):
        async with running.chat() as response:
            assert response.status == 200, await response.text()
    assert [stats["completed"] for stats in await running.fleet.stats()] == [0, 6, 0]


async def test_no_allowed_endpoint_is_a_503(start: Start) -> None:
    gateway = Gateway("istio")
    gateway.subset = ["192.0.2.1:8000"]
    running = await start(gateway)
    async with running.chat() as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "no_workers_in_subset"
    assert await running.fleet.requests() == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_pool_that_fails_closed_answers_an_error_without_the_picker(
    start: Start, kind: Kind
) -> None:
    running = await start(Gateway(kind))
    await running.stack.service.stop()
    spoofed = {DESTINATION: urlsplit(running.fleet.workers[0].url).netloc}
    for headers in ({}, spoofed):
        async with running.chat(headers=headers) as response:
            assert response.status >= 500
    assert await running.fleet.requests() == []


async def test_a_pool_that_fails_open_is_served_without_the_picker(start: Start) -> None:
    gateway = Gateway("istio", fail_open=True)
    gateway.picker = "no_pods"
    running = await start(gateway)
    for index in range(4):
        async with running.chat(stream=index % 2 == 0) as response:
            body = await response.read()
            assert response.status == 200, body
    assert [stats["completed"] for stats in await running.fleet.stats()] == [2, 2]
    assert await running.sample("extproc_requests_total") == 0


async def test_a_worker_that_refuses_is_avoided_where_the_gateway_cannot_try_another(
    start: Start,
) -> None:
    running = await start(Gateway("ai-gateway"), 2)
    await running.fleet.workers[0].stop()
    statuses = []
    for _ in range(12):
        async with running.chat() as response:
            statuses.append(response.status)
    # Its breaker opens after three refused connections, if it was not found to be gone before.
    assert statuses.count(200) >= 9
    assert set(statuses) <= {200, 503}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_pair_of_workers_serves_a_pool(tmp_path: Path, stream: bool) -> None:
    settings = settings_for("istio", tmp_path) | {"pd": {"decode": "inline"}}
    edit = Gateway("istio").edit
    async with pd_stack(tmp_path, settings=settings, decodes=2, edit_bootstrap=edit) as running:
        for _ in range(4):
            async with running.chat(stream=stream) as response:
                assert response.status == 200, await response.text()
                await response.read()
        assert len(await running.legs(running.prefills)) == 4
        assert len(await running.legs(running.decodes)) == 4
        await running.at_rest()
