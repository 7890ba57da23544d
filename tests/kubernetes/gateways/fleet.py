"""Simulated workers as pods behind Envoy Gateway, and requests to them."""

import asyncio
import io
import itertools
import json
from collections import defaultdict
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Final, Self

import aiohttp

from extproc.simulator.http import RunningSimulator, start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import wait_until

from ..cluster import Objects
from ..pods import end_pod, run_pod
from .installation import ADMIN_TOKEN, URL, Installation
from .kubelet import RunningPod

__all__ = ["PAGE", "Fleet", "chat_of"]

PAGE: Final = 16
_HOST: Final = "llm.example.com"
_PORT: Final = 8000
_FOLLOWED_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.05
# Each pod has a number and an address of its own.
_numbers = itertools.count(1)


class Fleet:
    """The workers of one test, by the numbers of their pods."""

    def __init__(self, installed: Installation, objects: Objects, tokenizer: str) -> None:
        self.installed = installed
        self.objects = objects
        self.workers: dict[int, RunningSimulator] = {}
        self._tokenizer = tokenizer
        self._exits = AsyncExitStack()
        self.http: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self.http = await self._exits.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for n in list(self.workers):
            await self.leave(n)
        async with self._exits:
            if error is None:
                await self.is_followed()

    async def run(self, count: int) -> list[int]:
        """Start workers with their pods, and wait until they are known everywhere."""
        numbers = [next(_numbers) for _ in range(count)]
        for n in numbers:
            settings = SimulatorSettings(
                host=self.ip(n),
                port=_PORT,
                model="m",
                page_size=PAGE,
                kv_events_port=0,
                tokenizer_path=self._tokenizer,
                decode_milliseconds_per_token=5.0,
            )
            self.workers[n] = await start(settings)
            await run_pod(self.objects, n, ip=self.ip(n), port=_PORT)
        await self.is_followed()
        return numbers

    async def leave(self, n: int) -> None:
        """End a worker, and its pod at once."""
        worker = self.workers.pop(n)
        await worker.stop()
        await end_pod(self.objects, n, grace_seconds=0)

    @staticmethod
    def ip(n: int) -> str:
        return f"10.244.1.{n}"

    def address(self, n: int) -> str:
        """What the service names as the destination."""
        return f"{self.ip(n)}:{_PORT}"

    async def is_followed(self) -> None:
        """Wait until Envoy and all replicas of the service know exactly these workers."""
        workers = {self.address(n) for n in self.workers}
        services = {f"{service.ip}:9002" for service in self.installed.services}
        # Without a usable worker no replica is ready.
        wanted = {"envoy": workers | services if workers else set()}
        wanted |= {service.name: workers for service in self.installed.services}
        end = asyncio.get_running_loop().time() + _FOLLOWED_SECONDS
        while (found := await self._known()) != wanted:
            if asyncio.get_running_loop().time() > end:
                raise AssertionError(f"{found} is {wanted}\n{self.installed.state()}")
            await asyncio.sleep(_POLL_SECONDS)

    async def _known(self) -> dict[str, set[str]]:
        """The addresses that Envoy knows, and the workers that each replica may choose."""
        found = {"envoy": self.installed.endpoints()}
        for service in self.installed.services:
            found[service.name] = {
                one["url"].removeprefix("http://")
                for one in await self.listed(service)
                if one["ready"] and not one["draining"]
            }
        return found

    async def service_is_known(self, service: RunningPod, known: bool) -> None:
        """Wait until Envoy asks this replica, or does not ask it any more."""

        async def equal() -> bool:
            return (f"{service.ip}:9002" in self.installed.endpoints()) is known

        await wait_until(equal, f"Envoy knows {service.name}: {known}")

    async def listed(self, service: RunningPod) -> list[dict[str, Any]]:
        """What `/workers` of a replica shows."""
        headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
        async with self.http.get(f"http://{service.ip}:9090/workers", headers=headers) as answer:
            workers: list[dict[str, Any]] = (await answer.json())["workers"]
            return workers

    async def metrics(self) -> dict[str, float]:
        """The samples of all replicas, added up."""
        found: dict[str, float] = defaultdict(float)
        headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
        for service in self.installed.services:
            url = f"http://{service.ip}:9090/metrics"
            async with self.http.get(url, headers=headers) as answer:
                for line in (await answer.text()).splitlines():
                    if line and not line.startswith("#"):
                        name, _, value = line.rpartition(" ")
                        found[name] += float(value)
        return found

    def post(self, body: dict[str, Any], n: int | None = None, **more: Any) -> Any:
        """POST a chat to Envoy, or directly to a worker; as aiohttp's `post`."""
        url = URL if n is None else self.workers[n].url
        headers = {"host": _HOST, "content-type": "application/json"} | more.pop("headers", {})
        data = io.BytesIO(json.dumps(body).encode())
        return self.http.post(f"{url}/v1/chat/completions", data=data, headers=headers, **more)

    async def chat(self, text: str, n: int | None = None, **more: Any) -> dict[str, Any]:
        """The answer to a short chat; it must succeed."""
        async with self.post(chat_of(text), n, **more) as answer:
            assert answer.status == 200, await answer.text()
            found: dict[str, Any] = await answer.json()
            return found

    async def served(self) -> dict[int, int]:
        """How many requests each worker has got."""
        return {n: (await self._stats(n))["received"] for n in self.workers}

    async def requests(self, n: int) -> list[dict[str, Any]]:
        """What a worker says about its last requests."""
        found: list[dict[str, Any]] = (await self._stats(n))["requests"]
        return found

    async def _stats(self, n: int) -> dict[str, Any]:
        async with self.http.get(f"{self.workers[n].url}/simulator/stats") as answer:
            found: dict[str, Any] = await answer.json()
            return found


def chat_of(text: str, **fields: Any) -> dict[str, Any]:
    """A chat with a short answer."""
    return {
        "model": "m",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 2,
    } | fields
