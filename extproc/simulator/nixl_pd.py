"""Prefill and decode legs as with vLLM's NIXL connector: one after the other.

The answer of the first leg says where its blocks are. The second leg fetches them there,
then they are freed. Blocks that are not fetched are freed after a time-out.
"""

import asyncio
import itertools
import uuid
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from extproc.simulator.binding import dialled
from extproc.simulator.bodies import InferenceRequest
from extproc.simulator.errors import ApiError
from extproc.simulator.legs import Leg, RemotePrefill, TransferError, Transfers, Wait
from extproc.simulator.settings import SimulatorSettings
from extproc.simulator.side_server import UNREACHABLE, SideServer, patient_client
from extproc.simulator.split import Output

__all__ = ["NixlPd"]


class _Params(msgspec.Struct, kw_only=True):
    """`kv_transfer_params` of a request."""

    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    remote_engine_id: str | None = None
    remote_block_ids: list[int] | None = None
    remote_host: str | None = None
    remote_port: int | str | None = None


class _Blocks(msgspec.Struct, frozen=True):
    """All blocks of a request, fetched together."""

    engine_id: str
    block_ids: tuple[int, ...]


_blocks_decoder: Final = msgspec.json.Decoder(_Blocks)


class _Held(msgspec.Struct):
    generation: Output
    timer: asyncio.TimerHandle


class NixlPd:
    """Both sides of the protocol; each request chooses its side."""

    def __init__(self, settings: SimulatorSettings, port: int) -> None:
        """`port` is the side channel's; 0 picks a free one at the first start."""
        self.transfers = Transfers(settings.bootstrap_timeout_seconds)
        self._settings = settings
        self._engine_id = str(uuid.uuid4())
        self._numbers = itertools.count(1)
        self._held: dict[tuple[int, ...], _Held] = {}
        self._client: aiohttp.ClientSession | None = None
        self._server = SideServer(
            "nixl_side_channel_port", settings.host, port, [web.post("/fetch", self._serve)]
        )

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def held_requests(self) -> int:
        return len(self._held)

    async def start(self) -> None:
        await self._server.start()
        self._client = patient_client()

    async def stop(self) -> None:
        for held in self._held.values():
            held.timer.cancel()
        self._held.clear()
        await self._server.stop()
        if self._client is not None:
            await self._client.close()

    async def switch(self, mode: str) -> None:
        """Do nothing: every worker runs both legs, whatever its role."""

    def leg(self, asked: InferenceRequest) -> Leg:
        if asked.kv_transfer_params is None:
            return Leg()
        try:
            params = msgspec.convert(asked.kv_transfer_params, _Params)
        except msgspec.ValidationError as error:
            raise ApiError(400, f"kv_transfer_params: {error}") from error
        if params.do_remote_prefill and self._client is not None:
            return _DecodeLeg(self._client, self.transfers, params)
        return _PrefillLeg(self) if params.do_remote_decode else Leg()

    def hold(self, generation: Output, prompt_tokens: int) -> dict[str, Any]:
        """Keep a request's blocks until they are fetched; returns the fields for the other leg."""
        blocks = max(1, -(-prompt_tokens // self._settings.page_size))
        ids = tuple(itertools.islice(self._numbers, blocks))
        generation.keep_blocks()
        patience = self._settings.bootstrap_timeout_seconds
        timer = asyncio.get_running_loop().call_later(patience, self._expire, ids)
        self._held[ids] = _Held(generation, timer)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self._engine_id,
            "remote_block_ids": list(ids),
            "remote_host": dialled(self._settings.host),
            "remote_port": self.port,
            "tp_size": 1,
        }

    def _expire(self, ids: tuple[int, ...]) -> None:
        self.transfers.timed_out += 1
        self._held.pop(ids).generation.free_blocks()

    async def _serve(self, request: web.Request) -> web.Response:
        try:
            wanted = _blocks_decoder.decode(await request.read())
        except msgspec.DecodeError as error:
            raise web.HTTPBadRequest from error
        if wanted.engine_id != self._engine_id or wanted.block_ids not in self._held:
            raise web.HTTPNotFound
        held = self._held.pop(wanted.block_ids)
        held.timer.cancel()
        held.generation.free_blocks()
        self.transfers.transferred += 1
        return web.Response()


class _PrefillLeg(Leg):
    """Computes the prompt and keeps its blocks."""

    def __init__(self, pd: NixlPd) -> None:
        self._pd = pd

    def finish(self, generation: Output) -> dict[str, Any]:
        if generation.is_aborted:
            return {}
        return {"kv_transfer_params": self._pd.hold(generation, generation.prompt_tokens)}


class _DecodeLeg(RemotePrefill):
    """Fetches the blocks that the first leg's answer names, and decodes."""

    def __init__(
        self, client: aiohttp.ClientSession, transfers: Transfers, params: _Params
    ) -> None:
        super().__init__(transfers, rooms=1)
        self._client = client
        self._params = params

    async def _fetch(self, wait: Wait) -> None:
        params = self._params
        place = f"{params.remote_host}:{params.remote_port}"
        blocks = _Blocks(params.remote_engine_id or "", tuple(params.remote_block_ids or ()))
        try:
            host = (params.remote_host or "").strip("[]")
            address = URL.build(scheme="http", host=host, port=int(params.remote_port or 0))
            body = msgspec.json.encode(blocks)
            async with self._client.post(address / "fetch", data=body) as response:
                status = response.status
        except UNREACHABLE as error:
            raise TransferError(f"no worker with these blocks at {place}: {error}") from error
        if status != 200:
            raise TransferError(f"the worker at {place} does not hold these blocks")
        wait.done = 1
