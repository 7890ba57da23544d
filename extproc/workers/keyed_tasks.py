"""Runs tasks by key: tasks of one key run one after the other, and keys run side by side.

It is separate from the manager, whose keys are the ids of workers, to be tested alone.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

__all__ = ["KeyedTasks"]

_log = structlog.get_logger()


class KeyedTasks:
    """Holds every task until it has ended, so that no task outlives `close`."""

    def __init__(self) -> None:
        # The last task of each key, and all tasks that have not ended.
        self._last: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def is_busy(self, key: str) -> bool:
        """True while a task of the key runs or waits."""
        return key in self._last

    def last_tasks(self) -> list[asyncio.Task[None]]:
        """The last task of every busy key."""
        return list(self._last.values())

    def start(self, key: str, work: Coroutine[Any, Any, object]) -> None:
        """Run the work after the earlier tasks of the key; after `close` it is dropped."""
        if self._closed:
            work.close()
            return
        task = asyncio.create_task(_run(key, self._last.get(key), work))
        self._last[key] = task
        self._tasks.add(task)

        def forget(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if self._last.get(key) is done:
                del self._last[key]

        task.add_done_callback(forget)

    async def close(self) -> None:
        """Cancel all tasks, and wait until they have ended."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(
    key: str, before: asyncio.Task[None] | None, work: Coroutine[Any, Any, object]
) -> None:
    try:
        if before is not None:
            await asyncio.wait([before])
        await work
    except Exception:
        # An unexpected error of one worker must not keep the others from joining.
        _log.exception("worker_task_failed", worker_id=key)
    finally:
        work.close()
