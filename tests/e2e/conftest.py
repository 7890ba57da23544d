"""Starts an installation for end-to-end tests: real Envoy, real service, workers over TCP.

The workers run in the test's own event loop, so that a test can stop one like a dying host.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import pytest

from extproc.simulator.http import RunningSimulator, start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import Stack, reserved_ports

__all__ = ["Fleet", "Launch", "Running"]


class Fleet:
    """The workers of one test."""

    def __init__(self, workers: list[RunningSimulator]) -> None:
        self.workers = workers

    async def stats(self) -> list[dict[str, Any]]:
        async with aiohttp.ClientSession() as session:
            found = []
            for worker in self.workers:
                async with session.get(f"{worker.url}/simulator/stats") as answer:
                    found.append(await answer.json())
            return found

    async def requests(self) -> list[dict[str, Any]]:
        """The requests of all workers, oldest first within a worker."""
        return [request for stats in await self.stats() for request in stats["requests"]]


class Running:
    """A stack, its workers and a client session."""

    def __init__(self, stack: Stack, fleet: Fleet, http: aiohttp.ClientSession) -> None:
        self.stack = stack
        self.fleet = fleet
        self.http = http

    @property
    def url(self) -> str:
        return self.stack.url

    def chat(
        self,
        model: str = "m",
        *,
        tokens: int = 5,
        stream: bool = False,
        fault: str = "",
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> Any:
        """POST a chat request; an async context manager like aiohttp's."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": tokens,
            "stream": stream,
            **fields,
        }
        sent = dict(headers or {})
        if fault:
            sent["x-simulator-fault"] = fault
        return self.http.post(f"{self.url}/v1/chat/completions", json=body, headers=sent)

    async def error(self, response: aiohttp.ClientResponse) -> tuple[int, str]:
        """Status and code of an answer in our envelope, checked."""
        body = (await response.json())["error"]
        assert set(body) == {"type", "code", "message", "request_id"}, body
        assert response.headers["x-router-error-code"] == body["code"]
        assert response.headers["content-type"] == "application/json"
        assert ("retry-after" in response.headers) == (response.status == 503)
        assert body["request_id"] == response.headers["x-request-id"]
        return response.status, body["code"]

    async def sample(self, name: str) -> float:
        """The sum of all samples whose name begins with this."""
        metrics = await self.stack.metrics()
        return sum(value for key, value in metrics.items() if key.startswith(name))


# Settings of the service besides models and workers; some depend on the workers' ports.
Settings = dict[str, Any] | Callable[[list[RunningSimulator]], dict[str, Any]] | None


class Launch(Protocol):
    def __call__(
        self,
        workers: int = 2,
        *,
        models: tuple[str, ...] = ("m",),
        worker: dict[str, Any] | None = None,
        settings: Settings = None,
        edit_bootstrap: Callable[[dict[str, Any]], None] | None = None,
        urls: Callable[[list[str]], list[str]] | None = None,
    ) -> Awaitable[Running]: ...


@pytest.fixture
async def launch(tmp_path: Path) -> AsyncIterator[Launch]:
    """Start a stack with this number of workers per model; stop everything at the end."""
    async with AsyncExitStack() as exits:

        async def run(
            workers: int = 2,
            *,
            models: tuple[str, ...] = ("m",),
            worker: dict[str, Any] | None = None,
            settings: Settings = None,
            edit_bootstrap: Callable[[dict[str, Any]], None] | None = None,
            urls: Callable[[list[str]], list[str]] | None = None,
        ) -> Running:
            fast = {"decode_milliseconds_per_token": 2.0} | (worker or {})
            fleet = Fleet([])
            for model in models:
                for _ in range(workers):
                    # A worker that a test stops must not be replaced by one of another test.
                    (port,) = exits.enter_context(reserved_ports(1))
                    simulator = await start(SimulatorSettings(model=model, port=port, **fast))
                    exits.push_async_callback(simulator.stop)
                    fleet.workers.append(simulator)
            found = [one.url for one in fleet.workers]
            more = settings(fleet.workers) if callable(settings) else settings
            stack = Stack(
                tmp_path,
                urls(found) if urls else found,
                {"models": [{"id": model} for model in models], **(more or {})},
                edit_bootstrap=edit_bootstrap,
            )
            await exits.enter_async_context(stack)
            http = await exits.enter_async_context(
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=0),
                    timeout=aiohttp.ClientTimeout(total=60),
                )
            )
            return Running(stack, fleet, http)

        yield run
