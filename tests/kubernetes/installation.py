"""The real Envoy and the whole service, with simulated workers that the pods of a namespace name.

The workers listen on loopback addresses, which an API server accepts for pods.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from extproc.simulator.http import RunningSimulator, start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import Stack, reserved_ports

from .cluster import Namespace

__all__ = ["Installation", "installation", "own_address", "port_of", "until_not"]

_BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
_WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.02


class Installation:
    """A service that follows the pods labelled app=sglang, and the workers that a test starts.

    The test starts the stack.
    """

    def __init__(self, stack: Stack, http: aiohttp.ClientSession, exits: AsyncExitStack) -> None:
        self.stack = stack
        self.http = http
        self._exits = exits
        self.workers: list[RunningSimulator] = []

    async def start_worker(self, **settings: Any) -> RunningSimulator:
        """A worker of the model "m", at ports of its own unless the settings give one."""
        given: dict[str, Any] = {"model": "m", "decode_milliseconds_per_token": 10.0} | settings
        if "port" not in given:
            given["port"], bootstrap_port = self._exits.enter_context(reserved_ports(2))
            given.setdefault("disaggregation_bootstrap_port", bootstrap_port)
        worker = await start(SimulatorSettings(**given))
        self._exits.push_async_callback(worker.stop)
        self.workers.append(worker)
        return worker

    def chat(self, tokens: int, *, stream: bool = False, **headers: str) -> Any:
        """POST a chat; names of headers have underscores."""
        body = _BODY | {"max_tokens": tokens, "stream": stream}
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post(f"{self.stack.url}/v1/chat/completions", json=body, headers=sent)

    async def listed(self) -> dict[str, dict[str, Any]]:
        """What `/workers` shows, by URL."""
        async with self.http.get(f"{self.stack.admin_url}/workers") as answer:
            return {one["url"]: one for one in (await answer.json())["workers"]}

    async def shows(self, **expected: Any) -> None:
        """Wait until exactly the workers of these ports are ready, True or False, or "draining"."""

        async def differs() -> Any:
            found = {
                url.rpartition(":")[2]: "draining" if one["draining"] else one["ready"]
                for url, one in (await self.listed()).items()
            }
            return found != expected and f"{found} is {expected}"

        await until_not(differs)

    async def has_roles(self, expected: dict[str, str]) -> None:
        """Wait until exactly the workers of these URLs have these roles."""

        async def differs() -> Any:
            found = {url: one["mode"] for url, one in (await self.listed()).items()}
            return found != expected and f"{found} is {expected}"

        await until_not(differs)

    async def is_idle(self, worker: RunningSimulator, poll_seconds: float = _POLL_SECONDS) -> None:
        """Wait until this worker drains or has left, and its last request has ended."""

        async def busy() -> Any:
            shown = (await self.listed()).get(worker.url)
            if shown is not None and (not shown["draining"] or shown["in_flight"]):
                return shown
            async with self.http.get(f"{worker.url}/simulator/stats") as answer:
                stats = await answer.json()
            return stats["running"] + stats["waiting"] + stats["rooms"]

        await until_not(busy, poll_seconds)

    async def is_gone(self, worker: RunningSimulator) -> None:
        """Wait until the service does not know this worker any more."""

        async def known() -> Any:
            return (await self.listed()).get(worker.url)

        await until_not(known)

    async def is_stale(self, *expected: bool) -> None:
        """Wait until the workers, in the order of registration, are shown like this."""

        async def differs() -> Any:
            found = [one["stale"] for one in (await self.listed()).values()]
            return found != [*expected] and f"{found} is {expected}"

        await until_not(differs)

    async def served_by(self, worker: RunningSimulator) -> int:
        """How many requests this worker has had."""
        async with self.http.get(f"{worker.url}/simulator/stats") as answer:
            count: int = (await answer.json())["received"]
            return count

    async def sample(self, name: str) -> float:
        """The sum of all samples whose name and labels begin like this."""
        samples = await self.stack.metrics()
        return sum(value for key, value in samples.items() if key.startswith(name))

    async def at_rest(self) -> None:
        """Wait until neither the service nor a worker has anything left of a request."""
        names = ("requests_open", "tickets_open", "streams_open", "buffered_bytes")

        async def left() -> Any:
            found = {name: await self.sample(f"extproc_{name}") for name in names}
            found |= {url: one["in_flight"] for url, one in (await self.listed()).items()}
            for worker in self.workers:
                async with self.http.get(f"{worker.url}/simulator/stats") as answer:
                    stats = await answer.json()
                at = f"at {worker.url}"
                found[at] = stats["running"] + stats["waiting"] + stats["rooms"]
            return {key: value for key, value in found.items() if value}

        await until_not(left)


async def until_not(
    look: Callable[[], Awaitable[Any]], poll_seconds: float = _POLL_SECONDS
) -> None:
    """Wait until it finds nothing; fails with what it has found last."""
    end = asyncio.get_running_loop().time() + _WAIT_SECONDS
    while found := await look():
        assert asyncio.get_running_loop().time() < end, found
        await asyncio.sleep(poll_seconds)


def own_address() -> str:
    """An address of this machine that EndpointSlices accept: they refuse those of loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        # No packet is sent.
        one.connect(("192.0.2.1", 9))
        return str(one.getsockname()[0])


def port_of(worker: RunningSimulator) -> str:
    return worker.url.rpartition(":")[2]


@asynccontextmanager
async def installation(
    namespace: Namespace,
    folder: Path,
    settings: dict[str, Any],
    *,
    backend: str = "k8s_pods",
    **section: Any,
) -> AsyncIterator[Installation]:
    """With these settings of the service and of its backend; an InferencePool's name is `pool`."""
    stack = Stack(folder, [], {"models": [{"id": "m"}], **settings})
    section = {"namespace": namespace.name, "kubeconfig": namespace.kubeconfig} | section
    if backend == "inference_pool":
        section["name"] = "pool"
    else:
        section = {"label_selector": "app=sglang", "port_name": "http"} | section
    chosen = {"backend": backend, backend: section}
    stack.config["discovery"] = settings.get("discovery", {}) | chosen
    async with AsyncExitStack() as exits:
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60)
        )
        yield Installation(stack, await exits.enter_async_context(session), exits)
