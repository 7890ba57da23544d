"""The sources for a cluster, from the wire to events about workers."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from lightkube.resources.discovery_v1 import EndpointSlice
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from extproc.config.schema import InferencePoolConfig, K8sPodsConfig
from extproc.discovery.cluster_objects import ClusterObjects
from extproc.discovery.cluster_source import SourceParts
from extproc.discovery.endpoint_slices import SliceReader
from extproc.discovery.inference_pool import PoolSource
from extproc.discovery.kube_api import KubeApi
from extproc.discovery.pods import WorkerPod, pod_reader
from extproc.discovery.worker_union import Reading
from extproc.metrics.service import Metrics
from extproc.workers.source import (
    Added,
    DrainingChanged,
    Listed,
    Removed,
    Vanished,
    WorkerEvent,
    WorkerSource,
)
from tests.fakes import FakeClock, settle

from .fake_cluster import FakeCluster
from .pod_json import pod_json
from .slices import endpoint, slice_json

SLICES, PODS, POOLS = "endpointslices", "pods", "inferencepools"


class Setup:
    def __init__(self, folder: Path) -> None:
        self.cluster = FakeCluster()
        self.clock = FakeClock()
        self.client = self.cluster.client(folder)
        self.parts = SourceParts(
            clock=self.clock,
            random=Random(1),
            metrics=Metrics(CollectorRegistry()).discovery,
        )
        self._seen: list[WorkerEvent] = []

    def slices(self) -> WorkerSource:
        api = KubeApi(self.client, EndpointSlice, namespace="ns", selector="app=sglang")
        list_watch = self.parts.list_watch(api, SLICES)
        reader = SliceReader(roles=[], port_name="http", port=None, family="v4_preferred")
        return ClusterObjects(list_watch, reader.read, SLICES, self.clock)

    def pool(self) -> WorkerSource:
        config = InferencePoolConfig(namespace="ns", name="pool")
        return PoolSource(config, self.client, self.parts)

    @asynccontextmanager
    async def following(self, source: WorkerSource) -> AsyncIterator[None]:
        async def collect() -> None:
            async for event in source.events():
                self._seen.append(event)

        task = asyncio.create_task(collect())
        try:
            await settle()
            yield
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def after(self, *changes: Callable[[], None]) -> list[WorkerEvent]:
        """The events since the last call, after these changes."""
        for change in changes:
            change()
            await settle()
        await settle()
        seen, self._seen[:] = list(self._seen), []
        return seen

    def put(self, plural: str, made: dict[str, Any]) -> Callable[[], None]:
        return lambda: self.cluster.put(plural, made)

    def put_slice(self, *endpoints: dict[str, Any], **fields: Any) -> Callable[[], None]:
        return self.put(SLICES, slice_json(*endpoints, **fields))


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def pod(n: int, **labels: str) -> dict[str, Any]:
    made = pod_json({"app": "sglang"} | labels, uid=f"u{n}", podIPs=[{"ip": f"10.0.0.{n}"}])
    made["metadata"]["name"] = f"pod-{n}"
    return made


def pool(*ports: int, **labels: str) -> dict[str, Any]:
    selector = {"matchLabels": labels or {"app": "sglang"}}
    return {
        "metadata": {"name": "pool", "uid": "p"},
        "spec": {"selector": selector, "targetPorts": [{"number": port} for port in ports]},
    }


def names(events: list[WorkerEvent]) -> list[str]:
    """Short texts of the events: `+` added, `-` removed, `?` vanished, `~` draining."""
    texts = []
    for event in events:
        match event:
            case Added(spec):
                texts.append(f"+{spec.id}")
            case Removed(worker_id):
                texts.append(f"-{worker_id}")
            case Vanished(spec):
                texts.append(f"?{spec.id}")
            case DrainingChanged(worker_id, draining):
                texts.append(f"{'~' if draining else '='}{worker_id}")
            case Listed():
                texts.append("listed")
    return texts


async def test_a_list_is_followed_by_what_changes(setup: Setup) -> None:
    setup.put_slice(endpoint())()
    async with setup.following(setup.slices()):
        assert names(await setup.after()) == ["+pod-1:8000", "listed"]
        two = setup.put_slice(endpoint(), endpoint("10.0.0.2", "pod-2"))
        assert names(await setup.after(two)) == ["+pod-2:8000"]


async def test_the_worker_of_a_deleted_slice_is_removed_after_three_seconds(setup: Setup) -> None:
    setup.put_slice(endpoint())()
    async with setup.following(setup.slices()):
        await setup.after()
        deleted = lambda: setup.cluster.delete(SLICES, "slice-1")  # noqa: E731
        assert names(await setup.after(deleted)) == ["~pod-1:8000"]
        await setup.clock.advance(2.9)
        assert await setup.after() == []
        await setup.clock.advance(0.2)
        assert names(await setup.after()) == ["-pod-1:8000"]


async def test_a_worker_that_moves_meanwhile_stays(setup: Setup) -> None:
    setup.put_slice(endpoint())()
    async with setup.following(setup.slices()):
        await setup.after()
        moved = setup.put_slice(endpoint(), name="slice-2")
        events = await setup.after(lambda: setup.cluster.delete(SLICES, "slice-1"), moved)
        assert names(events) == ["~pod-1:8000", "=pod-1:8000"]
        await setup.clock.advance(5.0)
        assert await setup.after() == []


async def test_removals_are_not_held_up_by_a_stream_of_other_changes(setup: Setup) -> None:
    setup.put_slice(endpoint())()
    async with setup.following(setup.slices()):
        await setup.after()
        await setup.after(lambda: setup.cluster.delete(SLICES, "slice-1"))
        setup.clock.tick(4.0)  # nothing is woken, but the next change comes
        other = setup.put_slice(endpoint("10.0.0.2", "pod-2"), name="slice-2")
        assert names(await setup.after(other)) == ["+pod-2:8000", "-pod-1:8000"]


async def test_a_worker_that_the_next_list_does_not_name_has_vanished(setup: Setup) -> None:
    setup.put_slice(endpoint())()
    setup.put_slice(endpoint("10.0.0.2", "pod-2"), name="slice-2")()
    async with setup.following(setup.slices()):
        await setup.after()
        setup.cluster.delete_unseen(SLICES, "slice-1")
        setup.cluster.end_watches()
        await setup.clock.advance(1.0)
        assert names(await setup.after()) == ["?pod-1:8000"]


@pytest.mark.parametrize(
    ("conditions", "seen"),
    [
        ({"ready": False}, ["-pod-1:8000"]),
        ({"ready": False, "serving": False, "terminating": True}, ["-pod-1:8000"]),
        ({"ready": False, "serving": True, "terminating": True}, ["~pod-1:8000"]),
    ],
)
async def test_a_worker_whose_slice_says_that_it_leaves_does_so_at_once(
    setup: Setup, conditions: dict[str, bool | None], seen: list[str]
) -> None:
    setup.put_slice(endpoint())()
    async with setup.following(setup.slices()):
        await setup.after()
        leaving = setup.put_slice(endpoint(conditions=conditions))
        assert names(await setup.after(leaving)) == seen


async def test_a_slice_that_is_emptied_says_nothing_about_its_workers(setup: Setup) -> None:
    setup.put_slice(endpoint())()
    async with setup.following(setup.slices()):
        await setup.after()
        assert names(await setup.after(setup.put_slice(endpoints=None))) == ["?pod-1:8000"]
        assert names(await setup.after(setup.put_slice(endpoint()))) == ["+pod-1:8000"]


async def test_a_pool_that_a_list_does_not_name_has_only_vanished(setup: Setup) -> None:
    setup.cluster.put(POOLS, pool(8000))
    setup.cluster.put(PODS, pod(1))
    async with setup.following(setup.pool()):
        await setup.after()
        setup.cluster.delete_unseen(POOLS, "pool")
        setup.cluster.end_watches()
        await setup.clock.advance(1.0)
        assert names(await setup.after()) == ["?u1:8000"]
        assert names(await setup.after(setup.put(POOLS, pool(8000)))) == ["+u1:8000"]


async def test_workers_stay_while_the_server_refuses(setup: Setup) -> None:
    setup.put_slice(endpoint())()
    async with setup.following(setup.slices()):
        await setup.after()
        setup.cluster.refuse = 403
        setup.cluster.end_watches()
        await setup.clock.advance(600.0)
        assert await setup.after() == []
        setup.cluster.refuse = None
        await setup.clock.advance(30.0)
        two = setup.put_slice(endpoint(), endpoint("10.0.0.2", "pod-2"))
        assert names(await setup.after(two)) == ["+pod-2:8000"]


async def test_nothing_is_listed_before_the_first_list_has_succeeded(setup: Setup) -> None:
    setup.cluster.refuse = 500
    async with setup.following(setup.slices()):
        await setup.clock.advance(60.0)
        assert await setup.after() == []
        setup.cluster.refuse = None
        await setup.clock.advance(30.0)
        assert names(await setup.after()) == ["listed"]


async def test_a_slice_that_cannot_be_used_is_warned_of_once(setup: Setup) -> None:
    setup.put_slice(endpoint(), ports=None)()
    with capture_logs() as logs:
        async with setup.following(setup.slices()):
            # The same again, by a change and by a list.
            await setup.after(setup.put_slice(endpoint(), ports=None))
            setup.cluster.end_watches()
            await setup.clock.advance(1.0)
            assert len(logs) == 1
            # It was good for a while.
            await setup.after(setup.put_slice(endpoint()), setup.put_slice(endpoint(), ports=None))
            assert len(logs) == 2
    assert logs[0]["event"] == "cluster_object_not_usable"
    assert (logs[0]["name"], logs[0]["reason"]) == ("ns/slice-1", "port_not_found")


async def test_a_pool_names_its_pods_at_each_port(setup: Setup) -> None:
    setup.cluster.put(POOLS, pool(8000, 8001))
    setup.cluster.put(PODS, pod(1))
    setup.cluster.put(PODS, pod(2) | {"status": {}})
    async with setup.following(setup.pool()):
        assert names(await setup.after()) == ["+u1:8000", "+u1:8001", "listed"]
        assert names(await setup.after(setup.put(PODS, pod(2)))) == ["+u2:8000", "+u2:8001"]


async def test_another_selector_keeps_the_workers_that_it_also_selects(setup: Setup) -> None:
    setup.cluster.put(POOLS, pool(8000))
    setup.cluster.put(PODS, pod(1, zone="a"))
    setup.cluster.put(PODS, pod(2, zone="b"))
    async with setup.following(setup.pool()):
        await setup.after()
        narrower = setup.put(POOLS, pool(8000, app="sglang", zone="b"))
        assert names(await setup.after(narrower)) == ["-u1:8000"]
        # The same pool once more is no change.
        assert await setup.after(narrower) == []
        assert names(await setup.after(setup.put(PODS, pod(3, zone="b")))) == ["+u3:8000"]
        events = names(await setup.after(setup.put(POOLS, pool(8001))))
        assert events[:2] == ["-u2:8000", "-u3:8000"]
        assert sorted(events[2:]) == ["+u1:8001", "+u2:8001", "+u3:8001"]


async def test_a_pool_that_is_deleted_takes_its_workers_at_once(setup: Setup) -> None:
    setup.cluster.put(PODS, pod(1))
    async with setup.following(setup.pool()):
        assert names(await setup.after()) == ["listed"]
        assert names(await setup.after(setup.put(POOLS, pool(8000)))) == ["+u1:8000"]
        deleted = lambda: setup.cluster.delete(POOLS, "pool")  # noqa: E731
        assert names(await setup.after(deleted)) == ["-u1:8000"]
        assert names(await setup.after(setup.put(POOLS, pool(8000)))) == ["+u1:8000"]


@pytest.mark.parametrize("spec", [None, {}, {"selector": {}}, {"selector": {"matchLabels": {}}}])
async def test_a_pool_that_selects_nothing_has_no_workers(setup: Setup, spec: Any) -> None:
    setup.cluster.put(PODS, pod(1))
    setup.cluster.put(POOLS, pool(8000) | {"spec": spec})
    async with setup.following(setup.pool()):
        assert names(await setup.after()) == ["listed"]


async def test_a_pod_of_a_group_that_says_its_ranks_makes_the_leader_another_worker(
    setup: Setup,
) -> None:
    index = "leaderworkerset.sigs.k8s.io/worker-index"
    group = {"leaderworkerset.sigs.k8s.io/group-key": "g"}
    section = K8sPodsConfig(namespace="ns", label_selector="app=sglang", ranks_from=index)
    list_watch = setup.parts.list_watch(KubeApi(setup.client, WorkerPod, namespace="ns"), PODS)
    source = ClusterObjects(list_watch, pod_reader(section).read, PODS, setup.clock)
    setup.put(PODS, pod(1, **group, **{index: "0"}))()
    async with setup.following(source):
        assert names(await setup.after()) == ["+u1:8000", "listed"]
        removed, added = await setup.after(setup.put(PODS, pod(2, **group, **{index: "1"})))
        assert removed == Removed("u1:8000")
        assert isinstance(added, Added)
        assert added.spec.rank_hosts == ((0, "10.0.0.1"), (1, "10.0.0.2"))
        # The same again changes nothing.
        assert await setup.after(setup.put(PODS, pod(2, **group, **{index: "1"}))) == []


async def test_a_long_list_is_read_in_several_turns_of_the_loop(setup: Setup) -> None:
    for n in range(10):
        ends = [endpoint(f"10.0.{n}.{m}", f"pod-{n}-{m}") for m in range(60)]
        setup.put_slice(*ends, name=f"slice-{n}")()
    turn, read_in = 0, list[int]()
    reader = SliceReader(roles=[], port_name="http", port=None, family="v4_preferred")

    def read(found: EndpointSlice) -> Reading:
        read_in.append(turn)
        return reader.read(found)

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    list_watch = setup.parts.list_watch(
        KubeApi(setup.client, EndpointSlice, namespace="ns"), SLICES
    )
    counting = asyncio.create_task(count())
    async with setup.following(ClusterObjects(list_watch, read, SLICES, setup.clock)):
        assert len(await setup.after()) == 601
    counting.cancel()
    await asyncio.gather(counting, return_exceptions=True)
    assert len(read_in) == 10
    assert max(Counter(read_in).values()) <= 2
