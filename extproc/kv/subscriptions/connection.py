"""Keeps one rank connected: a live socket for each connection in turn, and one for load reports.

A batch can thus never be taken for one of the engine process before or after. Separate from the
stream, which decides what the received messages mean: this is the only place that waits for a
rank's publisher to come back.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import zmq
from msgspec import Struct
from structlog.typing import FilteringBoundLogger

from extproc.clock import Clock
from extproc.kv.reorder_buffer import ReorderLimits
from extproc.kv.subscriptions.sockets import (
    RECONNECT_MAX_SECONDS,
    RECONNECT_MIN_SECONDS,
    Channel,
    Context,
)
from extproc.kv.subscriptions.subscription import EventEndpoint, SubscriberSettings

__all__ = ["LIVE_QUEUE_MESSAGES", "Connection", "Shared"]

LIVE_QUEUE_MESSAGES: Final = 1000
_LOAD_QUEUE_MESSAGES: Final = 64


class Shared(Struct):
    """What the streams of all ranks share."""

    clock: Clock
    settings: SubscriberSettings
    limits: ReorderLimits
    context: Context
    # Replays that may be under way.
    slots: asyncio.Semaphore
    # Ranks that may have sockets, and replays that may have one.
    ranks: asyncio.Semaphore
    replays: asyncio.Semaphore
    # One socket is opened at a time, each in a turn of its own.
    opening: asyncio.Lock


class Connection:
    """The sockets of one rank; `wake` is called when one of them is worth looking at."""

    def __init__(
        self,
        shared: Shared,
        endpoint: EventEndpoint,
        wake: Callable[[], None],
        log: FilteringBoundLogger,
    ) -> None:
        self._shared = shared
        self._clock = shared.clock
        self._endpoint = endpoint
        self._wake = wake
        self._log = log
        self._live: Channel | None = None
        self._load: Channel | None = None
        self._live_ended = asyncio.Event()

    async def keep(self) -> None:
        """Connect again and again, until cancelled."""
        if self._shared.ranks.locked():
            self._log.error(
                "kv_descriptors_short",
                fix="this rank waits for another to leave: raise the limit of open files",
            )
        async with self._shared.ranks:
            await self._connect_again_and_again()

    async def _connect_again_and_again(self) -> None:
        """Open a socket for each connection in turn; libzmq itself retries only the first.

        The wait grows with connections that do not last, such as those that break off at a
        message of forbidden size.
        """
        delay = RECONNECT_MIN_SECONDS
        while True:
            opened_at = self._clock.monotonic()
            self._live_ended.clear()
            try:
                async with self._shared.opening:
                    self._open()
                    await asyncio.sleep(0)
                await self._live_ended.wait()
            except zmq.ZMQError as error:
                if delay == RECONNECT_MIN_SECONDS:
                    self._log.error("kv_socket_failed", error=str(error))
            if self._clock.monotonic() - opened_at > 2 * RECONNECT_MAX_SECONDS:
                delay = RECONNECT_MIN_SECONDS
            await self._clock.sleep(delay)
            delay = min(2 * delay, RECONNECT_MAX_SECONDS)

    def _open(self) -> None:
        endpoint, context = self._endpoint, self._shared.context
        if endpoint.load_port is not None and self._load is None:
            self._load = Channel(
                context,
                endpoint.address(endpoint.load_port),
                self._wake,
                topic=endpoint.load_topic.encode(),
                queue_messages=_LOAD_QUEUE_MESSAGES,
                watched=False,
            )
        self._live = Channel(
            context,
            endpoint.address(endpoint.port),
            self._wake,
            topic=endpoint.topic.encode(),
            queue_messages=LIVE_QUEUE_MESSAGES,
        )

    def refresh(self) -> bool | None:
        """Whether the live socket is connected now; None while it is still connecting.

        A lost connection is closed. Called before each round of reads, much more often than
        libzmq can reconnect.
        """
        live = self._live
        if live is None:
            return None
        live.refresh()
        if live.lost.is_set():
            self.refuse()
            return False
        return True if live.connected.is_set() else None

    def refuse(self) -> None:
        """Give up the live connection; the next one is made after a wait."""
        if self._live is not None:
            self._live.close()
            self._live = None
            self._live_ended.set()

    def receive_live(self) -> list[bytes] | None:
        """The next live message, as Channel.receive gives it."""
        live = self._live
        return live.receive() if live is not None and live.readable else None

    def receive_loads(self) -> list[list[bytes]]:
        """The load messages that have come, oldest first."""
        messages: list[list[bytes]] = []
        while len(messages) < _LOAD_QUEUE_MESSAGES and self._load and self._load.readable:
            frames = self._load.receive()
            if frames is None:
                break
            messages.append(frames)
        return messages

    def close(self) -> None:
        """Close both sockets, with all that was not read."""
        for channel in (self._live, self._load):
            if channel is not None:
                channel.close()
        self._live = self._load = None
