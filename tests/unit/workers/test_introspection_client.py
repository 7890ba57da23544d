"""The real HTTP client with small servers: what it sends, and which answers are errors."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from extproc.worker_url import WorkerUrl, parse_worker_url
from extproc.workers.engine_calls import EngineUnreachableError
from extproc.workers.introspection_client import AiohttpIntrospectionClient

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def engine(handler: Handler) -> AsyncIterator[WorkerUrl]:
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        yield parse_worker_url(f"http://127.0.0.1:{port}")
    finally:
        await runner.cleanup()


async def test_the_status_and_the_whole_body_are_returned() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=418, text=request.path)

    async with engine(handler) as url, AiohttpIntrospectionClient(None, None) as client:
        answer = await client.get(url, "/server_info", 5.0)
    assert (answer.status, answer.body) == (418, b"/server_info")


@pytest.mark.parametrize(("key", "sent"), [(None, "none"), ("secret", "Bearer secret")])
async def test_the_api_key_is_sent_if_there_is_one(key: str | None, sent: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=request.headers.get("authorization", "none"))

    async with engine(handler) as url, AiohttpIntrospectionClient(key, None) as client:
        assert (await client.get(url, "/", 5.0)).body.decode() == sent


async def test_a_redirect_is_not_followed() -> None:
    asked: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=307, headers={"location": "/elsewhere"})

    async with engine(handler) as url, AiohttpIntrospectionClient("secret", None) as client:
        assert (await client.get(url, "/server_info", 5.0)).status == 307
    assert asked == ["/server_info"]


async def test_a_far_too_large_answer_is_an_error() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=b"x" * (9 * 1024 * 1024))

    async with engine(handler) as url, AiohttpIntrospectionClient(None, None) as client:
        with pytest.raises(EngineUnreachableError, match="too large"):
            await client.get(url, "/", 10.0)


async def test_a_silent_engine_times_out() -> None:
    release = asyncio.Event()

    async def handler(_: web.Request) -> web.Response:
        await release.wait()
        return web.Response()

    async with engine(handler) as url, AiohttpIntrospectionClient(None, None) as client:
        with pytest.raises(EngineUnreachableError) as caught:
            await client.get(url, "/", 0.05)
        release.set()
    assert str(caught.value)


async def test_an_answer_that_breaks_off_is_an_error() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-length": "100"})
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.abort()
        return response

    async with engine(handler) as url, AiohttpIntrospectionClient(None, None) as client:
        with pytest.raises(EngineUnreachableError):
            await client.get(url, "/", 5.0)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "nobody.invalid", "a..b", "x" * 64 + ".invalid"],
    ids=lambda host: host[:16],
)
async def test_an_engine_that_is_not_there_is_unreachable(host: str) -> None:
    async with AiohttpIntrospectionClient(None, None) as client:
        with pytest.raises(EngineUnreachableError):
            await client.get(WorkerUrl("http", host, 1), "/", 5.0)


async def test_the_client_refuses_calls_outside_its_context() -> None:
    with pytest.raises(RuntimeError, match="context"):
        await AiohttpIntrospectionClient(None, None).get(parse_worker_url("http://a"), "/", 1.0)


async def test_another_key_is_used_from_the_next_request_on() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=request.headers.get("authorization", "none"))

    async with engine(handler) as url, AiohttpIntrospectionClient("old", None) as client:
        seen = []
        for key in ("old", "new", None):
            client.use(key, None)
            seen.append((await client.get(url, "/", 5.0)).body.decode())
    assert seen == ["Bearer old", "Bearer new", "none"]
