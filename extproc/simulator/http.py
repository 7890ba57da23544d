"""The aiohttp application of one worker, and a running instance of it for tests.

aiohttp cancels the handler of a client that disconnects only with `handler_cancellation`.
An application cannot set that option, so this module makes the runner too.
"""

import contextlib
import hmac
from types import TracebackType
from typing import Self

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from extproc.simulator.binding import Listener, dialled, listen
from extproc.simulator.control import Control
from extproc.simulator.errors import ApiError, error_body
from extproc.simulator.faults import FAULT_HEADER, parse_header
from extproc.simulator.inference import json_answer, listening_port, serve
from extproc.simulator.journal import Journal
from extproc.simulator.kv_publisher import KvPorts, KvPublisher
from extproc.simulator.settings import SimulatorSettings
from extproc.simulator.tokenizing import Tokenizing
from extproc.simulator.worker import Worker

__all__ = ["RunningSimulator", "create_app", "start"]

_BODY_LIMIT_BYTES = 64 * 1024 * 1024
_BACKLOG_CONNECTIONS = 4096
_SHUTDOWN_SECONDS = 1.0  # handlers were cancelled already
_WORKER = web.AppKey("worker", Worker)
_OPEN_PATHS = frozenset({"/health", "/health_generate"})
_VLLM_GUARDED_PREFIX = "/v1"


def create_app(settings: SimulatorSettings) -> web.Application:
    """The worker as an application, for a runner with `handler_cancellation=True`."""
    worker = Worker(settings)
    app = web.Application(
        middlewares=[_tracked(worker), _enveloped(), _authorized(settings)],
        client_max_size=_BODY_LIMIT_BYTES,
    )
    app[_WORKER] = worker
    app.add_routes(Control(worker).routes())
    app.add_routes(Tokenizing(worker).routes())

    async def infer(request: web.Request) -> web.StreamResponse:
        return await serve(worker, request)

    app.add_routes([web.post(path, infer) for path in worker.readers])

    async def break_off(app: web.Application) -> None:
        worker.break_off()

    async def start_publishing(app: web.Application) -> None:
        await worker.start()

    async def stop_publishing(app: web.Application) -> None:
        await worker.stop()

    app.on_response_prepare.append(_sign)
    app.on_startup.append(start_publishing)
    app.on_shutdown.append(break_off)
    app.on_cleanup.append(stop_publishing)
    return app


class RunningSimulator:
    """A listening worker; as an async context manager it stops at the end.

    `stop` aborts running requests: their clients see connections that break.
    """

    def __init__(
        self,
        settings: SimulatorSettings,
        runner: web.AppRunner,
        listener: Listener,
        worker: Worker,
    ) -> None:
        self._host = dialled(settings.host)
        self._runner = runner
        self._listener = listener
        self._worker = worker
        self.settings = settings
        self.port: int = runner.addresses[0][1]

    @property
    def url(self) -> str:
        """The URL for clients on this machine, without a trailing slash."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    @property
    def publisher(self) -> KvPublisher | None:
        """The present publisher of KV events; None if the worker does not publish."""
        return None if self._runner.app is None else self._runner.app[_WORKER].publisher

    @property
    def journal(self) -> Journal:
        """The requests of this worker, also after it has stopped."""
        return self._worker.journal

    @property
    def kv_ports(self) -> KvPorts | None:
        """The ports of rank 0; None if the worker publishes no KV events."""
        return None if self.publisher is None else self.publisher.ports

    @property
    def side_channel_port(self) -> int | None:
        """The port at which other workers fetch KV by NIXL; None without that protocol."""
        return self._worker.side_channel_port

    @property
    def bootstrap_port(self) -> int:
        """The real bootstrap port of a prefill worker, for decode workers."""
        return self._worker.bootstrap_port

    def use_tokenizer(self, path: str) -> None:
        """From now on, encode and render with another model's folder, as after an update."""
        self._worker.use_tokenizer(path)

    async def restart(self) -> None:
        """Same as `POST /simulator/restart`: see `Worker.restart`."""
        if self._runner.app is None:
            raise RuntimeError("the worker has stopped")
        await self._worker.restart()

    async def stop(self) -> None:
        await self._listener.stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()


async def start(settings: SimulatorSettings) -> RunningSimulator:
    """Listen and serve; raises OSError when the address cannot be used."""
    app = create_app(settings)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )
    listener = await listen(runner, settings.host, settings.port, backlog=_BACKLOG_CONNECTIONS)
    return RunningSimulator(settings, runner, listener, app[_WORKER])


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["x-simulator-port"] = str(listening_port(request))
    fault = request.headers.get(FAULT_HEADER)
    if fault is not None:
        with contextlib.suppress(ValueError):  # answered with 400
            response.headers.update(parse_header(fault).response_headers)


def _tracked(worker: Worker) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        with worker.handling():
            return await handler(request)

    return middleware


def _enveloped() -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Put every error into the envelope that clients expect, aiohttp's own errors too."""
        try:
            return await handler(request)
        except ApiError as error:
            response = json_answer(error_body(error.status, error.message), error.status)
            response.headers.update(error.headers)
            return response
        except web.HTTPException as error:
            response = json_answer(error_body(error.status, error.reason), error.status)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
            return response

    return middleware


def _authorized(settings: SimulatorSettings) -> Middleware:
    expected = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()

    def guards(path: str) -> bool:
        if settings.is_vllm:
            return path.startswith(_VLLM_GUARDED_PREFIX)
        return path not in _OPEN_PATHS

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if expected is not None and guards(request.path):
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, expected):
                raise ApiError(
                    401, "a valid API key is needed", headers={"WWW-Authenticate": "Bearer"}
                )
        return await handler(request)

    return middleware
