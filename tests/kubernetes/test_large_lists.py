"""What a list of a thousand endpoints costs the event loop, and how many lists there are."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Final

from lightkube.resources.discovery_v1 import EndpointSlice
from prometheus_client import CollectorRegistry

from extproc.clock import SystemClock
from extproc.config.schema import K8sConfig
from extproc.discovery.cluster_source import SourceParts
from extproc.discovery.endpoint_slices import slice_source
from extproc.discovery.kube_api import WatchLimits
from extproc.metrics.service import Metrics
from extproc.workers.source import Added, Listed, WorkerEvent
from extproc.workers.source_health import SourceHealth
from tests.unit.discovery.slices import endpoint, slice_of

from .cluster import Cluster, Namespace, eventually
from .installation import installation, port_of
from .pods import end_pod, run_pod

_ENDPOINTS: Final = 1000
_SLICES: Final = 12
_TURN_SECONDS: Final = 0.010
# A busy machine is slow now and then. A list that holds the loop is slow every time.
_TRIES: Final = 10


def _address(n: int) -> str:
    return f"10.1.{n // 250}.{n % 250 + 1}"


def _slice(number: int) -> EndpointSlice:
    ends = []
    for n in range(number, _ENDPOINTS, _SLICES):
        # As long as the controller writes it.
        one = endpoint(_address(n), f"4a9d7c1e-5b6f-4f0a-9b7e-{n:012d}")
        ends.append(one | {"nodeName": f"node-{n % 50}", "zone": "zone-a"})
    found = slice_of(*ends, name=f"slice-{number}")
    assert found.metadata is not None
    found.metadata.uid = found.metadata.resourceVersion = None
    return found


class _LongestTurn:
    """The longest turn of the event loop so far, in seconds of this thread's CPU time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def watch(self) -> None:
        before = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.seconds, before = max(self.seconds, now - before), now


@contextlib.asynccontextmanager
async def _longest_turn() -> AsyncIterator[_LongestTurn]:
    turn = _LongestTurn()
    watching = asyncio.create_task(turn.watch())
    try:
        yield turn
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


class _Lists(SourceHealth):
    """Counts the lists; the test sets the count back."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def works(self, objects: str) -> None:
        super().works(objects)
        self.count += 1


async def test_a_list_does_not_hold_the_loop_for_more_than_ten_milliseconds(
    namespace: Namespace,
) -> None:
    for number in range(_SLICES):
        await namespace.put(_slice(number))
    lists, seen = _Lists(), list[WorkerEvent]()
    source = slice_source(
        K8sConfig(namespace=namespace.name, kubeconfig=namespace.kubeconfig, label_selector="app"),
        SourceParts(
            clock=SystemClock(),
            random=Random(1),
            metrics=Metrics(CollectorRegistry()).discovery,
            health=lists,
            limits=WatchLimits(seconds=1),
        ),
    )

    async def follow() -> None:
        async for event in source.events():
            seen.append(event)

    following = asyncio.create_task(follow())
    turns: list[float] = []
    try:
        await eventually(lambda: Listed() in seen, "the slices are listed")
        while len(turns) < _TRIES and min(turns, default=1.0) > _TURN_SECONDS:
            async with _longest_turn() as turn:
                lists.count = 0
                await eventually(lambda: lists.count >= 2, "they are listed again")
            turns.append(turn.seconds)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert sum(isinstance(event, Added) for event in seen) == _ENDPOINTS == len(seen) - 1
    assert min(turns) <= _TURN_SECONDS, turns


def _requests(cluster: Cluster, resource: str) -> tuple[int, int]:
    """How many lists of this kind the API server has answered, and how many watches are open."""
    lists = watches = 0.0
    for line in cluster.get("/metrics").splitlines():
        name, _, value = line.rpartition(" ")
        if f'resource="{resource}"' not in name:
            continue
        if name.startswith("apiserver_request_total{") and 'verb="LIST"' in name:
            lists += float(value)
        if name.startswith("apiserver_longrunning_requests{") and 'verb="WATCH"' in name:
            watches += float(value)
    return int(lists), int(watches)


async def test_each_replica_lists_once_and_keeps_one_watch(
    namespace: Namespace, tmp_path: Path
) -> None:
    selectors = {"prefill_selector": "role=prefill", "decode_selector": "role=decode"}
    lists, watches = _requests(namespace.cluster, "pods")
    async with contextlib.AsyncExitStack() as exits:
        for replica in (1, 2):
            folder = tmp_path / str(replica)
            folder.mkdir()
            one = await exits.enter_async_context(
                installation(namespace, folder, {"envoy": {"endpoints": "ads"}}, **selectors)
            )
            if replica == 1:
                ports = []
                for n, role in enumerate(("prefill", "decode", "decode"), 1):
                    worker = await one.start_worker(disaggregation_mode=role)
                    ports.append(port_of(worker))
                    await run_pod(namespace, n, {"role": role}, ip="127.0.0.1", port=worker.port)
            await exits.enter_async_context(one.stack)
            await one.shows(**dict.fromkeys(ports, True))
            assert _requests(namespace.cluster, "pods") == (lists + replica, watches + replica)
        await end_pod(namespace, 3, grace_seconds=0)
        await one.shows(**dict.fromkeys(ports[:2], True))
        assert _requests(namespace.cluster, "pods") == (lists + 2, watches + 2)
