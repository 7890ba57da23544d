"""Envoy's configuration of an operator with this service merged into it, with real traffic."""

import base64
import gzip
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from aiohttp import web

from extproc.config.loading import load_config
from extproc.envoy_config.merge import merge_bootstrap
from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running
from tests.e2e.pd_fleet import pd_stack
from tests.e2e.raw_http import completion, port_of, post
from tests.unit.simulator.model_folders import model_folder

BEFORE = Path(__file__).parents[2] / "envoy" / "merge" / "before.yaml"
SECRET = b"a secret of 32 bytes for tests.."
PAGE = 16
LONG = "The tide comes in and the tide goes out. " * 20
SPOOFED = {
    "x-extproc-cluster": "llm_workers",
    "x-extproc-model": "m",
    "x-extproc-decode-order": "1;h;p;127.0.0.1:1",
    "x-gateway-destination-endpoint": "127.0.0.1:1",
    "x-envoy-max-retries": "9",
    "x-envoy-retry-on": "5xx",
    "x-envoy-attempt-count": "7",
    "x-data-parallel-rank": "3",
}


def encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def token(secret: bytes = SECRET) -> str:
    head = encoded(json.dumps({"alg": "HS256", "typ": "JWT", "kid": "k"}).encode())
    claims = encoded(json.dumps({"iss": "https://login.example.com"}).encode())
    signed = f"{head}.{claims}".encode()
    return f"{head}.{claims}.{encoded(hmac.digest(secret, signed, hashlib.sha256))}"


USER = {"host": "llm.example.com", "authorization": f"Bearer {token()}"}


class Merging:
    """Replaces the rendered bootstrap by the operator's one, with this service merged into it."""

    def __init__(self, folder: Path, app_port: int) -> None:
        self.folder = folder
        self.app_port = app_port
        self.pool: list[str] = []
        self.per_second = 1000
        self.timeout = "300s"

    def edit(self, bootstrap: dict[str, Any]) -> None:
        config = load_config(self.folder / "extproc.yaml")
        existing = yaml.safe_load(BEFORE.read_text())
        resources = existing["static_resources"]
        (listener,) = resources["listeners"]
        listener["address"]["socket_address"]["port_value"] = config.envoy.port
        existing["admin"]["address"]["socket_address"]["port_value"] = config.envoy.admin_port
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        key = {"kty": "oct", "kid": "k", "alg": "HS256", "k": encoded(SECRET)}
        authentication = manager["http_filters"][0]["typed_config"]
        authentication["providers"]["company"]["local_jwks"] = {
            "inline_string": json.dumps({"keys": [key]})
        }
        route = manager["route_config"]["virtual_hosts"][1]["routes"][1]
        route["route"]["timeout"] = self.timeout
        limit = route["typed_per_filter_config"]["envoy.filters.http.local_ratelimit"]
        limit["token_bucket"] = {
            "max_tokens": self.per_second,
            "tokens_per_fill": self.per_second,
            "fill_interval": "1s" if self.per_second > 10 else "3600s",
        }
        app, pool = resources["clusters"]
        _point(app, [f"http://127.0.0.1:{self.app_port}"])
        _point(pool, self.pool)
        merged = merge_bootstrap(config, existing, ["chat"])
        bootstrap.clear()
        bootstrap.update(merged)


def _point(cluster: dict[str, Any], urls: list[str]) -> None:
    addresses = [urlsplit(url) for url in urls]
    cluster["type"] = "STATIC"
    cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
        {
            "endpoint": {
                "address": {
                    "socket_address": {"address": one.hostname, "port_value": one.port},
                }
            }
        }
        for one in addresses
    ]


class Application:
    """The operator's other service, which records its requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []

    async def answer(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append((headers, await request.read()))
        return web.Response(text="app", headers={"x-extproc-reason": "its own"})


@pytest.fixture
async def application() -> AsyncIterator[tuple[Application, int]]:
    found = Application()
    app = web.Application(client_max_size=1 << 26)
    app.router.add_route("*", "/{path:.*}", found.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield found, runner.addresses[0][1]
    finally:
        await runner.cleanup()


Start = Callable[..., Awaitable[Running]]


@pytest.fixture
def merging(tmp_path: Path, application: tuple[Application, int]) -> Merging:
    return Merging(tmp_path, application[1])


@pytest.fixture
def start(launch: Launch, merging: Merging) -> Start:
    async def run(workers: int = 2, **more: Any) -> Running:
        def remembered(urls: list[str]) -> list[str]:
            merging.pool = urls
            return urls

        settings = more.pop("settings", {})
        envoy = {"cluster": "llm_workers"} | settings.pop("envoy", {})
        return await launch(
            workers,
            settings=settings | {"envoy": envoy},
            edit_bootstrap=merging.edit,
            urls=remembered,
            **more,
        )

    return run


async def streams_started(running: Running) -> int:
    """How often any filter of this Envoy has asked the service."""
    url = f"{running.stack.envoy_admin_url}/stats?filter=ext_proc.streams_started"
    async with running.http.get(url) as response:
        lines = (await response.text()).split("\n")
    return sum(int(line.rpartition(": ")[2]) for line in lines if line)


async def test_an_authenticated_request_is_routed_and_a_streamed_one_may_last(
    start: Start, merging: Merging
) -> None:
    merging.timeout = "0.2s"
    running = await start(2, worker={"decode_milliseconds_per_token": 20})
    for _ in range(2):
        async with running.chat(headers=USER, stream=True, tokens=30) as response:
            text = await response.text()
            assert response.status == 200, text
            assert "[DONE]" in text
            assert not [name for name in response.headers if name.startswith("x-extproc")]
    assert [len(stats["requests"]) for stats in await running.fleet.stats()] == [1, 1]
    assert await running.sample("extproc_destination_missed_total") == 0
    assert await streams_started(running) == 2

    async def at_rest() -> bool:
        return await running.stack.in_flight() == 0

    await wait_until(at_rest, "load released at the last byte")


async def test_workers_may_come_over_ads(start: Start) -> None:
    running = await start(2, models=("a", "b"), settings={"envoy": {"endpoints": "ads"}})
    for model in ("a", "b", "a", "b"):
        async with running.chat(model, headers=USER | SPOOFED) as response:
            assert response.status == 200, await response.text()
    assert [len(stats["requests"]) for stats in await running.fleet.stats()] == [1, 1, 1, 1]
    assert await running.sample("extproc_destination_missed_total") == 0


async def test_requests_of_other_hosts_and_routes_do_not_reach_this_service(
    start: Start, application: tuple[Application, int]
) -> None:
    app, _ = application
    running = await start(1)
    kept = {"x-data-parallel-rank": "3", "x-override-rid": "1", "x-own": "1"}
    body = json.dumps({"model": "m", "routed_dp_rank": 1}).encode()
    url = f"{running.url}/v1/chat/completions"
    headers = {"host": "app.example.com", "accept-encoding": "gzip"} | kept
    async with running.http.post(url, data=body, headers=headers) as response:
        assert await response.text() == "app"
        assert response.headers["x-extproc-reason"] == "its own"
    ((seen, arrived),) = app.requests
    assert arrived == body
    assert kept.items() <= seen.items()
    assert "x-envoy-attempt-count" not in seen
    async with running.http.get(running.url, headers={"host": "llm.example.com"}) as response:
        assert await response.text() == "POST /v1/chat/completions"
    async with running.http.get(url, headers={"host": "other.example.com"}) as response:
        assert (response.status, await response.text()) == (404, "")
    assert await streams_started(running) == 0
    assert await running.sample("extproc_requests_total") == 0
    assert await running.fleet.requests() == []


WITHOUT_RIGHT: dict[str, dict[str, str]] = {
    "no token": {},
    "another key": {"authorization": f"Bearer {token(b'another secret of 32 bytes......')}"},
    "a decision of its own": SPOOFED,
    "a second pass of its own": SPOOFED | {"x-extproc-cluster": "decode_pass"},
}


async def test_neither_this_service_nor_a_worker_sees_a_request_without_a_right(
    start: Start,
) -> None:
    running = await start(2)
    for headers in WITHOUT_RIGHT.values():
        async with running.chat(headers={"host": "llm.example.com"} | headers) as response:
            assert response.status == 401, await response.text()
            assert (await response.json())["error"]["code"] == "bad_request"
    assert await running.sample("extproc_requests_total") == 0
    assert await running.fleet.requests() == []


async def test_neither_this_service_nor_a_worker_sees_a_request_over_the_rate(
    start: Start, merging: Merging
) -> None:
    merging.per_second = 2
    running = await start(2)
    statuses = []
    for headers in ({}, SPOOFED, {}, SPOOFED, SPOOFED | {"x-extproc-cluster": "decode_pass"}):
        async with running.chat(headers=USER | headers) as response:
            statuses.append(response.status)
    # Each of the routes has a bucket of its own, but no client can choose a route.
    assert statuses == [200, 200, 429, 429, 429]
    assert await running.sample("extproc_requests_total") == 2
    assert len(await running.fleet.requests()) == 2


async def test_a_destination_of_a_client_has_no_effect(start: Start) -> None:
    running = await start(2)
    other = urlsplit(running.fleet.workers[1].url).netloc
    await running.fleet.workers[1].stop()
    for destination in (other, "127.0.0.1:1"):
        spoofed = SPOOFED | {"x-gateway-destination-endpoint": destination}
        async with running.chat(headers=USER | spoofed) as response:
            assert response.status == 200, await response.text()
    async with running.http.get(f"{running.fleet.workers[0].url}/simulator/stats") as response:
        requests = (await response.json())["requests"]
    assert len(requests) == 2
    assert all("x-data-parallel-rank" not in one["headers"] for one in requests)
    assert await running.sample("extproc_destination_missed_total") == 0


async def test_requests_follow_the_pages_of_workers(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = model_folder(folder)
    running = await start(
        3,
        worker={"page_size": PAGE, "kv_events_port": 0, "tokenizer_path": path},
        settings={
            "models": [{"id": "m", "policy": "cache_aware_zmq", "tokenizer_path": path}],
            "observability": {"debug_headers": True},
        },
    )
    urls = [worker.url for worker in running.fleet.workers]
    bodies = [
        {
            "model": "m",
            "messages": [{"role": "user", "content": f"{number} {LONG}"}],
            "max_tokens": 2,
        }
        for number in range(3)
    ]
    for url, body in zip(urls, bodies, strict=True):
        async with running.http.post(f"{url}/v1/chat/completions", json=body) as response:
            assert response.status == 200

    async def known() -> bool:
        held = {
            worker.url: stats["caches"][0]["gpu_tokens"] // PAGE
            for worker, stats in zip(
                running.fleet.workers, await running.fleet.stats(), strict=True
            )
        }
        seen = {one["url"]: one["kv"]["ranks"][0] for one in await running.stack.workers()}
        return all(seen[url]["trusted"] and seen[url]["pages"] == held[url] for url in urls)

    await wait_until(known, "the service knows what the workers hold")
    debug = USER | {"x-extproc-debug": "true"}
    for url, body in [*zip(urls, bodies, strict=True)] * 2:
        target = f"{running.url}/v1/chat/completions"
        async with running.http.post(target, json=body, headers=debug) as response:
            assert response.status == 200, await response.text()
            assert response.headers["x-extproc-worker"] == url
            assert response.headers["x-extproc-reason"] == "hit"


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
async def test_large_and_compressed_bodies_pass(start: Start, version: str) -> None:
    running = await start(1, worker={"prefill_tokens_per_second": 1e9})
    host = ":authority" if version == "HTTP/2" else "host"
    headers = {host: USER["host"], "authorization": USER["authorization"]}
    packed = gzip.compress(completion(1 << 20), compresslevel=0)
    for body, more in (
        (completion(1 << 20), {}),
        (completion(8 << 20), {}),
        (packed, {"content-encoding": "gzip"}),
    ):
        answer = await post(
            port_of(running), "/v1/completions", body, version=version, headers=headers | more
        )
        assert answer.status == 200, answer.body
    sizes = [one["body_bytes"] for one in await running.fleet.requests()]
    assert sizes == [1 << 20, 8 << 20, 1 << 20]
    assert await running.sample("extproc_requests_total") == 3


async def test_a_refused_connection_is_tried_elsewhere(start: Start) -> None:
    running = await start(2)
    await running.fleet.workers[0].stop()
    for _ in range(3):
        async with running.chat(headers=USER) as response:
            assert response.status == 200, await response.text()


async def test_without_this_service_requests_go_where_they_went_before(start: Start) -> None:
    running = await start(2)
    await running.stack.service.stop()

    async def served() -> bool:
        async with running.chat(headers=USER | SPOOFED) as response:
            return bool(response.status == 200)

    await wait_until(served, "Envoy bypasses the service")
    for headers in WITHOUT_RIGHT.values():
        async with running.chat(headers={"host": "llm.example.com"} | headers) as response:
            assert response.status == 401
    before = len(await running.fleet.requests())
    # What no client should ask of an engine is not served without this service either.
    url = f"{running.url}/v1/unload_lora_adapter"
    async with running.http.post(url, json={}, headers=USER) as response:
        assert response.status == 503
        assert response.headers["retry-after"] == "1"
        assert (await response.json())["error"]["code"] == "router_unavailable"
    assert len(await running.fleet.requests()) == before


async def test_without_this_service_several_models_are_unavailable(
    start: Start, merging: Merging
) -> None:
    running = await start(1, models=("a", "b"))
    async with running.chat("b", headers=USER) as response:
        assert response.status == 200, await response.text()
    await running.stack.service.stop()
    async with running.chat("b", headers=USER | SPOOFED) as response:
        assert response.status == 503
        assert response.headers["x-router-error-code"] == "router_unavailable"
    assert len(await running.fleet.requests()) == 1


@pytest.mark.parametrize("mode", ["two_pass", "inline"])
async def test_pairs_are_served_and_no_prefill_leg_leaves_without_a_right(
    merging: Merging, tmp_path: Path, mode: str
) -> None:
    def remembered(urls: list[str]) -> list[str]:
        merging.pool = urls
        return urls

    async with pd_stack(
        tmp_path,
        settings={"pd": {"decode": mode}, "envoy": {"cluster": "llm_workers"}},
        edit_bootstrap=merging.edit,
        urls=remembered,
    ) as running:
        for headers in WITHOUT_RIGHT.values():
            async with running.chat(headers={"host": "llm.example.com"} | headers) as response:
                assert response.status == 401
        assert await running.sample("extproc_requests_total") == 0
        assert await running.legs(running.fleet.workers) == []
        for stream in (False, True):
            async with running.chat(headers=USER, stream=stream) as response:
                assert response.status == 200, await response.text()
                await response.read()
        assert len(await running.legs(running.prefills)) == 2
        assert len(await running.legs(running.decodes)) == 2
        await running.at_rest()
        assert await running.sample("extproc_pd_pairs_total") == 2
