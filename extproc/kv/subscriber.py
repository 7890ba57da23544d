"""Follows the KV-cache events of every (worker, rank) and hands them on, in order.

One SUB socket per rank is read by one task for all of them, in slices with a rest between, so
that a flood of events never holds up a request: what can not be applied yet stays in the
sockets' queues and finally with the publishers. Every connection has a socket of its own. A
batch can thus never be taken for one of the engine before or after, and each new connection
makes the rank prove that it is still the same engine (see `sequence`).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Mapping
from types import MappingProxyType
from typing import Any, Final, Protocol

import structlog
import zmq
from msgspec import Struct

from extproc.clock import Clock
from extproc.kv.replay import (
    RECONNECT_MAX_SECONDS,
    RECONNECT_MIN_SECONDS,
    Channel,
    Context,
    EventEndpoint,
    Replay,
    ReplayEnd,
    parse_live,
    parse_reply,
)
from extproc.kv.sequence import (
    Action,
    Apply,
    CancelReplay,
    Clear,
    HoldLimits,
    RankSequence,
    RequestReplay,
    Trust,
)

__all__ = [
    "EventEndpoint",
    "EventSink",
    "KvSubscriber",
    "SubscriberSettings",
    "SubscriptionState",
]

_log = structlog.get_logger()

_SLICE_SECONDS: Final = 0.002
_REST_SECONDS: Final = 0.001
_LIVE_QUEUE_MESSAGES: Final = 1000
_LOAD_QUEUE_MESSAGES: Final = 64
_SOCKETS_MAX: Final = 65_535


class EventSink(Protocol):
    """What becomes of one rank's events. What these raise is counted, not passed on."""

    def apply(self, payload: bytes) -> None:
        """The next batch, as it was published."""
        ...

    def clear(self, reason: str) -> None:
        """What was applied until now no longer holds."""
        ...

    def set_trusted(self, trusted: bool, reason: str) -> None:
        """Trusted: what was applied holds, if not all ("partial"), and is kept up to date."""
        ...

    def on_load(self, payload: bytes) -> None:
        """The engine's newest word on its load; older ones are left out."""
        ...


class SubscriberSettings(Struct, frozen=True):
    """Bounds, alike for all ranks."""

    # Without a frame for so long, a replay has failed.
    replay_timeout_seconds: float = 5.0
    # Before a failed replay is tried again.
    replay_cool_down_seconds: float = 30.0
    replays_at_once: int = 16
    held_batches: int = 4096
    held_bytes: int = 16 << 20
    held_total_bytes: int = 256 << 20


class SubscriptionState(Struct):
    """What is known of one rank's stream; counts since it was added, times monotonic."""

    connected: bool = False
    trusted: bool = False
    partial: bool = False
    batches: int = 0
    bytes: int = 0
    gaps: int = 0
    restarts: int = 0
    replays: int = 0
    replay_failures: int = 0
    malformed: int = 0
    dropped: int = 0
    sink_errors: int = 0
    load_reports: int = 0
    last_event_at: float | None = None


class KvSubscriber:
    """All subscriptions; made and used on one running event loop."""

    def __init__(self, clock: Clock, settings: SubscriberSettings | None = None) -> None:
        self._clock = clock
        self._settings = settings or SubscriberSettings()
        self._limits = HoldLimits(
            rank_batches=self._settings.held_batches,
            rank_bytes=self._settings.held_bytes,
            total_bytes=self._settings.held_total_bytes,
        )
        self._slots = asyncio.Semaphore(self._settings.replays_at_once)
        self._context: Context = zmq.Context(io_threads=2)
        self._context.set(zmq.MAX_SOCKETS, _SOCKETS_MAX)
        self._streams: dict[Hashable, _Stream] = {}
        self._states: dict[Hashable, SubscriptionState] = {}
        self._ready: deque[_Stream] = deque()
        self._woken = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    @property
    def states(self) -> Mapping[Hashable, SubscriptionState]:
        """A live view of every subscription, by holder key."""
        return MappingProxyType(self._states)

    def add(
        self, holder_key: Hashable, endpoint: EventEndpoint, sink: EventSink
    ) -> SubscriptionState:
        """Subscribe for ever; raises ValueError when the holder has a subscription.

        And RuntimeError after `close`.
        """
        if self._context.closed:
            raise RuntimeError("the subscriber is closed")
        if holder_key in self._streams:
            raise ValueError(f"already subscribed: {holder_key}")
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())
        stream = _Stream(self, holder_key, endpoint, sink)
        self._streams[holder_key] = stream
        self._states[holder_key] = stream.state
        stream.start()
        return stream.state

    async def remove(self, holder_key: Hashable) -> None:
        """End a subscription, if there is one; its sink is not called any more."""
        self._states.pop(holder_key, None)
        stream = self._streams.pop(holder_key, None)
        if stream is not None:
            await stream.close()

    async def close(self) -> None:
        """End everything; nothing can be added afterwards."""
        await asyncio.gather(*(self.remove(key) for key in list(self._streams)))
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if not self._context.closed:
            await asyncio.to_thread(self._context.term)

    def _wake(self, stream: "_Stream") -> None:
        if not stream.queued:
            stream.queued = True
            self._ready.append(stream)
            self._woken.set()

    async def _read(self) -> None:
        """Serve the streams that have something, a slice at a time."""
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
                    # One stream's surprise must not stop the others.
                    _log.exception("kv_stream_failed", worker=str(stream.holder_key))
                else:
                    if unfinished:
                        self._wake(stream)
            if self._ready:
                self._woken.set()
                await clock.sleep(_REST_SECONDS)


class _Stream:
    """One rank: feeds what its sockets bring to its sequence, and does what that says."""

    def __init__(
        self, owner: KvSubscriber, holder_key: Hashable, endpoint: EventEndpoint, sink: EventSink
    ) -> None:
        self.holder_key = holder_key
        self.state = SubscriptionState()
        self.queued = False
        self._owner = owner
        self._clock = owner._clock
        self._settings = owner._settings
        self._endpoint = endpoint
        self._topic = endpoint.topic.encode()
        self._load_topic = endpoint.load_topic.encode()
        self._sink = sink
        self._sequence = RankSequence(
            has_replay=endpoint.replay_port is not None, limits=owner._limits
        )
        self._actions: deque[Action] = deque()
        self._live: Channel | None = None
        self._load: Channel | None = None
        self._replay: Replay | None = None
        self._replaying: asyncio.Task[None] | None = None
        self._live_ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sink_failing = False
        self._replay_failing = False
        self._closed = False

    def start(self) -> None:
        self._spawn(self._keep_connected())

    async def close(self) -> None:
        """Before the first await all is closed: no socket is read and no action done."""
        self._closed = True
        self._feed(self._sequence.disconnected())  # gives back what it held
        self._actions.clear()
        self.state.connected = self.state.trusted = False
        for channel in (self._live, self._load):
            if channel is not None:
                channel.close()
        self._live = self._load = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def work(self, until: float) -> bool:
        """Do what there is to do until that time; True when some of it is left."""
        self._see_connection()
        while not self._closed:
            if self._actions:
                self._perform(self._actions.popleft())
            elif not (self._read_replay() or self._read_live() or self._read_load()):
                return False
            if self._clock.monotonic() >= until:
                return True
        return False

    async def _keep_connected(self) -> None:
        """A socket for each connection in turn; libzmq itself retries only to make the first.

        The wait grows with connections that do not last, such as those that break off at a
        message of forbidden size.
        """
        delay = RECONNECT_MIN_SECONDS
        while True:
            opened_at = self._clock.monotonic()
            self._live_ended.clear()
            try:
                self._open()
                await self._live_ended.wait()
            except zmq.ZMQError as error:
                if delay == RECONNECT_MIN_SECONDS:
                    _log.error("kv_socket_failed", worker=str(self.holder_key), error=str(error))
            if self._clock.monotonic() - opened_at > 2 * RECONNECT_MAX_SECONDS:
                delay = RECONNECT_MIN_SECONDS
            await self._clock.sleep(delay)
            delay = min(2 * delay, RECONNECT_MAX_SECONDS)

    def _open(self) -> None:
        endpoint, context = self._endpoint, self._owner._context
        if endpoint.load_port is not None and self._load is None:
            self._load = Channel(
                context,
                endpoint.address(endpoint.load_port),
                self._wake,
                topic=self._load_topic,
                queue_messages=_LOAD_QUEUE_MESSAGES,
                watched=False,
            )
        self._live = Channel(
            context,
            endpoint.address(endpoint.port),
            self._wake,
            topic=self._topic,
            queue_messages=_LIVE_QUEUE_MESSAGES,
        )

    def _wake(self) -> None:
        self._owner._wake(self)

    def _see_connection(self) -> None:
        """Asked before each round of reads, much more often than libzmq can reconnect."""
        live = self._live
        if live is None:
            return
        live.refresh()
        if live.lost.is_set():
            live.close()
            self._live = None
            self.state.connected = False
            self._feed(self._sequence.disconnected())
            self._live_ended.set()
        elif live.connected.is_set():
            self._be_connected()

    def _be_connected(self) -> None:
        if not self.state.connected:
            self.state.connected = True
            self._feed(self._sequence.connected())

    def _read_live(self) -> bool:
        frames = self._live.receive() if self._live is not None and self._live.readable else None
        if not frames:
            return frames is not None
        self._be_connected()
        try:
            batch = parse_live(frames, self._topic)
        except ValueError:
            self.state.malformed += 1
            return True
        if batch is not None:
            self.state.last_event_at = self._clock.monotonic()
            self._feed(self._sequence.live(batch.seq, batch.payload))
        return True

    def _read_replay(self) -> bool:
        replay = self._replay
        frames = replay.channel.receive() if replay and replay.channel.readable else None
        if replay is None or not frames:
            return frames is not None
        replay.last_frame_at = self._clock.monotonic()
        try:
            reply = parse_reply(frames, self._topic)
        except ValueError:
            self.state.malformed += 1
            return True
        if isinstance(reply, ReplayEnd):
            self._replay_failing = False
            self._drop_replay()
            self._feed(self._sequence.replay_ended())
        elif reply is not None:
            self._feed(self._sequence.replayed(reply.seq, reply.payload))
        return True

    def _read_load(self) -> bool:
        """Take all there is and tell the last."""
        newest = None
        read = 0
        for _ in range(_LOAD_QUEUE_MESSAGES):
            frames = self._load.receive() if self._load and self._load.readable else None
            if frames is None:
                break
            read += 1
            try:
                newest = (frames and parse_live(frames, self._load_topic)) or newest
            except ValueError:
                self.state.malformed += 1
        if newest:
            self.state.load_reports += 1
            self._tell_sink(self._sink.on_load, newest.payload)
        return read > 0

    def _feed(self, actions: list[Action]) -> None:
        """Enqueue what the sequence decided; a replay it has no use for ends at once."""
        for action in actions:
            if isinstance(action, RequestReplay | CancelReplay):
                self._drop_replay()
        self._actions.extend(actions)
        state, sequence = self.state, self._sequence
        state.gaps, state.restarts = sequence.gaps, sequence.restarts
        state.dropped, state.partial = sequence.dropped, sequence.partial

    def _perform(self, action: Action) -> None:
        match action:
            case Apply(payload):
                self.state.batches += 1
                self.state.bytes += len(payload)
                self._tell_sink(self._sink.apply, payload)
            case Clear(reason):
                _log.info("kv_cleared", worker=str(self.holder_key), reason=reason)
                self._tell_sink(self._sink.clear, reason)
            case Trust(trusted, reason):
                self.state.trusted = trusted
                self._tell_sink(self._sink.set_trusted, trusted, reason)
            case RequestReplay(start):
                self._drop_replay()
                self.state.replays += 1
                self._replaying = self._spawn(self._run_replay(start))
            case CancelReplay():
                self._drop_replay()

    def _tell_sink(self, method: Callable[..., None], *arguments: object) -> None:
        try:
            method(*arguments)
        except Exception as error:
            self.state.sink_errors += 1
            if not self._sink_failing:
                # The message of the error may quote a prompt.
                _log.warning(
                    "kv_sink_failed", worker=str(self.holder_key), error=type(error).__name__
                )
            self._sink_failing = True
        else:
            self._sink_failing = False

    async def _run_replay(self, start: int) -> None:
        """Ask; who reads the end of the answer cancels this."""
        replay = None
        try:
            endpoint = self._endpoint
            address = endpoint.address(endpoint.replay_port or endpoint.port)
            replay = self._replay = Replay(self._owner._context, address, start, self._wake)
            await replay.ask_until_failed(
                self._clock, self._owner._slots, self._settings.replay_timeout_seconds
            )
        except zmq.ZMQError as error:
            self._warn_of_replay(start, str(error))
        finally:
            if replay is not None:
                replay.channel.close()
        self._replay = None
        self.state.replay_failures += 1
        self._feed(self._sequence.replay_failed())
        self._wake()
        if self._sequence.degraded:
            self._warn_of_replay(start, "no answer in time")
            await self._clock.sleep(self._settings.replay_cool_down_seconds)
            self._feed(self._sequence.retry())
            self._wake()

    def _warn_of_replay(self, start: int, reason: str) -> None:
        """Once until a replay succeeds: it is tried again for ever."""
        if not self._replay_failing:
            self._replay_failing = True
            _log.warning(
                "kv_replay_failed", worker=str(self.holder_key), start=start, reason=reason
            )

    def _drop_replay(self) -> None:
        if self._replay is not None:
            self._replay.channel.close()
            self._replay = None
        if self._replaying is not None:
            self._replaying.cancel()
            self._replaying = None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
