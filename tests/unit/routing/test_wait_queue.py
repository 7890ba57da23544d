"""Requests wait for capacity, and nothing is left of them however the wait ends."""

import asyncio
import math
from typing import Any, cast

import pytest

from extproc.config.models import QueueConfig
from extproc.errors import RouterError
from extproc.routing.request import Request, find_endpoint
from extproc.routing.spare_capacity import SpareCapacity
from extproc.routing.wait_queue import WaitQueue, renew_queues
from tests.builders import make_shared
from tests.fakes import FakeClock

ENDPOINT = find_endpoint("POST", "/v1/chat/completions")


class FakeCapacity:
    """The spare capacity of the model is what the test says."""

    def __init__(self, spare: float = math.inf) -> None:
        self.requests = spare

    def of_model(self, model: str, queue: QueueConfig, now: float) -> float:
        return self.requests


class Rig:
    def __init__(self, spare: float = 0, **settings: Any) -> None:
        self.spare = FakeCapacity(spare)
        self.metrics = make_shared(clock=FakeClock()).metrics.queue
        self.settings = QueueConfig(**({"max_requests": 10, "max_wait_secs": 60} | settings))
        self.queue = self.make("m", self.settings)

    def make(self, model: str, settings: QueueConfig) -> WaitQueue:
        return WaitQueue(
            model,
            settings,
            spare=cast(SpareCapacity, self.spare),
            clock=FakeClock(),
            metrics=self.metrics,
        )

    async def enter(self, **headers: str) -> None:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        await self.queue.enter(Request(ENDPOINT, "m", False, read_headers=lambda _: given))

    def start(self, **headers: str) -> asyncio.Task[None]:
        return asyncio.create_task(self.enter(**headers))

    @property
    def waiting(self) -> float:
        return self.metrics.waiting("m").value

    def count(self, outcome: str, priority: str = "normal") -> int:
        return self.metrics.outcomes("m", priority, outcome).value


async def until(check: Any) -> None:
    async with asyncio.timeout(30):
        while not check():  # noqa: ASYNC110 (any condition, not one event)
            await asyncio.sleep(0.001)


async def refused(task: asyncio.Task[None]) -> None:
    with pytest.raises(RouterError) as caught:
        await task
    assert (caught.value.code, caught.value.status) == ("model_overloaded", 503)


async def test_with_room_nothing_waits_and_nothing_is_counted() -> None:
    rig = Rig(spare=math.inf)
    await rig.enter()
    rig.queue.leave()
    assert not rig.metrics.outcomes.children
    assert rig.queue._task is None


async def test_as_many_go_as_there_is_room_for_until_they_are_on_a_worker() -> None:
    rig = Rig(spare=2)
    await rig.enter()
    await rig.enter()
    third = rig.start()
    await until(lambda: rig.waiting == 1)
    rig.queue.leave()  # on a worker, which has less left now
    rig.spare.requests = 1
    await asyncio.sleep(0.03)
    assert not third.done()
    rig.spare.requests = 2
    await third
    assert (rig.waiting, rig.count("served")) == (0, 1)


async def test_newcomers_do_not_overtake() -> None:
    rig = Rig()
    first = rig.start()
    await until(lambda: rig.waiting == 1)
    second = rig.start()
    await until(lambda: rig.waiting == 2)
    rig.spare.requests = 1
    await first
    assert not second.done()
    rig.queue.leave()
    await second


async def test_a_queue_that_is_full_refuses_the_newest_of_the_greediest() -> None:
    rig = Rig(max_requests=2)
    tasks = [rig.start(x_tenant_id="a") for _ in range(3)]
    await refused(tasks[2])
    modest = rig.start(x_tenant_id="b")
    await refused(tasks[1])
    high = rig.start(x_request_priority="high", x_tenant_id="a")
    await until(lambda: rig.count("displaced") == 2)
    assert (rig.waiting, rig.count("refused"), rig.count("displaced")) == (2, 1, 2)
    rig.spare.requests = math.inf
    done = await asyncio.gather(tasks[0], modest, high, return_exceptions=True)
    assert sum(isinstance(one, RouterError) for one in done) == 1
    assert rig.count("served", "high") == 1


@pytest.mark.parametrize("header", ["", "unknown", " normal "])
async def test_requests_without_a_known_class_have_the_default_one(header: str) -> None:
    rig = Rig(max_wait_secs=0.01)
    await refused(rig.start(x_request_priority=header))
    assert rig.count("timed_out") == 1


async def test_a_request_that_leaves_is_forgotten() -> None:
    rig = Rig()
    task = rig.start()
    await until(lambda: rig.waiting == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (rig.waiting, rig.count("left")) == (0, 1)
    rig.spare.requests = 1
    await rig.enter()


async def test_a_turn_that_comes_as_the_client_leaves_is_not_lost() -> None:
    rig = Rig()
    task = rig.start()
    await until(lambda: rig.waiting == 1)
    rig.spare.requests = 1
    while rig.queue._going == 0:  # noqa: ASYNC110 (the very moment matters)
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert rig.queue._going == 0
    await rig.enter()


async def test_the_task_ends_with_the_last_request() -> None:
    rig = Rig()
    task = rig.start()
    await until(lambda: rig.waiting == 1)
    runner = rig.queue._task
    rig.spare.requests = math.inf
    await task
    await until(lambda: runner is not None and runner.done())


async def test_another_configuration_keeps_what_waits() -> None:
    rig = Rig()
    task = rig.start()
    await until(lambda: rig.waiting == 1)
    other = QueueConfig(max_requests=1, max_wait_secs=1)
    queues = renew_queues({"m": other}, {"m": rig.queue}, rig.make)
    assert queues["m"] is rig.queue
    assert rig.queue.settings is other
    classes = QueueConfig(max_requests=1, priority_classes=["normal"])
    assert renew_queues({"m": classes}, queues, rig.make)["m"] is not rig.queue
    assert renew_queues({}, queues, rig.make) == {}
    rig.spare.requests = 1
    await task
