"""A pool of threads with a bounded queue, for work that would hold the event loop too long."""

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
        """The result of `work`; raises EncoderBusyError if the queue is full or the pool is closed.

        Work that has begun runs to its end, and counts, even if its caller is cancelled.
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
        """Cancel the work that is waiting. Running work finishes in its thread."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _done(self, _: "Future[Any] | None") -> None:
        with self._lock:
            self._pending -= 1
