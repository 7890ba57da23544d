"""Prefill and decode legs as in SGLang: sent at the same time, they meet in a room.

A prefill worker listens at its bootstrap port. The decode worker connects there, learns how
many ranks there are and asks for a room on the rank where it expects the prefill. The answer
comes with the KV. It fails as the engine does: legs on different ranks or in different rooms
wait until their time-out, and so does a leg whose other half has failed, has left or never
came. Only an unreachable prefill worker is noticed at once.
"""

import asyncio
from contextlib import ExitStack
from typing import Final

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from extproc.simulator.bodies import InferenceRequest
from extproc.simulator.bootstrap_fields import Meeting, meetings, prefill_rank
from extproc.simulator.errors import ApiError
from extproc.simulator.generation import Job
from extproc.simulator.legs import Leg, RemotePrefill, TransferError, Transfers, Wait
from extproc.simulator.rooms import Offer, RoomKey, Rooms, RoomTakenError
from extproc.simulator.settings import SimulatorSettings
from extproc.simulator.side_server import UNREACHABLE, SideServer, patient_client
from extproc.simulator.split import Output

__all__ = ["SglangPd"]

_RETRY_SECONDS: Final = 0.05


class _PrefillInfo(msgspec.Struct):
    dp_size: int


class SglangPd:
    """Both sides of the protocol; the worker's role decides which one it runs."""

    def __init__(self, settings: SimulatorSettings, port: int) -> None:
        """`port` is a prefill worker's bootstrap port; 0 picks a free one at the first start."""
        self.transfers = Transfers(settings.bootstrap_timeout_seconds)
        self._settings = settings
        self._mode: str = settings.disaggregation_mode
        self._rooms = Rooms()
        self._client: aiohttp.ClientSession | None = None
        self._switching = asyncio.Lock()
        self._server = SideServer(
            "disaggregation_bootstrap_port",
            settings.host,
            port,
            [web.get("/info", self._info), web.post("/rooms/{rank:\\d+}/{room:\\d+}", self._take)],
        )

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def held_requests(self) -> int:
        return 0

    async def start(self) -> None:
        if self._mode == "prefill":
            await self._server.start()
        if self._mode != "null":
            self._client = patient_client()

    async def stop(self) -> None:
        await self._server.stop()
        if self._client is not None:
            await self._client.close()

    async def switch(self, mode: str) -> None:
        async with self._switching:
            if mode == self._mode:
                return
            if mode == "prefill":
                await self._server.start()
            self._mode = mode
            if mode != "prefill":
                await self._server.stop()

    def leg(self, asked: InferenceRequest) -> Leg:
        if self._mode == "prefill":
            return _PrefillLeg(self._rooms, self.transfers, self._settings.dp_size, meetings(asked))
        if self._mode == "decode" and self._client is not None:
            return _DecodeLeg(
                self._client,
                self.transfers,
                self._settings.disaggregation_bootstrap_port,
                meetings(asked),
                prefill_rank(asked),
            )
        return Leg()

    async def _info(self, request: web.Request) -> web.Response:
        info = _PrefillInfo(dp_size=self._settings.dp_size)
        return web.Response(body=msgspec.json.encode(info), content_type="application/json")

    async def _take(self, request: web.Request) -> web.Response:
        """Answers when the KV of the room is ready."""
        await self._rooms.take((int(request.match_info["rank"]), int(request.match_info["room"])))
        return web.Response()


class _PrefillLeg(Leg):
    """Computes the prompts, waits until their KV is fetched and answers with one token."""

    def __init__(
        self, rooms: Rooms, transfers: Transfers, dp_size: int, places: list[Meeting]
    ) -> None:
        self._rooms = rooms
        self._transfers = transfers
        self._dp_size = dp_size
        self._places = places
        self._keys: list[RoomKey] = []

    def jobs(self, job: Job) -> list[Job]:
        each = job.sequences // len(job.prompts)
        ranked: dict[int, list[Meeting]] = {}
        prompts: dict[int, list[int]] = {}
        for number, place in enumerate(self._places):
            rank = place.room % self._dp_size if job.rank is None else job.rank
            ranked.setdefault(rank, []).append(place)
            prompts.setdefault(rank, []).append(number)
        self._keys = [
            (rank, place.room)
            for rank, places in ranked.items()
            for place in places
            if not place.is_fake
        ]
        return [
            msgspec.structs.replace(
                job,
                prompts=[job.prompts[number] for number in numbers],
                sequences=each * len(numbers),
                max_tokens=1,
                natural_end=False,
                rank=rank,
            )
            for rank, numbers in prompts.items()
        ]

    async def prefill(self, generation: Output) -> None:
        if not self._keys:
            await generation.prefill()
            return
        with ExitStack() as stack, self._transfers.waiting(len(self._keys)) as wait:
            try:
                offers = [stack.enter_context(self._rooms.offer(key)) for key in self._keys]
            except RoomTakenError as error:
                raise ApiError(400, str(error)) from error
            try:
                async with self._transfers.patience():
                    await self._hand_over(generation, offers)
            finally:
                wait.done = sum(offer.is_taken for offer in offers)

    async def _hand_over(self, generation: Output, offers: list[Offer]) -> None:
        await generation.prefill()
        if generation.is_aborted:
            return
        for key in self._keys:
            self._rooms.computed(key)
        await generation.unless_aborted(_all_taken(offers))


class _DecodeLeg(RemotePrefill):
    """Fetches the KV of the prompts from the prefill worker and decodes."""

    def __init__(
        self,
        client: aiohttp.ClientSession,
        transfers: Transfers,
        default_port: int,
        places: list[Meeting],
        rank: int | None,
    ) -> None:
        self._places = [place for place in places if not place.is_fake]
        super().__init__(transfers, len(self._places))
        self._client = client
        self._default_port = default_port
        self._rank = rank

    async def _fetch(self, wait: Wait) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for place in self._places:
                    group.create_task(self._fetch_one(place, wait))
        except ExceptionGroup as failed:
            # The first failure has cancelled the other tasks.
            raise failed.exceptions[0] from None

    async def _fetch_one(self, place: Meeting, wait: Wait) -> None:
        address, ranks = await self._connect(place)
        rank = place.room % ranks if self._rank is None else self._rank
        room = address / "rooms" / str(rank) / str(place.room)
        while not await self._has_kv(room):  # noqa: ASYNC110  # no code here could set an event
            await asyncio.sleep(_RETRY_SECONDS)
        wait.done += 1

    async def _connect(self, place: Meeting) -> tuple[URL, int]:
        """Ask the prefill worker for its ranks; raises TransferError."""
        port = self._default_port if place.port is None else place.port
        host = (place.host or "").strip("[]")
        try:
            address = URL.build(scheme="http", host=host, port=port)
            async with self._client.get(address / "info") as response:
                response.raise_for_status()
                info = msgspec.json.decode(await response.read(), type=_PrefillInfo)
        except UNREACHABLE as error:
            raise TransferError(f"no prefill worker at {place.host}:{port}: {error}") from error
        return address, max(1, info.dp_size)

    async def _has_kv(self, room: URL) -> bool:
        """Wait for the KV of a room without a time limit; the end of the prefill is not noticed."""
        try:
            async with self._client.post(room) as response:
                return response.status == 200
        except UNREACHABLE:
            return False


async def _all_taken(offers: list[Offer]) -> None:
    for offer in offers:
        await offer.until_taken()
