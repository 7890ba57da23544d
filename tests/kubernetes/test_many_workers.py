"""A large part of the workers is replaced while requests are made."""

import asyncio
from pathlib import Path
from typing import Any, Final

import pytest

from extproc.simulator.http import RunningSimulator
from extproc.testing.stack import reserved_ports

from .cluster import Namespace
from .installation import Installation, installation, until_not
from .pods import end_pod, run_pod
from .traffic import Crashes, asking

_CLIENTS: Final = 16
# One in so many of the workers that are replaced crashes; the others finish their requests.
_CRASHES: Final = 4
# The page of two hundred workers costs the service some milliseconds.
_LOOK_SECONDS: Final = 0.2


class _Fleet:
    """Pods by number; all engines have the same port, and each has its own address."""

    def __init__(self, namespace: Namespace, installed: Installation, port: int) -> None:
        self._namespace = namespace
        self._installed = installed
        self._port = port
        self._engines: dict[int, RunningSimulator] = {}
        self._next = 1
        self.crashes = Crashes()

    async def run(self) -> None:
        n = self._next
        self._next += 1
        host = f"127.0.{1 + n // 250}.{1 + n % 250}"
        engine = await self._installed.start_worker(
            host=host, port=self._port, decode_milliseconds_per_token=5.0
        )
        await run_pod(self._namespace, n, ip=host, port=self._port)
        self._engines[n] = engine

    async def delete(self, n: int) -> None:
        """As a kubelet does: the pod terminates, its engine finishes, and it is gone."""
        engine = self._engines.pop(n)
        await end_pod(self._namespace, n, grace_seconds=60)
        await self._installed.is_idle(engine, _LOOK_SECONDS)
        await end_pod(self._namespace, n, grace_seconds=0)
        await engine.stop()
        self._installed.workers.remove(engine)

    async def crash(self, n: int) -> None:
        """The engine dies; its pod is removed later."""
        engine = self._engines.pop(n)
        await self.crashes.crash(engine)
        await end_pod(self._namespace, n, grace_seconds=0)
        self._installed.workers.remove(engine)

    async def replace_first(self, count: int, seconds: float) -> None:
        """Replace the oldest ones, each before the next by so much that it takes this long."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.TaskGroup() as group:
            for n in range(1, count + 1):
                await self.run()
                group.create_task(self.delete(n) if n % _CRASHES else self.crash(n))
                await asyncio.sleep(max(0.0, began + n * seconds / count - loop.time()))

    async def known(self) -> None:
        """Wait until the service uses exactly these workers."""
        expected = {engine.url for engine in self._engines.values()}

        async def differs() -> Any:
            shown = await self._installed.listed()
            ready = {url for url, one in shown.items() if one["ready"]}
            return (ready ^ expected, shown.keys() ^ expected) != (set(), set())

        await until_not(differs, _LOOK_SECONDS)


@pytest.mark.parametrize(
    ("workers", "replaced", "seconds"), [(20, 10, 6.0), pytest.param(200, 100, 60.0, id="many")]
)
async def test_half_of_the_workers_are_replaced_and_only_dead_sockets_cost_requests(
    namespace: Namespace, tmp_path: Path, workers: int, replaced: int, seconds: float
) -> None:
    settings = {"envoy": {"endpoints": "ads"}, "observability": {"log_format": "json"}}
    async with installation(namespace, tmp_path, settings) as installed:
        with reserved_ports(1) as (port,):
            fleet = _Fleet(namespace, installed, port)
            for _ in range(workers):
                await fleet.run()
            async with installed.stack:
                await fleet.known()
                async with asking(installed, _CLIENTS, 0) as answers:
                    await fleet.replace_first(replaced, seconds)
                    await fleet.known()
                assert fleet.crashes.unexplained(answers, tmp_path) == []
                assert len(answers) > _CLIENTS * seconds
                await installed.at_rest()
                assert await installed.sample("extproc_destination_missed_total") == 0
                assert await installed.sample("extproc_xds_rejections_total") == 0
                assert await installed.sample("extproc_workers_draining") == 0
                assert await installed.sample("extproc_worker_in_flight") == 0
