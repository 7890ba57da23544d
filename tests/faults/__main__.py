"""Runs storms: `python -m tests.faults [--preset storm|soak] [--seed S] …`.

Without `--policy` and `--fleet` there is a storm for each combination. The exit code is 1 if
something was not as it must be after a storm. `--preset storm` sends 20 000 requests while one of
six workers is killed, hung or slow every 2 s, and each gets eight requests at once; `--preset soak`
runs for ten minutes and checks the service's memory.
"""

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from extproc.testing.stack import StackError
from tests.faults.faults import NAME_FAULTS
from tests.faults.fleet import FleetOptions, running
from tests.faults.names import namespaces_work
from tests.faults.storm import Storm, StormOptions, fault_names

_POLICIES: Final = ("round_robin", "min_ttft")
_FLEETS: Final = ("plain", "pd")
_PRESETS: Final[dict[str, dict[str, Any]]] = {
    "storm": {
        "faults": "kill,hang,slow",
        "policy": ["round_robin"],
        "fleet": ["plain"],
        "requests": 20_000,
        "concurrency": 100,
        "worker_requests_max": 8,
        "max_plain_errors": 0.01,
    },
    "soak": {
        "faults": "kill,hang,slow,errors,full,reset,cut",
        "policy": ["round_robin"],
        "fleet": ["plain"],
        "minutes": 10.0,
        "every": 10.0,
        "max_growth": 0.02,
    },
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--preset", choices=sorted(_PRESETS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="length of each storm (default 1)")
    parser.add_argument("--requests", type=int, help="length of each storm, instead of --minutes")
    parser.add_argument("--concurrency", type=int, default=50)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--policy", action="append", help=f"default: {' and '.join(_POLICIES)}")
    parser.add_argument("--fleet", action="append", choices=_FLEETS, help="default: both")
    parser.add_argument("--faults", help="names with commas between them (default: all)")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two faults")
    parser.add_argument("--worker-requests-max", type=int, help="others wait in the service")
    parser.add_argument("--max-plain-errors", type=float, help="share of what is not streamed")
    parser.add_argument("--max-growth", type=float, help="of the service's memory, as a share")
    preset, _ = parser.parse_known_args()
    if preset.preset is not None:
        parser.set_defaults(**_PRESETS[preset.preset])
    return parser.parse_args()


async def main() -> int:
    options = arguments()
    wanted = options.faults.split(",") if options.faults else list(NAME_FAULTS)
    can_move = bool(NAME_FAULTS.keys() & set(wanted)) and namespaces_work()
    failed = 0
    for policy in options.policy or _POLICIES:
        for fleet in options.fleet or _FLEETS:
            # The workers of a pair, which are outside the namespace, know each other by name.
            named = can_move and fleet == "plain"
            fleet_options = FleetOptions(
                workers=options.workers,
                policy=policy,
                disaggregated=fleet == "pd",
                named=named,
                worker_requests_max=options.worker_requests_max,
            )
            print(f"== {fleet}, {policy}, seed {options.seed}", flush=True)
            failed += not await _storm(fleet_options, _storm_options(options, policy, named))
    return 1 if failed else 0


def _storm_options(options: argparse.Namespace, policy: str, named: bool) -> StormOptions:
    kv_events = policy in ("min_ttft", "cache_aware_zmq")
    faults = (
        options.faults.split(",")
        if options.faults
        else fault_names(kv_events=kv_events, named=named)
    )
    return StormOptions(
        seed=options.seed,
        faults=tuple(faults),
        seconds=None if options.requests else 60 * (options.minutes or 1.0),
        requests=options.requests,
        concurrency=options.concurrency,
        every_seconds=options.every,
        plain_errors_max=options.max_plain_errors,
        growth_max=options.max_growth,
    )


async def _storm(fleet_options: FleetOptions, options: StormOptions) -> bool:
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    started = time.monotonic()
    async with running(folder, fleet_options) as fleet:
        storm = Storm(fleet, options)
        try:
            await storm.run()
        except StackError as error:
            storm.problems.append(str(error))
    for line in _report(storm, time.monotonic() - started):
        print(line, flush=True)
    if storm.problems:
        print(f"logs: {folder}")
        return False
    shutil.rmtree(folder)
    return True


def _report(storm: Storm, seconds: float) -> Iterator[str]:
    yield from storm.log
    traffic = storm.traffic
    yield f"{traffic.sent} requests in {seconds:.0f} s, slowest {traffic.slowest_seconds:.1f} s"
    for (kind, outcome), number in sorted(traffic.outcomes.items(), key=str):
        yield f"  {kind:<9} {outcome.value:<15} {number:>7}"
    for code, number in traffic.codes.most_common():
        yield f"  code {code:<30} {number:>7}"
    yield f"  {traffic.plain_error_share:.2%} of the plain requests were not answered well"
    if storm.growth is not None:
        yield f"  the service's memory has grown by {storm.growth:.1%}"
    for problem in storm.problems:
        yield f"PROBLEM: {problem}"


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
