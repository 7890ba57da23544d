"""A service that hangs or stalls, with the time-outs that Envoy has by default.

Clients wait for 3 s at most, at any moment of a request. Other tests allow the service 10 s.
"""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from extproc.config.envoy import EnvoyConfig
from extproc.headers import DECODE_CLUSTER
from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running
from tests.e2e.pd_fleet import PdRunning, pd_stack
from tests.e2e.test_pd_modes import vllm

DEFAULT_SECONDS = EnvoyConfig().hang_timeout_secs
# 2 s in the first pass and 0.8 s in the second, and what a busy machine adds. Twice the time-out
# of the first pass would be 4 s.
LONGEST_SECONDS = 3.6
PAUSE_SECONDS = 2.0
STALL_SECONDS = 1.5
TRIES = 5
CLIENTS = 20


def pause_before_second_pass(bootstrap: dict[str, Any]) -> None:
    """Hold each request between the passes, so that a test can stop the service there."""
    (passes,) = [
        one for one in bootstrap["static_resources"]["listeners"] if one["name"] == DECODE_CLUSTER
    ]
    manager = passes["filter_chains"][0]["filters"][0]["typed_config"]
    fault = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault",
        "delay": {"fixed_delay": f"{PAUSE_SECONDS}s", "percentage": {"numerator": 100}},
    }
    manager["http_filters"].insert(0, {"name": "envoy.filters.http.fault", "typed_config": fault})


@asynccontextmanager
async def pair(folder: Path, **more: Any) -> AsyncIterator[PdRunning]:
    settings = {"envoy": {"hang_timeout_secs": DEFAULT_SECONDS, "fail_open": False}}
    async with pd_stack(folder, settings=settings, **more) as running:
        try:
            yield running
        finally:
            running.stack.service.send(signal.SIGCONT)


async def timed(running: PdRunning) -> tuple[int, str, float]:
    """Status, error code and seconds of one chat; a 503 must say when to retry."""
    started = time.monotonic()
    async with running.chat() as response:
        await response.read()
        assert ("retry-after" in response.headers) == (response.status == 503)
        code = response.headers.get("x-router-error-code", "")
        return response.status, code, time.monotonic() - started


async def test_a_pair_whose_service_hangs_before_the_first_pass(tmp_path: Path) -> None:
    async with pair(tmp_path) as running:
        running.stack.service.send(signal.SIGSTOP)
        status, code, seconds = await timed(running)
        assert (status, code) == (503, "router_unavailable")
        assert seconds < LONGEST_SECONDS


async def test_a_pair_whose_service_hangs_between_the_passes(tmp_path: Path) -> None:
    async with pair(tmp_path, edit_bootstrap=pause_before_second_pass) as running:
        asked = asyncio.create_task(timed(running))
        await running.arrived(running.prefills[0])
        running.stack.service.send(signal.SIGSTOP)
        status, code, seconds = await asked
        assert (status, code) == (503, "router_unavailable")
        assert seconds - PAUSE_SECONDS < LONGEST_SECONDS


async def test_a_pair_whose_service_hangs_while_the_engines_work(tmp_path: Path) -> None:
    """Both filters wait for an answer to the response headers, and then go on without it."""
    async with pair(tmp_path) as running:
        await running.fault(running.decodes[0], hang=PAUSE_SECONDS)
        asked = asyncio.create_task(timed(running))
        await running.arrived(running.decodes[0])
        running.stack.service.send(signal.SIGSTOP)
        status, _, seconds = await asked
        assert status == 200
        assert seconds - PAUSE_SECONDS < LONGEST_SECONDS


async def failed_in_a_stall(running: Running) -> int:
    """How many requests failed, or were not decided, while the service stood still once."""
    name = "extproc_decisions_total"
    before = await running.sample(name)
    running.stack.service.send(signal.SIGSTOP)
    asked = [asyncio.create_task(status_of(running)) for _ in range(CLIENTS)]
    await asyncio.sleep(STALL_SECONDS)
    running.stack.service.send(signal.SIGCONT)
    good = (await asyncio.gather(*asked)).count(200)
    decided = int(await running.sample(name) - before)
    return CLIENTS - min(good, decided)


async def status_of(running: Running) -> int:
    async with running.chat() as response:
        await response.read()
        return int(response.status)


@pytest.mark.parametrize("fail_open", [True, False])
async def test_a_stall_of_one_and_a_half_seconds_only_delays_requests(
    launch: Launch, fail_open: bool
) -> None:
    envoy = {"hang_timeout_secs": DEFAULT_SECONDS, "fail_open": fail_open}
    running = await launch(2, settings={"envoy": envoy})
    # A busy machine may let the service go on too late; not every time.
    failed = []
    while 0 not in failed:
        failed.append(await failed_in_a_stall(running))
        assert len(failed) < TRIES, failed
        await wait_until(running.stack.envoy_sees_service, "Envoy asks the service")


async def test_decisions_that_take_longer_than_the_time_out_are_waited_for_under_load(
    tmp_path: Path,
) -> None:
    """The service asks for more time for each of them, as it waits for the prefill worker."""
    settings = {"envoy": {"hang_timeout_secs": DEFAULT_SECONDS}}
    async with vllm(tmp_path, settings=settings) as running:
        await running.fault(running.prefills[0], hang=DEFAULT_SECONDS + 0.5)
        statuses = await asyncio.gather(*(status_of(running) for _ in range(CLIENTS)))
        assert statuses == [200] * CLIENTS
        await running.at_rest()
