"""A simple consumer of KV events: real sockets, decoded msgpack."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from extproc.simulator.settings import SimulatorSettings

from .clients import SimulatedWorker, endless

END = b"\xff" * 8
PATIENCE_SECONDS = 60
CLEARED = {"type": "AllBlocksCleared"}


def publishing(**fields: Any) -> SimulatorSettings:
    """A worker of no delays that publishes; pages of four tokens."""
    defaults: dict[str, Any] = {
        "prefill_tokens_per_second": 1e9,
        "decode_milliseconds_per_token": 0,
        "kv_events_port": 0,
        "page_size": 4,
    }
    return SimulatorSettings(**(defaults | fields))


class Batch(msgspec.Struct, frozen=True):
    seq: int
    events: list[Any]
    rank: int


def batch(seq: bytes, payload: bytes) -> Batch:
    _, events, rank = msgspec.msgpack.decode(payload)
    return Batch(int.from_bytes(seq, "big"), events, rank)


class KvClient:
    """Subscribes and asks for replays at one worker; `close` it."""

    def __init__(self, worker: SimulatedWorker) -> None:
        ports = worker.simulator.kv_ports
        assert ports is not None
        self.ports = ports
        self._worker = worker
        settings = worker.simulator.settings
        self._has_topic = settings.wire_format == "map"
        self._topic = settings.kv_topic.encode()
        self._context = zmq.asyncio.Context()

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _connected(self, kind: int, port: int) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        if kind == zmq.SUB:
            socket.subscribe(b"")
        socket.connect(f"tcp://127.0.0.1:{port}")
        return socket

    async def subscribed(self) -> zmq.asyncio.Socket:
        """A subscriber that receives from rank 0 and has read all messages so far."""
        socket = self._connected(zmq.SUB, self.ports.events)
        await self.heard(socket)
        return socket

    async def heard(self, socket: zmq.asyncio.Socket) -> Batch:
        """Flush the cache until the socket receives the event; returns its last batch."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await socket.poll(50):
                async with self._worker.session.post("/flush_cache") as response:
                    assert response.status == 200
            last = await socket.recv_multipart()
            while await socket.poll(100):
                last = await socket.recv_multipart()
        return batch(*last[1:])

    async def loads(self, count: int, during: Callable[[], Awaitable[Any]]) -> list[list[Any]]:
        """This number of load reports of rank 0 after the first one."""
        assert self.ports.load is not None
        socket = self._connected(zmq.SUB, self.ports.load)
        await received(socket)
        await during()
        return [msgspec.msgpack.decode((await received(socket))[2]) for _ in range(count)]

    async def load(self, rank: int = 0) -> list[Any]:
        """The next load report of a rank."""
        assert self.ports.load is not None
        socket = self._connected(zmq.SUB, self.ports.load + rank)
        async with asyncio.timeout(PATIENCE_SECONDS):
            topic, seq, payload = await socket.recv_multipart()
        socket.close()
        assert (topic, len(seq)) == (b"load", 8)
        decoded: list[Any] = msgspec.msgpack.decode(payload)
        return decoded

    async def replay(self, start: int = 0, rank: int = 0) -> list[Batch]:
        """The replay from this number on; engines that send arrays omit the topic."""
        assert self.ports.replay is not None
        socket = self._connected(zmq.DEALER, self.ports.replay + rank)
        await socket.send_multipart([b"", start.to_bytes(8, "big")])
        head = [b"", self._topic] if self._has_topic else [b""]
        got = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (frames := await socket.recv_multipart())[-2] != END:
                assert frames[:-2] == head
                got.append(batch(*frames[-2:]))
        assert frames == [*([b"", b""] if self._has_topic else [b""]), END, b""]
        socket.close()
        return got


async def received(socket: zmq.asyncio.Socket) -> list[bytes]:
    async with asyncio.timeout(PATIENCE_SECONDS):
        frames: list[bytes] = await socket.recv_multipart()
        return frames


def generate(tokens: list[int], max_new_tokens: int = 0, **fields: Any) -> dict[str, Any]:
    sampling = {"max_new_tokens": max_new_tokens}
    return {"input_ids": tokens, "sampling_params": sampling, **fields}


def endless_fields() -> dict[str, Any]:
    given = endless()
    names = ("prefill_tokens_per_second", "decode_milliseconds_per_token")
    return {name: getattr(given, name) for name in names}


Connect = Callable[[SimulatedWorker], KvClient]
