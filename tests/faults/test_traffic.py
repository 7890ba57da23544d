"""What the clients of a storm make of each kind of answer."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from random import Random

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.faults.traffic import Outcome, Traffic

ERROR = {"type": "server_error", "code": "c", "message": "m", "request_id": "r"}
OURS = {"x-router-error-code": "c", "retry-after": "1"}
DEADLINE_SECONDS = 60.0
PLAIN, STREAMED = b'{"choices": []}', b"data: {}\n\ndata: [DONE]\n\n"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def answering(
    status: int, body: bytes | dict[str, object], headers: dict[str, str] | None = None
) -> Handler:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=text, headers=headers)

    return handle


async def both_kinds(request: web.Request) -> web.StreamResponse:
    return web.Response(body=STREAMED if (await request.json())["stream"] else PLAIN)


async def breaking_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"data: {}\n\n")
    assert request.transport is not None
    request.transport.abort()
    return response


async def closing(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def silent(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(DEADLINE_SECONDS)
    return web.Response()


@pytest.mark.parametrize(
    ("handler", "outcome"),
    [
        (both_kinds, Outcome.OK),
        (answering(200, b"data: {}\n\n"), Outcome.ODD),
        (answering(503, {"error": ERROR}, OURS), Outcome.OUR_ERROR),
        (answering(503, {"error": ERROR}, {"x-router-error-code": "c"}), Outcome.ODD),
        (answering(503, {"error": ERROR}, {**OURS, "x-router-error-code": "d"}), Outcome.ODD),
        (answering(502, {"error": {"code": "c"}}, OURS), Outcome.ODD),
        (answering(503, b"upstream connect error"), Outcome.ODD),
        (answering(500, b"", {"x-simulator-port": "1"}), Outcome.ENGINE_ERROR),
        (breaking_off, Outcome.CUT),
        (closing, Outcome.REFUSED),
    ],
)
async def test_each_answer_has_an_outcome(handler: Handler, outcome: Outcome) -> None:
    assert await outcomes(handler, DEADLINE_SECONDS) == {outcome}


async def test_a_request_that_is_not_over_at_the_deadline_has_hung() -> None:
    assert await outcomes(silent, 0.2) == {Outcome.HUNG}


async def outcomes(handler: Handler, deadline_seconds: float) -> set[Outcome]:
    """Those of ten requests to such a server, some of them streamed."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        traffic = Traffic(
            http,
            str(server.make_url("")).rstrip("/"),
            Random(1),
            concurrency=5,
            requests=10,
            deadline_seconds=deadline_seconds,
        )
        await traffic.run()
    assert traffic.sent == 10
    assert {kind for kind, _ in traffic.outcomes} == {"plain", "streamed"}
    return {outcome for _, outcome in traffic.outcomes}
