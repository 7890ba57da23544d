"""Threads for work that takes longer than the event loop can wait, with a bound on the queue."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

from extproc.tokenization.errors import EncoderBusyError

__all__ = ["BoundedPool"]

_Result = TypeVar("_Result")


class BoundedPool:
    """Runs work in `threads` threads while at most `max_waiting` more wait for one of them."""

    def __init__(self, threads: int, max_waiting: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="tokens")
        self._max_pending = threads + max_waiting
        self._pending = 0
        self._lock = Lock()

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`; raises EncoderBusyError if too much is waiting, or after the end.

        Work of a cancelled caller that has begun still takes up its thread, and counts.
        """
        with self._lock:
            if self._pending >= self._max_pending:
                raise EncoderBusyError("too many texts are waiting to be encoded")
            self._pending += 1
        try:
            future = self._executor.submit(work)
        except RuntimeError:
            self._done(None)
            raise EncoderBusyError("the encoder is closed") from None
        future.add_done_callback(self._done)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Give up what is waiting; what runs finishes by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _done(self, _: "Future[Any] | None") -> None:
        with self._lock:
            self._pending -= 1
