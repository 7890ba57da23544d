"""The rooms in which the two legs of a request meet: the prefill side, without sockets.

A leg offers the KV it computes under its rank and the number of its room; a decode worker asks
for the same pair. The first one waits. Neither learns when the other goes away: as in the
engine, only its own time-out ends the wait.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Offer", "RoomKey", "RoomTakenError", "Rooms"]

RoomKey = tuple[int, int]  # rank, number of the room


class RoomTakenError(Exception):
    """A second prefill leg came into the same room."""


class Offer:
    """The KV of one prompt, available after it is computed."""

    def __init__(self) -> None:
        self.is_computed = False
        self._taken = asyncio.Event()

    @property
    def is_taken(self) -> bool:
        return self._taken.is_set()

    def take(self) -> None:
        self._taken.set()

    async def until_taken(self) -> None:
        await self._taken.wait()


class Rooms:
    """The offers of one worker and the requests that wait for them."""

    def __init__(self) -> None:
        self._offers: dict[RoomKey, Offer] = {}
        self._takers: dict[RoomKey, list[asyncio.Future[None]]] = {}

    def __len__(self) -> int:
        return len(self._offers.keys() | self._takers.keys())

    @contextmanager
    def offer(self, key: RoomKey) -> Iterator[Offer]:
        """A room for KV that will be computed, until the context ends; raises RoomTakenError."""
        if key in self._offers:
            raise RoomTakenError(f"bootstrap room {key[1]} is in use on rank {key[0]}")
        offer = self._offers[key] = Offer()
        try:
            yield offer
        finally:
            del self._offers[key]

    def computed(self, key: RoomKey) -> None:
        self._offers[key].is_computed = True
        self._match(key)

    async def take(self, key: RoomKey) -> None:
        """Wait without a time limit for KV that no other request has taken."""
        taker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._takers.setdefault(key, []).append(taker)
        self._match(key)
        try:
            await taker
        finally:
            self._takers[key].remove(taker)
            if not self._takers[key]:
                del self._takers[key]

    def _match(self, key: RoomKey) -> None:
        offer = self._offers.get(key)
        taker = next((each for each in self._takers.get(key, ()) if not each.done()), None)
        if offer is not None and offer.is_computed and not offer.is_taken and taker is not None:
            offer.take()
            taker.set_result(None)
