"""The signals for autoscalers rise with the load of slow workers, and fall when it is over."""

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running
from tests.e2e.pd_fleet import pd_stack
from tests.e2e.test_kv_routing import StartPool, pool
from tests.unit.simulator.model_folders import model_folder

__all__ = ["pool"]

# A token is a byte: the prompt takes half a second.
PROMPT = "Word after word. " * 12
SLOW = {"prefill_tokens_per_second": 400.0}


async def wait_of(running: Running, role: str = "plain") -> float:
    metrics = await running.stack.metrics()
    return metrics[f'extproc_pool_expected_wait_seconds{{model="m",role="{role}"}}']


async def occupancy_of(running: Running, role: str = "plain") -> float:
    metrics = await running.stack.metrics()
    return metrics.get(f'extproc_pool_occupancy_ratio{{model="m",role="{role}"}}', -1.0)


async def ask(running: Running, number: int = 0, *, tokens: int = 2, **more: Any) -> int:
    """One streamed request with a prompt of its own; returns the status."""
    message = {"role": "user", "content": f"{number} {PROMPT}"}
    async with running.chat(tokens=tokens, stream=True, messages=[message], **more) as response:
        await response.read()
        return int(response.status)


async def rises(running: Running, role: str, seconds: float) -> None:
    async def check() -> bool:
        return await wait_of(running, role) >= seconds

    await wait_until(check, f"the wait for {role} workers rises")


async def falls(running: Running, role: str = "plain") -> None:
    async def check() -> bool:
        return await wait_of(running, role) == 0

    await wait_until(check, f"the wait for {role} workers falls")


async def all_succeed(tasks: Iterable[asyncio.Task[int]]) -> None:
    assert set(await asyncio.gather(*tasks)) == {200}


async def test_the_wait_rises_with_the_load_and_falls_after_it(launch: Launch) -> None:
    running = await launch(2, worker=SLOW)
    assert await wait_of(running) == 0
    # Half a second each on two workers: the last one waits for two seconds.
    tasks = [asyncio.create_task(ask(running, number)) for number in range(9)]
    await rises(running, "plain", 0.7)
    await all_succeed(tasks)
    await falls(running)
    assert await occupancy_of(running) == -1, "these engines report nothing"


async def test_the_wait_is_known_in_tokens_where_they_are(pool: StartPool) -> None:
    running = (await pool(2, "min_ttft", worker=SLOW)).running
    assert await wait_of(running) == 0

    async def is_reported() -> bool:
        return await occupancy_of(running) == 0

    await wait_until(is_reported, "the engines have reported their load")
    tasks = [asyncio.create_task(ask(running, number)) for number in range(9)]
    await rises(running, "plain", 0.7)
    await all_succeed(tasks)
    await falls(running)


async def test_workers_that_hang_are_waited_for_ever_longer(launch: Launch) -> None:
    running = await launch(2, worker={"prefill_tokens_per_second": 1e6})
    await all_succeed([asyncio.create_task(ask(running)) for _ in range(2)])
    for worker in running.fleet.workers:
        async with running.http.post(f"{worker.url}/simulator/faults", json={"hang": True}) as done:
            assert done.status == 200
    tasks = [asyncio.create_task(ask(running)) for _ in range(2)]
    await rises(running, "plain", 1.0)
    await rises(running, "plain", 2.0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await falls(running)


async def test_requests_that_wait_in_the_service_count(launch: Launch) -> None:
    queue = {"max_requests": 100, "max_wait_secs": 20, "worker_requests_max": 2}
    running = await launch(
        1,
        worker={"decode_milliseconds_per_token": 20},
        settings={
            "server": {"step_deadline_secs": 30},
            "envoy": {"message_timeout_secs": 40},
            "models": [{"id": "m", "queue": queue}],
        },
    )
    assert await occupancy_of(running) == 0
    # 0.4 s each, two at once.
    tasks = [asyncio.create_task(ask(running, tokens=20)) for _ in range(20)]
    await rises(running, "plain", 1.5)

    async def is_full() -> bool:
        return await occupancy_of(running) == 1

    await wait_until(is_full, "both places of the worker are taken")
    await all_succeed(tasks)
    await falls(running)


async def test_prefill_and_decode_workers_have_signals_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = model_folder(folder)
    engine = {"page_size": 16, "kv_events_port": 0, "tokenizer_path": path}
    async with pd_stack(
        tmp_path,
        worker=engine | SLOW | {"max_running_requests": 4, "decode_milliseconds_per_token": 100.0},
        model={"policy": "min_ttft", "tokenizer_path": path},
    ) as running:
        for role in ("prefill", "decode"):
            assert await wait_of(running, role) == 0
        tasks = [asyncio.create_task(ask(running, number)) for number in range(6)]
        await rises(running, "prefill", 1.0)
        await all_succeed(tasks)
        await falls(running, "prefill")
        # Short prompts, long answers: the decode worker is full.
        message = [{"role": "user", "content": "hello"}]

        async def chat() -> int:
            async with running.chat(tokens=30, stream=True, messages=message) as response:
                await response.read()
                return int(response.status)

        tasks = [asyncio.create_task(chat()) for _ in range(8)]
        await rises(running, "decode", 0.5)
        assert await occupancy_of(running, "decode") == 1
        await all_succeed(tasks)
        await falls(running, "decode")


async def test_demand_without_any_worker_is_shown_until_one_comes(launch: Launch) -> None:
    running = await launch(1, settings={"models": [{"id": "m", "ready_without_workers": True}]})
    port = int(running.fleet.workers[0].url.rpartition(":")[2])
    await running.fleet.workers[0].stop()
    await running.stack.service.stop()
    await running.stack.start_service()
    await wait_until(running.stack.envoy_sees_service, "the service is ready without a worker")
    for role in ("plain", "prefill", "decode"):
        assert (await wait_of(running, role), await occupancy_of(running, role)) == (0, 0)
    async with running.chat() as response:
        assert await running.error(response) == (503, "no_healthy_workers")
    for role in ("plain", "prefill", "decode"):
        assert (await wait_of(running, role), await occupancy_of(running, role)) == (300, 1)
    again = await start(SimulatorSettings(model="m", port=port))
    try:
        await falls(running)
        metrics = await running.stack.metrics()
        shown = [name for name in metrics if name.startswith("extproc_pool_")]
        assert shown == ['extproc_pool_expected_wait_seconds{model="m",role="plain"}']
        async with running.chat() as response:
            assert response.status == 200
    finally:
        await again.stop()


@pytest.mark.parametrize("stays", [True, False])
async def test_a_model_that_is_gone_has_no_series(launch: Launch, stays: bool) -> None:
    running = await launch(1, models=("m", "n"))
    if not stays:
        running.stack.config["models"] = [{"id": "m"}]
        await running.stack.reload()
    metrics = await running.stack.metrics()
    name = 'extproc_pool_expected_wait_seconds{model="n",role="plain"}'
    assert (name in metrics) is stays
