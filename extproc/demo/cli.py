"""`extproc demo`: runs the same conversations under several policies and compares them.

There is one service and one Envoy, started as an operator starts them. Every policy has a
model of its own with the same number of simulated workers. All processes end with the command.

With `--pd` the workers of a model prefill and decode apart. With `--engine vllm` they resemble vLLM
instead of SGLang; the service finds that out by itself.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from extproc.config.models import PolicyName
from extproc.demo.client import hold_conversations
from extproc.demo.figures import Tally
from extproc.demo.fleet import Fleet
from extproc.demo.pairs import pairs_ended, pairs_line
from extproc.demo.pools import PAIR_WORKERS_MIN, Pool, divided_pool, plain_pool
from extproc.demo.report import summary, table
from extproc.demo.tiny_model import write_model_folder
from extproc.demo.workload import conversations
from extproc.simulator.settings import EngineName
from extproc.testing.stack import Stack, StackError, reserved_port, wait_until

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["add_arguments", "run"]

_POLICIES: Final = ("round_robin", "cache_aware_zmq", "min_ttft")
_PREFERRED_ENVOY_PORT: Final = 8080
_REFRESH_SECONDS: Final = 0.25
_PAIRS_END_SECONDS: Final = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the demo; with the defaults a round takes less than a minute."""
    parser.add_argument("--once", action="store_true", help="end after the round")
    parser.add_argument(
        "--pd", action="store_true", help="let half of the workers prefill and the others decode"
    )
    parser.add_argument(
        "--engine",
        choices=get_args(EngineName),
        default="sglang",
        help="the engine that the workers resemble (default %(default)s)",
    )
    parser.add_argument(
        "--policy",
        action="append",
        choices=get_args(PolicyName),
        help=f"compare this one; may be repeated (default {', '.join(_POLICIES)})",
    )
    parser.add_argument(
        "--workers",
        type=_workers,
        default=4,
        metavar="N",
        help="simulated workers of each policy; the load grows with them (default 4)",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=24,
        metavar="N",
        help="how long requests are sent (default 24)",
    )
    # Options that contradict each other are found after both are parsed.
    parser.set_defaults(refuse=parser.error)


def _workers(text: str) -> int:
    return _number(text, 16)


def _seconds(text: str) -> int:
    return _number(text, 3600)


def _number(text: str, highest: int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= highest:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {highest}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """0 when every request was answered, 1 otherwise."""
    if options.pd and options.workers < PAIR_WORKERS_MIN:
        options.refuse(
            f"argument --workers: with --pd at least {PAIR_WORKERS_MIN}, "
            "one to prefill and one to decode"
        )
    try:
        import rich  # noqa: F401 (an optional dependency: report now, not after the start)
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
    from rich.console import Console

    console = Console()
    policies = list(dict.fromkeys(options.policy or _POLICIES))
    models = {policy: _model(policy) for policy in policies}
    pool = (divided_pool if options.pd else plain_pool)(options.workers, options.engine)
    async with contextlib.AsyncExitStack() as exits:
        console.print(
            f"starting Envoy, the service and {len(policies)} x {options.workers} simulated "
            f"workers like {options.engine}"
            f"{f' ({pool.label} each)' if pool.apart else ''} ..."
        )
        tokenizer = write_model_folder(folder / "model")
        fleet = await exits.enter_async_context(
            Fleet(folder, list(models.values()), pool, tokenizer)
        )
        settings: dict[str, Any] = {
            "models": [
                {"id": model, "policy": policy, "tokenizer_path": str(tokenizer)}
                for policy, model in models.items()
            ],
            "observability": {"debug_headers": True},
        }
        if pool.apart and options.engine == "vllm":
            _name_roles(settings, fleet)
        # Easy to type. Held to the end: Envoys of two demos would share it.
        if exits.enter_context(reserved_port(_PREFERRED_ENVOY_PORT)):
            settings["envoy"] = {"port": _PREFERRED_ENVOY_PORT}
        stack = await exits.enter_async_context(Stack(folder, fleet.urls, settings))
        tallies = [Tally(policy, pool.prefilling) for policy in policies]
        await _round(console, stack, options, pool, tallies)
        if not options.once:
            _print_hints(stack, models[policies[-1]], apart=pool.apart)
            await stop.wait()
        return 1 if any(tally.failed for tally in tallies) else 0


def _name_roles(settings: dict[str, Any], fleet: Fleet) -> None:
    """Workers of vLLM do not say what they are for, so the configuration does."""
    for model in settings["models"]:
        model["pd"] = {"protocol": "nixl"}
    roles = {f"{name}_urls": fleet.urls_of(name) for name in ("prefill", "decode")}
    settings["discovery"] = {"static_urls": roles}


def _model(policy: str) -> str:
    return "demo-" + policy.removesuffix("_zmq").replace("_", "-")


async def _round(
    console: "Console",
    stack: Stack,
    options: argparse.Namespace,
    pool: Pool,
    tallies: Sequence[Tally],
) -> None:
    """Run the same conversations under every policy at the same time, and show the figures."""
    planned = conversations(options.workers, options.seconds)
    requests = sum(len(conversation.turns) for conversation in planned)

    def shown() -> "Table":
        return table(tallies, requests, apart=pool.apart)

    with _shown(console, shown):
        async with asyncio.TaskGroup() as group:
            for tally in tallies:
                group.create_task(
                    hold_conversations(
                        stack.url, _model(tally.policy), planned, tally.add, apart=pool.apart
                    )
                )
    said = summary(tallies, requests, len(planned), pool.label)
    console.print(said, style="bold", highlight=False)
    if pool.apart:
        await _print_pairs(console, stack, sum(tally.good for tally in tallies))
    missed = sum(
        value
        for key, value in (await stack.metrics()).items()
        if key.startswith("extproc_destination_missed_total")
    )
    console.print(
        f"{missed:g} requests went elsewhere than decided; "
        f"load left over: {await stack.in_flight()}",
        highlight=False,
    )


async def _print_pairs(console: "Console", stack: Stack, answered: int) -> None:
    """Print a line about the pairs once the service has seen the end of all answers."""

    async def all_ended() -> bool:
        return pairs_ended(await stack.metrics()) >= answered

    with contextlib.suppress(StackError):  # the printed line shows the difference
        await wait_until(all_ended, "pairs end", _PAIRS_END_SECONDS)
    console.print(pairs_line(await stack.metrics()), highlight=False)


@contextlib.contextmanager
def _shown(console: "Console", shown: Callable[[], "Table"]) -> Iterator[None]:
    """Show the table: live in a terminal, otherwise once at the end."""
    from rich.live import Live

    if not console.is_terminal:
        yield
        console.print(shown())
        return
    with Live(
        get_renderable=shown,
        console=console,
        refresh_per_second=1 / _REFRESH_SECONDS,
    ):
        yield


def _print_hints(stack: Stack, model: str, *, apart: bool) -> None:
    said = "tell the story of the old lantern by the harbour in the winter night"
    body = (
        f'{{"model":"{model}","stream":true,"max_tokens":16,'
        f'"messages":[{{"role":"user","content":"{said}"}}]}}'
    )
    workers = " (x-extproc-worker prefills, x-simulator-port decodes)" if apart else ""
    sys.stdout.write(
        f"\nstill serving until Ctrl-C; try this twice, and look at x-extproc-overlap{workers}:\n"
        f"  curl -i -N -H 'x-extproc-debug: true' {stack.url}/v1/chat/completions -d '{body}'\n"
        f"and:\n"
        f"  curl {stack.url}/v1/models\n"
        f"  curl {stack.admin_url}/workers\n"
        f"  curl {stack.admin_url}/metrics\n"
    )
    sys.stdout.flush()
