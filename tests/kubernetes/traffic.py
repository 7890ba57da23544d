"""Clients that ask all the time, and what is known about the requests that failed."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import aiohttp
from msgspec import Struct

from extproc.simulator.http import RunningSimulator

from .installation import Installation

__all__ = ["Answer", "Crashes", "asking"]

_TOKENS_MAX: Final = 40
# The header by which a request is found at the engines; prefill workers get it, too.
_ID_HEADER: Final = "x-correlation-id"
# A request ends within that time. For a moment after a crash, requests are still sent there.
_LASTS: Final = timedelta(seconds=10)
_NOTICED: Final = timedelta(seconds=1)
# In Envoy's words, a connection on which a request had been sent has died.
_DEAD_SOCKET: Final = "connection_termination"


class Answer(Struct):
    """What became of one request; `request_id` is Envoy's, where an error names it."""

    id: str
    status: int
    code: str
    request_id: str | None = None

    @property
    def ok(self) -> bool:
        return self.status == 200


@contextlib.asynccontextmanager
async def asking(
    installed: Installation, clients: int, requests: int
) -> AsyncIterator[list[Answer]]:
    """Send requests all the time, and at least that many; gives their answers."""
    answers: list[Answer] = []
    ended = asyncio.Event()
    chance = random.Random(2)
    numbers = iter(range(1_000_000))

    async def ask() -> None:
        while not (ended.is_set() and len(answers) >= requests):
            number = str(next(numbers))
            stream, tokens = chance.random() < 0.5, chance.randrange(2, _TOKENS_MAX)
            status, code, request_id = 0, "cut", None
            with contextlib.suppress(aiohttp.ClientPayloadError):
                async with installed.chat(tokens, stream=stream, x_correlation_id=number) as got:
                    body = await got.read()
                status, code = got.status, got.headers.get("x-router-error-code", "")
                if code and code != "prefill_refused":
                    request_id = json.loads(body)["error"]["request_id"]
                if status == 200:
                    assert (b"[DONE]" if stream else b'"choices"') in body
            answers.append(Answer(number, status, code, request_id))

    tasks = [asyncio.create_task(ask()) for _ in range(clients)]
    try:
        yield answers
    finally:
        ended.set()
        await asyncio.gather(*tasks)


class Crashes:
    """The engines that crashed, and the requests that they had on open sockets.

    The service logs JSON, with the level `debug` where a request has a prefill worker.
    """

    def __init__(self) -> None:
        self._torn: set[str] = set()
        # When the engine at an address has crashed; another one may use the address later.
        self._crashes: dict[str, list[datetime]] = {}

    async def crash(self, engine: RunningSimulator) -> None:
        """Stop it like a killed process."""
        address = engine.url.removeprefix("http://")
        self._crashes.setdefault(address, []).append(datetime.now(UTC))
        await engine.stop()
        left = (entry for entry in engine.journal.recent if entry.outcome != "completed")
        self._torn |= {entry.headers[_ID_HEADER] for entry in left}

    def unexplained(self, answers: list[Answer], folder: Path) -> list[Answer]:
        """The failed requests that had no leg on a socket that died; `folder` is the stack's."""
        torn = self._torn | self._not_read(folder)
        return [one for one in answers if not one.ok and not {one.id, one.request_id} & torn]

    def _not_read(self, folder: Path) -> set[str]:
        """Ids of requests that were sent to an engine which crashed before it read them."""
        lines = [json.loads(line) for line in (folder / "access.log").read_text().splitlines()]
        found = {
            line["request_id"]
            for line in lines
            if _DEAD_SOCKET in line["details"] and line["upstream_host"] in self._crashes
        }
        for line in (folder / "service.log").read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "routed" and self._had(event["worker"], event["timestamp"]):
                found.add(event["request_id"])
        return found

    def _had(self, worker: str, timestamp: str) -> bool:
        """True if a request that was routed to it at that time may have been there in a crash."""
        crashes = self._crashes.get(worker.removeprefix("http://"), ())
        routed = datetime.fromisoformat(timestamp)
        return any(-_NOTICED <= at - routed <= _LASTS for at in crashes)
