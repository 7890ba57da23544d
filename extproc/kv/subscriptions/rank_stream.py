"""One rank's subscription: its sockets, its sequence, and what is told to its sink.

Every connection has a socket of its own. A batch can thus never be taken for one of the engine
before or after, and each new connection makes the rank prove that it is still the same engine
(see `sequence`).
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final

import structlog
import zmq
from msgspec import Struct

from extproc.clock import Clock
from extproc.kv.actions import Action, Apply, CancelReplay, Clear, RequestReplay, Trust
from extproc.kv.reorder_buffer import ReorderLimits
from extproc.kv.sequence import RankSequence
from extproc.kv.subscriptions.sockets import (
    RECONNECT_MAX_SECONDS,
    RECONNECT_MIN_SECONDS,
    Channel,
    Context,
    Replay,
    ReplayEnd,
    parse_live,
    parse_reply,
)
from extproc.kv.subscriptions.subscription import (
    Applier,
    EventEndpoint,
    SubscriberSettings,
    SubscriptionState,
)

__all__ = ["RankStream", "Shared"]

_log = structlog.get_logger()

_LIVE_QUEUE_MESSAGES: Final = 1000
_LOAD_QUEUE_MESSAGES: Final = 64
# So many batches in a row without a pause mean that the queue was full, and perhaps that of the
# publisher too.
_PILED_UP_MESSAGES: Final = _LIVE_QUEUE_MESSAGES // 2
# After the last of them, before it is asked whether there were more.
_CATCH_UP_SECONDS: Final = 0.3
_CLEAR_LOG_SECONDS: Final = 10.0
_ERROR_LOG_SECONDS: Final = 30.0


class Shared(Struct):
    """What all streams have in common; `wake` is called when one has something to do."""

    clock: Clock
    settings: SubscriberSettings
    limits: ReorderLimits
    context: Context
    # Of replays under way.
    slots: asyncio.Semaphore
    # Ranks that may have sockets, and replays that may.
    ranks: asyncio.Semaphore
    replays: asyncio.Semaphore
    # One socket is opened at a time, each in a turn of its own.
    opening: asyncio.Lock
    wake: Callable[["RankStream"], None]


class RankStream:
    """One rank: feeds what its sockets bring to its sequence, and does what that says."""

    def __init__(self, shared: Shared, endpoint: EventEndpoint, applier: Applier) -> None:
        pages = applier.pages
        self.log = _log.bind(worker=pages.worker, rank=pages.dp_rank)
        self.state = SubscriptionState()
        self.queued = False
        self._shared = shared
        self._clock = shared.clock
        self._settings = shared.settings
        self._endpoint = endpoint
        self._topic = endpoint.topic.encode()
        self._load_topic = endpoint.load_topic.encode()
        self._applier = applier
        self._sequence = RankSequence(
            has_replay=endpoint.replay_port is not None, limits=shared.limits
        )
        self._actions: deque[Action] = deque()
        # The batch that the sink takes in now, and its steps.
        self._applying: tuple[bytes, Iterator[None]] | None = None
        # Until then, batches that can not be used are not asked for again.
        self._ask_again_at = 0.0
        self._log_clear_at = 0.0
        self._live: Channel | None = None
        self._load: Channel | None = None
        self._replay: Replay | None = None
        self._replaying: asyncio.Task[None] | None = None
        self._live_ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._without_pause = 0
        self._log_error_at = -math.inf
        self._replay_failing = False
        self._closed = False

    def start(self) -> None:
        self._spawn(self._keep_connected())

    async def close(self) -> None:
        """Before the first await all is closed: no socket is read and no action done."""
        self._closed = True
        self._feed(self._sequence.disconnected())  # gives back what it held
        self._actions.clear()
        self._applying = None
        self.state.connected = False
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
        self._read_load()
        while not self._closed:
            if self._applying is not None:
                self._apply_step(*self._applying)
            elif self._actions:
                self._perform(self._actions.popleft())
            elif not (self._read_replay() or self._read_live()):
                return False
            if self._clock.monotonic() >= until:
                return True
        return False

    async def _keep_connected(self) -> None:
        """A socket for each connection in turn; libzmq itself retries only to make the first.

        The wait grows with connections that do not last, such as those that break off at a
        message of forbidden size.
        """
        if self._shared.ranks.locked():
            self.log.error(
                "kv_descriptors_short",
                fix="this rank waits for another to leave: raise the limit of open files",
            )
        async with self._shared.ranks:
            await self._connect_again_and_again()

    async def _connect_again_and_again(self) -> None:
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
                    self.log.error("kv_socket_failed", error=str(error))
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
        self._shared.wake(self)

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
        if frames is None:
            if self._without_pause >= _PILED_UP_MESSAGES:
                self._spawn(self._check_caught_up(self.state.batches))
            self._without_pause = 0
            return False
        self._without_pause += 1
        if not frames:
            return True
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

    async def _check_caught_up(self, batches: int) -> None:
        await self._clock.sleep(_CATCH_UP_SECONDS)
        if self.state.batches == batches:  # else a later one has shown it
            self._feed(self._sequence.caught_up())
            self._wake()

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

    def _read_load(self) -> None:
        """Take all there is and tell the last: under a flood of events, too."""
        newest = None
        for _ in range(_LOAD_QUEUE_MESSAGES):
            frames = self._load.receive() if self._load and self._load.readable else None
            if frames is None:
                break
            try:
                newest = (frames and parse_live(frames, self._load_topic)) or newest
            except ValueError:
                self.state.malformed += 1
        if newest:
            self.state.load_reports += 1
            self._tell(self._applier.on_load, newest.payload)

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
                self._apply(payload)
            case Clear(reason):
                self.state.clears += 1
                self._log_clear(reason)
                self._tell(self._applier.clear, reason)
            case Trust(trusted, reason):
                self._tell(self._applier.set_trusted, trusted, reason)
            case RequestReplay(start):
                self._drop_replay()
                self.state.replays += 1
                self._replaying = self._spawn(self._run_replay(start))
            case CancelReplay():
                self._drop_replay()

    def _log_clear(self, reason: str) -> None:
        """A rank that loses batches all the time is counted, not logged each time."""
        now = self._clock.monotonic()
        if now >= self._log_clear_at:
            self._log_clear_at = now + _CLEAR_LOG_SECONDS
            self.log.info("kv_cleared", reason=reason)

    def _apply(self, payload: bytes) -> None:
        try:
            steps = self._applier.apply(payload)
        except Exception as error:
            self._apply_failed(payload, error)
        else:
            if steps is not None:
                self._applying = payload, steps

    def _apply_step(self, payload: bytes, steps: Iterator[None]) -> None:
        try:
            next(steps)
        except StopIteration:
            self._applying = None
        except Exception as error:
            self._applying = None
            self._apply_failed(payload, error)

    def _apply_failed(self, payload: bytes, error: Exception) -> None:
        self._count_error(error)
        now = self._clock.monotonic()
        actions = self._sequence.unreadable(payload, ask=now >= self._ask_again_at)
        if actions and isinstance(actions[0], Clear):
            self._perform(actions.pop(0))
        else:
            self._ask_again_at = now + self._settings.replay_cool_down_seconds
        self._feed(actions)

    def _tell(self, method: Callable[..., None], *arguments: object) -> None:
        try:
            method(*arguments)
        except Exception as error:
            self._count_error(error)

    def _count_error(self, error: Exception) -> None:
        self.state.sink_errors += 1
        now = self._clock.monotonic()
        if now >= self._log_error_at:
            self._log_error_at = now + _ERROR_LOG_SECONDS
            # The message of the error may quote a prompt.
            self.log.warning("kv_events_not_applied", error=type(error).__name__)

    async def _run_replay(self, start: int) -> None:
        """Ask; who reads the end of the answer cancels this."""
        async with self._shared.replays:
            await self._ask(start)
        self._replay = None
        self.state.replay_failures += 1
        self._feed(self._sequence.replay_failed())
        self._wake()
        if self._sequence.degraded:
            self._warn_of_replay(start, reason="timeout")
            await self._clock.sleep(self._settings.replay_cool_down_seconds)
            self._feed(self._sequence.retry())
            self._wake()

    async def _ask(self, start: int) -> None:
        """Returns when nothing more is to be hoped for."""
        endpoint, shared = self._endpoint, self._shared
        address = endpoint.address(endpoint.replay_port or endpoint.port)
        replay = None
        try:
            async with shared.opening:
                replay = self._replay = Replay(shared.context, address, start, self._wake)
                await asyncio.sleep(0)
            await replay.ask_until_failed(
                self._clock, shared.slots, self._settings.replay_timeout_seconds
            )
        except zmq.ZMQError as error:
            self._warn_of_replay(start, reason="socket", error=str(error))
        finally:
            if replay is not None:
                replay.channel.close()

    def _warn_of_replay(self, start: int, **fields: str) -> None:
        """Once until a replay succeeds: it is tried again for ever."""
        if not self._replay_failing:
            self._replay_failing = True
            self.log.warning("kv_replay_failed", start=start, **fields)

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
