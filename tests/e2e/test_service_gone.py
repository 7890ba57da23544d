"""Clients while the routing service dies, drains or comes back."""

import asyncio
import signal
import time

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running


async def read_stream(running: Running, tokens: int) -> int:
    async with running.chat(stream=True, tokens=tokens, fault="slow-token=0.1") as response:
        assert response.status == 200
        return int((await response.read()).count(b"data: "))


async def streams_are_open(running: Running, count: int) -> None:
    """Waits until workers generate for so many requests."""

    async def check() -> bool:
        return int(sum(stats["running"] for stats in await running.fleet.stats())) == count

    await wait_until(check, f"{count} streams are open")


async def bypassed(running: Running) -> bool:
    return not await running.stack.envoy_sees_service()


async def test_kill_9_in_mid_stream_then_the_pool_serves_then_routing_resumes(
    launch: Launch,
) -> None:
    running = await launch(2)
    streaming = asyncio.create_task(read_stream(running, 30))
    waiting = asyncio.create_task(read_stream(running, 3))
    await streams_are_open(running, 2)
    await running.stack.service.stop(signal.SIGKILL)
    assert await streaming == 33
    assert await waiting == 6
    await wait_until(lambda: bypassed(running), "Envoy notices")
    for _ in range(4):
        async with running.chat() as response:
            assert response.status == 200
    async with running.http.get(f"{running.url}/v1/models") as response:
        assert response.status == 200
    await running.stack.start_service()
    started = time.monotonic()

    async def routed() -> bool:
        async with running.chat() as response:
            assert response.status == 200
        return await running.sample("extproc_requests_total") > 0

    await wait_until(routed, "routing resumes")
    # Envoy probes the service every second, not every minute as by default.
    assert time.monotonic() - started < 20


async def test_with_two_models_requests_never_fail_open(launch: Launch) -> None:
    running = await launch(1, models=("a", "b"))
    await running.stack.service.stop(signal.SIGKILL)
    await wait_until(lambda: bypassed(running), "Envoy notices")
    async with running.chat("a") as response:
        assert await running.error(response) == (503, "router_unavailable")
    assert await running.fleet.requests() == []


async def test_fail_open_can_be_switched_off(launch: Launch) -> None:
    running = await launch(1, settings={"envoy": {"fail_open": False}})
    await running.stack.service.stop(signal.SIGKILL)
    async with running.chat() as response:
        assert await running.error(response) == (503, "router_unavailable")


async def test_sigterm_drains_without_losing_a_request(launch: Launch) -> None:
    running = await launch(2, settings={"server": {"drain_secs": 20}})
    streaming = asyncio.create_task(read_stream(running, 30))
    await streams_are_open(running, 1)
    running.stack.service.send(signal.SIGTERM)
    statuses = []
    while running.stack.service.returncode is None:
        async with running.chat() as response:
            statuses.append(response.status)
        await asyncio.sleep(0.02)
    assert running.stack.service.returncode == 0
    assert set(statuses) == {200}
    assert await streaming == 33


async def test_clients_do_not_notice_a_restart_of_the_service(launch: Launch) -> None:
    running = await launch(2)
    stop = asyncio.Event()

    async def steady() -> set[int]:
        statuses = set()
        while not stop.is_set():
            async with running.chat() as response:
                statuses.add(response.status)
                await response.read()
        return statuses

    clients = [asyncio.create_task(steady()) for _ in range(4)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        await asyncio.sleep(0.5)
        await running.stack.service.stop(number)
        await asyncio.sleep(0.5)
        await running.stack.start_service()
    stop.set()
    # A request in the filter at that moment may fail open but must not hang.
    assert set().union(*await asyncio.gather(*clients)) == {200}
