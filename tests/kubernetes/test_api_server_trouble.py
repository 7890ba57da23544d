"""The API server is away, is killed, or has forgotten a version, while requests are made."""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any, Final

from extproc.testing.stack import ManagedProcess

from . import hurried_service
from .api_proxy import api_proxy
from .cluster import Namespace, eventually
from .installation import Installation, installation, port_of, until_not
from .pods import end_pod, run_pod
from .traffic import Answer, asking

_CLIENTS: Final = 8
_AWAY_SECONDS: Final = 600.0
_UP: Final = "extproc_discovery_up"
_EXPIRED: Final = 'extproc_discovery_errors_total{objects="pods",reason="expired"}'


async def _run(namespace: Namespace, installed: Installation, n: int) -> str:
    """A pod with a worker of its own; returns the worker's port."""
    worker = await installed.start_worker(decode_milliseconds_per_token=2.0)
    await run_pod(namespace, n, ip="127.0.0.1", port=worker.port)
    return port_of(worker)


async def _reaches(installed: Installation, name: str, value: float) -> None:
    async def differs() -> Any:
        return await installed.sample(name) < value and name

    await until_not(differs)


def _removed(folder: Path) -> int:
    return (folder / "service.log").read_text().count("worker_removed")


def _failed(answers: list[Answer]) -> list[Answer]:
    return [one for one in answers if not one.ok]


async def test_ten_minutes_without_the_api_server_cost_no_request_and_no_worker(
    namespace: Namespace, tmp_path: Path
) -> None:
    async with installation(namespace, tmp_path, {"envoy": {"endpoints": "ads"}}) as installed:
        command = [sys.executable, hurried_service.__file__, "serve", "--config"]
        installed.stack.service = ManagedProcess(
            "service", [*command, str(installed.stack.config_file)], tmp_path / "service.log"
        )
        ports = [await _run(namespace, installed, n) for n in range(1, 6)]
        async with installed.stack:
            await installed.shows(**dict.fromkeys(ports, True))
            async with asking(installed, _CLIENTS, 0) as answers:
                namespace.cluster.kill()
                until = time.monotonic() + _AWAY_SECONDS / hurried_service.HURRY
                await installed.is_stale(*[True] * 5)
                await eventually(lambda: time.monotonic() >= until, "ten minutes are over")
                await installed.shows(**dict.fromkeys(ports, True))
                await installed.is_stale(*[True] * 5)
                assert await installed.sample(_UP) == 0
                await asyncio.to_thread(namespace.cluster.start)
                await end_pod(namespace, 1, grace_seconds=60)
                await installed.is_idle(installed.workers[0])
                await end_pod(namespace, 1, grace_seconds=0)
                await installed.shows(**dict.fromkeys(ports[1:], True))
                await installed.is_stale(*[False] * 4)
            assert _failed(answers) == []
            assert len(answers) > 100
            assert _removed(tmp_path) == 1


async def test_a_killed_server_and_expired_watches_lose_nothing_and_keep_nothing_stale(
    namespace: Namespace, tmp_path: Path
) -> None:
    async with api_proxy(namespace.cluster) as proxy:
        proxied = {"kubeconfig": namespace.kubeconfig_for(proxy.url)}
        settings = {"envoy": {"endpoints": "ads"}}
        async with installation(namespace, tmp_path, settings, **proxied) as installed:
            ports = [await _run(namespace, installed, n) for n in range(1, 4)]
            async with installed.stack, asking(installed, _CLIENTS, 0) as answers:
                await installed.shows(**dict.fromkeys(ports, True))
                namespace.cluster.kill()
                await installed.is_stale(*[True] * 3)
                proxy.forgets = True
                await asyncio.to_thread(namespace.cluster.start)
                # Each watch ends at once, so only lists tell what has changed.
                await _reaches(installed, _EXPIRED, 2)
                ports.append(await _run(namespace, installed, 4))
                await installed.shows(**dict.fromkeys(ports, True))
                await end_pod(namespace, 1, grace_seconds=60)
                await installed.shows(**{ports[0]: "draining"}, **dict.fromkeys(ports[1:], True))
                await installed.is_idle(installed.workers[0])
                await end_pod(namespace, 1, grace_seconds=0)
                await installed.shows(**dict.fromkeys(ports[1:], True))
                await _reaches(installed, _EXPIRED, 4)
                proxy.forgets = False
                ports.append(await _run(namespace, installed, 5))
                await installed.shows(**dict.fromkeys(ports[1:], True))
                assert await installed.sample(_UP) == 1
            assert _failed(answers) == []
            assert _removed(tmp_path) == 1
