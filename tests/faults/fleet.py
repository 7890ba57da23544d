"""An installation that a storm can break: each worker is a process of its own."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
from msgspec import Struct

from extproc.demo.tiny_model import write_model_folder
from extproc.testing.stack import ManagedProcess, Stack, StackError, reserved_ports
from tests.faults.names import Names

__all__ = ["MODEL", "Fleet", "FleetOptions", "Worker", "running"]

MODEL: Final = "m"
_TOKEN_POLICIES: Final = ("cache_aware_zmq", "min_ttft")
_PAGE_TOKENS: Final = 16


class FleetOptions(Struct, frozen=True, kw_only=True):
    """`disaggregated`: half of the workers prefill, the others decode. `named`: the service and
    Envoy know the workers by host names, which can move. `worker_requests_max`: a worker gets no
    more at once, and others wait in the service.
    """

    workers: int = 6
    policy: str = "round_robin"
    disaggregated: bool = False
    named: bool = False
    worker_requests_max: int | None = None


class Worker:
    """One simulated worker, which a storm can kill, stop and replace."""

    def __init__(self, port: int, argv: list[str], log: Path, http: aiohttp.ClientSession) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        # Held by the fault that the worker has.
        self.busy = asyncio.Lock()
        self._http = http
        self._argv = argv
        self._log = log
        self._process = self._new_process()

    def _new_process(self) -> ManagedProcess:
        return ManagedProcess(f"worker on port {self.port}", self._argv, self._log)

    async def start(self) -> None:
        self._process = self._new_process()
        await self._process.start()
        await self._process.wait_ready(self._is_ready)

    async def _is_ready(self) -> bool:
        try:
            async with self._http.get(f"{self.url}/health") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        await self._process.stop(number)

    def send(self, number: signal.Signals) -> None:
        self._process.send(number)

    async def set_faults(self, **faults: Any) -> None:
        """As `POST /simulator/faults`; no names clear all faults."""
        async with self._http.post(f"{self.url}/simulator/faults", json=faults) as answer:
            answer.raise_for_status()

    async def busy_with(self) -> int:
        """Requests and rooms that the worker still has."""
        async with self._http.get(f"{self.url}/simulator/stats") as answer:
            stats = await answer.json()
        return int(stats["running"] + stats["waiting"] + stats["rooms"])


class Fleet:
    """The service and Envoy with their workers, and an HTTP client. `names` is None unless the
    workers have host names.
    """

    def __init__(
        self,
        stack: Stack,
        workers: list[Worker],
        http: aiohttp.ClientSession,
        names: Names | None = None,
    ) -> None:
        self.stack = stack
        self.workers = workers
        self.http = http
        self.names = names
        # Held by the fault that the service or the gateway has.
        self.busy = asyncio.Lock()


@contextlib.asynccontextmanager
async def running(folder: Path, options: FleetOptions) -> AsyncIterator[Fleet]:
    """Start all of it; stopped at the end, also what a storm has stopped or left behind."""
    async with contextlib.AsyncExitStack() as exits:
        http = await exits.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=False))
        )
        model: dict[str, Any] = {"id": MODEL, "policy": options.policy}
        model["circuit_breaker"] = {"cool_down_secs": 1}
        if options.worker_requests_max is not None:
            most = options.worker_requests_max
            model["queue"] = {"max_requests": 1000, "worker_requests_max": most}
        shared = ["--model", MODEL, "--decode-milliseconds-per-token", "2"]
        if options.policy in _TOKEN_POLICIES:
            model["tokenizer_path"] = str(write_model_folder(folder / "model"))
            shared += ["--tokenizer-path", model["tokenizer_path"]]
            shared += ["--page-size", str(_PAGE_TOKENS)]
        workers: list[Worker] = []
        for number in range(options.workers):
            ports = exits.enter_context(reserved_ports(5))
            argv = [*_command(ports, options, number), *shared]
            worker = Worker(ports[0], argv, folder / f"worker-{number}.log", http)
            exits.push_async_callback(_end, worker)
            workers.append(worker)
        await asyncio.gather(*(worker.start() for worker in workers))
        names = Names(folder / "hosts", len(workers)) if options.named else None
        stack = _stack(folder, workers, _settings(model, options), names)
        yield Fleet(await exits.enter_async_context(_restorable(stack)), workers, http, names)


def _stack(
    folder: Path, workers: list[Worker], settings: dict[str, Any], names: Names | None
) -> Stack:
    if names is None:
        return Stack(folder, [worker.url for worker in workers], settings)
    urls = [f"http://{names.name(n)}:{worker.port}" for n, worker in enumerate(workers)]
    stack = Stack(folder, urls, settings)
    for part in ("service", "envoy"):
        process: ManagedProcess = getattr(stack, part)
        argv = names.using(list(process._argv))
        setattr(stack, part, ManagedProcess(process.name, argv, process.log))
    return stack


def _command(ports: list[int], options: FleetOptions, number: int) -> list[str]:
    port, bootstrap, events, replay, load = ports
    command = [sys.executable, "-m", "extproc", "simulate", "--port", str(port)]
    if options.named:
        command += ["--host", "0.0.0.0"]
    if options.disaggregated:
        prefills = number < options.workers // 2
        command += ["--disaggregation-mode", "prefill" if prefills else "decode"]
        command += ["--bootstrap-timeout-seconds", "5"]
        if prefills:
            command += ["--disaggregation-bootstrap-port", str(bootstrap)]
    if options.policy in _TOKEN_POLICIES:
        command += ["--kv-events-port", str(events), "--kv-replay-port", str(replay)]
        command += ["--kv-load-port", str(load)]
    return command


def _settings(model: dict[str, Any], options: FleetOptions) -> dict[str, Any]:
    """Short time-outs, so that a storm is over soon after its last fault."""
    return {
        "models": [model],
        "proxy": {"request_timeout_secs": 10, "connect_timeout_secs": 1},
        "discovery": {
            "introspection_retry_secs": 1,
            "introspection_interval_secs": 2,
            "static_urls": {"dns_ttl_secs": 1},
        },
        "pd": {"response_timeout_secs": 6, "prefill_timeout_secs": 5},
        "envoy": {
            "stream_idle_timeout_secs": 12,
            "access_log": None,
            # Neither worker of a pair can serve alone.
            "fail_open": not options.disaggregated,
        },
    }


async def _end(worker: Worker) -> None:
    with contextlib.suppress(StackError):  # it never started
        worker.send(signal.SIGCONT)
    await worker.stop(signal.SIGKILL)


@contextlib.asynccontextmanager
async def _restorable(stack: Stack) -> AsyncIterator[Stack]:
    """The stack; a service that a storm has stopped with SIGSTOP must run to be ended."""
    async with stack:
        try:
            yield stack
        finally:
            stack.service.send(signal.SIGCONT)
