"""Engines are asked for the tokens of a body: by which path, and what an answer may be."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from extproc.engines.engine import EngineName
from extproc.worker_url import WorkerUrl, parse_worker_url
from extproc.workers.engine_calls import EngineAnswer
from extproc.workers.engine_tokenizer import EngineTokenizer, NoTokensToldError
from extproc.workers.introspection_client import AiohttpIntrospectionClient
from tests.fakes import FakeEngineClient

URL = "http://10.0.0.1:8000"
CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


async def ask(
    client: Any,
    engine: EngineName,
    path: str = CHAT,
    *,
    url: WorkerUrl | None = None,
    timeout_seconds: float = 5.0,
    tokens_max: int = 100,
    absent: set[str] | None = None,
) -> list[int]:
    ids = await EngineTokenizer(client).ask(
        url or parse_worker_url(URL),
        engine,
        path,
        json.dumps(BODY).encode(),
        timeout_seconds=timeout_seconds,
        tokens_max=tokens_max,
        absent=set() if absent is None else absent,
    )
    return [int(one) for one in ids]


def answering(**answers: tuple[int, bytes]) -> FakeEngineClient:
    client = FakeEngineClient()
    for path, (status, body) in answers.items():
        client.script(URL, path, EngineAnswer(status, body))
    return client


async def test_vllm_is_asked_to_render_the_body_as_it_is() -> None:
    client = answering(**{f"{CHAT}/render": (200, b'{"token_ids": [1, 2], "model": "m"}')})
    assert await ask(client, "vllm") == [1, 2]
    assert client.posted == [(URL, f"{CHAT}/render", BODY)]


async def test_vllm_without_its_render_endpoints_is_asked_to_tokenize() -> None:
    client = answering(
        **{f"{CHAT}/render": (403, b"{}"), "/tokenize": (200, b'{"count": 1, "tokens": [7]}')}
    )
    absent: set[str] = set()
    assert await ask(client, "vllm", absent=absent) == [7]
    assert absent == {f"{CHAT}/render"}
    assert await ask(client, "vllm", absent=absent) == [7]
    assert client.asked(URL) == [f"{CHAT}/render", "/tokenize", "/tokenize"]


async def test_a_rendered_completion_is_a_list_of_one() -> None:
    path = "/v1/completions"
    client = answering(**{f"{path}/render": (200, b'[{"token_ids": [3]}]')})
    assert await ask(client, "vllm", path) == [3]
    client = answering(**{f"{path}/render": (200, b'[{"token_ids": [3]}, {"token_ids": [4]}]')})
    with pytest.raises(NoTokensToldError) as caught:
        await ask(client, "vllm", path)
    assert caught.value.reason == "unreadable"


async def test_sglang_has_one_path_for_chats_and_texts() -> None:
    client = answering(**{"/v1/tokenize": (200, b'{"tokens": [1], "count": 1}')})
    assert await ask(client, "sglang") == [1]
    assert client.posted == [(URL, "/v1/tokenize", BODY)]


@pytest.mark.parametrize(
    ("engine", "path"),
    [("sglang", "/v1/responses"), ("sglang", "/v1/messages"), ("vllm", "/generate")],
)
async def test_nothing_is_asked_where_no_endpoint_can_tell(engine: EngineName, path: str) -> None:
    client = FakeEngineClient()
    with pytest.raises(NoTokensToldError) as caught:
        await ask(client, engine, path)
    assert (caught.value.reason, client.calls) == ("no_endpoint", [])


@pytest.mark.parametrize(
    ("status", "reason"),
    [(404, "no_endpoint"), (405, "no_endpoint"), (501, "no_endpoint"), (400, "refused"),
     (401, "refused"), (429, "refused"), (500, "refused"), (307, "refused")],
)  # fmt: skip
async def test_an_error_is_no_answer(status: int, reason: str) -> None:
    with pytest.raises(NoTokensToldError) as caught:
        await ask(answering(**{"/v1/tokenize": (status, b'{"tokens": [1]}')}), "sglang")
    assert caught.value.reason == reason


@pytest.mark.parametrize("status", [401, 429, 503])
async def test_an_engine_that_wants_no_questions_gets_no_second_one(status: int) -> None:
    client = answering(**{f"{CHAT}/render": (status, b""), "/tokenize": (200, b'{"tokens": [1]}')})
    with pytest.raises(NoTokensToldError):
        await ask(client, "vllm")
    assert client.asked(URL) == [f"{CHAT}/render"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xff", b"[]", b"{}", b"null", b'"x"', b'{"tokens": "x"}', b'{"tokens": [1.5]}',
        b'{"tokens": [-1]}', b'{"tokens": [4294967296]}', b'{"tokens": [[1]]}', b'{"tokens": null}',
        b'{"tokens": [1e999]}', b'{"tokens": ["1"]}', b'{"tokens": [true]}', b"[" * 5000,
        b'{"tokens": [' + b"1," * 100 + b"1]}",
    ],
)  # fmt: skip
async def test_an_answer_that_is_no_list_of_ids_is_unreadable(body: bytes) -> None:
    with pytest.raises(NoTokensToldError) as caught:
        await ask(answering(**{"/v1/tokenize": (200, body)}), "sglang")
    assert caught.value.reason == "unreadable"


# -- with real servers

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[WorkerUrl]:
    app = web.Application()
    app.router.add_post("/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield parse_worker_url(f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()


async def test_the_body_and_the_key_are_sent_to_a_real_server() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.headers["authorization"] == "Bearer secret"
        assert request.content_type == "application/json"
        assert await request.json() == BODY
        return web.json_response({"tokens": [5, 6]})

    async with server(handler) as url, AiohttpIntrospectionClient("secret", None) as client:
        assert await ask(client, "sglang", url=url) == [5, 6]


async def test_an_answer_without_end_or_limit_is_given_up() -> None:
    written = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'{"tokens": [1')
        while True:
            await response.write(b",1" * 32768)
            written += 65536

    async with server(handler) as url, AiohttpIntrospectionClient(None, None) as client:
        with pytest.raises(NoTokensToldError) as caught:
            await ask(client, "sglang", url=url)
    assert caught.value.reason == "unreachable"
    assert written < 16 * 1024 * 1024


async def test_a_server_that_is_slow_is_not_waited_for() -> None:
    async def handler(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with server(handler) as url, AiohttpIntrospectionClient(None, None) as client:
        with pytest.raises(NoTokensToldError) as caught:
            await ask(client, "sglang", url=url, timeout_seconds=0.05)
    assert caught.value.reason == "unreachable"


async def test_a_redirect_is_not_followed() -> None:
    asked: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=307, headers={"location": "/v1/elsewhere"})

    async with server(handler) as url, AiohttpIntrospectionClient("secret", None) as client:
        with pytest.raises(NoTokensToldError) as caught:
            await ask(client, "sglang", url=url)
    assert (caught.value.reason, asked) == ("refused", ["/v1/tokenize"])
