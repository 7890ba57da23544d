"""`extproc demo`: the whole path on one machine, and a table of who served what."""

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extproc.demo.stack import ManagedProcess, Stack, StackError, free_ports
from extproc.demo.traffic import Outcome, percentile, send_traffic

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["add_arguments", "run"]

_MODEL = "demo-model"
_POLICIES = ("round_robin", "random", "power_of_two", "least_load")
_PREFERRED_ENVOY_PORT = 8080


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the demo; the defaults end within seconds."""
    parser.add_argument("--once", action="store_true", help="end after one round of traffic")
    parser.add_argument("--workers", type=_workers, default=3, metavar="N", help="default 3")
    parser.add_argument("--requests", type=_count, default=120, metavar="N", help="default 120")
    parser.add_argument("--concurrency", type=_count, default=16, metavar="N", help="default 16")
    parser.add_argument("--policy", choices=_POLICIES, default="least_load")


def _count(text: str) -> int:
    return _number(text, 100_000)


def _workers(text: str) -> int:
    return _number(text, 32)


def _number(text: str, highest: int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= highest:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {highest}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """0 when every request was answered with 200, 1 otherwise."""
    try:
        import rich  # noqa: F401 (an optional dependency; better told now than after the start)
    except ImportError:
        sys.stderr.write("the demo needs more packages: pip install 'llm-extproc[demo]'\n")
        return 1
    try:
        return asyncio.run(_demo(options))
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 0


async def _demo(options: argparse.Namespace) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    with tempfile.TemporaryDirectory(prefix="extproc-demo-") as name:
        serving = asyncio.create_task(_serve(options, Path(name), stop))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            serving.cancel()
        stopping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            return await serving
        return 0


async def _serve(options: argparse.Namespace, folder: Path, stop: asyncio.Event) -> int:
    async with contextlib.AsyncExitStack() as exits:
        ports = free_ports(options.workers)
        sys.stdout.write(f"starting {len(ports)} simulated workers, the service and Envoy ...\n")
        for port in ports:
            worker = _worker(port, folder)
            exits.push_async_callback(worker.stop)
            await worker.start()
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        settings: dict[str, Any] = {
            "models": [{"id": _MODEL, "policy": options.policy}],
            "discovery": {"introspection_retry_secs": 0.5},
        }
        if envoy_port := _preferred_port():
            settings["envoy"] = {"port": envoy_port}
        stack = await exits.enter_async_context(Stack(folder, urls, settings))
        good = await _round(stack, options)
        if not options.once:
            _print_hints(stack)
            await stop.wait()
        return 0 if good else 1


def _preferred_port() -> int | None:
    """8080 when nobody has it, since it is easy to type."""

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", _PREFERRED_ENVOY_PORT))
        except OSError:
            return None
    return _PREFERRED_ENVOY_PORT


def _worker(port: int, folder: Path) -> ManagedProcess:
    argv = [sys.executable, "-m", "extproc", "simulate", "--port", str(port), "--model", _MODEL]
    return ManagedProcess(f"worker {port}", argv, folder / f"worker-{port}.log")


async def _round(stack: Stack, options: argparse.Namespace) -> bool:
    from rich.console import Console
    from rich.live import Live

    outcomes: list[Outcome] = []
    console = Console()
    with Live(_table([], options), console=console, refresh_per_second=8) as live:

        def show(outcome: Outcome) -> None:
            outcomes.append(outcome)
            live.update(_table(outcomes, options))

        await send_traffic(
            stack.url,
            _MODEL,
            requests=options.requests,
            concurrency=options.concurrency,
            on_outcome=show,
        )
    failed = sum(outcome.status != 200 for outcome in outcomes)
    missed = sum(
        value
        for key, value in (await stack.metrics()).items()
        if key.startswith("extproc_destination_missed_total")
    )
    console.print()
    console.print(
        f"{len(outcomes)} requests through Envoy at {stack.url}, {failed} failed; "
        f"{missed:g} went elsewhere than decided; load left over: {await stack.in_flight()}"
    )
    return failed == 0


def _table(outcomes: Sequence[Outcome], options: argparse.Namespace) -> "Table":
    from rich.table import Table

    table = Table(title=f"who served what ({options.policy})")
    for heading in ("worker", "requests", "streamed", "share", "TTFT p50", "TTFT p95", "chunks"):
        table.add_column(heading, justify="left" if heading == "worker" else "right")
    for port in sorted({outcome.port for outcome in outcomes}):
        served = [outcome for outcome in outcomes if outcome.port == port]
        first = [outcome.ttft_seconds * 1000 for outcome in served if outcome.streamed]
        table.add_row(
            f"127.0.0.1:{port}",
            str(len(served)),
            str(sum(outcome.streamed for outcome in served)),
            f"{len(served) / len(outcomes):.0%}",
            f"{percentile(first, 50):.0f} ms" if first else "-",
            f"{percentile(first, 95):.0f} ms" if first else "-",
            str(sum(outcome.chunks for outcome in served)),
        )
    return table


def _print_hints(stack: Stack) -> None:
    body = f'{{"model":"{_MODEL}","stream":true,"messages":[{{"role":"user","content":"hi"}}]}}'
    sys.stdout.write(
        f"\nstill serving until Ctrl-C; try:\n"
        f"  curl -N {stack.url}/v1/chat/completions -d '{body}'\n"
        f"  curl {stack.url}/v1/models\n"
        f"  curl {stack.admin_url}/workers\n"
        f"  curl {stack.admin_url}/metrics\n"
    )
    sys.stdout.flush()
