"""Measures how long a client waits for the answer after its prefill has failed.

    python -m benchmarks.pd_fail_fast [--requests 100] [--at-once 10]

Real Envoy and service, simulated workers that meet in rooms: without the answer the decode worker
would wait for its time-out of minutes. The prefill worker fails after a set time, in turn with a
5xx and with a closed connection. The result is the client's wait beyond that time.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import aiohttp

from benchmarks.rig import run_until_signal
from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import Stack, StackError

_MODEL: Final = "apart"
_EVENT_SECONDS: Final = 0.2
_LIMIT_SECONDS: Final = 0.05
_FAULTS: Final = ({"status": 500}, {"die_before_headers": True})


async def measure(options: argparse.Namespace, folder: Path) -> int:
    prefill = await start(
        SimulatorSettings(
            model=_MODEL, disaggregation_mode="prefill", disaggregation_bootstrap_port=0
        )
    )
    decode = await start(SimulatorSettings(model=_MODEL, disaggregation_mode="decode"))
    # An open breaker would end the experiment.
    model = {"id": _MODEL, "circuit_breaker": {"threshold": 1_000_000}}
    settings = {"models": [model], "envoy": {"access_log": None, "fail_open": False}}
    waits: list[float] = []
    try:
        async with (
            Stack(folder, [prefill.url, decode.url], settings) as stack,
            aiohttp.ClientSession() as http,
        ):
            places = asyncio.Semaphore(options.at_once)

            async def send(number: int) -> None:
                body = {
                    "model": _MODEL,
                    "stream": number % 2 == 0,
                    "messages": [{"role": "user", "content": f"request {number}"}],
                }
                async with places:
                    started = time.monotonic()
                    url = f"{stack.url}/v1/chat/completions"
                    async with http.post(url, json=body) as response:
                        await response.read()
                        if response.status != 502:
                            raise StackError(f"status {response.status}")
                    waits.append(time.monotonic() - started - _EVENT_SECONDS)

            for fault in _FAULTS:
                faults = {"hang": _EVENT_SECONDS, **fault}
                async with http.post(f"{prefill.url}/simulator/faults", json=faults) as answer:
                    answer.raise_for_status()
                await asyncio.gather(*(send(n) for n in range(options.requests // 2)))
    finally:
        await asyncio.gather(prefill.stop(), decode.stop())
    waits.sort()
    within = sum(wait < _LIMIT_SECONDS for wait in waits)
    print(
        f"{len(waits)} failed prefills: {within} answered within {_LIMIT_SECONDS * 1e3:.0f} ms; "
        f"median {waits[len(waits) // 2] * 1e3:.1f} ms, p95 {waits[-len(waits) // 20] * 1e3:.1f} ms"
    )
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=10)
    return parser.parse_args(arguments)


async def _main(options: argparse.Namespace) -> int:
    try:
        with tempfile.TemporaryDirectory(prefix="extproc-benchmark-") as folder:
            return await measure(options, Path(folder))
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(asyncio.run(run_until_signal(_main(_options(None)))))
