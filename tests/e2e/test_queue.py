"""While all workers are full, requests wait in this service, by priority and fair to tenants."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running

QUEUE = {"max_requests": 100, "max_wait_secs": 20, "worker_requests_max": 2}
# While a request waits, the service must ask Envoy for more time than this.
HANG_SECONDS = 0.5
SETTINGS = {
    "server": {"step_deadline_secs": 30},
    "envoy": {"message_timeout_secs": 40, "hang_timeout_secs": HANG_SECONDS},
}
# A request takes 0.2 s; a worker takes two at once and no request waits in it.
WORKER = {
    "decode_milliseconds_per_token": 20,
    "prefill_tokens_per_second": 1e6,
    "max_running_requests": 2,
    "max_queued_requests": 0,
}


def settings(**queue: Any) -> dict[str, Any]:
    return SETTINGS | {"models": [{"id": "m", "queue": QUEUE | queue}]}


async def outcome(running: Running, *, tokens: int = 10, **headers: str) -> tuple[int, str]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with running.chat(tokens=tokens, headers=names) as response:
        if response.status == 200:
            await response.read()
            return 200, ""
        assert int(response.headers["retry-after"]) >= 1
        if "x-router-error-code" not in response.headers:
            return response.status, "of the engine"
        return await running.error(response)


async def waiting(running: Running) -> float:
    return (await running.stack.metrics()).get('extproc_queue_requests_open{model="m"}', 0.0)


async def fill(running: Running, count: int) -> list[asyncio.Task[tuple[int, str]]]:
    """Long requests on every place of the workers."""
    tasks = [asyncio.create_task(outcome(running, tokens=60)) for _ in range(count)]

    async def all_run() -> bool:
        return await running.stack.in_flight() == count

    await wait_until(all_run, "the workers are full")
    return tasks


async def test_requests_wait_for_room_and_all_are_served(launch: Launch) -> None:
    running = await launch(2, worker=WORKER, settings=settings())
    found = Counter(await asyncio.gather(*[outcome(running) for _ in range(40)]))
    assert found == {(200, ""): 40}
    metrics = await running.stack.metrics()
    # No engine had to refuse one.
    assert metrics.get('extproc_worker_requests_total{outcome="busy"}', 0.0) == 0.0
    name = 'extproc_queue_outcomes_total{model="m",outcome="served",priority="normal"}'
    served = metrics[name]
    assert served >= 30
    assert metrics['extproc_queue_seconds_count{model="m"}'] == served
    longer = served - metrics['extproc_queue_seconds_bucket{le="0.6",model="m"}']
    assert longer >= 10, "few requests have waited for longer than HANG_SECONDS"
    assert await waiting(running) == 0
    assert "requests_wait" in running.stack.service.log.read_text()


async def test_without_a_number_the_engines_answers_tell_when_they_are_full(
    launch: Launch,
) -> None:
    running = await launch(2, worker=WORKER, settings=settings(worker_requests_max=None))
    # The first crowd finds out; nothing is known of the workers before.
    await asyncio.gather(*[outcome(running) for _ in range(12)])
    found = Counter(await asyncio.gather(*[outcome(running) for _ in range(40)]))
    assert found[200, ""] >= 38, found


async def test_a_higher_class_overtakes_and_tenants_take_turns(launch: Launch) -> None:
    running = await launch(1, worker=WORKER, settings=settings())
    full = await fill(running, 2)
    done: list[str] = []

    async def send(name: str, **headers: str) -> None:
        assert await outcome(running, tokens=5, **headers) == (200, "")
        done.append(name)

    tasks = []
    for number, (name, headers) in enumerate(
        [
            *[("greedy", {"x_tenant_id": "a"})] * 8,
            ("modest", {"x_tenant_id": "b"}),
            ("low", {"x_request_priority": "low"}),
            ("high", {"x_request_priority": "high", "x_tenant_id": "a"}),
        ],
        start=1,
    ):
        tasks.append(asyncio.create_task(send(name, **headers)))

        async def queued(number: int = number) -> bool:
            return await waiting(running) == number

        await wait_until(queued, "the request waits")
    await asyncio.gather(*full, *tasks)
    assert done.index("high") <= 1
    assert done.index("modest") <= 4
    assert done.index("low") >= 9


async def test_a_full_queue_refuses_and_a_greedy_tenant_makes_room(launch: Launch) -> None:
    running = await launch(1, worker=WORKER, settings=settings(max_requests=4))
    full = await fill(running, 2)
    greedy = [asyncio.create_task(outcome(running, x_tenant_id="a")) for _ in range(10)]

    async def refused() -> bool:
        return sum(task.done() for task in greedy) == 6

    await wait_until(refused, "what does not fit is refused")
    assert await waiting(running) == 4
    modest = asyncio.create_task(outcome(running, x_tenant_id="b"))
    assert await modest == (200, "")
    await asyncio.gather(*full)
    assert Counter(await asyncio.gather(*greedy)) == {
        (200, ""): 3,
        (503, "model_overloaded"): 7,
    }


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_request_that_waits_too_long_or_leaves_is_forgotten(
    launch: Launch, leaves: bool
) -> None:
    running = await launch(1, worker=WORKER, settings=settings(max_wait_secs=20 if leaves else 0.3))
    full = await fill(running, 2)
    late = asyncio.create_task(outcome(running))

    async def is_over() -> bool:
        metrics = await running.stack.metrics()
        name = "left" if leaves else "timed_out"
        label = f'{{model="m",outcome="{name}",priority="normal"}}'
        return metrics.get(f"extproc_queue_outcomes_total{label}") == 1

    if leaves:

        async def waits() -> bool:
            return await waiting(running) == 1

        await wait_until(waits, "the request waits")
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
    else:
        assert await late == (503, "model_overloaded")
    await wait_until(is_over, "the wait is over")
    assert await waiting(running) == 0
    assert await asyncio.gather(*full) == [(200, "")] * 2
    assert await outcome(running) == (200, "")
    assert len(await running.fleet.requests()) == 3


async def test_dead_workers_are_nothing_to_wait_for(launch: Launch) -> None:
    running = await launch(2, worker=WORKER, settings=settings())
    for worker in running.fleet.workers:
        await worker.stop()
    async with asyncio.timeout(10):
        for _ in range(8):
            status, code = await outcome(running)
            assert (status, code) == (503, "upstream_unreachable")
    assert await waiting(running) == 0
