"""An engine's publisher for tests, with real sockets: PUB for events, ROUTER for replays."""

import asyncio
import contextlib
import itertools
from collections import deque
from types import TracebackType
from typing import Self

import zmq

__all__ = ["Publisher"]

_END_SEQ = b"\xff" * 8
_names = itertools.count()


class Publisher:
    """Publishes payloads that contain the publisher's name and their sequence number.

    `port` and `replay_port` are chosen unless given. `kill` frees them at once, as the death of
    a process does; another one may then be started there.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        replay_port: int = 0,
        topic: bytes = b"",
        topic_in_replies: bool = True,
        buffered: int = 10_000,
        answers: bool = True,
        router_queue: int = 0,
        host: str = "127.0.0.1",
    ) -> None:
        self.name = next(_names)
        self.seq = 0
        self.subscribed = 0
        self.requests: list[int] = []
        self.answers = answers
        # Messages that are sent before each answer.
        self.junk: list[list[bytes]] = []
        self._topic = topic
        self._topic_in_replies = topic_in_replies
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffered)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # A PUB socket that reports subscriptions.
        self._pub = self._context.socket(zmq.XPUB)
        self._pub.setsockopt(zmq.XPUB_VERBOSER, 1)
        self._pub.setsockopt(zmq.SNDHWM, 100_000)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.SNDHWM, router_queue)
        for socket in (self._pub, self._router):
            socket.setsockopt(zmq.IPV6, 1)
        self.port = _bind(self._pub, host, port)
        self.replay_port = _bind(self._router, host, replay_port)
        self._serving = asyncio.create_task(self._serve())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.kill()

    async def kill(self) -> None:
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._context.destroy(linger=0)

    def successor(self) -> "Publisher":
        """Another publisher at the same ports, as after a restart of the engine."""
        return Publisher(port=self.port, replay_port=self.replay_port, topic=self._topic)

    def payload(self, seq: int) -> bytes:
        return f"{self.name}:{seq}".encode()

    def payloads(self, start: int = 0) -> list[bytes]:
        return [self.payload(seq) for seq in range(start, self.seq)]

    def publish(self, count: int = 1, *, lost: bool = False, buffered: bool = True) -> None:
        """Publish the next batches; lost ones are only in the buffer."""
        for _ in range(count):
            payload = self.payload(self.seq)
            if buffered:
                self._buffer.append((self.seq, payload))
            if not lost:
                self.send([self._topic, self.seq.to_bytes(8, "big"), payload])
            self.seq += 1

    def send(self, frames: list[bytes]) -> None:
        self._pub.send_multipart(frames, zmq.NOBLOCK)

    async def _serve(self) -> None:
        while True:
            with contextlib.suppress(zmq.Again):
                while True:
                    message = self._pub.recv(zmq.NOBLOCK)
                    self.subscribed += 1 if message[:1] == b"\x01" else -1
            with contextlib.suppress(zmq.Again):
                while True:
                    self._answer(self._router.recv_multipart(zmq.NOBLOCK))
            await asyncio.sleep(0.002)

    def _answer(self, request: list[bytes]) -> None:
        client, delimiter, start_frame = request
        assert delimiter == b""
        start = int.from_bytes(start_frame, "big")
        self.requests.append(start)
        if not self.answers:
            return
        for frames in self.junk:
            self._router.send_multipart([client, *frames])
        for seq, payload in self._buffer:
            if seq >= start:
                self._reply(client, self._topic, seq.to_bytes(8, "big"), payload)
        self._reply(client, b"", _END_SEQ, b"")

    def _reply(self, client: bytes, topic: bytes, seq: bytes, payload: bytes) -> None:
        topics = [topic] if self._topic_in_replies else []
        self._router.send_multipart([client, b"", *topics, seq, payload])


def _bind(socket: zmq.Socket[bytes], host: str, port: int) -> int:
    if not port:
        return socket.bind_to_random_port(f"tcp://{host}")
    socket.bind(f"tcp://{host}:{port}")
    return port
