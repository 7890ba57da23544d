"""The loop list, watch, list again: what it yields, when it waits, and what it says of trouble."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from random import Random

import pytest
from lightkube.resources.discovery_v1 import EndpointSlice
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from extproc.discovery.kube_api import ApiTroubleError, Reason, WatchEndedError, WatchEvent
from extproc.discovery.list_watch import ListWatch, Snapshot
from extproc.metrics.service import Metrics
from extproc.workers.source_health import SourceHealth
from tests.fakes import FakeClock, settle

from .slices import slice_of

ONE, TWO = slice_of(name="one"), slice_of(name="two")
Steps = list[Snapshot[EndpointSlice] | WatchEvent[EndpointSlice]]


class _Api:
    """Lists and watches as scripted; a watch without further events stays open."""

    def __init__(self, clock: FakeClock) -> None:
        self.lists: deque[list[EndpointSlice] | Exception] = deque()
        self.watches: deque[list[WatchEvent[EndpointSlice] | Exception]] = deque()
        self.listed_at: list[float] = []
        self.watched: list[str] = []
        self.closed = False
        self._clock = clock

    async def list(self) -> tuple[list[EndpointSlice], str]:
        self.listed_at.append(self._clock.monotonic())
        answer = self.lists.popleft() if self.lists else []
        if isinstance(answer, Exception):
            raise answer
        return answer, f"v{len(self.listed_at)}"

    async def watch(self, version: str) -> AsyncGenerator[WatchEvent[EndpointSlice], None]:
        self.watched.append(version)
        for step in self.watches.popleft() if self.watches else []:
            if isinstance(step, Exception):
                raise step
            yield step
        await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        self.closed = True


class _Setup:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.api = _Api(self.clock)
        self.prometheus = CollectorRegistry()
        self.steps: Steps = []
        metrics = Metrics(self.prometheus).discovery
        self.health = SourceHealth()
        self.list_watch = ListWatch(
            self.api,
            "endpointslices",
            clock=self.clock,
            random=Random(1),
            metrics=metrics,
            health=self.health,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async def collect() -> None:
            async with aclosing(self.list_watch.follow()) as steps:
                async for step in steps:
                    self.steps.append(step)

        task = asyncio.create_task(collect())
        await settle()
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert self.api.closed

    def metric(self, name: str, **labels: str) -> float | None:
        labels |= {"objects": "endpointslices"}
        return self.prometheus.get_sample_value(f"extproc_discovery_{name}", labels)


def trouble(reason: Reason = "unreachable", retry_after: float = 0.0) -> ApiTroubleError:
    return ApiTroubleError(reason, "detail", retry_after)


async def test_a_list_and_the_events_after_it_are_yielded_without_bookmarks() -> None:
    setup = _Setup()
    setup.api.lists.append([ONE])
    added = WatchEvent("ADDED", TWO)
    setup.api.watches.append([WatchEvent("BOOKMARK", slice_of()), added])
    async with setup.running():
        assert setup.steps == [Snapshot([ONE]), added]
        assert setup.api.watched == ["v1"]
        assert setup.metric("up") == 1


async def test_every_end_of_a_watch_is_followed_by_a_list() -> None:
    setup = _Setup()
    setup.api.lists.extend([[ONE, TWO], [TWO]])
    setup.api.watches.append([WatchEndedError()])
    async with setup.running():
        await setup.clock.advance(1.0)
        assert setup.steps == [Snapshot([ONE, TWO]), Snapshot([TWO])]
        assert setup.metric("errors_total", reason="expired") is None


async def test_a_version_that_is_too_old_is_no_failure() -> None:
    setup = _Setup()
    setup.api.watches.append([trouble("expired")])
    with capture_logs() as logs:
        async with setup.running():
            await setup.clock.advance(1.0)
            assert len(setup.steps) == 2
            assert setup.metric("errors_total", reason="expired") == 1
            assert setup.metric("up") == 1
    assert logs == []


async def test_a_server_that_ends_each_watch_at_once_is_asked_once_a_second() -> None:
    setup = _Setup()
    setup.api.watches.extend([[WatchEndedError()] for _ in range(20)])
    async with setup.running():
        await setup.clock.advance(10.0)
        assert len(setup.api.listed_at) == 11


async def test_failed_lists_are_repeated_with_growing_waits_and_nothing_is_yielded() -> None:
    setup = _Setup()
    setup.api.lists.append([ONE])
    setup.api.watches.append([trouble()])
    setup.api.lists.extend([trouble("timeout") for _ in range(12)])
    async with setup.running():
        await setup.clock.advance(1000.0)
        assert setup.steps[0] == Snapshot([ONE])
        waits = [b - a for a, b in zip(setup.api.listed_at, setup.api.listed_at[1:], strict=False)]
    # 0.5 s doubled each time, at most 30 s; between half of that and all of it.
    for wait, longest in zip(waits, [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30], strict=False):
        assert longest / 2 <= wait <= longest


async def test_the_servers_own_wait_is_kept_within_a_minute() -> None:
    setup = _Setup()
    setup.api.lists.extend([trouble("throttled", 7.0), trouble("throttled", 86400.0)])
    async with setup.running():
        await setup.clock.advance(6.9)
        assert len(setup.api.listed_at) == 1
        await setup.clock.advance(0.1)
        assert len(setup.api.listed_at) == 2
        await setup.clock.advance(60.0)
        assert len(setup.api.listed_at) == 3


async def test_a_long_outage_is_logged_once_a_minute_and_its_end_once() -> None:
    setup = _Setup()
    setup.api.lists.extend([trouble("forbidden") for _ in range(30)])
    with capture_logs() as logs:
        async with setup.running():
            assert setup.metric("up") == 0
            await setup.clock.advance(300.0)
            assert setup.metric("up") == 0
            warnings = len(logs)
            await setup.clock.advance(900.0)
            assert setup.metric("up") == 1
            assert setup.metric("errors_total", reason="forbidden") == 30
    assert 4 <= warnings <= 6
    assert {log["event"] for log in logs[:-1]} == {"discovery_failing"}
    assert logs[0]["reason"] == "forbidden"
    assert "docs/kubernetes.md" in logs[0]["fix"]
    assert logs[-1]["event"] == "discovery_recovered"


@pytest.mark.parametrize("seconds", [5.0, 20.0])
async def test_a_watch_that_lasted_shows_that_the_server_works(seconds: float) -> None:
    setup = _Setup()
    setup.api.lists.extend([trouble() for _ in range(5)])
    async with setup.running():
        await setup.clock.advance(60.0)
        assert len(setup.api.listed_at) == 6
    short = setup.list_watch._pause_seconds(trouble(), seconds) <= 0.5
    assert short is (seconds > 10)
