"""The whole service and the real Envoy with workers that a real API server names.

The workers are simulators on loopback addresses, which an API server accepts for pods.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from extproc.simulator.http import RunningSimulator, start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import Stack, reserved_ports

from .cluster import Namespace
from .pods import end_pod, run_pod

_BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


class _Installation:
    def __init__(self, stack: Stack, http: aiohttp.ClientSession, exits: AsyncExitStack) -> None:
        self.stack = stack
        self.http = http
        self._exits = exits

    async def start_worker(self) -> RunningSimulator:
        (port,) = self._exits.enter_context(reserved_ports(1))
        settings = SimulatorSettings(model="m", port=port, decode_milliseconds_per_token=10.0)
        worker = await start(settings)
        self._exits.push_async_callback(worker.stop)
        return worker

    def chat(self, tokens: int, *, stream: bool = False) -> Any:
        body = _BODY | {"max_tokens": tokens, "stream": stream}
        return self.http.post(f"{self.stack.url}/v1/chat/completions", json=body)

    async def workers(self) -> dict[str, dict[str, Any]]:
        """What `/workers` shows, by URL."""
        async with self.http.get(f"{self.stack.admin_url}/workers") as answer:
            return {one["url"]: one for one in (await answer.json())["workers"]}

    async def shows(self, **expected: Any) -> None:
        """Wait until exactly the workers of these ports have these states."""
        end = asyncio.get_running_loop().time() + 60
        while True:
            found = {
                url.rpartition(":")[2]: "draining" if one["draining"] else one["ready"]
                for url, one in (await self.workers()).items()
            }
            if found == expected:
                return
            assert asyncio.get_running_loop().time() < end, f"{found} is {expected}"
            await asyncio.sleep(0.02)

    async def served_by(self, worker: RunningSimulator) -> int:
        async with self.http.get(f"{worker.url}/simulator/stats") as answer:
            return len((await answer.json())["requests"])


@pytest.fixture
async def installed(namespace: Namespace, tmp_path: Path) -> AsyncIterator[_Installation]:
    """A stack that follows the pods of the namespace; it is started by the test."""
    async with AsyncExitStack() as exits:
        http = await exits.enter_async_context(aiohttp.ClientSession())
        settings: dict[str, Any] = {
            "models": [{"id": "m"}],
            "envoy": {"endpoints_file": str(tmp_path / "endpoints.json")},
        }
        stack = Stack(tmp_path, [], settings)
        section = {
            "namespace": namespace.name,
            "kubeconfig": namespace.kubeconfig,
            "label_selector": "app=sglang",
            "port_name": "http",
        }
        stack.config["discovery"] = {"backend": "k8s_pods", "k8s_pods": section}
        yield _Installation(stack, http, exits)


def port_of(worker: RunningSimulator) -> str:
    return worker.url.rpartition(":")[2]


async def test_a_pod_that_is_deleted_finishes_its_streams_and_gets_no_others(
    namespace: Namespace, installed: _Installation
) -> None:
    leaving, staying = [await installed.start_worker() for _ in range(2)]
    for n, worker in enumerate((leaving, staying), 1):
        await run_pod(namespace, n, ip="127.0.0.1", port=int(port_of(worker)))
    async with installed.stack:
        await installed.shows(**{port_of(leaving): True, port_of(staying): True})
        # Round robin: one of the two streams is on the worker that leaves.
        async with (
            installed.chat(200, stream=True) as one,
            installed.chat(200, stream=True) as other,
        ):
            assert one.status == other.status == 200
            assert await installed.served_by(leaving) == 1
            await end_pod(namespace, 1, grace_seconds=60)
            await installed.shows(**{port_of(leaving): "draining", port_of(staying): True})
            for _ in range(10):
                async with installed.chat(1) as answer:
                    assert answer.status == 200
            assert await installed.served_by(leaving) == 1
            bodies = [await one.text(), await other.text()]
        assert [body.rstrip().endswith("data: [DONE]") for body in bodies] == [True, True]
        await end_pod(namespace, 1, grace_seconds=0)
        await installed.shows(**{port_of(staying): True})


async def test_workers_are_replaced_one_by_one_without_a_failed_request(
    namespace: Namespace, installed: _Installation
) -> None:
    first = [await installed.start_worker() for _ in range(3)]
    for n, worker in enumerate(first, 1):
        await run_pod(namespace, n, ip="127.0.0.1", port=int(port_of(worker)))
    statuses: list[int] = []
    async with installed.stack:
        stop = asyncio.Event()

        async def ask() -> None:
            while not stop.is_set():
                async with installed.chat(5) as answer:
                    await answer.read()
                    statuses.append(answer.status)

        asking = [asyncio.create_task(ask()) for _ in range(4)]
        there = {port_of(worker): True for worker in first}
        await installed.shows(**there)
        for n, old in enumerate(first, 1):
            new = await installed.start_worker()
            await run_pod(namespace, 10 + n, ip="127.0.0.1", port=int(port_of(new)))
            there[port_of(new)] = True
            await installed.shows(**there)
            await end_pod(namespace, n, grace_seconds=60)
            await installed.shows(**(there | {port_of(old): "draining"}))
            await end_pod(namespace, n, grace_seconds=0)
            del there[port_of(old)]
            await installed.shows(**there)
        stop.set()
        await asyncio.gather(*asking)
    assert set(statuses) == {200}
    assert len(statuses) > 20
