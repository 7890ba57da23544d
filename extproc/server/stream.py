"""One open ext_proc stream: the I/O around a session, and the set of all open streams.

A session decides without I/O. The stream reads the messages, asks the router, writes the
replies, keeps the deadlines, and counts, logs and settles what the session returns. It is
separate from the gRPC server, which handles addresses, health and the end of the process.
"""

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from extproc._protos import llm_extproc_pb2 as pb
from extproc.errors import (
    RouterError,
    internal_error,
    retry_after_seconds,
    routing_timeout,
    service_overloaded,
)
from extproc.event_loop import StreamTask
from extproc.metrics.service import Metrics
from extproc.routing.lease import Lease
from extproc.routing.pd.decode_order import DecodeQuery
from extproc.routing.pd.pair import Pair
from extproc.routing.request import Request
from extproc.server.deadlines import Deadlines
from extproc.server.decider import Decider
from extproc.server.decode_session import DecodeSession
from extproc.server.event_log import EventLog, log_decision
from extproc.server.messages import Response, read_attempt
from extproc.server.replies import RESPONSE_HEADERS_CONTINUE, at_work, attempt_reported
from extproc.server.route_session import RouteSession
from extproc.server.session import Session, SessionContext
from extproc.server.steps import Step
from extproc.server.stream_settings import Extension, StreamSettings

__all__ = ["Stream", "Streams"]

_log = structlog.get_logger()

_CROWD_STREAMS: Final = 1
_OVERLOADED: Final = service_overloaded().code
# A body that takes longer makes room for others when there are too many requests.
_SLOW_BODY_SECONDS: Final = 2.0


class Stream:
    """One open stream: its session and the I/O around it."""

    __slots__ = (
        "_context",
        "_decider",
        "_extended",
        "_grpc_task",
        "_interrupted",
        "_lease",
        "_overtaking",
        "_settings",
        "_streams",
        "_task",
        "_writing",
        "ending",
        "overdue",
        "reading",
        "session",
    )

    def __init__(self, streams: "Streams", context: Any, session: Session) -> None:
        self._streams = streams
        # Kept for the whole stream: a request is served by the configuration it began with.
        self._decider = streams.decider
        self._settings = streams.settings
        self._context = context
        self._task = task = asyncio.current_task()
        self._grpc_task = task if isinstance(task, StreamTask) else None
        if self._grpc_task is not None:
            self._grpc_task.stream = self
        self._lease: Lease | Pair | None = None
        self.overdue = False
        self.ending = False
        # True while waiting for Envoy's next message: all replies are out.
        self.reading = False
        # The request was answered between two messages, so replies that come later are dropped.
        self._interrupted = False
        self._extended = False
        # gRPC refuses a second write while one is under way.
        self._writing = False
        self._overtaking: Sequence[bytes] = ()
        self.session = session

    async def serve(self) -> None:
        """Read until Envoy is done; returns to end the stream with status OK."""
        context, session, streams = self._context, self.session, self._streams
        grpc_task = self._grpc_task
        while True:
            self.reading = True
            raw = await context.read()
            self.reading = False
            if grpc_task is not None and grpc_task.was_cancelled:
                raise asyncio.CancelledError
            if raw is grpc.aio.EOF:
                return
            try:
                step = session.receive(raw)
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a ProcessingRequest")
            out = self._carry_out(step)
            # A stream may stay open for minutes: it must not keep a body alive.
            del raw
            if out:
                await self._say(out)
            if session.question is not None:
                await self._ask(session.question)
            if session.waits_for_body:
                if self not in streams.deadlines:
                    streams.deadlines.start(self, self._settings.body_deadline_seconds)
            elif self in streams.deadlines:
                streams.deadlines.end(self)  # a body that came after the decision is complete
            if streams.draining and self._may_end_early:
                return

    def _carry_out(self, step: Step) -> Sequence[bytes]:
        """Count, log and settle what a step says; gives the replies to write."""
        metrics = self._streams.metrics
        if step.body_bytes is not None:
            metrics.request_body_bytes.observe(step.body_bytes)
        if step.code:
            metrics.requests(step.path, step.code).inc()
            if step.code == _OVERLOADED:
                self._streams.end_slowest()
        if step.events:
            self._streams.event_log.write(step.events)
        lease = self._lease
        if lease is not None:
            if step.response is not None:
                return self._settle(lease, step.response, step.replies)
            if step.released:
                lease.close()
        return step.replies

    def _settle(
        self, lease: Lease | Pair, response: Response, out: Sequence[bytes]
    ) -> Sequence[bytes]:
        """Settle the lease by the response headers; gives the replies to them."""
        lease.responded(
            response.status,
            response.address,
            response.code_details,
            response.streamed,
            response.attempts,
            response.busy,
            retry_after_seconds(response.retry_after) if response.retry_after else None,
        )
        if response.end_of_stream:
            lease.close()
        if not self.session.debug:
            return out
        return self.session.served_by(*lease.served_urls, lease.served_overlap).replies

    async def _ask(self, question: Request | DecodeQuery) -> None:
        """Get the answer to the session's question, and write what follows from it."""
        streams, session = self._streams, self.session
        decider = self._decider
        started = streams.deadlines.start(self, self._settings.first_deadline_seconds)
        try:
            if isinstance(question, DecodeQuery):
                step = self._take(decider.pick_decode(question), question.attempt)
            else:
                if question.endpoint.answered_locally:
                    step = session.answered((await decider.answer(question)).body)
                else:
                    step = self._take(await decider.route(question))
                streams.metrics.decision_seconds.observe(time.monotonic() - started)
        except RouterError as error:
            step = session.failed(error)
        except asyncio.CancelledError:
            if not self.overdue:
                raise
            _uncancel()
            step = session.failed(routing_timeout())
        except Exception:
            # A fault of the router costs one request, and its client still gets an answer.
            _log.exception("routing_failed", request_id=session.request_id)
            step = session.failed(internal_error())
        finally:
            streams.deadlines.end(self)
        await self._say(self._carry_out(step))
        session.give_back()

    def _take(self, lease: Lease | Pair, attempt: int = 1) -> Step:
        """The router has decided; the stream closes the lease in the end."""
        self._lease = lease
        lease.on_abort = self._on_abort
        if self._settings.log_decisions:
            log_decision(self.session.request_id, lease, attempt)
        return self.session.routed(lease.decision)

    async def _say(self, out: Sequence[bytes], *, interrupting: bool = False) -> None:
        """Write replies. Those that interrupt take the place of others that are not written yet.

        In a crowd the others are written together with those of other streams.
        """
        if not interrupting:
            if self._streams.is_crowded:
                await asyncio.sleep(0)
            if self._interrupted:
                return
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

    @property
    def waits_for_client(self) -> bool:
        return self.session.waits_for_body

    def timed_out(self) -> None:
        """The deadline of the body or of the decision has passed; called by Deadlines."""
        if self.session.question is None:
            self._interrupt(self.session.body_timed_out())
        elif self._settings.extension is not None and not self._extended:
            self._extend(self._settings.extension)
        elif self._task is not None:
            # `_ask` catches the cancellation and answers.
            self.overdue = True
            self._task.cancel()

    def _on_abort(self, error: RouterError) -> None:
        self._interrupt(self.session.aborted(error))
        if isinstance(self._lease, Pair):
            self._lease.answer_written()

    def _interrupt(self, step: Step) -> None:
        """Send what a timer has decided while `serve` is waiting for Envoy."""
        out = self._carry_out(step)
        if out:
            self._interrupted = True
            self._streams.spawn(self._write(out))

    async def _write(self, out: Sequence[bytes], *, interrupting: bool = True) -> None:
        # The stream may have ended in the meantime; then nothing needs to be written.
        with contextlib.suppress(grpc.aio.BaseError, grpc.RpcError, asyncio.InvalidStateError):
            await self._say(out, interrupting=interrupting)

    def _extend(self, extension: Extension) -> None:
        """Ask the gateway to wait: this service is at work."""
        self._extended = True
        self._streams.deadlines.start(self, self._settings.last_deadline_seconds)
        reply = at_work(extension.message_timeout_seconds)
        self._streams.spawn(self._write((reply,), interrupting=False))

    @property
    def _may_end_early(self) -> bool:
        return self.session.may_end_early and not (
            self._lease is not None and self._lease.holds_stream
        )

    def end_if_idle(self) -> None:
        """End the stream with status OK, from outside `serve`, if nothing is lost by that."""
        if self.reading and self._may_end_early and self._task is not None:
            self.ending = True
            self.reading = False  # or the task would not be cancelled
            self._task.cancel()

    def close(self) -> None:
        self._streams.deadlines.end(self)
        self.session.close()
        if self._lease is not None:
            self._lease.close()


def _uncancel() -> None:
    """Take back a cancellation that this module has made and caught."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()


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
        # Set when the process is about to end: streams then end as soon as they may.
        self.draining = False
        self.deadlines = Deadlines()
        self.event_log = EventLog()
        self.last_opened_at = 0.0
        self._open: set[Stream] = set()
        self._background: set[asyncio.Task[None]] = set()

    def use(
        self, session_context: SessionContext, decider: Decider, settings: StreamSettings
    ) -> None:
        """Serve the streams that open from now on with these; open ones stay as they are."""
        # The same name as before, for requests that began before.
        session_context.responses.replica = self.session_context.responses.replica
        self.session_context = session_context
        self.decider = decider
        self.settings = settings

    def __len__(self) -> int:
        """The number of open streams."""
        return len(self._open)

    @property
    def is_crowded(self) -> bool:
        """True when several requests are being decided at once.

        A reply then waits until the other streams that are ready have built theirs. Replies that
        are written in one turn of the loop leave in one system call and wake Envoy once; one by
        one, each of them wakes it. With few requests the wait would only add latency.
        """
        return len(self.deadlines) > _CROWD_STREAMS

    async def serve(self, context: Any, session: type[RouteSession | DecodeSession]) -> None:
        """Serve one gRPC stream to its end; returns to end it with status OK."""
        stream = Stream(self, context, session(self.session_context))
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

    def report_attempt(self, raw: bytes) -> bytes:
        """Take the report of one attempt, and return the reply; raises protobuf's DecodeError.

        The first pass may be in another replica: the reply carries the report on to it.
        """
        report = read_attempt(pb.ProcessingRequest.FromString(raw))
        if not self.decider.answered_busy(report.address, report.retry_after_seconds):
            return RESPONSE_HEADERS_CONTINUE
        replica = self.session_context.responses.replica
        return attempt_reported(report.number, report.address, replica)

    def end_slowest(self) -> None:
        """There are too many requests: end one whose body has not come for long.

        Otherwise clients that send slowly could keep all others out.
        """
        begun_before = time.monotonic() - _SLOW_BODY_SECONDS
        self.deadlines.end_waiting(begun_before + self.settings.body_deadline_seconds)

    def end_idle(self) -> None:
        """End the streams whose request is decided; their responses go on without this service."""
        for stream in list(self._open):
            stream.end_if_idle()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine beside the streams, and keep it referenced."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Cancel what runs beside the streams, which have ended."""
        self.event_log.flush()
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
