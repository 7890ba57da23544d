"""Workers with a wrong role, and workers that come back as another engine."""

from contextlib import AsyncExitStack
from typing import Any

import aiohttp

from extproc.simulator.http import RunningSimulator, start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import reserved_ports, wait_until
from tests.e2e.conftest import Launch, Running


async def workers_page(running: Running) -> dict[str, Any]:
    url = f"{running.stack.admin_url}/workers"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        page: dict[str, Any] = await answer.json()
    return page


async def answer_later(worker: RunningSimulator, seconds: float) -> None:
    faults = {"server_info_hang": seconds}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{worker.url}/simulator/faults", json=faults) as answer,
    ):
        assert answer.status == 200


async def test_one_worker_with_a_wrong_role_does_not_stop_a_plain_fleet(launch: Launch) -> None:
    async with AsyncExitStack() as exits:
        odd = SimulatorSettings(model="m", disaggregation_mode="decode")
        workers = [await start(odd)]
        workers += [await start(SimulatorSettings(model="m")) for _ in range(3)]
        for worker in workers:
            exits.push_async_callback(worker.stop)
        for worker in workers[1:]:
            await answer_later(worker, 0.5)
        running = await launch(0, urls=lambda _: [worker.url for worker in workers])
        for _ in range(4):
            async with running.chat(tokens=1) as response:
                assert response.status == 200
        page = await workers_page(running)
        assert page["refused"] == [{"url": workers[0].url, "model": "m", "mode": "decode"}]
        assert {worker["url"] for worker in page["workers"]} == {one.url for one in workers[1:]}
        assert workers[0].url in running.stack.service.log.read_text()


async def test_a_worker_that_comes_back_with_another_model_loses_its_old_traffic(
    launch: Launch,
) -> None:
    discovery = {"introspection_interval_secs": 3600}
    with reserved_ports(1) as (port,):
        first = await start(SimulatorSettings(model="a", port=port))
        try:
            running = await launch(
                1,
                models=("b",),
                urls=lambda urls: [*urls, first.url],
                settings={"discovery": discovery, "models": [{"id": "a"}, {"id": "b"}]},
            )
        finally:
            await first.stop()
        async with running.chat("a") as response:
            assert await running.error(response) == (503, "upstream_unreachable")
        second = await start(SimulatorSettings(model="b", port=port))
        try:

            async def known() -> bool:
                page = await workers_page(running)
                return [worker["model"] for worker in page["workers"]] == ["b", "b"]

            await wait_until(known, "the worker is known by its new model", seconds=30)
            async with running.chat("a") as response:
                assert await running.error(response) == (503, "no_healthy_workers")
        finally:
            await second.stop()
