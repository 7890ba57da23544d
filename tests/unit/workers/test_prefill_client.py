"""The real prefill client with small servers: when it returns, how calls end, what it sends."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from extproc.testing.stack import free_ports
from extproc.worker_url import WorkerUrl, parse_worker_url
from extproc.workers.engine_calls import (
    EngineTimeoutError,
    EngineUnreachableError,
    PrefillCall,
    PrefillClientOverloadedError,
)
from extproc.workers.prefill_client import AiohttpPrefillClient

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MEBIBYTE = 1024 * 1024
WAIT_SECONDS = 60.0


class Engine:
    """A server with one handler; `connections` counts all connections, `open` the open ones."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.url = WorkerUrl("http", "127.0.0.1", 1)
        self.peers: list[tuple[str, int]] = []
        self.arrived = asyncio.Event()
        self.left = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.peers.append(request.transport.get_extra_info("peername"))
        self.arrived.set()
        try:
            return await self.handler(request)
        except asyncio.CancelledError:
            self.left.set()
            raise


@asynccontextmanager
async def engine(handler: Handler) -> AsyncIterator[Engine]:
    made = Engine(handler)
    app = web.Application(client_max_size=64 * MEBIBYTE)
    app.router.add_post("/{path:.*}", made.handle)
    # Handlers are cancelled when their client leaves.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        made.url = parse_worker_url(f"http://127.0.0.1:{runner.addresses[0][1]}")
        yield made
    finally:
        await runner.cleanup()


@pytest.fixture
async def caller() -> AsyncIterator[AiohttpPrefillClient]:
    made = AiohttpPrefillClient(None)
    made.open()
    yield made
    await made.close()


async def post(
    caller: AiohttpPrefillClient,
    url: WorkerUrl,
    path: str = "/generate",
    *,
    headers: Iterable[tuple[str, str]] = (("content-type", "application/json"),),
    body: bytes = b"{}",
    connect_seconds: float = WAIT_SECONDS,
    answer_seconds: float = WAIT_SECONDS,
    keep_bytes: int = MEBIBYTE,
) -> PrefillCall:
    return await caller.post(
        url,
        path,
        headers,
        body,
        connect_seconds=connect_seconds,
        answer_seconds=answer_seconds,
        keep_bytes=keep_bytes,
    )


async def happens(event: asyncio.Event) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        await event.wait()


async def echo(request: web.Request) -> web.Response:
    return web.Response(status=202, body=await request.read())


async def silence(_: web.Request) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


# -- when post returns


async def test_post_returns_when_connected_and_before_the_answer(
    caller: AiohttpPrefillClient,
) -> None:
    may_answer = asyncio.Event()

    async def handler(_: web.Request) -> web.Response:
        await may_answer.wait()
        return web.Response(status=201, body=b"late")

    async with engine(handler) as server:
        call = await post(caller, server.url)
        waiting = asyncio.create_task(_answer(call))
        await happens(server.arrived)
        assert not waiting.done()
        may_answer.set()
        assert await waiting == (201, b"late")


async def _answer(call: PrefillCall) -> tuple[int, bytes]:
    answer = await call.answer()
    return answer.status, answer.body


async def test_post_returns_even_if_the_server_never_reads(caller: AiohttpPrefillClient) -> None:
    # The kernel accepts the connection even if the server does nothing.
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(4)
        url = WorkerUrl("http", "127.0.0.1", listening.getsockname()[1])
        call = await post(caller, url, body=b"x" * (8 * MEBIBYTE), answer_seconds=0.2)
        with pytest.raises(EngineTimeoutError):
            await call.answer()


async def test_an_answer_can_be_read_long_after_it_came(caller: AiohttpPrefillClient) -> None:
    async with engine(echo) as server:
        call = await post(caller, server.url, body=b"[1]")
        assert await _answer(call) == (202, b"[1]")
        assert await _answer(call) == (202, b"[1]")
        call.cancel()
        assert await _answer(call) == (202, b"[1]")


# -- how calls end


async def test_a_refused_connection_raises_at_once(caller: AiohttpPrefillClient) -> None:
    url = WorkerUrl("http", "127.0.0.1", free_ports(1)[0])
    with pytest.raises(EngineUnreachableError) as caught:
        await post(caller, url)
    assert not isinstance(caught.value, EngineTimeoutError)
    assert str(caught.value)


async def test_a_host_name_that_does_not_exist_is_unreachable(caller: AiohttpPrefillClient) -> None:
    with pytest.raises(EngineUnreachableError):
        await post(caller, WorkerUrl("http", "x" * 64 + ".invalid", 80))


async def test_a_host_that_does_not_accept_in_time_is_unreachable(
    caller: AiohttpPrefillClient,
) -> None:
    with (
        socket.socket() as listening,
        FullBacklog(listening) as url,
        pytest.raises(EngineTimeoutError),
    ):
        async with asyncio.timeout(WAIT_SECONDS):
            await post(caller, url, connect_seconds=0.2, answer_seconds=600.0)


class FullBacklog:
    """Fills the backlog of a listening socket: further connections hang in the handshake."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._clients: list[socket.socket] = []

    def __enter__(self) -> WorkerUrl:
        self._listening.bind(("127.0.0.1", 0))
        self._listening.listen(0)
        address = self._listening.getsockname()
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(address)
            self._clients.append(client)
        return WorkerUrl("http", *address)

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()


async def test_an_engine_that_stays_silent_times_out(
    caller: AiohttpPrefillClient,
) -> None:
    async with engine(silence) as server:
        call = await post(caller, server.url, answer_seconds=0.1)
        with pytest.raises(EngineTimeoutError) as caught:
            await call.answer()
        assert str(caught.value)
        # The engine sees that the connection is closed.
        await happens(server.left)


async def test_an_answer_that_does_not_end_in_time_times_out(
    caller: AiohttpPrefillClient,
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"drop")
            await asyncio.sleep(0.02)

    async with engine(handler) as server:
        call = await post(caller, server.url, answer_seconds=0.2)
        with pytest.raises(EngineTimeoutError):
            await call.answer()


@pytest.mark.parametrize("when", ["before", "within"])
async def test_an_answer_that_breaks_off_is_unreachable_and_not_a_timeout(
    caller: AiohttpPrefillClient, when: str
) -> None:
    may_break = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-length": "100"})
        if when == "within":
            await response.prepare(request)
            await response.write(b"half")
        await may_break.wait()
        assert request.transport is not None
        request.transport.abort()
        return response

    async with engine(handler) as server:
        call = await post(caller, server.url)
        may_break.set()
        with pytest.raises(EngineUnreachableError) as caught:
            await call.answer()
        assert not isinstance(caught.value, EngineTimeoutError)


async def test_an_answer_that_is_not_http_is_an_error(caller: AiohttpPrefillClient) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"220 smtp ready\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = WorkerUrl("http", "127.0.0.1", server.sockets[0].getsockname()[1])
        call = await post(caller, url)
        with pytest.raises(EngineUnreachableError):
            await call.answer()


async def test_every_status_is_an_answer_and_redirects_are_not_followed(
    caller: AiohttpPrefillClient,
) -> None:
    asked: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=int(request.path[1:]), headers={"location": "/200"})

    async with engine(handler) as server:
        for status in (200, 307, 400, 429, 500, 503):
            call = await post(caller, server.url, f"/{status}")
            assert (await call.answer()).status == status
    assert len(asked) == 6


# -- cancelled


async def test_cancelling_closes_the_connection(caller: AiohttpPrefillClient) -> None:
    async with engine(silence) as server:
        call = await post(caller, server.url)
        await happens(server.arrived)
        assert not server.left.is_set()
        call.cancel()
        call.cancel()
        await happens(server.left)
        with pytest.raises(asyncio.CancelledError):
            await call.answer()


async def test_a_call_without_a_waiting_caller_can_be_cancelled(
    caller: AiohttpPrefillClient,
) -> None:
    async with engine(silence) as server:
        call = await post(caller, server.url)
        await happens(server.arrived)
        waiting = asyncio.create_task(call.answer())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await happens(server.left)


async def test_cancelling_while_connecting_leaves_no_connection(
    caller: AiohttpPrefillClient,
) -> None:
    with socket.socket() as listening, FullBacklog(listening) as url:
        before = asyncio.all_tasks()
        connecting = asyncio.create_task(
            post(caller, url, connect_seconds=600.0, answer_seconds=600.0)
        )
        await asyncio.sleep(0.05)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        async with asyncio.timeout(WAIT_SECONDS):
            while asyncio.all_tasks() - before:  # noqa: ASYNC110 (tasks of a library)
                await asyncio.sleep(0.01)


async def test_a_failure_that_is_never_read_is_not_logged(caller: AiohttpPrefillClient) -> None:
    noise: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: noise.append(context))

    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with engine(handler) as server:
        try:
            call = await post(caller, server.url)
        except EngineUnreachableError:
            pass  # it broke off earlier
        else:
            await happens(server.arrived)
            await asyncio.sleep(0.05)
            del call
    await asyncio.sleep(0)
    assert noise == []


# -- what is sent


async def test_every_call_has_its_own_connection(caller: AiohttpPrefillClient) -> None:
    async with engine(echo) as server:
        for _ in range(4):
            await (await post(caller, server.url)).answer()
        calls = [await post(caller, server.url) for _ in range(4)]
        for call in calls:
            await call.answer()
        assert len(set(server.peers)) == len(server.peers) == 8


async def test_only_the_given_headers_are_sent(caller: AiohttpPrefillClient) -> None:
    seen: list[tuple[str, str]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.extend((name.lower(), value) for name, value in request.headers.items())
        return web.Response()

    async with engine(handler) as server:
        headers = [
            ("content-type", "application/json"),
            ("x-request-id", "r1"),
            ("x-sgl-a", "1"),
            ("x-sgl-a", "2"),
        ]
        await (await post(caller, server.url, headers=headers, body=b"{}")).answer()
    assert [value for name, value in seen if name == "x-sgl-a"] == ["1", "2"]
    found = dict(seen)
    assert found["content-type"] == "application/json"
    assert found["x-request-id"] == "r1"
    assert found["content-length"] == "2"
    assert not {"authorization", "accept-encoding", "cookie"} & set(found)


async def test_given_credentials_of_the_client_are_sent(caller: AiohttpPrefillClient) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=request.headers["authorization"])

    async with engine(handler) as server:
        call = await post(caller, server.url, headers=[("authorization", "Bearer client")])
        assert (await call.answer()).body == b"Bearer client"


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions?a=b%2Fc", "/generate?x=%41+b", "/a%20b", "/a//b/../c"]
)
async def test_the_path_is_sent_unchanged(caller: AiohttpPrefillClient, path: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=request.raw_path)

    async with engine(handler) as server:
        answer = await (await post(caller, server.url, path)).answer()
    assert answer.body.decode() == path


# 256 KiB is where bodies begin to be written in pieces.
@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 256 * 1024 + 1, 3 * MEBIBYTE])
async def test_a_body_of_any_size_arrives_whole(caller: AiohttpPrefillClient, size: int) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    lengths: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        lengths.append(request.headers.get("content-length", "none"))
        return web.Response(body=b"same" if await request.read() == body else b"other")

    async with engine(handler) as server:
        answer = await (await post(caller, server.url, body=body)).answer()
    assert answer.body == b"same"
    assert lengths == [str(size)]


@pytest.mark.parametrize("size", [0, 99, 100, 101, 3 * MEBIBYTE])
async def test_only_the_first_bytes_of_an_answer_are_kept(
    caller: AiohttpPrefillClient, size: int
) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=b"x" * size)

    async with engine(handler) as server:
        answer = await (await post(caller, server.url, keep_bytes=100)).answer()
    assert (answer.status, answer.body) == (200, b"x" * min(size, 100))


async def test_a_compressed_answer_is_not_decompressed(
    caller: AiohttpPrefillClient,
) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=b"not gzip", headers={"content-encoding": "gzip"})

    async with engine(handler) as server:
        assert (await (await post(caller, server.url)).answer()).body == b"not gzip"


# -- open and close


async def test_a_client_that_was_not_opened_raises() -> None:
    caller = AiohttpPrefillClient(None)
    with pytest.raises(RuntimeError, match="not open"):
        await post(caller, WorkerUrl("http", "127.0.0.1", 1))
    await caller.close()


async def test_closing_ends_running_calls() -> None:
    caller = AiohttpPrefillClient(None)
    caller.open()
    async with engine(silence) as server:
        call = await post(caller, server.url)
        await happens(server.arrived)
        await caller.close()
        await happens(server.left)
        with pytest.raises((EngineUnreachableError, asyncio.CancelledError)):
            await call.answer()


# -- what is not waited for


@pytest.mark.parametrize("status", [500, 503])
async def test_a_5xx_is_returned_without_its_body(
    caller: AiohttpPrefillClient, status: int
) -> None:
    async def stalls(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"content-length": "100"})
        await response.prepare(request)
        await response.write(b"xx")
        return await silence(request)

    async with engine(stalls) as made, asyncio.timeout(WAIT_SECONDS / 2):
        answer = await (await post(caller, made.url)).answer()
        assert answer.status == status


async def test_a_4xx_is_returned_with_the_body_that_comes_soon(
    caller: AiohttpPrefillClient,
) -> None:
    async def stalls(request: web.Request) -> web.StreamResponse:
        headers = {"content-length": "100", "content-type": "text/plain", "retry-after": "7"}
        response = web.StreamResponse(status=429, headers=headers)
        await response.prepare(request)
        await response.write(b"xx")
        return await silence(request)

    async with engine(stalls) as made, asyncio.timeout(WAIT_SECONDS / 2):
        answer = await (await post(caller, made.url)).answer()
        assert (answer.status, answer.body) == (429, b"xx")
        assert dict(answer.headers) == {"content-type": "text/plain", "retry-after": "7"}


async def test_a_lack_of_sockets_is_not_the_fault_of_the_engine(
    caller: AiohttpPrefillClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async with engine(echo) as made:
        monkeypatch.setattr(socket, "socket", exhausted)
        with pytest.raises(PrefillClientOverloadedError):
            await post(caller, made.url)
