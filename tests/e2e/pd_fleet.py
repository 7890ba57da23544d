"""Starts prefill and decode workers behind the real Envoy and the real service."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from extproc.simulator.http import RunningSimulator, start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import Stack, reserved_ports, wait_until
from tests.e2e.conftest import Fleet, Running

__all__ = ["PdRunning", "pd_stack"]

_DECODE_MILLISECONDS = 2.0


class PdRunning(Running):
    """As Running, with the workers by role."""

    def __init__(
        self,
        stack: Stack,
        http: aiohttp.ClientSession,
        prefills: list[RunningSimulator],
        decodes: list[RunningSimulator],
        plains: list[RunningSimulator],
    ) -> None:
        super().__init__(stack, Fleet([*prefills, *decodes, *plains]), http)
        self.prefills = prefills
        self.decodes = decodes
        self.plains = plains

    async def stats_of(self, worker: RunningSimulator) -> dict[str, Any]:
        async with self.http.get(f"{worker.url}/simulator/stats") as answer:
            found: dict[str, Any] = await answer.json()
            return found

    async def fault(self, worker: RunningSimulator, **faults: Any) -> None:
        async with self.http.post(f"{worker.url}/simulator/faults", json=faults) as answer:
            assert answer.status == 200, await answer.text()

    async def legs(self, workers: list[RunningSimulator]) -> list[dict[str, Any]]:
        """The requests that arrived at these workers, oldest first within a worker."""
        return [one for worker in workers for one in (await self.stats_of(worker))["requests"]]

    async def at_rest(self, seconds: float = 60.0) -> None:
        """Wait until no ticket, leg or room is left; fails after this many seconds."""
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            async with self.http.get(f"{self.stack.admin_url}/workers") as answer:
                workers = (await answer.json())["workers"]
            stats = [await self.stats_of(worker) for worker in self.fleet.workers]
            left = [one["in_flight"] for one in workers] + [
                one["running"] + one["waiting"] + one["rooms"] for one in stats
            ]
            if not any(left):
                return
            assert asyncio.get_running_loop().time() < deadline, (left, workers, stats)
            await asyncio.sleep(0.05)

    async def arrived(self, worker: RunningSimulator) -> None:
        """Waits until a leg is with this worker."""

        async def check() -> bool:
            return bool(await self.legs([worker]))

        await wait_until(check, "a leg arrives")

    async def kv_settled(self, page: int) -> None:
        """Waits until the service knows all pages, of so many tokens each, that workers hold."""

        async def check() -> bool:
            held = {
                worker.url: [cache["gpu_tokens"] // page for cache in stats["caches"]]
                for worker in self.fleet.workers
                for stats in [await self.stats_of(worker)]
            }
            return held == {
                worker["url"]: [rank["pages"] for rank in worker["kv"]["ranks"] if rank["trusted"]]
                for worker in await self.stack.workers()
            }

        await wait_until(check, "the service knows what the workers hold")

    async def roles(self) -> dict[str, str]:
        async with self.http.get(f"{self.stack.admin_url}/workers") as answer:
            return {one["url"]: one["mode"] for one in (await answer.json())["workers"]}


@asynccontextmanager
async def pd_stack(
    folder: Path,
    *,
    prefills: int = 1,
    decodes: int = 1,
    plains: int = 0,
    worker: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    edit_bootstrap: Callable[[dict[str, Any]], None] | None = None,
    urls: Callable[[list[str]], list[str]] | None = None,
) -> AsyncIterator[PdRunning]:
    """Workers of the model "m", and plain ones of the model "other"."""
    async with AsyncExitStack() as exits:

        async def simulator(**more: Any) -> RunningSimulator:
            # A worker that a test stops must not be replaced by one of another test.
            port, bootstrap_port = exits.enter_context(reserved_ports(2))
            given = {
                "port": port,
                "decode_milliseconds_per_token": _DECODE_MILLISECONDS,
            } | (worker or {})
            if more.get("disaggregation_mode") == "prefill":
                more["disaggregation_bootstrap_port"] = bootstrap_port
            one = await start(SimulatorSettings(**(given | more)))
            exits.push_async_callback(one.stop)
            return one

        prefilling = [
            await simulator(model="m", disaggregation_mode="prefill") for _ in range(prefills)
        ]
        decoding = [
            await simulator(model="m", disaggregation_mode="decode") for _ in range(decodes)
        ]
        plain = [await simulator(model="other") for _ in range(plains)]
        models = [{"id": "m"} | (model or {})] + ([{"id": "other"}] if plains else [])
        found = [one.url for one in (*prefilling, *decoding, *plain)]
        stack = Stack(
            folder,
            urls(found) if urls else found,
            {"models": models, **(settings or {})},
            edit_bootstrap=edit_bootstrap,
        )
        await exits.enter_async_context(stack)
        http = await exits.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60)
            )
        )
        yield PdRunning(stack, http, prefilling, decoding, plain)
