"""Measures what the service adds to a request, beside no filter and a bare responder.

    python -m benchmarks.extproc_overhead [--pairs 5] [--seconds 10] [--quick]

Throughput depends on the other load of the machine. CPU time per request and ratios between
arms that ran next to each other do not, so use those. All processes share the cores with wrk,
so throughput is that of the whole machine, not of one process.
"""

import argparse
import asyncio
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from benchmarks.figures import Run, Setting, pair_order, ratios, summaries
from benchmarks.procs import cpu_seconds, machine_cpu_seconds
from benchmarks.rig import MODEL, Arm, Rig, run_until_signal, running_rig
from benchmarks.wrk import WrkError, chat_body, find_wrk, run_wrk, script
from extproc.testing.stack import StackError

__all__ = ["Plan", "main", "publish", "report", "run_once"]

_PATH: Final = "/v1/chat/completions"
_WARM_UP_SECONDS: Final = 1
_QUIET_CORES: Final = 0.15


class Plan(Struct, frozen=True, kw_only=True):
    """The settings of a run of this program."""

    pairs: int
    seconds: int
    body_bytes: Sequence[int]
    concurrency: Sequence[int]

    @property
    def settings(self) -> list[Setting]:
        return [Setting(size, count) for size in self.body_bytes for count in self.concurrency]


class _Report(Struct, frozen=True, kw_only=True):
    """The content of the `--json` file."""

    machine: str
    cores: int
    plan: Plan
    runs: Sequence[Run]


async def measure(plan: Plan, folder: Path) -> list[Run]:
    """All runs, pair by pair."""
    scripts = {size: folder / f"body-{size}.lua" for size in plan.body_bytes}
    for size, file in scripts.items():
        file.write_text(script(chat_body(MODEL, size)))
    runs: list[Run] = []
    async with running_rig(folder) as rig:
        for pair in range(plan.pairs):
            for setting in plan.settings:
                for arm in pair_order(pair):
                    file = scripts[setting.body_bytes]
                    run = await run_once(rig, arm, setting, file, pair, plan.seconds)
                    runs.append(run)
    return runs


async def run_once(
    rig: Rig, arm: Arm, setting: Setting, script_file: Path, pair: int, seconds: int
) -> Run:
    """One run of one arm; prints a line on standard error at its end."""
    url = rig.urls[arm] + _PATH
    await run_wrk(url, script_file, setting.connections, _WARM_UP_SECONDS)
    server = rig.servers.get(arm)
    pids = [rig.envoy, rig.upstream, *([server] if server is not None else [])]
    machine, ours, before = machine_cpu_seconds(), _own_cpu_seconds(), _each(pids)
    result = await run_wrk(url, script_file, setting.connections, seconds)
    used = [now - start for now, start in zip(_each(pids), before, strict=True)]
    strangers = machine_cpu_seconds() - machine - (_own_cpu_seconds() - ours) - sum(used)
    envoy, upstream, *rest = [cpu * 1e6 / max(1, result.requests) for cpu in used]
    run = Run(
        pair=pair,
        arm=arm,
        setting=setting,
        requests=result.requests,
        seconds=result.seconds,
        p50_us=result.p50_us,
        p99_us=result.p99_us,
        server_cpu_us=rest[0] if rest else 0.0,
        envoy_cpu_us=envoy,
        upstream_cpu_us=upstream,
        strangers_cores=max(0.0, strangers / result.seconds),
        errors=result.errors,
    )
    _progress(run)
    return run


def _each(pids: Sequence[int]) -> list[float]:
    return [cpu_seconds(pid) for pid in pids]


def _own_cpu_seconds() -> float:
    """CPU time of this process and of its ended children (wrk)."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _progress(run: Run) -> None:
    errors = f"  INVALID {run.errors}" if not run.valid else ""
    sys.stderr.write(
        f"pair {run.pair + 1}  {run.setting.body_bytes:>6} B  c={run.setting.connections:<4}"
        f"{run.arm:<10}{run.requests_per_second:>8.0f} req/s{errors}\n"
    )


def report(runs: Sequence[Run]) -> str:
    """The table and the ratios as text."""
    lines = [
        f"{'body':>7} {'c':>4} {'arm':<10}{'req/s':>8}{'p50 ms':>9}{'p99 ms':>9}"
        f"{'CPU us/request: server':>24}{'Envoy':>8}{'upstream':>10}{'strangers':>11}{'runs':>6}"
    ]
    for each in summaries(runs):
        server = f"{each.server_cpu_us:.0f}" if each.arm is not Arm.NONE else "-"
        lines.append(
            f"{each.setting.body_bytes:>7} {each.setting.connections:>4} {each.arm:<10}"
            f"{each.requests_per_second:>8.0f}{each.p50_ms:>9.2f}{each.p99_ms:>9.2f}"
            f"{server:>24}{each.envoy_cpu_us:>8.0f}{each.upstream_cpu_us:>10.0f}"
            f"{each.strangers_cores:>11.2f}{each.runs:>6}"
        )
    lines += ["", f"{'body':>7} {'c':>4} {'ratio':<36}{'median':>8}{'min':>8}{'max':>8}"]
    for ratio in ratios(runs):
        lines.append(
            f"{ratio.setting.body_bytes:>7} {ratio.setting.connections:>4} {ratio.name:<36}"
            f"{ratio.median:>8.2f}{min(ratio.values):>8.2f}{max(ratio.values):>8.2f}"
        )
    if any(run.strangers_cores > _QUIET_CORES for run in runs):
        lines += [
            "",
            f"Other processes took more than {_QUIET_CORES} cores during some runs (column "
            "strangers): CPU per request rises and the ratios with it. Repeat on a quiet machine.",
        ]
    invalid = [run for run in runs if not run.valid]
    if invalid:
        lines += ["", "Runs with errors, left out above:"]
        lines += [
            f"  pair {run.pair + 1}, {run.setting.body_bytes} B, c={run.setting.connections}, "
            f"{run.arm}: {run.errors or 'no request was answered'}"
            for run in invalid
        ]
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="runs of each arm and setting")
    parser.add_argument("--seconds", type=int, default=10, help="length of a run")
    parser.add_argument("--body-bytes", type=int, nargs="+", default=[1200, 33000])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all runs")
    parser.add_argument("--quick", action="store_true", help="one pair of 2 s, 1.2 KB, c = 32")
    return parser.parse_args(arguments)


def _plan(options: argparse.Namespace) -> Plan:
    if options.quick:
        return Plan(pairs=1, seconds=2, body_bytes=[1200], concurrency=[32])
    return Plan(
        pairs=options.pairs,
        seconds=options.seconds,
        body_bytes=options.body_bytes,
        concurrency=options.concurrency,
    )


def publish(plan: Plan, runs: Sequence[Run], json_file: Path | None) -> None:
    """Print the report; with `json_file` write every run to it."""
    cores = os.cpu_count() or 0
    print(
        f"\nMedians of {plan.pairs} interleaved run(s) of {plan.seconds} s; {cores} cores, "
        f"Python {platform.python_version()}\n\n{report(runs)}"
    )
    if json_file is not None:
        written = _Report(machine=platform.platform(), cores=cores, plan=plan, runs=runs)
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(written)))


async def _main(plan: Plan, json_file: Path | None) -> int:
    try:
        find_wrk()
        with tempfile.TemporaryDirectory(prefix="extproc-benchmark-") as folder:
            runs = await measure(plan, Path(folder))
    except (WrkError, StackError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    publish(plan, runs, json_file)
    return 0 if all(run.valid for run in runs) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if all is well, 1 after a run with errors or gaps, 130 when interrupted."""
    options = _options(arguments)
    return asyncio.run(run_until_signal(_main(_plan(options), options.json)))


if __name__ == "__main__":
    sys.exit(main())
