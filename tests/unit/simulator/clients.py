"""The client side of the tests: short names for what they send and read."""

import asyncio
import io
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec

from extproc.simulator.http import RunningSimulator
from extproc.simulator.settings import SimulatorSettings

CHAT = "/v1/chat/completions"
FOREVER_MILLISECONDS = 3_600_000.0


class SimulatedWorker:
    """A running worker and a session that talks to it."""

    def __init__(self, simulator: RunningSimulator, session: aiohttp.ClientSession) -> None:
        self.simulator = simulator
        self.session = session

    async def post(
        self,
        path: str,
        body: Any,
        *,
        fault: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any]:
        """(status, decoded JSON) of a POST; `body` is sent as it is when it is bytes."""
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        sent = dict(headers or {})
        if fault is not None:
            sent["x-simulator-fault"] = fault
        async with self.session.post(path, data=io.BytesIO(data), headers=sent) as response:
            answer = await response.read()
            return response.status, msgspec.json.decode(answer) if answer else None

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(path) as response:
            answer = await response.read()
            is_json = response.content_type == "application/json"
            return response.status, msgspec.json.decode(answer) if is_json else answer

    async def stats(self) -> Any:
        return (await self.get("/simulator/stats"))[1]

    async def until(self, **expected: int) -> Any:
        """The statistics, once they have these values."""
        async with asyncio.timeout(20):
            while True:
                stats = await self.stats()
                if all(stats[name] == value for name, value in expected.items()):
                    return stats
                await asyncio.sleep(0.005)


Launch = Callable[..., Awaitable[SimulatedWorker]]


def chat(content: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def events(raw: bytes) -> list[Any]:
    """The payloads of an SSE body: decoded JSON, or the text for `[DONE]`."""
    payloads = []
    for block in raw.decode().split("\n\n"):
        for line in block.splitlines():
            if line.startswith("data: "):
                text = line.removeprefix("data: ")
                payloads.append(text if text == "[DONE]" else msgspec.json.decode(text))
    return payloads


async def broken_off(response: aiohttp.ClientResponse) -> tuple[bytes, Exception | None]:
    """What arrived of a body before reading it failed, and how it failed."""
    got = b""
    try:
        async for chunk in response.content.iter_any():
            got += chunk
    except (aiohttp.ClientError, TimeoutError) as error:
        return got, error
    return got, None


def endless(**fields: Any) -> SimulatorSettings:
    """A worker whose first token comes at once and whose second never does."""
    defaults: dict[str, Any] = {
        "prefill_tokens_per_second": 1e9,
        "decode_milliseconds_per_token": FOREVER_MILLISECONDS,
    }
    return SimulatorSettings(**(defaults | fields))
