"""Adding and removing workers over the admin server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from structlog.testing import capture_logs

from extproc.admin.access import require_token
from extproc.admin.runtime_workers import RuntimeWorkerPages
from extproc.config.schema import Config
from extproc.workers.registry import WorkerRegistry
from extproc.workers.runtime_workers import RuntimeWorkers
from tests.builders import make_worker
from tests.fakes import FakeWorkerSource
from tests.unit.configs import config

TOKEN = "secret"
URL = "http://10.0.0.9:8000"


class Pages:
    """The pages, and a client that has the token."""

    def __init__(self, session: ClientSession, runtime: RuntimeWorkers) -> None:
        self.session = session
        self.runtime = runtime

    async def call(self, method: str, **options: Any) -> tuple[int, dict[str, Any]]:
        async with self.session.request(method, "/workers", **options) as response:
            assert response.content_type == "application/json"
            return response.status, await response.json()

    async def refused(self, status: int, **body: Any) -> str:
        """The error of a POST that changes nothing."""
        before = len(self.runtime)
        found, answer = await self.call("POST", json=body)
        assert (found, set(answer)) == (status, {"error"})
        assert len(self.runtime) == before
        return str(answer["error"])


def settings(envoy: dict[str, Any] | None = None, token: bool = True) -> Config:
    server = {"admin_token_env": "ADMIN_TOKEN"} if token else {}
    return config(server=server, envoy={"endpoints": "ads"} if envoy is None else envoy)


@asynccontextmanager
async def serving(
    current: Config | None = None, registry: WorkerRegistry | None = None
) -> AsyncIterator[Pages]:
    current = current or settings()
    runtime = RuntimeWorkers(FakeWorkerSource(), limit=2)
    made = RuntimeWorkerPages(runtime, registry or WorkerRegistry(), lambda: current)
    app = web.Application(middlewares=[require_token(TOKEN, without=frozenset())])
    app.add_routes(made.routes())
    async with TestServer(app) as server:
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with ClientSession(server.make_url("/"), headers=headers) as session:
            yield Pages(session, runtime)


async def test_the_answer_says_what_was_added_for_how_long_and_how_the_gateway_knows() -> None:
    async with serving() as pages:
        with capture_logs() as logs:
            status, body = await pages.call(
                "POST", json={"url": f"{URL}/", "role": "decode", "model": "m"}
            )
        assert status == 201
        assert body["added"] == {"url": URL, "role": "decode", "model": "m"}
        assert body["scope"].startswith("this replica only, until it restarts")
        assert "ADS" in body["gateway"]
        assert "GET /workers" in body["note"]
        assert [(line["event"], line["worker"]) for line in logs] == [("runtime_worker_added", URL)]
        assert len(pages.runtime) == 1


async def test_an_added_worker_can_be_removed() -> None:
    async with serving() as pages:
        await pages.call("POST", json={"url": URL})
        status, body = await pages.call("DELETE", params={"url": f"{URL}/"})
        assert (status, body["removed"]) == (200, {"url": URL})
        assert body["scope"].startswith("this replica only")
        assert len(pages.runtime) == 0
        status, body = await pages.call("DELETE", params={"url": URL})
        assert (status, body) == (404, {"error": "url: there is no such worker"})
        status, body = await pages.call("DELETE")
        assert (status, body["error"]) == (400, "url: missing, send DELETE /workers?url=URL")


async def test_without_a_configured_token_nothing_can_be_changed() -> None:
    async with serving(settings(token=False)) as pages:
        error = await pages.refused(403, url=URL)
        assert "set server.admin_token_file or server.admin_token_env" in error
        status, body = await pages.call("DELETE", params={"url": URL})
        assert (status, body["error"]) == (403, error)


async def test_a_request_without_the_token_is_refused() -> None:
    async with serving() as pages:
        for headers in ({"authorization": "Bearer other"}, {"authorization": ""}):
            for method in ("POST", "DELETE"):
                async with pages.session.request(
                    method, "/workers", json={"url": URL}, headers=headers
                ) as response:
                    assert response.status == 401
        assert len(pages.runtime) == 0


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("", "url: an empty URL"),
        ("10.0.0.9:8000", "url: the scheme must be http or https"),
        ("ftp://10.0.0.9", "url: the scheme must be"),
        ("http://user:secret@10.0.0.9", "url: credentials do not belong here"),
        ("http://10.0.0.9/v1", "url: a path"),
        ("http://localhost:9002", "url: this is server.port"),
        ("https://10.0.0.9", "url: Envoy can verify an https worker only by its host name"),
    ],
)
async def test_a_url_is_checked_as_in_the_configuration(url: str, text: str) -> None:
    async with serving() as pages:
        assert (await pages.refused(400, url=url)).startswith(text)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "url"),
        ({"url": 1}, "url"),
        ({"url": URL, "role": "both"}, "role"),
        ({"url": URL, "weight": 1}, "weight"),
        ({"url": URL, "model": "n"}, "model: not one of the configured models"),
    ],
)
async def test_a_wrong_body_is_refused_with_its_key(body: dict[str, Any], text: str) -> None:
    async with serving() as pages:
        assert text in await pages.refused(400, **body)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"\xff"', b"null"])
async def test_a_body_that_is_not_an_object_is_refused(data: bytes) -> None:
    async with serving() as pages:
        status, body = await pages.call("POST", data=data)
        assert status == 400
        assert body["error"].startswith("expected a JSON object with a url: ")


async def test_a_body_that_cannot_be_decompressed_is_refused() -> None:
    async with serving() as pages:
        for encoding in ("gzip", "deflate"):
            headers = {"content-encoding": encoding}
            status, body = await pages.call("POST", data=b'{"url": ""}', headers=headers)
            assert status == 400
            assert body["error"].startswith("the body cannot be read")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://0.0.0.0:9002", "url: this is server.port"),
        ("http://[::]:9002", "url: this is server.port"),
        ("http://[::ffff:127.0.0.1]:9002", "url: this is server.port"),
        ("http://localhost.:9002", "url: this is server.port"),
        ("http://0.0.0.0:1", "url: not the address of one host"),
        ("http://0.0.0.0.:1", "url: not the address of one host"),
        ("http://[::]:1", "url: not the address of one host"),
        ("http://224.0.0.1:1", "url: not the address of one host"),
        ("http://[ff02::1]:1", "url: not the address of one host"),
        ("http://[::ffff:224.0.0.1]:1", "url: not the address of one host"),
        ("http://255.255.255.255:1", "url: not the address of one host"),
    ],
)
async def test_an_address_that_cannot_be_one_worker_is_refused(url: str, text: str) -> None:
    async with serving() as pages:
        assert (await pages.refused(400, url=url)).startswith(text)


async def test_two_spellings_of_an_address_are_one_worker() -> None:
    async with serving() as pages:
        status, _ = await pages.call("POST", json={"url": "http://[2001:db8::1]:8000"})
        assert status == 201
        error = await pages.refused(409, url="http://[2001:DB8:0::0:1]:8000")
        assert "was added before" in error


async def test_duplicates_and_too_many_are_refused() -> None:
    registry = WorkerRegistry()
    named = make_worker("http://name:8000")
    named.address = "10.0.0.1:8000"
    registry.upsert(named)
    async with serving(registry=registry) as pages:
        error = await pages.refused(409, url="http://10.0.0.1:8000")
        assert error == "url: http://name:8000 has the same address"
        await pages.call("POST", json={"url": URL})
        assert "was added before" in await pages.refused(409, url=URL)
        await pages.call("POST", json={"url": "http://10.0.0.8:8000"})
        error = await pages.refused(409, url="http://10.0.0.7:8000")
        assert "discovery.runtime_workers_max" in error


@pytest.mark.parametrize(
    ("envoy", "text"),
    [
        ({"endpoints_file": "/run/w.json"}, "the worker is written into /run/w.json"),
        ({"destination": "single"}, "the gateway must connect to any address"),
    ],
)
async def test_other_ways_for_the_gateway_to_know_it(envoy: dict[str, Any], text: str) -> None:
    async with serving(settings(envoy)) as pages:
        status, body = await pages.call("POST", json={"url": URL})
        assert status == 201
        assert body["gateway"].startswith(text)


async def test_a_gateway_with_a_fixed_list_would_not_know_it() -> None:
    async with serving(settings({})) as pages:
        error = await pages.refused(409, url=URL)
        assert "set envoy.endpoints: ads or envoy.endpoints_file" in error
