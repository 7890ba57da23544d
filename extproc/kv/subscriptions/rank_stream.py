"""Runs one rank's subscription: feeds received batches to its sequence and carries out its actions.

Each new connection makes the rank prove that it is still the same engine process (see
`kv.sequence`). Separate from the sequence, which knows neither sockets nor time, and from the
connection, which knows no batches.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Final

import structlog
import zmq

from extproc.kv.actions import Action, Apply, CancelReplay, Clear, RequestReplay, Trust
from extproc.kv.sequence import RankSequence
from extproc.kv.subscriptions.connection import LIVE_QUEUE_MESSAGES, Connection, Shared
from extproc.kv.subscriptions.sockets import Replay, ReplayEnd, parse_live, parse_reply
from extproc.kv.subscriptions.subscription import Applier, EventEndpoint, SubscriptionState

__all__ = ["RankStream"]

_log = structlog.get_logger()

# This many batches in a row without a pause show that the socket's queue was full, and perhaps
# the publisher's queue, too.
_PILED_UP_MESSAGES: Final = LIVE_QUEUE_MESSAGES // 2
# The wait after the last of them, before a replay is requested to check for more.
_CATCH_UP_SECONDS: Final = 0.3
_CLEAR_LOG_SECONDS: Final = 10.0
_ERROR_LOG_SECONDS: Final = 30.0


class RankStream:
    """The event stream of one rank, read in slices by `work`."""

    def __init__(
        self,
        shared: Shared,
        endpoint: EventEndpoint,
        applier: Applier,
        wake: Callable[["RankStream"], None],
    ) -> None:
        """`wake` is called with the stream when there is work: `work` should be called soon."""
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
        # The batch that is being applied, and its remaining steps.
        self._applying: tuple[bytes, Iterator[None]] | None = None
        # Until then, a batch that could not be applied is not requested again.
        self._ask_again_at = 0.0
        self._log_clear_at = 0.0
        self._wake = partial(wake, self)
        self._connection = Connection(shared, endpoint, self._wake, self.log)
        self._replay: Replay | None = None
        self._replaying: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._without_pause = 0
        self._log_error_at = -math.inf
        self._replay_failing = False
        # A batch has been applied; until then a malformed message makes the whole stream suspect.
        self._has_decoded = False
        self._suspect = False
        self._closed = False

    def start(self) -> None:
        self._spawn(self._connection.keep())

    async def close(self) -> None:
        """Close at once, before the first await: no socket is read and no action carried out."""
        self._closed = True
        self._feed(self._sequence.disconnected())  # empties the reorder buffer
        self._actions.clear()
        self._applying = None
        self.state.connected = False
        self._connection.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def work(self, until: float) -> bool:
        """Do the work there is, until that time; True when some of it is left."""
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

    def _see_connection(self) -> None:
        connected = self._connection.refresh()
        if connected:
            self._be_connected()
        elif connected is False:
            self.state.connected = False
            self._feed(self._sequence.disconnected())

    def _be_connected(self) -> None:
        if not self.state.connected:
            self.state.connected = True
            self._feed(self._sequence.connected())

    def _read_live(self) -> bool:
        frames = self._connection.receive_live()
        if frames is None:
            if self._without_pause >= _PILED_UP_MESSAGES:
                self._spawn(self._check_caught_up(self.state.batches))
            self._without_pause = 0
            return False
        self._without_pause += 1
        if not frames:
            return True
        if not self.state.connected:
            self._see_connection()
            if not self.state.connected:
                # libzmq takes any bytes for messages of its oldest version, which has no greeting.
                self._malformed()
                self._connection.refuse()
                return True
        try:
            batch = parse_live(frames, self._topic)
        except ValueError:
            self._malformed()
            return True
        if batch is not None:
            self.state.last_event_at = self._clock.monotonic()
            self._feed(self._sequence.live(batch.seq, batch.payload))
        return True

    async def _check_caught_up(self, batches: int) -> None:
        await self._clock.sleep(_CATCH_UP_SECONDS)
        if self.state.batches == batches:  # else a later batch has shown it
            self._feed(self._sequence.caught_up())
            self._wake()

    def _malformed(self) -> None:
        """Count a message that cannot be read; before the first batch it is also logged."""
        self.state.malformed += 1
        if not self._has_decoded and not self._suspect:
            self.log.warning(
                "kv_events_malformed",
                port=self._endpoint.port,
                fix="the port must be that of the engine's publisher of KV events",
            )
            self._doubt()

    def _doubt(self) -> None:
        """Nothing could be read so far, so the stream is not trusted until a batch is applied."""
        self._suspect = True
        self._feed(self._sequence.malformed())

    def _decoded(self) -> None:
        """The first batch was applied."""
        self._has_decoded = True
        if self._suspect:
            self._suspect = False
            self._feed(self._sequence.decoded())

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
        """Read all load reports and pass on the newest, even while events flood in."""
        newest = None
        for frames in self._connection.receive_loads():
            try:
                newest = (frames and parse_live(frames, self._load_topic)) or newest
            except ValueError:
                self.state.malformed += 1
        if newest:
            self.state.load_reports += 1
            self._call(self._applier.on_load, newest.payload)

    def _feed(self, actions: list[Action]) -> None:
        """Enqueue the actions of the sequence; a replay that is no longer needed ends at once."""
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
                self._call(self._applier.clear, reason)
            case Trust(trusted, reason):
                self._call(self._applier.set_trusted, trusted, reason)
            case RequestReplay(start):
                self._drop_replay()
                self.state.replays += 1
                self._replaying = self._spawn(self._run_replay(start))
            case CancelReplay():
                self._drop_replay()

    def _log_clear(self, reason: str) -> None:
        """Log that the pages were cleared, not more often than every ten seconds."""
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
            elif not self._has_decoded:
                self._decoded()

    def _apply_step(self, payload: bytes, steps: Iterator[None]) -> None:
        try:
            next(steps)
        except StopIteration:
            self._applying = None
            if not self._has_decoded:
                self._decoded()
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
        if not self._has_decoded:
            self._doubt()

    def _call(self, method: Callable[..., None], *arguments: object) -> None:
        try:
            method(*arguments)
        except Exception as error:
            self._count_error(error)

    def _count_error(self, error: Exception) -> None:
        self.state.apply_errors += 1
        now = self._clock.monotonic()
        if now >= self._log_error_at:
            self._log_error_at = now + _ERROR_LOG_SECONDS
            # The error's text may quote a prompt.
            self.log.warning("kv_events_not_applied", error=type(error).__name__)

    async def _run_replay(self, start: int) -> None:
        """Request a replay and wait until it fails; reading its end cancels this task."""
        async with self._shared.replays:
            await self._request(start)
        self._replay = None
        self.state.replay_failures += 1
        self._feed(self._sequence.replay_failed())
        self._wake()
        if self._sequence.degraded:
            self._warn_of_replay(start, reason="timeout")
            await self._clock.sleep(self._settings.replay_cool_down_seconds)
            self._feed(self._sequence.retry())
            self._wake()

    async def _request(self, start: int) -> None:
        """Send the request; returns when no more of the answer can be expected."""
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
        """Log once until a replay succeeds, since it is tried again and again."""
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
