"""Publishes KV events, their replay and load reports over ZMQ, as an engine does.

One PUB socket for events, one ROUTER for replay and one PUB for load on every rank, each at
its base port plus the rank. All work happens on the event loop, so a replay is served
between two publishes and never during one. Sending on these sockets never blocks.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import zmq

from extproc.simulator.binding import with_patience
from extproc.simulator.cache_events import CacheEvent, Removed, Stored
from extproc.simulator.engine import RankLoad
from extproc.simulator.faults import WorkerFaults
from extproc.simulator.kv_encoding import EventEncoder, encode_batch, encode_load
from extproc.simulator.kv_sockets import bind_ranks
from extproc.simulator.settings import SimulatorSettings
from extproc.simulator.vllm_encoding import VllmEventEncoder

__all__ = ["KvPorts", "KvPublisher"]

_LOAD_TOPIC: Final = b"load"
_REPLAYED_BATCHES: Final = 10_000
_END_SEQ: Final = b"\xff" * 8
_LOAD_INTERVAL_SECONDS: Final = 0.9  # one report a second is due, also when the timer is late


class KvPorts(msgspec.Struct, frozen=True, kw_only=True):
    """The ports of rank 0; None for a socket that is not used."""

    events: int
    replay: int | None
    load: int | None


class KvPublisher:
    """Publishes for the ranks of one worker, from `start` to `stop`; an engine's observer.

    Reports before `start` and after `stop` are lost, as with an engine that is down.
    """

    def __init__(self, settings: SimulatorSettings) -> None:
        self._settings = settings
        self._ranks: list[_RankSockets] = []
        self._sockets: list[zmq.Socket[bytes]] = []
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._load_timer: asyncio.TimerHandle | None = None
        self.ports: KvPorts | None = None

    async def start(self, load_of: Callable[[int], RankLoad], ports: KvPorts | None = None) -> None:
        """Bind, at `ports` instead of those of the settings; raises OSError if that fails.

        `load_of` gives the load of a rank whenever a report is due.
        """
        settings = self._settings
        wanted = ports or KvPorts(
            events=settings.kv_events_port or 0,
            replay=None if settings.no_replay else settings.kv_replay_port,
            load=(None if settings.no_load_events or settings.is_vllm else settings.kv_load_port),
        )

        async def bind() -> None:
            self._context = zmq.Context()
            try:
                self._bind(wanted, load_of)
            except zmq.ZMQError as error:
                self.stop()
                raise OSError(error.errno, f"KV sockets: {error.strerror}") from error

        await with_patience(bind)
        self._report_loads()

    def stop(self) -> None:
        """Close all sockets at once; unsent messages are lost."""
        if self._load_timer is not None:
            self._load_timer.cancel()
        for rank in self._ranks:
            rank.close()
        for socket in self._sockets:
            socket.close(linger=0)
        self._ranks, self._sockets = [], []
        if self._context is not None:
            self._context.term()  # close() returns after the ports are free
            self._context = None

    def cache_changed(self, rank: int, events: list[CacheEvent]) -> None:
        if self._ranks:
            self._ranks[rank].publish(events)

    def load_changed(self, rank: int) -> None:
        if self._ranks:
            self._ranks[rank].report_load_soon()

    def misbehave(self, faults: WorkerFaults) -> None:
        """Take over the KV event faults; those that need no batch apply now."""
        for rank in self._ranks:
            rank.misbehave(faults)

    def description(self) -> dict[str, Any] | None:
        """The `kv_events` block of `/server_info`."""
        if self.ports is None:
            return None
        host = self._settings.host
        block = {
            "publisher": "zmq",
            "endpoint_host": "*" if host in ("0.0.0.0", "::") else host,  # noqa: S104
            "endpoint_port_base": self.ports.events,
            "topic": self._settings.kv_topic,
            "block_size": self._settings.page_size,
            "dp_size": self._settings.dp_size,
        }
        if self.ports.replay is not None:
            block["replay_endpoint_port_base"] = self.ports.replay
        if self.ports.load is not None:
            block["load_endpoint_port_base"] = self.ports.load
            block["load_topic"] = _LOAD_TOPIC.decode()
        return block

    def _bind(self, wanted: KvPorts, load_of: Callable[[int], RankLoad]) -> None:
        events, events_port = self._bind_ranks(zmq.PUB, wanted.events)
        loads, load_port = self._bind_if_wanted(zmq.PUB, wanted.load)
        replays, replay_port = self._bind_if_wanted(zmq.ROUTER, wanted.replay)
        self.ports = KvPorts(events=events_port, replay=replay_port, load=load_port)
        self._ranks = [
            _RankSockets(self._settings, rank, *sockets, load_of)
            for rank, sockets in enumerate(zip(events, replays, loads, strict=True))
        ]

    def _bind_if_wanted(
        self, kind: int, base: int | None
    ) -> tuple[Sequence["zmq.Socket[bytes] | None"], int | None]:
        if base is None:
            return [None] * self._settings.dp_size, None
        return self._bind_ranks(kind, base)

    def _bind_ranks(self, kind: int, base: int) -> tuple[list["zmq.Socket[bytes]"], int]:
        if self._context is None:
            raise RuntimeError("sockets are bound by start")
        settings = self._settings
        sockets, base = bind_ranks(self._context, kind, settings.host, base, settings.dp_size)
        self._sockets += sockets
        return sockets, base

    def _report_loads(self) -> None:
        for rank in self._ranks:
            rank.report_load()
        loop = asyncio.get_running_loop()
        self._load_timer = loop.call_later(_LOAD_INTERVAL_SECONDS, self._report_loads)


class _RankSockets:
    """The three sockets of a rank, their sequence numbers and the replay buffer."""

    def __init__(
        self,
        settings: SimulatorSettings,
        rank: int,
        events: "zmq.Socket[bytes]",
        replay: "zmq.Socket[bytes] | None",
        load: "zmq.Socket[bytes] | None",
        load_of: Callable[[int], RankLoad],
    ) -> None:
        self._settings = settings
        self._rank = rank
        self._events = events
        self._replay = replay
        self._load = load
        self._load_of = load_of
        self._topic = settings.kv_topic.encode()
        self._encoder = (
            VllmEventEncoder(settings.page_size)
            if settings.is_vllm
            else EventEncoder(settings.wire_format, settings.page_size)
        )
        self._sent: deque[tuple[bytes, bytes]] = deque(maxlen=_REPLAYED_BATCHES)
        self._seq = 0
        self._load_seq = 0
        self._load_call: asyncio.Handle | None = None
        self._to_drop = 0
        self._to_shorten = 0
        self._loop = asyncio.get_running_loop()
        if replay is not None:
            # The descriptor is edge-triggered: read until the queue is empty.
            self._loop.add_reader(replay.fileno(), self._serve_replays)
            self._serve_replays()

    def close(self) -> None:
        if self._load_call is not None:
            self._load_call.cancel()
        if self._replay is not None:
            self._loop.remove_reader(self._replay.fileno())

    def publish(self, events: list[CacheEvent], *, garbled: bool = False) -> None:
        """Send one batch, changed by the present faults."""
        wire_events = [self._wire_event(event) for event in events]
        payload = encode_batch(time.time(), wire_events, self._rank)
        seq = self._seq.to_bytes(8, "big")
        self._seq += 1
        self._sent.append((seq, payload))
        if self._to_drop:
            self._to_drop -= 1
            return
        self._send([self._topic, seq, b"\xc1" if garbled else payload])

    def report_load_soon(self) -> None:
        """Report once for all changes in the present turn of the event loop."""
        if self._load is not None and self._load_call is None:
            self._load_call = self._loop.call_soon(self.report_load)

    def report_load(self) -> None:
        if self._load_call is not None:
            self._load_call.cancel()
            self._load_call = None
        if self._load is None:
            return
        payload = encode_load(
            self._load_of(self._rank),
            rank=self._rank,
            max_total_num_tokens=self._settings.max_total_num_tokens,
            max_running_requests=self._settings.max_running_requests,
        )
        seq = self._load_seq.to_bytes(8, "big")
        self._load_seq += 1
        self._load.send_multipart([_LOAD_TOPIC, seq, payload], zmq.NOBLOCK)

    def misbehave(self, faults: WorkerFaults) -> None:
        self._to_drop = faults.kv_drop_batches
        self._to_shorten = faults.kv_wrong_token_counts
        for number in range(faults.kv_garbage_frames):
            self._send_garbage(number)
        if faults.kv_unknown_removals:
            unknown = [hash(("unknown", n)) for n in range(faults.kv_unknown_removals)]
            self.publish([Removed(hashes=unknown, medium="GPU")])

    def _wire_event(self, event: CacheEvent) -> msgspec.Struct:
        if self._to_shorten and isinstance(event, Stored):
            self._to_shorten -= 1
            return self._encoder.wire_event(event, missing_tokens=1)
        return self._encoder.wire_event(event)

    def _send_garbage(self, number: int) -> None:
        """Send in turn: a missing frame, a short sequence number, a payload that is not msgpack.

        The last one uses a sequence number; its replay is an empty batch.
        """
        if number % 3 == 0:
            self._send([self._topic, b"garbage"])
        elif number % 3 == 1:
            self._send([self._topic, b"seq", b"garbage"])
        else:
            self.publish([], garbled=True)

    def _send(self, frames: list[bytes]) -> None:
        self._events.send_multipart(frames, zmq.NOBLOCK)

    def _serve_replays(self) -> None:
        if self._replay is None:
            return
        while True:
            try:
                frames = self._replay.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 3 and len(frames[2]) == 8:
                self._answer_replay(self._replay, frames[0], frames[2])

    def _answer_replay(self, socket: "zmq.Socket[bytes]", client: bytes, start: bytes) -> None:
        # Engines that publish arrays omit the topic.
        head = (
            [client, b""] if self._settings.wire_format == "array" else [client, b"", self._topic]
        )
        for seq, payload in self._sent:
            if seq >= start:  # big-endian bytes compare like the numbers
                socket.send_multipart([*head, seq, payload], zmq.NOBLOCK)
        if self._settings.is_vllm:
            head[2] = b""
        socket.send_multipart([*head, _END_SEQ, b""], zmq.NOBLOCK)
