"""Asks the prefill worker of a request for its token counts.

A client sees the usage of the decode worker, whose cached tokens save no prefill. The demo
therefore asks the prefill worker, which the debug headers name under any policy.
"""

import asyncio
import contextlib
from typing import Final

import aiohttp
import msgspec
from msgspec import Struct

__all__ = ["Prefilled", "prefilled"]

# A prefill worker can finish its answer a little after the client has its own.
_ATTEMPTS: Final = 20
_RETRY_SECONDS: Final = 0.05


class Prefilled(Struct, frozen=True):
    """The tokens of one prompt, and how many of them the prefill worker had cached."""

    prompt_tokens: int
    cached_tokens: int


class _Noted(Prefilled, frozen=True, kw_only=True):
    request_id: str | None
    outcome: str | None


class _Stats(Struct):
    requests: list[_Noted]


_decoder = msgspec.json.Decoder(_Stats)


async def prefilled(
    session: aiohttp.ClientSession, worker_url: str, request_id: str
) -> Prefilled | None:
    """Ask a simulated worker; None if it does not know the request."""
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError):
        for _ in range(_ATTEMPTS):
            async with session.get(f"{worker_url}/simulator/stats") as response:
                stats = _decoder.decode(await response.read())
            for noted in reversed(stats.requests):
                if (noted.request_id, noted.outcome) == (request_id, "completed"):
                    return noted
            await asyncio.sleep(_RETRY_SECONDS)
    return None
