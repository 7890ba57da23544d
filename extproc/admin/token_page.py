"""Says the tokens of a request: `POST /tokens?path=/v1/chat/completions`, with its body.

The answer has the tokens for each engine of the model's workers, or the reason without them. It
decides nothing and asks no worker. The page costs as much as the request, so it needs a token.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from aiohttp import web

from extproc.admin.access import token_problem
from extproc.config.schema import Config
from extproc.engines.engine import Engine
from extproc.errors import RouterError
from extproc.routing.request import ClientHeaders, find_endpoint, parse_body
from extproc.routing.router import Router
from extproc.tokenization.encoder import Encoded

__all__ = ["TokenPage"]

_TIMEOUT_SECONDS: Final = 10.0


class TokenPage:
    """The page, for the router in use."""

    def __init__(self, router: Callable[[], Router], config: Callable[[], Config]) -> None:
        self._router = router
        self._config = config

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/tokens", self._post)]

    async def _post(self, request: web.Request) -> web.Response:
        config = self._config()
        if (problem := token_problem(config)) is not None:
            return _answer(403, {"error": f"tokens are said only with a token; {problem}"})
        body = await _body(request, config.server.max_body_bytes)
        if body is None:
            return _answer(413, {"error": f"more than {config.server.max_body_bytes} bytes"})
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                endpoint = find_endpoint("POST", request.query.get("path", ""))
                parsed = parse_body(endpoint, body, _no_headers, prompt_max_bytes=0)
                found = await self._router().tokens(parsed)
        except RouterError as error:
            return _answer(error.status, {"error": error.message})
        except TimeoutError:
            return _answer(503, {"error": "no tokens in time; try again later"})
        return _answer(200, {"tokens": [_shown(*one) for one in found.items()]})


async def _body(request: web.Request, max_bytes: int) -> bytes | None:
    """The body; None if it is larger. The limit of the other pages is too small for prompts."""
    body = bytearray()
    async for part in request.content.iter_any():
        body += part
        if len(body) > max_bytes:
            # The server must not read on after the answer.
            request.content.feed_eof()
            return None
    return bytes(body)


def _shown(engine: Engine, encoded: Encoded) -> dict[str, Any]:
    shown: dict[str, Any] = {"engine": engine.name}
    if encoded.ids is not None:
        return shown | {"ids": encoded.ids.tolist()}
    return shown | {"reason": encoded.reason, "member": encoded.member or None}


def _no_headers() -> ClientHeaders:
    return ClientHeaders("", ())


def _answer(status: int, body: Mapping[str, Any]) -> web.Response:
    response = web.Response(
        status=status, body=msgspec.json.encode(body), content_type="application/json"
    )
    if status == 413:
        response.force_close()
    return response
