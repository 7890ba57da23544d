"""Lets requests wait while all workers of their model are full.

Without it such a request goes to an engine, which refuses it or lets it wait where no other
request can overtake it. Here it waits in the order of `fair_queue`, for a limited time, and leaves
when a worker has capacity. Off unless a model configures it.

Capacity is looked for by the clock, not by events: it comes from the ends of requests, from reports
of engines and from the ends of avoidances, and a missed event would let a queue stand still.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from extproc.clock import Clock
from extproc.config.models import QueueConfig
from extproc.errors import model_overloaded
from extproc.metrics.service import QueueMetrics
from extproc.routing.fair_queue import FairQueue
from extproc.routing.request import Request
from extproc.routing.spare_capacity import SpareCapacity
from extproc.workers.worker import Worker

__all__ = ["WaitQueue", "renew_queues"]

_log = structlog.get_logger()

_LOOK_SECONDS: Final = 0.01
_LOG_EACH_SECONDS: Final = 10.0
_TENANT_MAX_CHARS: Final = 128


class _Waiting:
    """One request that waits until its `turn` is done; `priority` is its class."""

    __slots__ = ("priority", "turn")

    def __init__(self, priority: str) -> None:
        self.priority = priority
        # True: it goes on. False: another has taken its place.
        self.turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    @property
    def may_go(self) -> bool:
        turn = self.turn
        return turn.done() and not turn.cancelled() and turn.result()


class WaitQueue:
    """The queue of one model. `settings` may be replaced by others with the same classes."""

    def __init__(
        self,
        model: str,
        settings: QueueConfig,
        *,
        spare: SpareCapacity,
        clock: Clock,
        metrics: QueueMetrics,
    ) -> None:
        self.settings = settings
        self._model = model
        self._spare = spare
        self._clock = clock
        self._metrics = metrics
        self._size = metrics.waiting(model)
        self._waiting: FairQueue[_Waiting] = FairQueue(len(settings.priority_classes))
        # Requests that go on and are not counted on a worker yet.
        self._going = 0
        self._task: asyncio.Task[None] | None = None
        self._logged_at = -math.inf

    @property
    def waiting_requests(self) -> int:
        """How many requests wait now."""
        return len(self._waiting)

    async def enter(self, request: Request) -> None:
        """Wait until a worker has capacity; `leave` must follow when the request is on a worker.

        Raises RouterError 503 if the request cannot wait, or has waited for too long.
        """
        if not self._waiting and self._spare_now() > self._going:
            self._going += 1
            return
        waiting = self._join(request)
        began = self._clock.monotonic()
        outcome = "left"
        try:
            async with asyncio.timeout(self.settings.max_wait_secs):
                outcome = "served" if await waiting.turn else "displaced"
        except TimeoutError:
            outcome = "timed_out"
        finally:
            self._waiting.remove(waiting)
            self._size.set(len(self._waiting))
            if outcome not in ("served", "displaced") and waiting.may_go:
                self._going -= 1  # its turn came in the same moment
            self._count(waiting, outcome)
        if outcome != "served":
            raise model_overloaded()
        self._metrics.seconds(self._model).observe(self._clock.monotonic() - began)

    def leave(self) -> None:
        """A request that entered is counted on a worker, or has failed."""
        self._going -= 1

    def with_capacity(self, workers: list[Worker], now: float) -> list[Worker]:
        """The workers that are not full; all of them if all are."""
        settings, spare = self.settings, self._spare
        return [one for one in workers if spare.of(one, settings, now) > 0] or workers

    def _join(self, request: Request) -> _Waiting:
        """Put the request into the queue; raises RouterError 503 if it is full."""
        settings = self.settings
        headers = request.read_headers(
            frozenset((settings.priority_header, settings.tenant_header))
        )
        classes = settings.priority_classes
        priority = headers.get(settings.priority_header, "").strip()
        if priority not in classes:
            priority = settings.default_class
        tenant = headers.get(settings.tenant_header, "").strip()[:_TENANT_MAX_CHARS]
        waiting = _Waiting(priority)
        self._waiting.push(waiting, classes.index(priority), tenant)
        if len(self._waiting) > settings.max_requests:
            last = self._waiting.least_entitled()
            if last is waiting:
                self._waiting.remove(waiting)
                self._count(waiting, "refused")
                raise model_overloaded()
            if last is not None:
                self._waiting.remove(last)
                last.turn.set_result(False)
        self._size.set(len(self._waiting))
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        return waiting

    async def _run(self) -> None:
        """Let requests go while there is capacity, until the queue is empty."""
        while self._waiting:
            spare = self._spare_now()
            while self._waiting and spare > self._going:
                self._going += 1
                self._waiting.pop().turn.set_result(True)
            if self._waiting:
                self._say_that_requests_wait()
            await asyncio.sleep(_LOOK_SECONDS)

    def _spare_now(self) -> float:
        return self._spare.of_model(self._model, self.settings, self._clock.monotonic())

    def _say_that_requests_wait(self) -> None:
        now = self._clock.monotonic()
        if now - self._logged_at >= _LOG_EACH_SECONDS:
            self._logged_at = now
            _log.warning("requests_wait", model=self._model, count=len(self._waiting))

    def _count(self, waiting: _Waiting, outcome: str) -> None:
        self._metrics.outcomes(self._model, waiting.priority, outcome).inc()


def renew_queues(
    settings: Mapping[str, QueueConfig],
    before: Mapping[str, WaitQueue],
    make: Callable[[str, QueueConfig], WaitQueue],
) -> dict[str, WaitQueue]:
    """The queues of another configuration, by model id. What waits in `before` is not lost.

    A queue with other classes is a new one; the requests in the old one leave it as before.
    """
    queues = {}
    for model, one in settings.items():
        known = before.get(model)
        if known is not None and known.settings.priority_classes == one.priority_classes:
            known.settings = one
            queues[model] = known
        else:
            queues[model] = make(model, one)
    return queues
