"""Fakes for time, engines, names and discovery."""

import asyncio
import heapq
import itertools
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from extproc.routing.rank import Rank
from extproc.worker_url import WorkerUrl, format_endpoint
from extproc.workers.engine_calls import EngineAnswer, EngineUnreachableError, PrefillCall
from extproc.workers.source import WorkerEvent
from extproc.workers.worker import Worker

__all__ = [
    "FakeClock",
    "FakeEngineClient",
    "FakeResolver",
    "FakeWorkerSource",
    "NoPrefillClient",
    "NoRanks",
    "settle",
]

# More turns than any chain of tasks in the package needs.
_SETTLE_TURNS: Final = 50
# Sums of floats must not leave a sleeper a rounding error short of its time.
_ROUNDING_SECONDS: Final = 1e-9


async def settle() -> None:
    """Let every task run until it waits for something the test controls."""
    for _ in range(_SETTLE_TURNS):
        await asyncio.sleep(0)


class FakeClock:
    """Time stands still until the test advances it.

    `slept` are the durations asked for, in order; `sleeping` is how many sleep now.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._sequence = itertools.count()
        self.slept: list[float] = []

    @property
    def sleeping(self) -> int:
        return len(self._sleepers)

    def monotonic(self) -> float:
        return self._now

    def tick(self, seconds: float) -> None:
        """Move time without waking sleepers, for tests that have no tasks."""
        self._now += seconds

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (self._now + seconds, next(self._sequence), woken)
        heapq.heappush(self._sleepers, entry)
        try:
            await woken
        finally:
            if entry in self._sleepers:  # cancelled
                self._sleepers.remove(entry)
                heapq.heapify(self._sleepers)

    async def advance(self, seconds: float) -> None:
        """Move time on, waking sleepers one by one at their own time."""
        target = self._now + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= target + _ROUNDING_SECONDS:
            due, _, woken = heapq.heappop(self._sleepers)
            self._now = max(self._now, due)
            if not woken.done():
                woken.set_result(None)
            await settle()
        self._now = max(self._now, target)
        await settle()


_Scripted = EngineAnswer | Exception | Callable[[], Awaitable[EngineAnswer]]


class FakeEngineClient:
    """Answers as scripted per URL and path; the last answer of a script repeats.

    A URL without a script refuses the connection. `calls` are (url, path, timeout in seconds), and
    `posted` those with a body: (url, path, body).
    """

    def __init__(self) -> None:
        self._scripts: dict[tuple[str, str], deque[_Scripted]] = {}
        self.calls: list[tuple[str, str, float]] = []
        self.posted: list[tuple[str, str, Any]] = []

    def script(self, url: str, path: str, *answers: _Scripted) -> None:
        self._scripts[url, path] = deque(answers)

    def tell(self, url: str, name: str | None, **fields: Any) -> None:
        """Script a `/server_info` with that served model name."""
        self.script(url, "/server_info", self.info(name, **fields))

    @staticmethod
    def info(name: str | None, **fields: Any) -> EngineAnswer:
        body = {} if name is None else {"served_model_name": name}
        return EngineAnswer(200, json.dumps(body | fields).encode())

    def asked(self, url: str) -> list[str]:
        """The paths asked of one worker, in order."""
        return [path for called, path, _ in self.calls if called == url]

    async def post(
        self, url: WorkerUrl, path: str, body: bytes, timeout_seconds: float, max_bytes: int
    ) -> EngineAnswer:
        self.posted.append((str(url), path, json.loads(body)))
        return await self.get(url, path, timeout_seconds)

    async def get(self, url: WorkerUrl, path: str, timeout_seconds: float) -> EngineAnswer:
        self.calls.append((str(url), path, timeout_seconds))
        script = self._scripts.get((str(url), path))
        if not script:
            raise EngineUnreachableError("connection refused")
        answer = script.popleft() if len(script) > 1 else script[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, EngineAnswer):
            return answer
        return await answer()


class FakeResolver:
    """IP literals are themselves; names answer as the test has set, else with nothing."""

    def __init__(self, names: Mapping[str, Sequence[str] | Exception] | None = None) -> None:
        self.names = dict(names or {})
        self.calls: list[str] = []

    async def resolve(self, url: WorkerUrl) -> tuple[str, ...]:
        self.calls.append(url.host)
        if url.is_ip:
            return (format_endpoint(url.host, url.port),)
        answer = self.names.get(url.host, ())
        if isinstance(answer, Exception):
            raise answer
        return tuple(answer)


class FakeWorkerSource:
    """A source whose events the test pushes."""

    def __init__(self, *events: WorkerEvent) -> None:
        self._queue: asyncio.Queue[WorkerEvent] = asyncio.Queue()
        self.push(*events)

    def push(self, *events: WorkerEvent) -> None:
        for event in events:
            self._queue.put_nowait(event)

    async def events(self) -> AsyncIterator[WorkerEvent]:
        while True:
            yield await self._queue.get()


class NoRanks:
    """For models without a KV-aware policy."""

    def of(self, worker: Worker) -> Sequence[Rank]:
        return ()


class NoPrefillClient:
    """For models without prefill workers."""

    async def post(self, url: WorkerUrl, path: str, *_: Any, **__: Any) -> PrefillCall:
        raise AssertionError(f"a prefill was sent to {url}{path}")
