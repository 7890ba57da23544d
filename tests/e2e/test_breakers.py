"""Breakers contain faults of workers, and never turn one client's errors into an outage."""

import asyncio
import contextlib
import time
from typing import Any

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running


async def breakers(running: Running) -> list[str]:
    return [worker["breaker"] for worker in await running.stack.workers()]


async def set_faults(running: Running, numbers: range, **faults: Any) -> None:
    for number in numbers:
        url = running.fleet.workers[number].url
        async with running.http.post(f"{url}/simulator/faults", json=faults) as answer:
            assert answer.status == 200, await answer.text()


async def test_requests_that_fail_everywhere_cost_other_clients_nothing(launch: Launch) -> None:
    running = await launch(4)

    async def send(fault: str) -> int:
        async with running.chat(fault=fault) as response:
            return int(response.status)

    assert {await send("status=500") for _ in range(30)} == {500}
    statuses = await asyncio.gather(
        *(send("status=500" if number % 2 else "") for number in range(60))
    )
    assert statuses[::2] == [200] * 30
    assert "open" not in await breakers(running)
    assert {await send("") for _ in range(12)} == {200}


async def test_full_workers_serve_again_as_soon_as_they_have_room(launch: Launch) -> None:
    running = await launch(3)
    await set_faults(running, range(3), status=503)
    ends = time.monotonic() + 1.0
    while time.monotonic() < ends:
        async with running.chat() as response:
            assert response.status == 503
    assert set(await breakers(running)) == {"busy"}
    assert await running.sample("extproc_last_resort_total") > 0
    await set_faults(running, range(3))
    for _ in range(20):
        async with running.chat() as response:
            assert response.status == 200


async def test_a_worker_that_never_answers_loses_its_traffic_and_returns(launch: Launch) -> None:
    breaker = {"threshold": 1, "cool_down_secs": 1}
    running = await launch(3, settings={"models": [{"id": "m", "circuit_breaker": breaker}]})
    await set_faults(running, range(1), hang=True)

    async def impatient() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.5), running.chat() as response:
                assert response.status == 200

    patient = asyncio.create_task(impatient())
    others = [asyncio.create_task(impatient()) for _ in range(2)]
    await asyncio.sleep(0.5)
    # The others have answered since the request that hangs was sent.
    for _ in range(2):
        await impatient()
    await asyncio.gather(patient, *others)

    async def opened() -> bool:
        return (await breakers(running))[0] != "closed"

    await wait_until(opened, "the breaker opens")
    assert (await breakers(running))[1:] == ["closed", "closed"]
    assert await running.sample('extproc_worker_requests_total{model="m",outcome="silent"') >= 1
    await set_faults(running, range(1))

    async def closed() -> bool:
        async with running.chat() as response:
            assert response.status == 200
        return await breakers(running) == ["closed"] * 3

    await wait_until(closed, "a probe closes the breaker")


async def test_a_stream_whose_first_byte_is_late_is_given_up_and_slow_streams_go_on(
    launch: Launch,
) -> None:
    """The worker accepts requests, and its engine does not run."""
    settings = {
        "proxy": {"first_byte_timeout_secs": 60},
        "models": [{"id": "m", "first_byte_timeout_secs": 1, "circuit_breaker": {"threshold": 1}}],
    }
    running = await launch(2, settings=settings)
    await set_faults(running, range(1), hang=True)

    async def send(**request: Any) -> tuple[int, float]:
        begun = time.monotonic()
        async with running.chat(stream=True, **request) as response:
            await response.read()
            return response.status, time.monotonic() - begun

    first, second = await asyncio.gather(send(), send())
    (late,) = [seconds for status, seconds in (first, second) if status == 504]
    assert 0.9 <= late < 30
    assert "open" in await breakers(running)
    status, seconds = await send(tokens=4, fault="slow-token=0.5")
    assert (status, seconds >= 1.5) == (200, True)


async def test_a_worker_whose_engine_stands_still_is_found_by_the_generating_check(
    launch: Launch,
) -> None:
    """It answers with 200 and headers at once, and then sends no token."""
    running = await launch(2, settings={"discovery": {"generating_check_secs": 0.5}})
    await set_faults(running, range(1), stall_after_tokens=0, health_hang=True)

    async def avoided() -> bool:
        return await breakers(running) == ["busy", "closed"]

    await wait_until(avoided, "the check fails twice")
    for _ in range(6):
        async with running.chat(stream=True) as response:
            assert b"[DONE]" in await response.read()
    await set_faults(running, range(1))

    async def back() -> bool:
        return await breakers(running) == ["closed"] * 2

    await wait_until(back, "the check passes")
