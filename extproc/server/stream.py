"""One open ext_proc stream: the I/O around a session, and the set of all open streams.

A session decides, without I/O, what is replied to a message. The stream reads the messages,
writes the replies, asks the router, and keeps the deadlines. It is apart from the gRPC server,
which has to do with addresses, health and the end of the process.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Protocol

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError
from msgspec import Struct

from extproc.errors import RouterError, internal_error, routing_timeout
from extproc.metrics.service import Metrics
from extproc.routing.lease import Lease
from extproc.routing.local_endpoints import Answer
from extproc.routing.pd.pair import Pair
from extproc.routing.request import Request
from extproc.server.decode_session import DecodeSession
from extproc.server.session import Session, SessionContext

__all__ = ["Decider", "Stream", "StreamSettings", "Streams"]

_log = structlog.get_logger()

_WATCH_SECONDS: Final = 0.05
_CROWD_STREAMS: Final = 1


class Decider(Protocol):
    """The part of the router that streams ask; every call may raise RouterError."""

    async def route(self, request: Request) -> Lease | Pair:
        """Decide where a request goes."""

    async def answer(self, request: Request) -> Answer:
        """Answer a request to an endpoint that needs no worker."""


class StreamSettings(Struct, frozen=True, kw_only=True):
    """Deadlines of a stream. A decision must be there within `step_deadline_seconds` of its
    request's body, and the whole body within `body_deadline_seconds` of its first part.
    """

    step_deadline_seconds: float
    body_deadline_seconds: float
    log_decisions: bool


class Stream:
    """One open stream: its session and the I/O around it."""

    __slots__ = (
        "_context",
        "_interrupted",
        "_overtaking",
        "_picks_itself",
        "_reading",
        "_streams",
        "_task",
        "_writing",
        "deadline",
        "ending",
        "overdue",
        "session",
    )

    def __init__(self, streams: "Streams", context: Any, session: type[Session] = Session) -> None:
        self._streams = streams
        self._context = context
        self._task = asyncio.current_task()
        # Set while a deadline of ours runs, in seconds of time.monotonic.
        self.deadline: float | None = None
        self.overdue = False
        self.ending = False
        # True while waiting for Envoy's next message: all replies are out.
        self._reading = False
        # A timer has answered the request, so a decision that comes later is not written.
        self._interrupted = False
        # gRPC refuses a second write while one is under way.
        self._writing = False
        self._overtaking: Sequence[bytes] = ()
        self.session = session(streams.session_context)
        # In the second pass `receive` decides; until it has.
        self._picks_itself = session is DecodeSession

    async def serve(self) -> None:
        """Read until Envoy is done; returns to end the stream with status OK."""
        context, session, streams = self._context, self.session, self._streams
        while True:
            self._reading = True
            raw = await context.read()
            self._reading = False
            if raw is grpc.aio.EOF:
                return
            try:
                out = session.receive(raw)
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a ProcessingRequest")
            if self._picks_itself and session.lease is not None:
                self._picks_itself = False
                session.lease.on_abort = self._on_abort
            if out:
                if streams.is_crowded:
                    await asyncio.sleep(0)
                await self._say(out)
            # A stream may stay open for minutes: it must not keep a body alive.
            del raw
            if session.to_route is not None:
                await self._route(session.to_route)
            elif session.waits_for_body and self.deadline is None:
                streams.watch(self, streams.settings.body_deadline_seconds)
            if streams.draining and session.may_end_early:
                return

    async def _route(self, request: Request) -> None:
        session, streams = self.session, self._streams
        started = streams.watch(self, streams.settings.step_deadline_seconds)
        try:
            if request.endpoint.answered_locally:
                out = session.answered(await streams.decider.answer(request))
            else:
                lease = await streams.decider.route(request)
                lease.on_abort = self._on_abort
                out = session.routed(lease)
                if streams.settings.log_decisions:
                    _log_decision(session.request_id, lease)
        except RouterError as error:
            out = session.failed(error)
        except asyncio.CancelledError:
            if not self.overdue:
                raise
            _uncancel()
            out = session.failed(routing_timeout())
        except Exception:
            # Our own mistake must cost one request, and say so, but never the stream's answer.
            _log.exception("routing_failed", request_id=session.request_id)
            out = session.failed(internal_error())
        else:
            streams.metrics.decision_seconds.observe(time.monotonic() - started)
        finally:
            streams.unwatch(self)
        if streams.is_crowded:
            await asyncio.sleep(0)
        if not self._interrupted:
            await self._say(out)

    async def _say(self, out: Sequence[bytes]) -> None:
        """Write replies; what comes meanwhile takes the place of those that are left."""
        if self._writing:
            self._overtaking = out
            return
        self._writing = True
        try:
            while out:
                for reply in out:
                    await self._context.write(reply)
                    if self._overtaking:
                        break
                out, self._overtaking = self._overtaking, ()
        finally:
            self._writing = False

    def timed_out(self) -> None:
        """A deadline of ours has passed; called by the watch of Streams."""
        if self.session.to_route is None:
            self._interrupt(self.session.body_timed_out)
        elif self._task is not None:
            # The router does not come back: `_route` answers.
            self.overdue = True
            self._task.cancel()

    def _on_abort(self, error: RouterError) -> None:
        lease = self.session.lease
        self._interrupt(lambda: self.session.aborted(error))
        if isinstance(lease, Pair):
            lease.answer_written()

    def _interrupt(self, step: Callable[[], Sequence[bytes]]) -> None:
        """Send what a timer wants said while `serve` is waiting for Envoy."""
        out = step()
        if out:
            self._interrupted = True
            self._streams.spawn(self._write(out))

    async def _write(self, out: Sequence[bytes]) -> None:
        # The stream may have ended in the meantime; then there is nobody to tell.
        with contextlib.suppress(grpc.aio.BaseError, grpc.RpcError, asyncio.InvalidStateError):
            await self._say(out)

    def end_if_idle(self) -> None:
        """End the stream with status OK, from outside `serve`, if nothing is lost by that."""
        if self._reading and self.session.may_end_early and self._task is not None:
            self.ending = True
            self._task.cancel()

    def close(self) -> None:
        if self.deadline is not None:
            self._streams.unwatch(self)
        self.session.close()


def _uncancel() -> None:
    """A cancellation of our own has done its work."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()


def _log_decision(request_id: str, lease: Lease | Pair) -> None:
    decision = lease.decision
    _log.debug(
        "routed",
        request_id=request_id,
        model=decision.model,
        policy=decision.policy,
        reason=decision.reason,
        worker=decision.worker_url,
        cached_tokens=decision.cached_tokens,
        total_tokens=decision.total_tokens,
    )


class Streams:
    """The open streams of one server, with their deadlines and what they share."""

    def __init__(
        self,
        session_context: SessionContext,
        decider: Decider,
        metrics: Metrics,
        settings: StreamSettings,
    ) -> None:
        self.session_context = session_context
        self.decider = decider
        self.metrics = metrics
        self.settings = settings
        # Set once, when the process is about to end: streams then end as soon as they may.
        self.draining = False
        self.last_opened_at = 0.0
        self._open: set[Stream] = set()
        self._background: set[asyncio.Task[None]] = set()
        # Streams with a running deadline. One task looks at all of them: a timer per request
        # would cost more than the decision.
        self._watched: dict[Stream, None] = {}

    def __len__(self) -> int:
        """The number of open streams."""
        return len(self._open)

    @property
    def is_crowded(self) -> bool:
        """True when several requests are being decided at once.

        A reply then waits until the other streams that are ready have made theirs. Written in
        one turn of the loop, many replies leave in one system call and wake Envoy once; one by
        one, each of them wakes it. With few requests the wait would only add latency.
        """
        return len(self._watched) > _CROWD_STREAMS

    async def serve(self, context: Any, session: type[Session]) -> None:
        """Serve one gRPC stream to its end; returns to end it with status OK."""
        stream = Stream(self, context, session)
        self._open.add(stream)
        self.metrics.streams_open.set(len(self._open))
        self.last_opened_at = time.monotonic()
        outcome = "ok"
        try:
            await stream.serve()
        except asyncio.CancelledError:
            if not stream.ending:
                outcome = "cancelled"  # how Envoy ends most streams
                raise
            _uncancel()
        except Exception:
            outcome = "error"
            raise
        finally:
            stream.close()
            self._open.discard(stream)
            self.metrics.streams_open.set(len(self._open))
            self.metrics.streams(outcome).inc()

    def end_idle(self) -> None:
        """End the streams whose request is decided; their responses go on without us."""
        for stream in list(self._open):
            stream.end_if_idle()

    def watch(self, stream: Stream, seconds: float) -> float:
        """Start a deadline for the stream, replacing its last one; returns the time now."""
        now = time.monotonic()
        stream.deadline = now + seconds
        self._watched[stream] = None
        return now

    def unwatch(self, stream: Stream) -> None:
        """The step is done in time."""
        stream.deadline = None
        self._watched.pop(stream, None)

    async def watch_deadlines(self) -> None:
        """Tell streams when their deadline has passed; runs until it is cancelled."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            now = time.monotonic()
            late = [
                stream
                for stream in self._watched
                if stream.deadline is not None and stream.deadline <= now
            ]
            for stream in late:
                self.unwatch(stream)
                stream.timed_out()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine beside the streams, and keep it referenced."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """End what runs beside the streams; they themselves have ended."""
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
