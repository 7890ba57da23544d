"""Starts the service and Envoy with simulated workers, and reads what the service holds."""

import asyncio
import contextlib
import resource
import sys
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from msgspec import Struct

from benchmarks.procs import rss_bytes
from extproc.testing.stack import ManagedProcess, Stack, free_ports, wait_until

__all__ = [
    "MODEL",
    "Held",
    "held",
    "raise_file_limit",
    "running_stack",
    "running_workers",
    "settle",
]

MODEL: Final = "benchmark-model"
_SETTLE_SECONDS: Final = 30.0
# Older builds of the service do not export it.
_TASKS_METRIC: Final = "extproc_asyncio_tasks_open"


class Held(Struct, frozen=True, kw_only=True):
    """The resources that the service holds and must give back; `tasks` is None if unknown."""

    tickets: int
    streams: int
    open_files: int
    tasks: int | None
    rss_bytes: int


@contextlib.asynccontextmanager
async def running_stack(
    folder: Path,
    workers: int,
    simulator_options: Mapping[str, str],
    envoy: Mapping[str, object] | None = None,
) -> AsyncIterator[Stack]:
    """Simulators as processes of their own, the service and Envoy; stopped at the end.

    `envoy` has settings of that section.
    """
    async with (
        running_workers(folder, workers, simulator_options) as urls,
        Stack(
            folder,
            urls,
            {"models": [{"id": MODEL}], "envoy": {"access_log": None, **(envoy or {})}},
        ) as stack,
    ):
        yield stack


@contextlib.asynccontextmanager
async def running_workers(
    folder: Path, workers: int, simulator_options: Mapping[str, str]
) -> AsyncIterator[list[str]]:
    """Simulators as processes of their own, stopped at the end; yields their URLs."""
    async with contextlib.AsyncExitStack() as stack:
        ports = free_ports(workers)
        options = [part for pair in simulator_options.items() for part in pair]
        for port in ports:
            process = ManagedProcess(
                f"simulator on port {port}",
                [
                    *(sys.executable, "-m", "extproc", "simulate"),
                    *("--port", str(port), "--model", MODEL, *options),
                ],
                folder / f"simulator-{port}.log",
            )
            # Register the clean-up first: a Ctrl-C during the start must not leave it behind.
            stack.push_async_callback(process.stop)
            await process.start()
            await process.wait_ready(partial(_says_ready, process))
        yield [f"http://127.0.0.1:{port}" for port in ports]


async def _says_ready(process: ManagedProcess) -> bool:
    return "simulator ready" in process.tail()


async def held(stack: Stack) -> Held:
    """Read what the service holds now."""
    metrics = await stack.metrics()
    tasks = metrics.get(_TASKS_METRIC)
    return Held(
        tickets=int(metrics["extproc_tickets_open"]),
        streams=int(metrics["extproc_streams_open"]),
        open_files=int(metrics["process_open_fds"]),
        tasks=None if tasks is None else int(tasks),
        rss_bytes=rss_bytes(stack.service.pid),
    )


async def settle(stack: Stack, streams: int = 0) -> Held:
    """Wait until this many streams are open, each with its ticket, then read.

    Raises StackError if that takes too long.
    """

    async def reached() -> bool:
        now = await held(stack)
        return now.streams == streams and now.tickets == streams

    await wait_until(reached, f"{streams} streams and tickets open", _SETTLE_SECONDS)
    # Envoy's and the kernel's buffers are freed a moment later.
    await asyncio.sleep(1)
    return await held(stack)


def raise_file_limit(needed: int) -> None:
    """Let this process and its children open this many files, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
