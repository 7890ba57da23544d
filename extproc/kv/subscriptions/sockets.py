"""The ZMQ sockets of a subscription, and the parsing of the messages they receive.

libzmq announces new messages by an edge on a file descriptor. A Channel answers every edge at
once, which also lets libzmq send the subscription on a fresh connection, and leaves the reading
to its owner: unread messages fill the socket's queue, then the connection, then the publisher's
queue. No message needs a task or a future, so thousands of silent sockets cost nothing.
"""

import asyncio
from collections.abc import Callable
from typing import Final, TypeAlias

import zmq
from msgspec import Struct
from zmq.utils.monitor import parse_monitor_message

from extproc.clock import Clock, wait_for_first

__all__ = [
    "Batch",
    "Channel",
    "Context",
    "Replay",
    "ReplayEnd",
    "parse_live",
    "parse_reply",
]

Context: TypeAlias = zmq.Context[zmq.Socket[bytes]]

RECONNECT_MIN_SECONDS: Final = 0.2
RECONNECT_MAX_SECONDS: Final = 5.0
# More than a batch with a million token ids.
_MESSAGE_MAX_BYTES: Final = 32 << 20
_FRAMES_MAX: Final = 5
_SEQ_BYTES: Final = 8
_END_SEQ: Final = b"\xff" * _SEQ_BYTES
# A larger number must be random bytes.
_SEQ_MAX: Final = 1 << 63
# A dead peer is noticed after about twice this time.
_HEARTBEAT_SECONDS: Final = 10
# The engine buffers 10 000 batches, and its socket drops what finds no room on the way.
_REPLAY_QUEUE_MESSAGES: Final = 16_384
# A replay that takes longer than this many time-outs has failed.
_TIMEOUTS_MAX: Final = 12
_MS: Final = 1000


class Batch(Struct):
    """One numbered payload."""

    seq: int
    payload: bytes


class ReplayEnd(Struct):
    """The marker after the last buffered batch."""


def parse_live(frames: list[bytes], topic: bytes) -> Batch | None:
    """Parse a published message; None for a topic that only begins with ours.

    Raises ValueError if it cannot be parsed.
    """
    if len(frames) != 3:
        raise ValueError("not three frames")
    if frames[0] != topic:
        return None
    return Batch(_parse_seq(frames[1]), frames[2])


def parse_reply(frames: list[bytes], topic: bytes) -> Batch | ReplayEnd | None:
    """Parse a message of a replay, with the topic or, from older engines, without.

    None for another topic. Raises ValueError if it cannot be parsed.
    """
    if len(frames) not in (3, 4) or frames[0]:
        raise ValueError("not an empty frame and two or three more")
    seq, payload = frames[-2:]
    if seq == _END_SEQ:
        return ReplayEnd()
    if len(frames) == 4 and frames[1] != topic:
        return None
    return Batch(_parse_seq(seq), payload)


def _parse_seq(frame: bytes) -> int:
    seq = int.from_bytes(frame, "big")
    if len(frame) != _SEQ_BYTES or seq >= _SEQ_MAX:
        raise ValueError("not a sequence number")
    return seq


class Channel:
    """One connecting socket; `on_ready` is called when something happened to it.

    With `watched`, `connected` and `lost` show the state of its first connection, as of the last
    `refresh`. Raises zmq.ZMQError when the process has no more sockets.
    """

    def __init__(
        self,
        context: Context,
        address: str,
        on_ready: Callable[[], None],
        *,
        topic: bytes | None = None,
        queue_messages: int,
        watched: bool = True,
    ) -> None:
        self.connected = asyncio.Event()
        self.lost = asyncio.Event()
        self.readable = False
        self._loop = asyncio.get_running_loop()
        self._on_ready = on_ready
        self._discarding = False
        self._descriptors: list[int] = []
        self._monitor: zmq.Socket[bytes] | None = None
        self._socket = context.socket(zmq.DEALER if topic is None else zmq.SUB)
        try:
            _configure(self._socket, queue_messages)
            if topic is not None:
                self._socket.setsockopt(zmq.SUBSCRIBE, topic)
            if watched:
                self._monitor = self._socket.get_monitor_socket(
                    zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
                )
                self._monitor.setsockopt(zmq.LINGER, 0)
                self._listen(self._monitor, self._on_monitor_edge)
            self._listen(self._socket, self._on_edge)
            self._socket.connect(address)
        except BaseException:
            self.close()
            raise
        # Edges during the set-up may have been missed.
        self._on_edge()
        self._on_monitor_edge()

    def refresh(self) -> None:
        """Bring `connected` and `lost` up to date."""
        monitor = self._monitor
        while monitor is not None and _has_message(monitor):
            event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))["event"]
            if event == zmq.Event.DISCONNECTED:
                # Before the handshake, libzmq itself tries again.
                if self.connected.is_set():
                    self.lost.set()
            else:
                self.connected.set()

    def receive(self) -> list[bytes] | None:
        """The frames of the next message; None if there is no message now.

        A message of more than five frames is cut: an empty list stands for each part of its rest.
        """
        socket = self._socket
        try:
            frames = [socket.recv(zmq.NOBLOCK)]
        except zmq.Again:
            self.readable = False
            return None
        more = socket.getsockopt(zmq.RCVMORE)
        if self._discarding:
            self._discarding = bool(more)
            return []
        while more and len(frames) < _FRAMES_MAX:
            frames.append(socket.recv(zmq.NOBLOCK))
            more = socket.getsockopt(zmq.RCVMORE)
        self._discarding = bool(more)
        return frames

    def send(self, frames: list[bytes]) -> None:
        """Send a message; raises zmq.Again if there is no connection."""
        self._socket.send_multipart(frames, zmq.NOBLOCK)
        # Sending may have used up an edge that announced a message.
        self._on_edge()

    def close(self) -> None:
        """Close the connection and drop all unread messages."""
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)
        self._descriptors = []
        self.readable = False
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
        self._socket.close(linger=0)

    def _listen(self, socket: zmq.Socket[bytes], callback: Callable[[], None]) -> None:
        descriptor = socket.fileno()
        self._loop.add_reader(descriptor, callback)
        self._descriptors.append(descriptor)

    def _on_edge(self) -> None:
        # Asking for the socket's events resets the edge and lets libzmq work.
        if _has_message(self._socket):
            self.readable = True
            self._on_ready()

    def _on_monitor_edge(self) -> None:
        self.refresh()
        self._on_ready()


class Replay:
    """One request for buffered batches, over a connection of its own.

    So the answer to an abandoned request cannot be taken for the answer to the next one.
    """

    def __init__(
        self, context: Context, address: str, start: int, on_ready: Callable[[], None]
    ) -> None:
        self.channel = Channel(context, address, on_ready, queue_messages=_REPLAY_QUEUE_MESSAGES)
        self.last_frame_at = 0.0
        self._start = start

    async def ask_until_failed(
        self, clock: Clock, slots: asyncio.Semaphore, timeout_seconds: float
    ) -> None:
        """Send the request and return when the replay has failed; its end cancels this.

        `slots` bounds how many replays, of thousands of batches each, are received at once. An
        endpoint without a listener takes no slot.
        """
        if not await _happens(self.channel.connected, clock, timeout_seconds):
            return
        async with slots:
            until = clock.monotonic() + timeout_seconds * _TIMEOUTS_MAX
            self.last_frame_at = clock.monotonic()
            self.channel.send([b"", self._start.to_bytes(_SEQ_BYTES, "big")])
            while True:
                wait_until = min(self.last_frame_at + timeout_seconds, until)
                if await _happens(self.channel.lost, clock, wait_until - clock.monotonic()):
                    return
                now = clock.monotonic()
                if self.channel.readable and now < until:
                    self.last_frame_at = now  # frames are there, but have not been read yet
                elif now >= min(self.last_frame_at + timeout_seconds, until):
                    return


async def _happens(event: asyncio.Event, clock: Clock, timeout_seconds: float) -> bool:
    await wait_for_first(event.wait(), clock.sleep(max(0.0, timeout_seconds)))
    return event.is_set()


def _has_message(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


def _configure(socket: zmq.Socket[bytes], queue_messages: int) -> None:
    options = {
        zmq.LINGER: 0,
        zmq.IPV6: 1,
        zmq.RCVHWM: queue_messages,
        zmq.MAXMSGSIZE: _MESSAGE_MAX_BYTES,
        zmq.RECONNECT_IVL: int(RECONNECT_MIN_SECONDS * _MS),
        zmq.RECONNECT_IVL_MAX: int(RECONNECT_MAX_SECONDS * _MS),
        zmq.CONNECT_TIMEOUT: int(RECONNECT_MAX_SECONDS * _MS),
        zmq.HANDSHAKE_IVL: _HEARTBEAT_SECONDS * _MS,
        zmq.HEARTBEAT_IVL: _HEARTBEAT_SECONDS * _MS,
        zmq.HEARTBEAT_TIMEOUT: _HEARTBEAT_SECONDS * _MS,
        zmq.TCP_KEEPALIVE: 1,
        zmq.TCP_KEEPALIVE_IDLE: _HEARTBEAT_SECONDS,
        zmq.TCP_KEEPALIVE_INTVL: _HEARTBEAT_SECONDS,
        zmq.TCP_KEEPALIVE_CNT: 3,
    }
    for option, value in options.items():
        socket.setsockopt(option, value)
