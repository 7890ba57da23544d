"""The grpc.aio transport: thin, everything that decides is in session and routing.

Messages are handed over as bytes both ways: replies are serialised once by replies, and a
message that does not parse ends its stream with a clear status instead of an exception in
the library.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from extproc.config.schema import MEBIBYTE, ServerConfig, ServerTlsConfig
from extproc.errors import ConfigError, RouterError, internal_error, routing_timeout
from extproc.headers import DECODE_PASS, PASS_KEY, ROUTE_PASS
from extproc.metrics.service import Metrics
from extproc.routing.lease import Lease
from extproc.routing.local_endpoints import Answer
from extproc.routing.pd.pair import Pair
from extproc.routing.request import Request
from extproc.server.decode_session import DecodeSession
from extproc.server.session import Session, SessionContext

__all__ = [
    "HEALTH_SERVICES_ALIVE",
    "HEALTH_SERVICES_READY",
    "SERVICE",
    "ExtProcServer",
    "grpc_options",
]

_log = structlog.get_logger()

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
# Health names that answer for the process, and those that answer for the workers as well.
HEALTH_SERVICES_ALIVE: Final = ("", "liveness")
HEALTH_SERVICES_READY: Final = ("readiness", SERVICE)

# Headers and framing around a body in one message.
_MESSAGE_OVERHEAD_BYTES: Final = 2 * MEBIBYTE
_STOP_GRACE_SECONDS: Final = 2.0
_DRAIN_POLL_SECONDS: Final = 0.1
_WATCH_SECONDS: Final = 0.05
_CROWD_STREAMS: Final = 1
# With Envoy probing health every second, two seconds without a stream mean it has noticed.
_DRAIN_QUIET_SECONDS: Final = 2.5


def grpc_options(max_body_bytes: int) -> list[tuple[str, int]]:
    """Channel arguments of the server."""
    # Twice the limit is let in, so that a body over it is still answered with our 413.
    receive_limit = 2 * max_body_bytes + _MESSAGE_OVERHEAD_BYTES
    return [
        ("grpc.max_receive_message_length", min(receive_limit, 2**31 - 1)),
        ("grpc.max_send_message_length", -1),
        # A second server on the port must fail, not silently share it.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Proxies ping often; that is no attack here.
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.http2.max_ping_strikes", 0),
    ]


class _Stream:
    """One open stream: owns its session and the I/O around it."""

    __slots__ = (
        "_context",
        "_interrupted",
        "_overtaking",
        "_picks_itself",
        "_reading",
        "_server",
        "_task",
        "_writing",
        "deadline",
        "ending",
        "overdue",
        "session",
    )

    def __init__(
        self, server: "ExtProcServer", context: Any, session: type[Session] = Session
    ) -> None:
        self._server = server
        self._context = context
        self._task = asyncio.current_task()
        # Set while a deadline of ours runs, in seconds of time.monotonic.
        self.deadline: float | None = None
        self.overdue = False
        self.ending = False
        # Only then has everything that was decided been written.
        self._reading = False
        # What was to be said next has been overtaken by an answer.
        self._interrupted = False
        # gRPC takes one message at a time, and refuses a second one.
        self._writing = False
        self._overtaking: Sequence[bytes] = ()
        self.session = session(server.session_context)
        # In the second pass `receive` decides; until it has.
        self._picks_itself = session is DecodeSession

    async def serve(self) -> None:
        """Read until Envoy is done; returns to end the stream with status OK."""
        context, session, server = self._context, self.session, self._server
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
                session.lease.ticket.on_stale = self._on_stale
            if out:
                if server.is_crowded:
                    await asyncio.sleep(0)
                await self._say(out)
            # A stream may stay open for minutes: it must not keep a body alive.
            del raw
            if session.to_route is not None:
                await self._route(session.to_route)
            elif session.waits_for_body and self.deadline is None:
                server.watch(self, server.body_deadline_seconds)
            if server.draining and session.may_end_early:
                return

    async def _route(self, request: Request) -> None:
        session, server = self.session, self._server
        started = server.watch(self, server.step_deadline_seconds)
        try:
            if request.endpoint.answered_locally:
                out = session.answered(await server.answer(request))
            else:
                lease = await server.route(request)
                lease.ticket.on_stale = self._on_stale
                lease.on_failure = self._on_partner_failed
                out = session.routed(lease)
                if server.log_decisions:
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
            server.metrics.decision_seconds.observe(time.monotonic() - started)
        finally:
            server.unwatch(self)
        if server.is_crowded:
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
        """A deadline of ours has passed; called by the server's watch."""
        if self.session.to_route is None:
            self._interrupt(self.session.body_timed_out)
        elif self._task is not None:
            # The router does not come back: `_route` answers.
            self.overdue = True
            self._task.cancel()

    def _on_stale(self) -> None:
        self._interrupt(self.session.expired)

    def _on_partner_failed(self, error: RouterError) -> None:
        lease = self.session.lease
        self._interrupt(lambda: self.session.partner_failed(error))
        if isinstance(lease, Pair):
            lease.told()

    def _interrupt(self, step: Callable[[], Sequence[bytes]]) -> None:
        """Send what a timer wants said while `serve` is waiting for Envoy."""
        out = step()
        if out:
            self._interrupted = True
            self._server.spawn(self._write(out))

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
            self._server.unwatch(self)
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


class ExtProcServer:
    """The gRPC server with the ExternalProcessor and health services."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        session_context: SessionContext,
        route: Callable[[Request], Awaitable[Lease | Pair]],
        answer: Callable[[Request], Awaitable[Answer]],
        metrics: Metrics,
        body_deadline_seconds: float,
        log_decisions: bool,
        step_deadline_seconds: float | None = None,
    ) -> None:
        self._config = config
        self.session_context = session_context
        self.route = route
        self.answer = answer
        self.metrics = metrics
        self.body_deadline_seconds = body_deadline_seconds
        self.step_deadline_seconds = step_deadline_seconds or config.step_deadline_secs
        self.log_decisions = log_decisions
        self.draining = False
        self._socket_file: tuple[Path, tuple[int, int] | None] | None = None
        self._streams: set[_Stream] = set()
        self._last_stream_at = 0.0
        self._background: set[asyncio.Task[None]] = set()
        # Streams with a running deadline. One task looks at all of them: a timer per request
        # would cost more than the decision.
        self._watched: dict[_Stream, None] = {}
        metrics.streams_open.set_function(lambda: float(len(self._streams)))
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(options=grpc_options(config.max_body_bytes))
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    SERVICE,
                    {"Process": grpc.stream_stream_rpc_method_handler(self._process)},
                ),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    @property
    def is_crowded(self) -> bool:
        """True when several requests are being decided at once.

        A reply then waits until the other streams that are ready have made theirs. Written in
        one turn of the loop, many replies leave in one system call and wake Envoy once; one by
        one, each of them wakes it. With few requests the wait would only add latency.
        """
        return len(self._watched) > _CROWD_STREAMS

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    async def start(self) -> None:
        """Begin to answer on the addresses that `bind` has taken."""
        await self.set_health(ready=False)
        await self._server.start()
        self.spawn(self._watch_deadlines())

    def bind(self) -> None:
        """Take the addresses; raises ConfigError naming the key of one that can not be had."""
        config = self._config
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"{host}:{config.port}"
        try:
            if config.tls is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, _credentials(config.tls))
        except RuntimeError:
            raise ConfigError(
                [
                    f"server.port: can not listen on {address}: the port is in use, "
                    "or server.host is no address of this machine"
                ]
            ) from None
        if config.unix_socket is None:
            return
        path = Path(config.unix_socket)
        _remove_left_over(path)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError:
            raise ConfigError([f"server.unix_socket: can not listen on {path}"]) from None
        self._socket_file = (path, _identity(path))

    def _unlink_socket(self) -> None:
        """Remove our socket file, unless somebody else has put theirs in its place."""
        if self._socket_file is not None:
            path, identity = self._socket_file
            if identity is not None and _identity(path) == identity:
                path.unlink(missing_ok=True)

    async def set_health(self, *, ready: bool) -> None:
        """Publish readiness; while draining every name stays NOT_SERVING."""
        if self.draining:
            return
        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        for name in HEALTH_SERVICES_ALIVE:
            await self._health.set(name, serving)
        for name in HEALTH_SERVICES_READY:
            await self._health.set(name, serving if ready else not_serving)

    async def drain(self, limit_seconds: float) -> None:
        """Say NOT_SERVING, go on answering until Envoy has turned away, then end all streams.

        Streams whose request is decided are ended at once with status OK: their responses go
        on without us. Others are answered first.
        """
        await self._health.enter_graceful_shutdown()
        self.draining = True
        begun = time.monotonic()
        while time.monotonic() - begun < limit_seconds:
            for stream in list(self._streams):
                stream.end_if_idle()
            quiet = time.monotonic() - max(self._last_stream_at, begun) >= _DRAIN_QUIET_SECONDS
            if not self._streams and (quiet or not self._last_stream_at):
                break
            await asyncio.sleep(_DRAIN_POLL_SECONDS)

    async def stop(self) -> None:
        """Close what is left; every stream's books are settled afterwards."""
        await self._server.stop(_STOP_GRACE_SECONDS)
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self._unlink_socket()

    def watch(self, stream: _Stream, seconds: float) -> float:
        """Start a deadline for the stream, replacing its last one; returns the time now."""
        now = time.monotonic()
        stream.deadline = now + seconds
        self._watched[stream] = None
        return now

    def unwatch(self, stream: _Stream) -> None:
        """The step is done in time."""
        stream.deadline = None
        self._watched.pop(stream, None)

    async def _watch_deadlines(self) -> None:
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

    def spawn(self, work: Any) -> None:
        """Run a short coroutine beside a stream, and keep it referenced."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _process(self, _: Any, context: Any) -> None:
        session = Session
        for key, value in context.invocation_metadata() or ():
            if key == PASS_KEY and value == DECODE_PASS:
                session = DecodeSession
            elif key == PASS_KEY and value != ROUTE_PASS:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{PASS_KEY}: unknown pass")
        stream = _Stream(self, context, session)
        self._streams.add(stream)
        self._last_stream_at = time.monotonic()
        end = "ok"
        try:
            await stream.serve()
        except asyncio.CancelledError:
            if not stream.ending:
                end = "cancelled"  # how Envoy ends most streams
                raise
            _uncancel()
        except Exception:
            end = "error"
            raise
        finally:
            stream.close()
            self._streams.discard(stream)
            self.metrics.streams(end).inc()


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None when there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _remove_left_over(path: Path) -> None:
    """Make way for our socket; raises ConfigError for anything but a dead one."""
    if _identity(path) is None:
        return
    if not path.is_socket():
        raise ConfigError([f"server.unix_socket: {path} exists and is no socket"])
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)  # left over from a process that was killed
            return
    raise ConfigError([f"server.unix_socket: another process listens on {path}"])


def _credentials(tls: ServerTlsConfig) -> grpc.ServerCredentials:
    client_ca = Path(tls.client_ca_file).read_bytes() if tls.client_ca_file else None
    return grpc.ssl_server_credentials(
        [(Path(tls.key_file).read_bytes(), Path(tls.cert_file).read_bytes())],
        root_certificates=client_ca,
        require_client_auth=client_ca is not None,
    )
