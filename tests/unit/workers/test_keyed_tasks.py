"""Tasks of one key run one after the other; keys do not wait for each other."""

import asyncio

from structlog.testing import capture_logs

from extproc.workers.keyed_tasks import KeyedTasks
from tests.fakes import settle


class Work:
    """Makes coroutines that record their beginning and end; each ends when the test says so."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    async def run(self, name: str) -> None:
        self.gates[name] = asyncio.Event()
        self.seen.append(f"{name} begins")
        try:
            await self.gates[name].wait()
        finally:
            self.seen.append(f"{name} ends")


async def fail() -> None:
    raise RuntimeError("boom")


async def test_tasks_of_one_key_run_one_after_the_other() -> None:
    tasks, work = KeyedTasks(), Work()
    for name in ("one", "two"):
        tasks.start("a", work.run(name))
    await settle()
    assert work.seen == ["one begins"]
    work.gates["one"].set()
    await settle()
    assert work.seen == ["one begins", "one ends", "two begins"]
    await tasks.close()


async def test_a_key_does_not_wait_for_another_one() -> None:
    tasks, work = KeyedTasks(), Work()
    tasks.start("a", work.run("one"))
    tasks.start("b", work.run("two"))
    await settle()
    assert work.seen == ["one begins", "two begins"]
    assert (tasks.is_busy("a"), tasks.is_busy("c"), len(tasks.last_tasks())) == (True, False, 2)
    work.gates["one"].set()
    await settle()
    assert (tasks.is_busy("a"), tasks.is_busy("b")) == (False, True)
    await tasks.close()


async def test_an_exception_is_logged_and_the_next_task_of_the_key_runs() -> None:
    tasks, work = KeyedTasks(), Work()
    with capture_logs() as logs:
        tasks.start("a", fail())
        tasks.start("a", work.run("two"))
        await settle()
    assert work.seen == ["two begins"]
    assert [(line["event"], line["worker_id"]) for line in logs] == [("worker_task_failed", "a")]
    await tasks.close()


async def test_close_cancels_all_tasks_and_drops_later_ones() -> None:
    tasks, work = KeyedTasks(), Work()
    tasks.start("a", work.run("one"))
    tasks.start("a", work.run("two"))
    await settle()
    await tasks.close()
    tasks.start("b", work.run("three"))
    await settle()
    assert work.seen == ["one begins", "one ends"]
    assert not tasks.last_tasks()
