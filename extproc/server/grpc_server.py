"""The gRPC server: addresses, TLS, health checks and draining.

It is separate from stream, which serves one stream. gRPC hands over messages as bytes both ways:
replies are serialised already, and a message that does not parse ends its stream with a clear
status instead of an exception in the library.
"""

import asyncio
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from extproc.config.section import MEBIBYTE
from extproc.config.server import ServerConfig
from extproc.errors import ConfigError
from extproc.event_loop import let_cancellation_come
from extproc.headers import ATTEMPT_PASS, DECODE_PASS, PASS_KEY, ROUTE_PASS
from extproc.server.certificates import Certificates
from extproc.server.decode_session import DecodeSession
from extproc.server.route_session import RouteSession
from extproc.server.stream import Streams

__all__ = [
    "HEALTH_SERVICES_ALIVE",
    "HEALTH_SERVICES_READY",
    "SERVICE",
    "ExtProcServer",
    "grpc_options",
]

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
# Health names for the process alone, and those for the process and its workers.
HEALTH_SERVICES_ALIVE: Final = ("", "liveness")
HEALTH_SERVICES_READY: Final = ("readiness", SERVICE)

# Headers and framing around a body in one message.
_MESSAGE_OVERHEAD_BYTES: Final = 2 * MEBIBYTE
_STOP_GRACE_SECONDS: Final = 2.0
_DRAIN_POLL_SECONDS: Final = 0.1
# With Envoy probing health every second, two seconds without a stream mean it has noticed.
_DRAIN_QUIET_SECONDS: Final = 2.5


def grpc_options(max_body_bytes: int) -> list[tuple[str, int]]:
    """Channel arguments of the server."""
    # Twice the limit is accepted, so that a body over it still gets the 413 of this service.
    receive_limit = 2 * max_body_bytes + _MESSAGE_OVERHEAD_BYTES
    return [
        ("grpc.max_receive_message_length", min(receive_limit, 2**31 - 1)),
        ("grpc.max_send_message_length", -1),
        # A second server on the port must fail, not silently share it.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Proxies ping often; that is not an attack here.
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.http2.max_ping_strikes", 0),
    ]


class ExtProcServer:
    """The gRPC server with the ExternalProcessor and health services."""

    def __init__(
        self,
        config: ServerConfig,
        streams: Streams,
        services: Sequence[grpc.GenericRpcHandler] = (),
    ) -> None:
        """`services` are served beside it, at the same addresses."""
        self.streams = streams
        # None without TLS.
        self.certificates = None if config.tls is None else Certificates(config.tls)
        self._config = config
        self._socket_file: tuple[Path, tuple[int, int] | None] | None = None
        self._health = health.aio.HealthServicer()
        self._takes_requests = False
        self._server = grpc.aio.server(options=grpc_options(config.max_body_bytes))
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    SERVICE,
                    {"Process": grpc.stream_stream_rpc_method_handler(self._process)},
                ),
                *services,
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    @property
    def open_streams(self) -> int:
        return len(self.streams)

    @property
    def draining(self) -> bool:
        """True from the call of `drain` on."""
        return self.streams.draining

    async def start(self, *, alive: bool = True) -> None:
        """Begin to serve on the addresses that `bind` has taken.

        Unless it is `alive`, requests are refused until `set_health`: a gateway that has not seen
        yet that it was gone must serve them without it.
        """
        if alive:
            await self.set_health(ready=False)
        else:
            for name in (*HEALTH_SERVICES_ALIVE, *HEALTH_SERVICES_READY):
                await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()
        self.streams.spawn(self.streams.deadlines.run())

    def bind(self) -> None:
        """Take the addresses; raises ConfigError with the key of one that is not available."""
        config = self._config
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"{host}:{config.port}"
        try:
            if self.certificates is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, self.certificates.credentials())
        except RuntimeError:
            raise ConfigError(
                [
                    f"server.port: cannot listen on {address}: the port is in use, "
                    "or server.host is not an address of this machine"
                ]
            ) from None
        if config.unix_socket is None:
            return
        path = Path(config.unix_socket)
        _remove_left_over(path)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError:
            raise ConfigError([f"server.unix_socket: cannot listen on {path}"]) from None
        self._socket_file = (path, _identity(path))

    def _unlink_socket(self) -> None:
        """Remove the socket file, unless another process has put its own in its place."""
        if self._socket_file is not None:
            path, identity = self._socket_file
            if identity is not None and _identity(path) == identity:
                path.unlink(missing_ok=True)

    async def set_health(self, *, ready: bool) -> None:
        """Publish readiness. While draining, every name stays NOT_SERVING."""
        self._takes_requests = True
        if self.draining:
            return
        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        for name in HEALTH_SERVICES_ALIVE:
            await self._health.set(name, serving)
        for name in HEALTH_SERVICES_READY:
            await self._health.set(name, serving if ready else not_serving)

    async def drain(self, limit_seconds: float) -> None:
        """Report NOT_SERVING, and serve until Envoy has noticed and every stream has ended.

        Streams whose request is decided end at once with status OK: their responses go on
        without this service. Other streams get their decision first.
        """
        await self._health.enter_graceful_shutdown()
        streams = self.streams
        streams.draining = True
        begun = time.monotonic()
        while time.monotonic() - begun < limit_seconds:
            streams.end_idle()
            quiet = time.monotonic() - max(streams.last_opened_at, begun) >= _DRAIN_QUIET_SECONDS
            if not len(streams) and (quiet or not streams.last_opened_at):
                break
            await asyncio.sleep(_DRAIN_POLL_SECONDS)

    async def stop(self) -> None:
        """Close the streams that are left; every lease is closed afterwards."""
        await self._server.stop(_STOP_GRACE_SECONDS)
        await self.streams.close()
        self._unlink_socket()

    async def _serve_report(self, context: Any) -> None:
        """Take the report of an attempt, and wait for the end of its stream."""
        try:
            raw = await context.read()
            if raw is not grpc.aio.EOF:
                await context.write(self.streams.report_attempt(raw))
                while await context.read() is not grpc.aio.EOF:
                    pass
                await let_cancellation_come()
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a ProcessingRequest")

    async def _process(self, _: Any, context: Any) -> None:
        session: type[RouteSession | DecodeSession] = RouteSession
        for key, value in context.invocation_metadata() or ():
            if key == PASS_KEY and value == DECODE_PASS:
                session = DecodeSession
            elif key == PASS_KEY and value == ATTEMPT_PASS:
                await self._serve_report(context)
                return
            elif key == PASS_KEY and value != ROUTE_PASS:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{PASS_KEY}: unknown pass")
        if not self._takes_requests:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the workers are not known yet")
        await self.streams.serve(context, session)
        await let_cancellation_come()


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None if it does not exist."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _remove_left_over(path: Path) -> None:
    """Remove the socket of a dead process; raises ConfigError for anything else."""
    if _identity(path) is None:
        return
    if not path.is_socket():
        raise ConfigError([f"server.unix_socket: {path} exists and is not a socket"])
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)  # left over from a process that was killed
            return
    raise ConfigError([f"server.unix_socket: another process listens on {path}"])
