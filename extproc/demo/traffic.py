"""Client traffic for the demo: chat requests over HTTP, streamed and not, and what came back."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from random import Random
from statistics import quantiles

import aiohttp
from msgspec import Struct

__all__ = ["Outcome", "percentile", "send_traffic"]

_TOPICS = ("tides", "bridges", "glaciers", "sparrows", "harbours", "clocks", "maps", "looms")
_TIMEOUT_SECONDS = 60.0
# The simulated workers sign their answers, so that the client can see who served.
_SERVED_BY_HEADER = "x-simulator-port"


class Outcome(Struct, frozen=True):
    """One finished request; status 0 = it broke off.

    `ttft_seconds` is the time to the first byte of the body.
    """

    port: str
    status: int
    streamed: bool
    ttft_seconds: float
    chunks: int


def percentile(values: list[float], percent: int) -> float:
    """The percentile of at least one value."""
    if len(values) == 1:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]


async def send_traffic(
    url: str,
    model: str,
    *,
    requests: int,
    concurrency: int,
    on_outcome: Callable[[Outcome], None],
) -> None:
    """Send that many requests, so many at a time; calls on_outcome as each one ends."""
    random = Random(1)  # noqa: S311 (the same traffic in every run)
    places = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def one(streamed: bool, topic: str, tokens: int) -> None:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": f"Tell me about {topic}."}],
                "max_tokens": tokens,
                "stream": streamed,
            }
            async with places:
                on_outcome(await _chat(session, url, body, streamed))

        async with asyncio.TaskGroup() as group:
            for index in range(requests):
                work = one(index % 4 != 3, random.choice(_TOPICS), random.randint(8, 48))
                group.create_task(work)


async def _chat(
    session: aiohttp.ClientSession, url: str, body: dict[str, object], streamed: bool
) -> Outcome:
    started = time.monotonic()
    port, status, first, chunks = "nobody", 0, 0.0, 0
    # A request that breaks off is an outcome, not the end of the demo.
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            port = response.headers.get(_SERVED_BY_HEADER, port)
            async for chunk in response.content.iter_any():
                first = first or time.monotonic()
                chunks += chunk.count(b"data: ")
            status = response.status
    return Outcome(
        port=port,
        status=status,
        streamed=streamed,
        ttft_seconds=(first or time.monotonic()) - started,
        chunks=chunks,
    )
