"""Subscribes to the KV events of all ranks and passes them on in order.

One task reads the sockets of all ranks, in slices with a rest between, so that a flood of events
never delays a request. What cannot be applied yet stays in the sockets' queues and finally with
the publishers.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import zmq

from extproc.clock import Clock
from extproc.kv.reorder_buffer import ReorderLimits
from extproc.kv.subscriptions.connection import Shared
from extproc.kv.subscriptions.fd_budget import FdBudget, raise_descriptor_limit
from extproc.kv.subscriptions.rank_stream import RankStream
from extproc.kv.subscriptions.sockets import Context
from extproc.kv.subscriptions.subscription import (
    Applier,
    EventEndpoint,
    SubscriberSettings,
    SubscriptionState,
)

__all__ = ["KvSubscriber"]

_SLICE_SECONDS: Final = 0.002
_REST_SECONDS: Final = 0.001
_SOCKETS_MAX: Final = 65_535


class KvSubscriber:
    """All subscriptions; made and used on one running event loop.

    Sets the process's limit of open files as high as the system allows.
    """

    def __init__(self, clock: Clock, settings: SubscriberSettings) -> None:
        self._clock = clock
        self._context: Context = zmq.Context(io_threads=2)
        self._context.set(zmq.MAX_SOCKETS, _SOCKETS_MAX)
        share = FdBudget.within(raise_descriptor_limit())
        self._shared = Shared(
            clock=clock,
            settings=settings,
            limits=ReorderLimits(
                rank_batches=settings.reorder_batches,
                rank_bytes=settings.reorder_bytes,
                total_bytes=settings.reorder_total_bytes,
            ),
            context=self._context,
            slots=asyncio.Semaphore(settings.replays_at_once),
            ranks=asyncio.Semaphore(share.ranks),
            replays=asyncio.Semaphore(share.replays),
            opening=asyncio.Lock(),
        )
        self._streams: dict[Applier, RankStream] = {}
        self._states: dict[Applier, SubscriptionState] = {}
        self._ready: deque[RankStream] = deque()
        self._woken = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    @property
    def states(self) -> Mapping[Applier, SubscriptionState]:
        """A live view of all subscriptions, by applier."""
        return MappingProxyType(self._states)

    def add(self, endpoint: EventEndpoint, applier: Applier) -> SubscriptionState:
        """Subscribe until `remove`; gives the subscription's live state.

        Raises ValueError if the applier has a subscription, and RuntimeError after `close`.
        """
        if self._context.closed:
            raise RuntimeError("the subscriber is closed")
        if applier in self._streams:
            raise ValueError(f"already subscribed: {applier.pages}")
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())
        stream = RankStream(self._shared, endpoint, applier, self._wake)
        self._streams[applier] = stream
        self._states[applier] = stream.state
        stream.start()
        return stream.state

    async def remove(self, applier: Applier) -> None:
        """End a subscription, if there is one; from the call on its applier is left alone."""
        self._states.pop(applier, None)
        stream = self._streams.pop(applier, None)
        if stream is not None:
            await stream.close()

    async def close(self) -> None:
        """End all subscriptions; nothing can be added afterwards."""
        await asyncio.gather(*(self.remove(applier) for applier in list(self._streams)))
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if not self._context.closed:
            await asyncio.to_thread(self._context.term)

    def _wake(self, stream: RankStream) -> None:
        if not stream.queued:
            stream.queued = True
            self._ready.append(stream)
            self._woken.set()

    async def _read(self) -> None:
        """Let the streams that have work do it, a slice at a time."""
        clock = self._clock
        while True:
            await self._woken.wait()
            self._woken.clear()
            until = clock.monotonic() + _SLICE_SECONDS
            while self._ready and clock.monotonic() < until:
                stream = self._ready.popleft()
                stream.queued = False
                try:
                    unfinished = stream.work(until)
                except Exception:
                    # An unexpected error of one stream must not stop the others.
                    stream.log.exception("kv_stream_failed")
                else:
                    if unfinished:
                        self._wake(stream)
            if self._ready:
                self._woken.set()
                await clock.sleep(_REST_SECONDS)
