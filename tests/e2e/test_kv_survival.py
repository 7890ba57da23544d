"""Engines die and restart under traffic: routing becomes right again, requests are served."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from extproc.testing.stack import ManagedProcess, Stack, reserved_ports, wait_until
from tests.unit.simulator.model_folders import model_folder

PAGE = 16
TENANTS = [f"tenant {number}: " + "the same long instructions " * 30 for number in range(6)]


class Engine:
    """A simulated worker in its own process, which restarts at the same ports."""

    def __init__(self, folder: Path, model: str, ports: list[int]) -> None:
        self.port, self.events, self.replay, self.load = ports
        self.url = f"http://127.0.0.1:{self.port}"
        self._argv = [
            *(sys.executable, "-m", "extproc", "simulate", "--model", "m"),
            *("--port", str(self.port), "--kv-events-port", str(self.events)),
            *("--kv-replay-port", str(self.replay), "--kv-load-port", str(self.load)),
            *("--page-size", str(PAGE), "--tokenizer-path", model),
            *("--decode-milliseconds-per-token", "1", "--prefill-tokens-per-second", "200000"),
        ]
        self._log = folder / f"engine-{self.port}.log"
        self.process = self._new()

    def _new(self) -> ManagedProcess:
        return ManagedProcess(f"engine {self.port}", self._argv, self._log)

    async def start(self) -> None:
        self.process = self._new()
        await self.process.start()
        await self.process.wait_ready(self._is_up)

    async def kill(self) -> None:
        await self.process.stop(signal.SIGKILL)

    async def _is_up(self) -> bool:
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{self.url}/server_info") as answer,
            ):
                return answer.status == 200
        except aiohttp.ClientError:
            return False


class Rig:
    def __init__(self, stack: Stack, engines: list[Engine], http: aiohttp.ClientSession) -> None:
        self.stack, self.engines, self.http = stack, engines, http

    async def chat(
        self, text: str, engine: Engine | None = None
    ) -> tuple[int, dict[str, str], dict[str, Any]]:
        """Send a chat through Envoy, or directly to one engine."""
        body = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": text}]}
        url = engine.url if engine is not None else self.stack.url
        async with self.http.post(
            f"{url}/v1/chat/completions",
            json=body,
            headers={"x-extproc-debug": "true"},
        ) as answer:
            shown = {
                name: answer.headers.get(f"x-extproc-{name}", "")
                for name in ("worker", "reason", "overlap")
            }
            return answer.status, shown, (await answer.json()).get("usage", {})

    async def rank(self, engine: Engine) -> dict[str, Any]:
        (found,) = [one for one in await self.stack.workers() if one["url"] == engine.url]
        rank: dict[str, Any] = found["kv"]["ranks"][0]
        return rank

    async def is_right(self) -> bool:
        """True if every overlap that the service reports equals the engine's reused tokens."""
        for tenant in TENANTS:
            status, shown, usage = await self.chat(tenant + "question")
            if status != 200 or shown["worker"] == "unknown":
                return False
            claimed = int(shown["overlap"].partition("/")[0])
            if claimed > usage["prompt_tokens_details"]["cached_tokens"]:
                return False
        ranks = [await self.rank(engine) for engine in self.engines]
        return all(rank["trusted"] for rank in ranks)


@asynccontextmanager
async def rig(folder: Path, engines: int = 2) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as exits:
        model = folder / "model"
        model.mkdir()
        path = model_folder(model)
        fleet = [
            Engine(folder, path, exits.enter_context(reserved_ports(4))) for _ in range(engines)
        ]
        for engine in fleet:
            exits.push_async_callback(engine.kill)
            await engine.start()
        settings = {
            "models": [
                {
                    "id": "m",
                    "policy": "min_ttft",
                    "tokenizer_path": path,
                    "circuit_breaker": {"cool_down_secs": 0.2},
                }
            ],
            "observability": {"debug_headers": True},
        }
        stack = await exits.enter_async_context(
            Stack(folder, [engine.url for engine in fleet], settings)
        )
        http = await exits.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30))
        )
        started = Rig(stack, fleet, http)
        await wait_until(started.is_right, "all ranks are followed")
        yield started


async def test_an_engine_killed_under_traffic_comes_back_with_an_empty_cache(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path) as running:
        statuses: list[int] = []
        stop = asyncio.Event()

        async def traffic() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                status, _, _ = await running.chat(TENANTS[number % len(TENANTS)] + str(number))
                statuses.append(status)

        clients = [asyncio.create_task(traffic()) for _ in range(4)]
        victim = running.engines[0]
        for _ in range(2):
            await running.chat(TENANTS[0], victim)

            async def is_holder() -> bool:
                return int((await running.rank(victim))["pages"]) > 0

            await wait_until(is_holder, "the victim holds something")
            await victim.kill()

            async def is_marked() -> bool:
                return not (await running.rank(victim))["trusted"]

            await wait_until(is_marked, "the dead rank is marked")
            await victim.start()
            await wait_until(running.is_right, "overlaps are true again")
        stop.set()
        await asyncio.gather(*clients)
        assert len(statuses) > 50
        # Refused connections went to the other engine; requests that broke midway did not.
        assert statuses.count(200) > 0.9 * len(statuses)
        assert set(statuses) <= {200, 503}
        metrics = await running.stack.metrics()
        assert metrics["extproc_kv_restarts_total"] >= 2
        await running.stack.idle()


async def test_a_dead_engine_gets_no_requests(tmp_path: Path) -> None:
    async with rig(tmp_path) as running:
        for tenant in TENANTS:
            await running.chat(tenant)
        await running.engines[0].kill()

        async def goes_to_the_other() -> bool:
            answers = [await running.chat(tenant) for tenant in TENANTS]
            return all(
                status == 200 and shown["worker"] == running.engines[1].url
                for status, shown, _ in answers
            )

        await wait_until(goes_to_the_other, "the other engine serves all")
        assert not (await running.rank(running.engines[0]))["trusted"]
        samples = await running.stack.metrics()
        assert samples["extproc_kv_ranks_untrusted"] == 1
