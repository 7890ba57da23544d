"""Istio's recipe with traffic: our patches and routes, put into an Envoy as a gateway has it.

Istio's controller does not run here. The translation below follows its documentation: messages
are merged, filters are inserted before the router, routes are made of the VirtualService.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running
from tests.e2e.pd_fleet import pd_stack
from tests.e2e.raw_http import completion, port_of, post
from tests.e2e.test_envoy_validation import (
    API,
    MANAGER,
    WORKERS,
    gateway_cluster,
    in_file,
    istio_patches,
    merged,
)
from tests.e2e.test_merged_envoy import SECRET, SPOOFED, encoded, streams_started, token

HOST = "llm.example.com:80"
SERVICE = "outbound|9002||extproc.llm.svc.cluster.local"
USER = {"host": "llm.example.com", "authorization": f"Bearer {token()}"}
EXTENSIONS = f"{API}.extensions"


def routes_of(name: str) -> list[dict[str, Any]]:
    """The routes that Istio makes of a VirtualService of ours."""
    (service,) = in_file(f"istio/{name}.yaml", "VirtualService")
    return [
        {"match": match, **_action(http)}
        for http in service["spec"]["http"]
        for match in [_match(one) for one in http.get("match", [{}])]
    ]


def _match(given: dict[str, Any]) -> dict[str, Any]:
    match: dict[str, Any] = {"prefix": "/"}
    if "uri" in given:
        match = {"path": given["uri"]["exact"]}
    headers = [
        {"name": name, "string_match": {"safe_regex": {"regex": value["regex"]}}}
        for name, value in given.get("headers", {}).items()
    ]
    return match | ({"headers": headers} if headers else {})


def _action(http: dict[str, Any]) -> dict[str, Any]:
    if "directResponse" in http:
        answer = http["directResponse"]
        added = http["headers"]["response"]["set"].items()
        return {
            "direct_response": {
                "status": answer["status"],
                "body": {"inline_string": answer["body"]["string"]},
            },
            "response_headers_to_add": [
                {
                    "header": {"key": key, "value": value},
                    "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
                }
                for key, value in added
            ],
        }
    (route,) = http["route"]
    host, port = route["destination"]["host"], route["destination"]["port"]["number"]
    predicate = f"{EXTENSIONS}.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    retry_policy = {
        "retry_on": http["retries"]["retryOn"],
        "num_retries": http["retries"]["attempts"],
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {"@type": predicate},
            }
        ],
        "host_selection_retry_max_attempts": 5,
    }
    removed = http.get("headers", {}).get("response", {}).get("remove", [])
    return {
        "response_headers_to_remove": removed,
        "route": {
            "cluster": f"outbound|{port}||{host}",
            "timeout": "0s",
            "retry_policy": retry_policy,
        },
    }


class Istio:
    """Replaces the rendered bootstrap by the one of a gateway with the recipe."""

    def __init__(self, folder: Path, route: str = "route") -> None:
        self.folder = folder
        self.route = route

    def edit(self, bootstrap: dict[str, Any]) -> None:
        resources = bootstrap["static_resources"]
        listener = _patched_listener(
            {
                "name": "0.0.0.0_8080",
                "address": resources["listeners"][0]["address"],
                # Istio's own limit.
                "per_connection_buffer_limit_bytes": 32768,
            },
            self._manager(),
            "istio/route-fail-closed.yaml" if self.route == "route-fail-closed" else None,
        )
        workers, service = resources["clusters"][0], resources["clusters"][-1]
        clusters = [
            _patched_cluster(name, of["load_assignment"]["endpoints"])
            for name, of in ((WORKERS, workers), (SERVICE, service))
        ]
        bootstrap["static_resources"] = {"listeners": [listener], "clusters": clusters}
        bootstrap.pop("overload_manager")
        bootstrap.pop("bootstrap_extensions")
        # By this name the stack finds the service's cluster.
        renamed = json.loads(json.dumps(bootstrap).replace(SERVICE, "extproc"))
        bootstrap.clear()
        bootstrap.update(renamed)

    def _manager(self) -> dict[str, Any]:
        jwks = self.folder / "jwks.json"
        key = {"kty": "oct", "kid": "k", "alg": "HS256", "k": encoded(SECRET)}
        jwks.write_text(json.dumps({"keys": [key]}))
        llm: dict[str, Any] = {
            "name": HOST,
            "domains": ["llm.example.com"],
            "routes": routes_of(self.route),
        }
        other = {
            "name": "app.example.com:80",
            "domains": ["app.example.com"],
            "routes": [
                {
                    "match": {"prefix": "/"},
                    "direct_response": {"status": 200, "body": {"inline_string": "app"}},
                }
            ],
        }
        return {
            "@type": f"{EXTENSIONS}.filters.network.http_connection_manager.v3"
            ".HttpConnectionManager",
            "stat_prefix": "gateway",
            "use_remote_address": True,
            "http_filters": [_authentication(jwks), _router()],
            "route_config": {"virtual_hosts": [llm, other]},
        }


def _authentication(jwks: Path) -> dict[str, Any]:
    """As of a RequestAuthentication and an AuthorizationPolicy that asks for a token."""
    typed = {
        "@type": f"{EXTENSIONS}.filters.http.jwt_authn.v3.JwtAuthentication",
        "providers": {
            "company": {
                "issuer": "https://login.example.com",
                "local_jwks": {"filename": str(jwks)},
                "forward": True,
            }
        },
        "rules": [
            {
                "match": {
                    "prefix": "/",
                    "headers": [{"name": ":authority", "string_match": {"prefix": "llm."}}],
                },
                "requires": {"provider_name": "company"},
            }
        ],
    }
    return {"name": "envoy.filters.http.jwt_authn", "typed_config": typed}


def _router() -> dict[str, Any]:
    typed = {"@type": f"{EXTENSIONS}.filters.http.router.v3.Router"}
    return {"name": "envoy.filters.http.router", "typed_config": typed}


def _patched_listener(
    listener: dict[str, Any], manager: dict[str, Any], more: str | None
) -> dict[str, Any]:
    files = ["istio/envoyfilter.yaml", *([more] if more else [])]
    for target, match, value in istio_patches(*files):
        match target:
            case "NETWORK_FILTER":
                manager = merged(manager, value["typed_config"])
            case "HTTP_FILTER":
                manager["http_filters"].insert(-1, value)
            case "VIRTUAL_HOST":
                hosts = manager["route_config"]["virtual_hosts"]
                name = match["routeConfiguration"]["vhost"]["name"]
                (at,) = [index for index, one in enumerate(hosts) if one["name"] == name]
                hosts[at] = merged(hosts[at], value)
            case "LISTENER":
                listener = merged(listener, value)
    return {
        **listener,
        "filter_chains": [{"filters": [{"name": MANAGER, "typed_config": manager}]}],
    }


def _patched_cluster(name: str, endpoints: list[dict[str, Any]]) -> dict[str, Any]:
    cluster = gateway_cluster(name)
    cluster["load_assignment"]["endpoints"] = endpoints
    for target, match, value in istio_patches("istio/envoyfilter.yaml"):
        if target == "CLUSTER" and match["cluster"]["name"] == name:
            cluster = merged(cluster, value)
    return cluster


def recipe_settings() -> dict[str, Any]:
    """What the recipe's configuration says besides addresses."""
    (config_map,) = in_file("istio/extproc.yaml", "ConfigMap")
    given = yaml.safe_load(config_map["data"]["extproc.yaml"])
    return {name: given[name] for name in ("proxy", "load")}


Start = Callable[..., Any]


@pytest.fixture
def start(launch: Launch, tmp_path: Path) -> Start:
    async def run(workers: int = 2, route: str = "route", **more: Any) -> Running:
        edit = Istio(tmp_path, route).edit
        return await launch(workers, settings=recipe_settings(), edit_bootstrap=edit, **more)

    return run


ROUTES = ["route", "route-fail-closed"]


@pytest.mark.parametrize("route", ROUTES)
async def test_requests_are_routed_and_their_load_is_released(start: Start, route: str) -> None:
    running = await start(route=route)
    for index in range(4):
        async with running.chat(headers=USER, stream=index % 2 == 0) as response:
            body = await response.read()
            assert response.status == 200, body
            assert not [name for name in response.headers if name.startswith("x-extproc")]
    assert [stats["completed"] for stats in await running.fleet.stats()] == [2, 2]
    assert await running.sample("extproc_destination_missed_total") == 0

    async def at_rest() -> bool:
        return int(await running.stack.in_flight()) == 0

    await wait_until(at_rest, "load released")


async def test_other_hosts_do_not_ask_the_service(start: Start) -> None:
    running = await start()
    headers = {"host": "app.example.com"}
    async with running.http.post(f"{running.url}/any", data=b"x", headers=headers) as response:
        assert await response.text() == "app"
    assert await streams_started(running) == 0


@pytest.mark.parametrize("route", ROUTES)
async def test_no_request_without_a_token_reaches_the_service_or_a_worker(
    start: Start, route: str
) -> None:
    running = await start(route=route)
    for headers in ({}, SPOOFED, {"authorization": f"Bearer {token(b'another secret')}"}):
        async with running.chat(headers={"host": "llm.example.com"} | headers) as response:
            assert response.status == 401
    assert await running.sample("extproc_requests_total") == 0
    assert await running.fleet.requests() == []


@pytest.mark.parametrize("route", ROUTES)
async def test_a_destination_of_a_client_has_no_effect(start: Start, route: str) -> None:
    running = await start(route=route)
    for _ in range(4):
        async with running.chat(headers=USER | SPOOFED) as response:
            assert response.status == 200, await response.text()
    requests = await running.fleet.requests()
    assert len(requests) == 4
    assert all("x-data-parallel-rank" not in one["headers"] for one in requests)
    assert await running.sample("extproc_destination_missed_total") == 0


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
@pytest.mark.parametrize("route", ROUTES)
async def test_large_bodies_pass(start: Start, route: str, version: str) -> None:
    running = await start(1, route=route, worker={"prefill_tokens_per_second": 1e9})
    host = ":authority" if version == "HTTP/2" else "host"
    headers = {host: USER["host"], "authorization": USER["authorization"]}
    for size in (1 << 20, 8 << 20):
        answer = await post(
            port_of(running), "/v1/completions", completion(size), version=version, headers=headers
        )
        assert answer.status == 200, answer.body


@pytest.mark.parametrize("route", ROUTES)
async def test_no_control_header_of_a_worker_reaches_the_client(start: Start, route: str) -> None:
    running = await start(1, route=route)
    for name in ("x-router-error-code", "x-extproc-worker"):
        fault = f'response-headers={{"{name}":"evil"}}'
        async with running.chat(headers=USER, fault=fault) as response:
            assert response.status == 200
            assert name not in response.headers
    async with running.chat("unknown", headers=USER) as response:
        assert response.headers["x-router-error-code"] == "model_not_found"


async def test_a_refused_connection_is_tried_elsewhere(start: Start) -> None:
    running = await start(3)
    await running.fleet.workers[0].stop()
    for _ in range(6):
        async with running.chat(headers=USER) as response:
            assert response.status == 200, await response.text()


async def test_without_the_service_the_route_decides(start: Start) -> None:
    running = await start()
    await running.stack.service.stop()

    async def served() -> bool:
        async with running.chat(headers=USER) as response:
            return bool(response.status == 200)

    await wait_until(served, "Envoy bypasses the service")
    url = f"{running.url}/flush_cache"
    async with running.http.post(url, headers=USER) as response:
        assert response.status == 404


async def test_without_the_service_a_closed_route_is_unavailable(start: Start) -> None:
    running = await start(route="route-fail-closed")
    await running.stack.service.stop()
    async with running.chat(headers=USER | SPOOFED) as response:
        assert response.status == 503
        assert response.headers["x-router-error-code"] == "router_unavailable"
        assert (await response.json())["error"]["code"] == "router_unavailable"
    assert await running.fleet.requests() == []


async def test_pairs_are_served_and_no_prefill_leg_leaves_without_a_token(tmp_path: Path) -> None:
    edit = Istio(tmp_path, "route-fail-closed").edit
    settings = recipe_settings() | {"pd": {"decode": "inline"}}
    async with pd_stack(tmp_path, settings=settings, edit_bootstrap=edit) as running:
        async with running.chat(headers={"host": "llm.example.com"} | SPOOFED) as response:
            assert response.status == 401
        assert await running.legs(running.fleet.workers) == []
        for stream in (False, True):
            async with running.chat(headers=USER, stream=stream) as response:
                assert response.status == 200, await response.text()
                await response.read()
        assert len(await running.legs(running.prefills)) == 2
        assert len(await running.legs(running.decodes)) == 2
        await running.at_rest()
