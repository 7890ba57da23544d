"""Tasks in lanes: those of one lane run one after the other, lanes run side by side."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

__all__ = ["KeyedTasks"]

_log = structlog.get_logger()


class KeyedTasks:
    """Holds every task until it has ended, so that none is left behind."""

    def __init__(self) -> None:
        # The last task of each lane, and all that have not ended.
        self._tails: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def is_busy(self, lane: str) -> bool:
        """Something runs or waits in the lane."""
        return lane in self._tails

    def tails(self) -> list[asyncio.Task[None]]:
        """The last task of every lane that is busy."""
        return list(self._tails.values())

    def start(self, lane: str, work: Coroutine[Any, Any, None]) -> None:
        """Run the work after what was started before in the lane; nothing after `close`."""
        if self._closed:
            work.close()
            return
        task = asyncio.create_task(_after(self._tails.get(lane), work))
        self._tails[lane] = task
        self._tasks.add(task)

        def forget(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if self._tails.get(lane) is done:
                del self._tails[lane]

        task.add_done_callback(forget)

    async def close(self) -> None:
        """Cancel what has not ended, and wait for its end."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _after(before: asyncio.Task[None] | None, work: Coroutine[Any, Any, None]) -> None:
    try:
        if before is not None:
            await asyncio.wait([before])
        await work
    except Exception:
        # One worker's surprise must not stop the others from joining.
        _log.exception("worker_event_failed")
    finally:
        work.close()
