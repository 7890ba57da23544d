"""The fake clock itself: every test about time stands on it."""

import asyncio

import pytest

from tests.fakes import FakeClock, settle


async def test_sleepers_wake_in_order_of_their_time_and_see_it() -> None:
    clock = FakeClock(now=0.0)
    woken: list[tuple[float, float]] = []

    async def sleeper(seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((seconds, clock.monotonic()))

    tasks = [asyncio.create_task(sleeper(seconds)) for seconds in (3.0, 1.0, 2.0)]
    await clock.advance(2.0)
    assert woken == [(1.0, 1.0), (2.0, 2.0)]
    await clock.advance(10.0)
    assert woken[-1] == (3.0, 3.0)
    assert clock.monotonic() == 12.0
    await asyncio.gather(*tasks)


async def test_periodic_work_runs_once_per_period() -> None:
    clock = FakeClock(now=0.0)
    seen: list[float] = []

    async def periodic() -> None:
        while True:
            await clock.sleep(0.1)
            seen.append(clock.monotonic())

    task = asyncio.create_task(periodic())
    await clock.advance(1.0)
    assert seen == pytest.approx([0.1 * turn for turn in range(1, 11)])
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_cancelled_sleeper_leaves_nothing_behind() -> None:
    clock = FakeClock()
    task = asyncio.create_task(clock.sleep(5.0))
    await settle()
    assert clock.sleeping == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert clock.sleeping == 0
    await clock.advance(10.0)
