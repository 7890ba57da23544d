"""`extproc simulate`: runs one or more workers in one process until a signal stops it.

Standard output carries one line for every worker, printed when all of them listen, so that
scripts can wait for it and read the ports; logs go to standard error.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
from typing import get_args

import msgspec
import structlog
import uvloop

from extproc.simulator.http import RunningSimulator, start
from extproc.simulator.settings import (
    DisaggregationMode,
    EngineName,
    PdProtocol,
    SimulatorSettings,
    WireFormat,
)
from extproc.simulator.vllm_chats import ContentFormat

__all__ = ["DESCRIPTION", "add_arguments", "in_a_row", "run"]

DESCRIPTION = "Workers like SGLang or vLLM that need no GPU, for tests and demonstrations."

_MOST_WORKERS = 256

_DEFAULTS = SimulatorSettings()
_HELP = {
    "host": "address to listen on",
    "port": "port to listen on; 0 picks a free one",
    "model": "served model name",
    "kv_topic": "topic of KV events",
    "prefill_tokens_per_second": "prefill speed, one prompt at a time",
    "decode_milliseconds_per_token": "time between two tokens of one request",
    "max_running_requests": "requests decoded at once on each rank; more wait",
    "max_queued_requests": "requests that wait on each rank; more get a 503",
    "default_max_tokens": "output length of a request without a limit",
    "max_total_num_tokens": "size of the prefix cache of each rank, in tokens",
    "host_cache_tokens": "host memory of each rank for what its cache evicts, in tokens",
    "context_length": "reported context length",
    "disaggregation_bootstrap_port": "where decode legs meet prefill legs; 0 picks a free port",
    "bootstrap_timeout_seconds": "how long the legs of a request wait for each other",
    "nixl_side_channel_port": "where other workers fetch KV by NIXL; 0 picks a free port",
    "page_size": "tokens per KV page",
    "dp_size": "data-parallel ranks",
    "kv_replay_port": "base port of KV event replay; 0 picks a free one",
    "kv_load_port": "base port of published load; 0 picks a free one",
    "startup_delay_seconds": "answer 503 for so long after the start",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for every field of SimulatorSettings, with its default."""
    parser.add_argument(
        "--workers",
        type=_count,
        default=1,
        metavar="N",
        help="number of workers, on consecutive ports from the given ones (default 1)",
    )
    for name, text in _HELP.items():
        default = getattr(_DEFAULTS, name)
        parser.add_argument(
            _option(name), type=type(default), default=default, help=f"{text} (default %(default)s)"
        )
    parser.add_argument(
        "--disaggregation-mode",
        choices=get_args(DisaggregationMode),
        default=_DEFAULTS.disaggregation_mode,
        help="role (default %(default)s)",
    )
    parser.add_argument(
        "--pd-protocol",
        choices=get_args(PdProtocol),
        default=_DEFAULTS.pd_protocol,
        help="how prefill and decode workers find each other (default %(default)s)",
    )
    parser.add_argument(
        "--kv-events-port",
        type=int,
        help="publish KV events and load from this base port; 0 picks a free one",
    )
    parser.add_argument("--no-replay", action="store_true", help="publish KV events once only")
    parser.add_argument("--no-load-events", action="store_true", help="publish no load")
    parser.add_argument(
        "--speculative-algorithm",
        metavar="NAME",
        help="reported; EAGLE, EAGLE3 and FROZEN_KV_MTP make KV pages of pairs of tokens",
    )
    parser.add_argument(
        "--wire-format",
        choices=get_args(WireFormat),
        default=_DEFAULTS.wire_format,
        help="KV events as maps, or as the arrays of older engines (default %(default)s)",
    )
    parser.add_argument(
        "--tokenizer-path",
        help="a tokenizer.json, or a model's folder with a chat template too; without one every "
        "byte is a token",
    )
    parser.add_argument("--api-key", help="bearer token every path but health asks for")
    parser.add_argument(
        "--log-requests", action="store_true", help="one log line for every request"
    )
    parser.add_argument("--no-server-info", action="store_true", help="answer 404 to introspection")
    _add_vllm_arguments(parser)


def _add_vllm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=get_args(EngineName),
        default=_DEFAULTS.engine,
        help="the engine that the workers resemble (default %(default)s)",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME",
        help="an adapter that is loaded; may be repeated",
    )
    parser.add_argument(
        "--content-format",
        choices=get_args(ContentFormat),
        help="how vllm gives contents to a chat template (default: as the template reads them)",
    )
    parser.add_argument(
        "--sliding-window",
        type=int,
        metavar="TOKENS",
        help="half of the layers of a model of vllm see so many tokens only",
    )
    parser.add_argument(
        "--dev-mode", action="store_true", help="the paths of vllm's development mode"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; returns 0 then, 2 for bad settings, 1 if it cannot listen."""
    names = SimulatorSettings.__struct_fields__
    try:
        settings = SimulatorSettings(**{name: getattr(args, name) for name in names})
        fleet = [in_a_row(settings, number) for number in range(args.workers)]
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if not structlog.is_configured():
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(fleet))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"port: cannot listen on {settings.host}:{settings.port}: {error}\n")
        return 1
    return 0


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {_MOST_WORKERS}")
    return int(text)


def in_a_row(settings: SimulatorSettings, number: int) -> SimulatorSettings:
    """The settings of one of several workers; port 0 (any free port) stays 0."""
    ranks = settings.dp_size
    ports = {
        name: port + number * ports_each
        for name, ports_each in (
            ("port", 1),
            ("kv_events_port", ranks),
            ("kv_replay_port", ranks),
            ("kv_load_port", ranks),
            ("disaggregation_bootstrap_port", 1),
            ("nixl_side_channel_port", 1),
        )
        if (port := getattr(settings, name))
    }
    return msgspec.structs.replace(settings, **ports)


def _line(simulator: RunningSimulator) -> str:
    """The line that scripts read: the worker's URL, its KV event ports and its transfer port."""
    line = f"simulator ready url={simulator.url} model={simulator.settings.model}"
    if simulator.kv_ports is not None:
        named = msgspec.structs.asdict(simulator.kv_ports)
        for name in ("events", "replay", "load"):
            if named[name] is not None:
                line += f" kv_{name}_port={named[name]}"
    if simulator.side_channel_port is not None:
        line += f" nixl_side_channel_port={simulator.side_channel_port}"
    elif simulator.settings.disaggregation_mode == "prefill":
        line += f" disaggregation_bootstrap_port={simulator.bootstrap_port}"
    return line + "\n"


async def _serve(fleet: list[SimulatorSettings]) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with contextlib.AsyncExitStack() as exits:
        running = [await exits.enter_async_context(await start(each)) for each in fleet]
        sys.stdout.write("".join(map(_line, running)))
        sys.stdout.flush()
        await stopped.wait()
