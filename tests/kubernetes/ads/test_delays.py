"""How long a change of the cluster takes until Envoy's requests follow it, over ADS.

From a real API server through EndpointSlices and the service to the real Envoy. The limits are
wider than the aims, since the machine may be busy; the delays are printed.
"""

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec import Struct

from extproc.simulator.http import RunningSimulator
from tests.unit.discovery.slices import endpoint

from ..cluster import Namespace
from ..installation import Installation, installation, until_not
from ..pods import end_pod, run_pod, set_status
from ..services import make_node, make_service
from ..test_endpoint_slices import TERMINATING, made

_PORT: Final = 8000
_LOOK_SECONDS: Final = 0.01
_CLIENTS: Final = 4
_ROUNDS: Final = 20
_BEFORE: Final = 2
# How long requests are watched after a worker should get no more of them.
_WATCHED_SECONDS: Final = 1.5
_DELETED: Final = 4
_STREAMS: Final = 6


class Delays:
    """Seconds, with what is aimed at and what is tolerated for 95 of 100."""

    def __init__(self, what: str, *, aim: float, limit: float) -> None:
        self._what = what
        self._aim = aim
        self._limit = limit
        self.seconds: list[float] = []

    def show(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Print them, and fail if they are over the limit."""
        ordered = sorted(self.seconds)
        late = ordered[math.ceil(0.95 * len(ordered)) - 1]
        with capsys.disabled():
            sys.stdout.write(
                f"\n{self._what}: p50 {ordered[len(ordered) // 2] * 1000:.0f} ms, "
                f"p95 {late * 1000:.0f} ms, longest {ordered[-1] * 1000:.0f} ms "
                f"of {len(ordered)}; aim {self._aim * 1000:.0f} ms\n"
            )
        assert late <= self._limit


class Pick(Struct):
    """When a request was sent, and by which worker it was served."""

    sent_at: float
    worker: str


class Asked:
    """Requests that are sent all the time, and the workers that served them."""

    def __init__(self, installed: Installation) -> None:
        self._installed = installed
        self._ended = asyncio.Event()
        self.picks: list[Pick] = []

    @contextlib.asynccontextmanager
    async def asking(self) -> AsyncIterator["Asked"]:
        tasks = [asyncio.create_task(self._ask()) for _ in range(_CLIENTS)]
        try:
            yield self
        finally:
            self._ended.set()
            await asyncio.gather(*tasks)

    async def _ask(self) -> None:
        while not self._ended.is_set():
            at = time.monotonic()
            async with self._installed.chat(1, x_extproc_debug="true") as answer:
                await answer.read()
            assert answer.status == 200
            self.picks.append(Pick(at, answer.headers["x-extproc-worker"]))

    async def more(self, count: int) -> None:
        wanted = len(self.picks) + count

        async def missing() -> int:
            return max(0, wanted - len(self.picks))

        await until_not(missing, _LOOK_SECONDS)

    def last_of(self, worker: str, since: float) -> float:
        """Seconds from then to the last request that the worker got; 0 without one."""
        return max([one.sent_at - since for one in self.picks if one.worker == worker] + [0.0])


def ip(n: int) -> str:
    """The address of the pod of this number."""
    return f"10.244.2.{n}"


async def start_worker(installed: Installation, n: int) -> RunningSimulator:
    return await installed.start_worker(host=ip(n), port=_PORT)


async def is_pickable(installed: Installation, worker: RunningSimulator) -> None:
    async def waiting() -> bool:
        return not (await installed.listed()).get(worker.url, {}).get("ready")

    await until_not(waiting, _LOOK_SECONDS)


@pytest.fixture
async def installed(namespace: Namespace, tmp_path: Path) -> AsyncIterator[Installation]:
    """A service that follows the EndpointSlices of a namespace; a test starts the stack."""
    settings = {"envoy": {"endpoints": "ads"}, "observability": {"debug_headers": True}}
    async with installation(namespace, tmp_path, settings) as found:
        section = {
            "namespace": namespace.name,
            "kubeconfig": namespace.kubeconfig,
            "label_selector": "app=sglang",
            "port_name": "http",
        }
        found.stack.config["discovery"] = {"backend": "k8s", "k8s": section}
        yield found


@pytest.fixture
async def services(namespace: Namespace) -> AsyncIterator[Namespace]:
    """The namespace, with the controller at work and the Service of the workers."""
    await make_node(namespace)
    await make_service(namespace, "workers", {"app": "sglang"}, app="sglang")
    with namespace.cluster.slice_controller():
        yield namespace


async def test_a_pod_that_becomes_ready_gets_requests_soon(
    services: Namespace, installed: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    delays = Delays("ready to pickable", aim=1.0, limit=2.0)
    for n in range(1, _BEFORE + 1):
        await start_worker(installed, n)
        await run_pod(services, n, ip=ip(n), port=_PORT)
    async with installed.stack:
        async with Asked(installed).asking() as asked:
            for n in range(_BEFORE + 1, _BEFORE + 1 + _ROUNDS):
                worker = await start_worker(installed, n)
                await run_pod(services, n, ip=ip(n), port=_PORT, ready=False)
                ready_at = time.monotonic()
                await set_status(services, n, ready=True, ips=(ip(n),))
                await is_pickable(installed, worker)
                delays.seconds.append(time.monotonic() - ready_at)
            await asked.more(3 * (_BEFORE + _ROUNDS))
        assert {one.worker for one in asked.picks} == {one.url for one in installed.workers}
        assert await installed.sample("extproc_destination_missed_total") == 0
    delays.show(capsys)


@pytest.mark.parametrize(
    ("state", "conditions"),
    [("not ready", {"ready": False}), ("terminating", TERMINATING)],
    ids=["not ready", "terminating"],
)
async def test_no_request_is_sent_to_a_worker_after_its_slice_says_so(
    namespace: Namespace,
    installed: Installation,
    capsys: pytest.CaptureFixture[str],
    state: str,
    conditions: dict[str, Any],
) -> None:
    delays = Delays(f"{state} in a slice to the last new request", aim=0.2, limit=0.5)
    leaving = await start_worker(installed, 1)
    await start_worker(installed, 2)
    stays = endpoint(ip(2), "pod-2")
    await namespace.put(made(endpoint(ip(1), "pod-1-0"), stays))
    async with installed.stack, Asked(installed).asking() as asked:
        for turn in range(_ROUNDS):
            await is_pickable(installed, leaving)
            await asked.more(20)
            asked.picks.clear()
            ending = endpoint(ip(1), f"pod-1-{turn}", conditions=conditions)
            written_at = time.monotonic()
            await namespace.put(made(ending, stays))
            await asyncio.sleep(_WATCHED_SECONDS)
            delays.seconds.append(asked.last_of(leaving.url, written_at))
            await namespace.put(made(endpoint(ip(1), f"pod-1-{turn + 1}"), stays))
        assert await installed.sample("extproc_destination_missed_total") == 0
    delays.show(capsys)


async def test_a_pod_that_terminates_gets_no_request_after_a_second_and_keeps_its_streams(
    services: Namespace, installed: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    delays = Delays("deleted pod to the last new request", aim=1.0, limit=1.0)
    for n in (1, 2):
        await start_worker(installed, n)
        await run_pod(services, n, ip=ip(n), port=_PORT)

    async def stream() -> tuple[str, str]:
        # Longer than it takes until the pod has left Envoy's endpoints.
        async with installed.chat(300, stream=True, x_extproc_debug="true") as answer:
            assert answer.status == 200
            return answer.headers["x-extproc-worker"], await answer.text()

    async with installed.stack:
        streams = []
        async with Asked(installed).asking() as asked:
            for n in range(1, _DELETED + 1):
                leaving = installed.workers[n - 1]
                await start_worker(installed, n + 2)
                await run_pod(services, n + 2, ip=ip(n + 2), port=_PORT)
                for one in installed.workers[n - 1 :]:
                    await is_pickable(installed, one)
                streams += [asyncio.create_task(stream()) for _ in range(_STREAMS)]
                await asked.more(20)
                asked.picks.clear()
                deleted_at = time.monotonic()
                await end_pod(services, n, grace_seconds=60)
                await asyncio.sleep(_WATCHED_SECONDS)
                delays.seconds.append(asked.last_of(leaving.url, deleted_at))
            ended = await asyncio.gather(*streams)
        assert await installed.sample("extproc_destination_missed_total") == 0
    assert {one.url for one in installed.workers[:_DELETED]} <= {worker for worker, _ in ended}
    assert all(text.rstrip().endswith("data: [DONE]") for _, text in ended)
    delays.show(capsys)
