"""Work for many workers leaves turns of the event loop to others."""

import asyncio
from collections import Counter

from extproc.workers.source import Added, DrainingChanged
from extproc.workers.turns import Turns
from tests.builders import make_spec

from .manager_setup import ManagerSetup, running

URLS = [f"http://10.1.{n // 100}.{n % 100}:8000" for n in range(300)]
# The asker of a turn comes before or after the tasks that it counts.
AT_ONCE = 2 * 8


async def turns_until(count: int, done: list[int]) -> list[int]:
    """How many were done in each turn of the loop, until all were."""
    each, before = [], 0
    while len(done) < count:
        await asyncio.sleep(0)
        each.append(len(done) - before)
        before = len(done)
    return each


async def test_a_number_of_tasks_goes_on_in_each_turn_in_the_order_of_their_calls() -> None:
    turns, done = Turns(3), list[int]()

    async def work(number: int) -> None:
        await turns.wait()
        done.append(number)

    tasks = [asyncio.create_task(work(number)) for number in range(20)]
    assert max(await turns_until(20, done)) <= 3
    assert done == list(range(20))
    await asyncio.gather(*tasks)


async def test_a_cancelled_task_does_not_keep_its_place() -> None:
    turns, done = Turns(1), list[int]()

    async def work(number: int) -> None:
        await turns.wait()
        done.append(number)

    tasks = [asyncio.create_task(work(number)) for number in range(4)]
    await asyncio.sleep(0)
    for task in tasks[:3]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert done == [3]


async def test_workers_that_join_or_drain_together_leave_turns_to_requests() -> None:
    async with running(ManagerSetup()) as setup:
        for url in URLS:
            setup.client.tell(url, "m")
        joined, drained = Counter[int](), Counter[int]()
        setup.source.push(*(Added(make_spec(url)) for url in URLS))
        turn = 0
        while (count := len(setup.pool())) < len(URLS):
            await asyncio.sleep(0)
            turn += 1
            joined[turn] += len(setup.pool()) - count
        setup.source.push(*(DrainingChanged(url, True) for url in URLS))
        while count := len(setup.pool()):
            await asyncio.sleep(0)
            turn += 1
            drained[turn] += count - len(setup.pool())
        assert sum(joined.values()) == sum(drained.values()) == len(URLS)
        assert max(joined.values()) <= AT_ONCE
        assert max(drained.values()) <= AT_ONCE
        # Observers hear once of what has changed in a turn.
        assert setup.changes <= turn
