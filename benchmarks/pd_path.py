"""Measures the cost of serving a request by a prefill and a decode worker instead of one.

    python -m benchmarks.pd_path [--pairs 5] [--seconds 5]

One service has two models: one with plain workers, one with prefill and decode workers. All
workers are fakes that answer at once, so the result is the cost of the service and of Envoy: a
connection and a request of the service, and a second pass. It also measures adding the members
to a large body.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.procs import cpu_seconds
from benchmarks.rig import MODEL, Arm, run_until_signal, running_rig
from benchmarks.wrk import WrkError, chat_body, find_wrk, run_wrk, script
from extproc.routing.json_members import with_members
from extproc.routing.pd.handoff import bootstrap_members
from extproc.testing.stack import StackError

_PD_MODEL: Final = "apart"
_PATH: Final = "/v1/chat/completions"
_WARM_UP_SECONDS: Final = 1
_MEGABYTE: Final = 1024 * 1024


def _worker(mode: str) -> dict[str, Any]:
    return {
        "served_model_name": _PD_MODEL,
        "disaggregation_mode": mode,
        "disaggregation_bootstrap_port": 8998,
    }


async def measure(options: argparse.Namespace, folder: Path) -> None:
    files = {}
    for model in (MODEL, _PD_MODEL):
        files[model] = folder / f"{model}.lua"
        files[model].write_text(script(chat_body(model, options.body_bytes)))
    workers = [_worker("prefill"), _worker("prefill"), _worker("decode"), _worker("decode")]
    figures: dict[tuple[int, str], list[tuple[float, float, float]]] = {}
    settings = {"pd": {"decode": options.decode}}
    async with running_rig(folder, others=workers, settings=settings) as rig:
        url, server = rig.urls[Arm.OURS] + _PATH, rig.servers[Arm.OURS]
        for number in range(options.pairs):
            for connections in options.concurrency:
                models = (MODEL, _PD_MODEL) if number % 2 else (_PD_MODEL, MODEL)
                for model in models:
                    await run_wrk(url, files[model], connections, _WARM_UP_SECONDS)
                    before = cpu_seconds(server)
                    result = await run_wrk(url, files[model], connections, options.seconds)
                    if result.errors:
                        raise WrkError(f"{model}: {result.errors}")
                    cpu = (cpu_seconds(server) - before) * 1e6 / result.requests
                    rate = result.requests / result.seconds
                    figures.setdefault((connections, model), []).append(
                        (cpu, result.p50_us / 1000, rate)
                    )
    print(f"{'c':>4} {'model':<8}{'CPU us/request':>16}{'p50 ms':>9}{'req/s':>9}")
    for (connections, model), runs in figures.items():
        cpu, p50, rate = (statistics.median(column) for column in zip(*runs, strict=True))
        name = "plain" if model == MODEL else "pair"
        print(f"{connections:>4} {name:<8}{cpu:>16.0f}{p50:>9.2f}{rate:>9.0f}")
    for connections in options.concurrency:
        pair, plain = figures[connections, _PD_MODEL], figures[connections, MODEL]
        cpus = [a[0] / b[0] for a, b in zip(pair, plain, strict=True)]
        added = [a[1] - b[1] for a, b in zip(pair, plain, strict=True)]
        print(
            f"c={connections}: CPU pair/plain {statistics.median(cpus):.2f} "
            f"({min(cpus):.2f}-{max(cpus):.2f}), added p50 {statistics.median(added):.2f} ms"
        )


def inject() -> None:
    """Add the members to a body of 1 MB."""
    body = chat_body(MODEL, _MEGABYTE).encode()
    times = []
    for _ in range(200):
        members = bootstrap_members("10.0.0.1", 8998, dp_rank=1, dp_size=2, prompts=None)
        started = time.perf_counter()
        with_members(body, members)
        times.append(time.perf_counter() - started)
    print(f"members into {len(body)} bytes: {statistics.median(times) * 1e3:.3f} ms median")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="runs of each model")
    parser.add_argument("--seconds", type=int, default=5, help="length of a run")
    parser.add_argument("--body-bytes", type=int, default=1200)
    parser.add_argument("--decode", default="two_pass", choices=("two_pass", "inline"))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32])
    return parser.parse_args(arguments)


async def _main(options: argparse.Namespace) -> int:
    inject()
    try:
        find_wrk()
        with tempfile.TemporaryDirectory(prefix="extproc-benchmark-") as folder:
            await measure(options, Path(folder))
    except (WrkError, StackError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(run_until_signal(_main(_options(None)))))
