"""Clients of a storm, and the outcome of each of their requests."""

import asyncio
import enum
import json
from collections import Counter
from random import Random
from typing import Any, Final

import aiohttp

from tests.faults.fleet import MODEL

__all__ = ["Outcome", "Traffic"]

_ENVELOPE: Final = {"type", "code", "message", "request_id"}
_LAST_EVENT: Final = b"data: [DONE]\n\n"
_WORDS: Final = [
    "the",
    "worker",
    "holds",
    "a",
    "prefix",
    "of",
    "this",
    "prompt",
    "in",
    "its",
    "cache",
    "and",
    "answers",
    "soon",
]
_PAUSE_SECONDS: Final = 0.1


class Outcome(enum.Enum):
    OK = "ok"
    OUR_ERROR = "our error"  # in the envelope of the service
    ENGINE_ERROR = "engine's error"
    CUT = "cut"  # the connection broke in the response
    REFUSED = "refused"  # no connection to the gateway, or it broke before the response
    HUNG = "hung"  # not over at the deadline
    ODD = "odd"  # a kind of answer that no client should see


class Traffic:
    """Requests from `concurrency` clients until `stop` or until `requests` are sent.

    Every second one is streamed. What was wrong with odd answers is in `odd`.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        random: Random,
        *,
        concurrency: int,
        requests: int | None,
        deadline_seconds: float,
    ) -> None:
        self._http = http
        self._url = f"{url}/v1/chat/completions"
        self._random = random
        self._left = requests
        self._deadline_seconds = deadline_seconds
        self._concurrency = concurrency
        self._stopped = False
        # By "streamed" or "plain" and outcome.
        self.outcomes: Counter[tuple[str, Outcome]] = Counter()
        self.codes: Counter[str] = Counter()
        self.odd: list[str] = []
        self.slowest_seconds = 0.0

    def stop(self) -> None:
        """Let each client finish its request."""
        self._stopped = True

    async def run(self) -> None:
        async with asyncio.TaskGroup() as clients:
            for _ in range(self._concurrency):
                clients.create_task(self._client())

    async def _client(self) -> None:
        while not self._stopped and self._left != 0:
            if self._left is not None:
                self._left -= 1
            if await self.send() in (Outcome.REFUSED, Outcome.OUR_ERROR):
                # Clients that do not wait send most of their requests while nothing is up.
                await asyncio.sleep(_PAUSE_SECONDS)

    async def send(self) -> Outcome:
        """Send one request and count its outcome."""
        streamed = self._random.random() < 0.5
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(self._deadline_seconds):
                outcome = await self._exchange(streamed)
        except TimeoutError:
            outcome = Outcome.HUNG
        self.slowest_seconds = max(self.slowest_seconds, loop.time() - started)
        self.outcomes["streamed" if streamed else "plain", outcome] += 1
        return outcome

    async def _exchange(self, streamed: bool) -> Outcome:
        prompt = " ".join(self._random.choices(_WORDS, k=self._random.randint(4, 80)))
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self._random.randint(1, 12),
            "stream": streamed,
        }
        began = False
        try:
            async with self._http.post(self._url, json=body) as response:
                began = True
                data = await response.read()
        except aiohttp.ClientError:
            return Outcome.CUT if began else Outcome.REFUSED
        if response.status != 200:
            return self._error(response, data)
        complete = data.endswith(_LAST_EVENT) if streamed else "choices" in _object(data)
        return Outcome.OK if complete else self._odd(response, data)

    def _error(self, response: aiohttp.ClientResponse, data: bytes) -> Outcome:
        code = response.headers.get("x-router-error-code")
        if code is None:
            # The simulator signs its answers.
            by_engine = "x-simulator-port" in response.headers
            return Outcome.ENGINE_ERROR if by_engine else self._odd(response, data)
        error = _object(data).get("error", {})
        if set(error) != _ENVELOPE or error["code"] != code:
            return self._odd(response, data)
        if response.status == 503 and "retry-after" not in response.headers:
            return self._odd(response, data)
        self.codes[code] += 1
        return Outcome.OUR_ERROR

    def _odd(self, response: aiohttp.ClientResponse, data: bytes) -> Outcome:
        self.odd.append(f"{response.status} {dict(response.headers)} {data[-200:]!r}")
        return Outcome.ODD

    @property
    def sent(self) -> int:
        return self.outcomes.total()

    def count(self, outcome: Outcome, kind: str | None = None) -> int:
        return sum(
            number
            for (one, seen), number in self.outcomes.items()
            if seen is outcome and kind in (None, one)
        )

    @property
    def plain_error_share(self) -> float:
        """The share of requests without streaming that were not answered well."""
        plain = sum(number for (kind, _), number in self.outcomes.items() if kind == "plain")
        return 1 - self.count(Outcome.OK, "plain") / max(1, plain)


def _object(data: bytes) -> dict[str, Any]:
    try:
        read = json.loads(data)
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}
