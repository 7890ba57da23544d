"""A full worker's 503 or 429 goes to another worker, within limits; a killed request never does."""

import asyncio
from typing import Any

import aiohttp
import pytest

from extproc.simulator.http import RunningSimulator
from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running


async def set_faults(worker: RunningSimulator, **faults: Any) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{worker.url}/simulator/faults", json=faults) as answer,
    ):
        assert answer.status == 200


async def received(running: Running) -> list[int]:
    return [stats["received"] for stats in await running.fleet.stats()]


async def outcomes(running: Running, worker: RunningSimulator, outcome: str) -> float:
    labels = f'model="m",outcome="{outcome}",role="plain",worker="{worker.url}"'
    return await running.sample(f"extproc_worker_requests_total{{{labels}}}")


async def test_a_busy_answer_goes_to_another_worker_and_is_recorded_for_its_own(
    launch: Launch,
) -> None:
    running = await launch(3)
    full, limited, free = running.fleet.workers
    await set_faults(full, status=503, retry_after=1)
    await set_faults(limited, status=429)
    for _ in range(6):
        async with running.chat(tokens=1) as response:
            assert response.status == 200
            assert response.headers["x-simulator-port"] == str(free.port)
    async with running.chat(stream=True, tokens=100_000) as response:
        await response.content.readline()
        loads = {one["url"]: one["in_flight"] for one in await running.stack.workers()}
        assert loads == {full.url: 0, limited.url: 0, free.url: 1}
    asked = await received(running)
    for worker, count in ((full, asked[0]), (limited, asked[1])):
        assert count > 0
        assert await outcomes(running, worker, "busy") == count
        assert await outcomes(running, worker, "error") == 0
    assert await outcomes(running, free, "success") == 7
    assert "open" not in {one["breaker"] for one in await running.stack.workers()}
    for request in await running.fleet.requests():
        assert not [name for name in request["headers"] if "retr" in name]


async def test_with_all_workers_full_the_last_answer_passes_and_retries_have_a_budget(
    launch: Launch,
) -> None:
    # Each worker gives at least 20 busy answers in a row. On a machine without time some of their
    # reports may come too late, and these count as failures.
    model = {"id": "m", "circuit_breaker": {"threshold": 20}}
    running = await launch(3, settings={"models": [model]})
    for worker in running.fleet.workers:
        await set_faults(worker, status=503, hang=0.8)
    clients = 60

    async def ask() -> int:
        async with running.chat(tokens=1) as response:
            assert "x-router-error-code" not in response.headers
            return int(response.status)

    assert await asyncio.gather(*(ask() for _ in range(clients))) == [503] * clients
    extra = sum(await received(running)) - clients
    # A third of those in flight, again a third of these; without a limit it were twice the clients.
    assert 0 < extra < clients
    await wait_until(lambda: no_load(running), "load released")
    # Full workers are not broken: they are used as soon as they have room.
    assert "open" not in {one["breaker"] for one in await running.stack.workers()}
    for worker in running.fleet.workers:
        await set_faults(worker)
    assert await ask() == 200


async def no_load(running: Running) -> bool:
    return await running.stack.in_flight() == 0


@pytest.mark.parametrize("fault", ["die-before-headers, reset", "die-before-headers"])
async def test_a_request_that_kills_its_worker_is_not_sent_to_another(
    launch: Launch, fault: str
) -> None:
    running = await launch(3)
    async with running.chat(fault=fault) as response:
        assert await running.error(response) == (503, "upstream_unreachable")
    assert sum(await received(running)) == 1


async def test_a_busy_answer_is_final_where_the_operator_wants_it(launch: Launch) -> None:
    running = await launch(3, settings={"proxy": {"retry_busy": False}})
    await set_faults(running.fleet.workers[0], status=429)
    statuses = []
    for _ in range(3):
        async with running.chat(tokens=1) as response:
            statuses.append(response.status)
    assert sorted(statuses) == [200, 200, 429]
