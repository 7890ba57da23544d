"""All failures of one worker of a pair: the client gets an answer at once, nothing is left."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from extproc.simulator.http import RunningSimulator, start
from tests.e2e.pd_fleet import PdRunning, pd_stack

# The event itself takes this long in the simulated worker.
EVENT_SECONDS = 0.3
# Seconds a client may wait after it; 0.05 on a quiet machine.
AT_ONCE = 0.25
TRIES = 30
# Seconds for a busy machine; what must not be waited for takes much longer.
SOON = 30.0
STREAMS = [False, True]
# Failures are counted here, not ended by a breaker.
PATIENT = {"circuit_breaker": {"threshold": 1000}}
MODES = ["two_pass", "inline"]


async def timed(running: PdRunning, stream: bool) -> tuple[int, str, float]:
    """Status, error code and seconds of one chat."""
    started = time.monotonic()
    async with running.chat(stream=stream) as response:
        await response.read()
        code = response.headers.get("x-router-error-code", "")
        return response.status, code, time.monotonic() - started


async def tries_until_one_takes(limit_seconds: float, ask: Callable[[], Awaitable[None]]) -> int:
    """How often it was asked until it took less than the limit; fails if it never does.

    A busy machine is slow now and then. A router that waits for something is slow every time.
    """
    for tries in range(1, TRIES + 1):
        started = time.monotonic()
        await ask()
        if time.monotonic() - started < limit_seconds:
            return tries
    raise AssertionError(f"{TRIES} requests took {limit_seconds} s or more")


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"hang": EVENT_SECONDS, "status": 500}, (502, "prefill_failed")),
        ({"hang": EVENT_SECONDS, "status": 503}, (502, "prefill_failed")),
        ({"hang": EVENT_SECONDS, "die_before_headers": True}, (502, "prefill_failed")),
        (
            {"hang": EVENT_SECONDS, "die_before_headers": True, "reset": True},
            (502, "prefill_failed"),
        ),
        ({"hang": EVENT_SECONDS, "status": 422}, (422, "prefill_refused")),
    ],
)
async def test_a_failed_prefill_is_answered_at_once(
    tmp_path: Path, fault: dict[str, Any], expected: tuple[int, str], mode: str, stream: bool
) -> None:
    settings = {"pd": {"decode": mode}}
    async with pd_stack(tmp_path, settings=settings, model=PATIENT) as running:
        await running.fault(running.prefills[0], **fault)

        async def ask() -> None:
            # In a stream the decode worker's headers may be out; then it is cut.
            try:
                status, code, _ = await timed(running, stream)
                assert (status, code) == expected
            except aiohttp.ClientPayloadError:
                assert stream

        tries = await tries_until_one_takes(EVENT_SECONDS + AT_ONCE, ask)
        await running.at_rest()
        outcome = "prefill_refused" if expected[0] < 500 else "prefill_failed"
        name = f'extproc_pd_pairs_total{{model="m",outcome="{outcome}"}}'
        assert await running.sample(name) == tries


async def test_the_engines_error_for_a_bad_request_is_passed_on(tmp_path: Path) -> None:
    async with pd_stack(tmp_path) as running:
        await running.fault(running.prefills[0], status=422)
        async with running.chat() as response:
            assert response.status == 422
            assert "simulated fault" in await response.text()
            assert response.headers["content-type"] == "application/json"


async def test_a_prefill_that_takes_too_long_is_answered_with_an_error(tmp_path: Path) -> None:
    async with pd_stack(
        tmp_path, settings={"pd": {"prefill_timeout_secs": 0.5}}, model=PATIENT
    ) as running:
        await running.fault(running.prefills[0], hang=True)

        async def ask() -> None:
            status, code, seconds = await timed(running, False)
            assert (status, code) == (502, "prefill_failed")
            assert seconds >= 0.5

        await tries_until_one_takes(0.5 + AT_ONCE, ask)
        await running.fault(running.prefills[0])
        await running.at_rest()


@pytest.mark.parametrize("mode", MODES)
async def test_a_hung_prefill_worker_opens_no_breaker_of_a_decode_worker(
    tmp_path: Path, mode: str
) -> None:
    """One of two prefill workers hangs, and decode workers give up before we do."""
    settings = {"pd": {"decode": mode}}
    async with pd_stack(
        tmp_path,
        prefills=2,
        decodes=2,
        worker={"bootstrap_timeout_seconds": 1.5},
        settings=settings,
    ) as running:
        await running.fault(running.prefills[0], hang=True)
        seen = Counter(
            [
                status
                for status, _, _ in await asyncio.gather(
                    *(timed(running, False) for _ in range(20))
                )
            ]
        )
        assert set(seen) <= {200, 500}, seen
        async with running.http.get(f"{running.stack.admin_url}/workers") as answer:
            workers = {one["url"]: one for one in (await answer.json())["workers"]}
        assert workers[running.prefills[0].url]["breaker"] == "open"
        others = [running.prefills[1], *running.decodes]
        assert {workers[one.url]["breaker"] for one in others} == {"closed"}
        for _ in range(5):
            async with running.chat() as response:
                assert response.status == 200
        await running.fault(running.prefills[0])
        await running.at_rest()


async def test_prefill_workers_that_refuse_connections_are_skipped(tmp_path: Path) -> None:
    async with pd_stack(tmp_path, prefills=3) as running:
        await running.prefills[0].stop()
        await running.prefills[1].stop()
        running.fleet.workers.remove(running.prefills[0])
        running.fleet.workers.remove(running.prefills[1])
        for _ in range(6):
            async with running.chat() as response:
                assert response.status == 200, await response.text()
        name = 'extproc_pd_prefill_failures_total{model="m",reason="connect"}'
        assert 3 <= await running.sample(name) <= 6
        await running.at_rest()


async def test_clients_get_503_when_all_prefill_workers_are_gone(tmp_path: Path) -> None:
    async with pd_stack(tmp_path) as running:
        await running.prefills[0].stop()
        running.fleet.workers.remove(running.prefills[0])
        async with running.chat() as response:
            assert await running.error(response) == (503, "no_prefill_workers_available")
        await running.at_rest()


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("mode", MODES)
async def test_a_decode_worker_that_refuses_connections_is_skipped(
    tmp_path: Path, mode: str, stream: bool
) -> None:
    settings = {"pd": {"decode": mode}}
    async with pd_stack(tmp_path, decodes=3, settings=settings) as running:
        await running.decodes[0].stop()
        running.fleet.workers.remove(running.decodes[0])
        retries = 0.0
        # Chosen by chance: every third request meets the dead worker first.
        for number in range(300):
            if number >= 12 and (retries or mode == "inline"):
                break
            async with running.chat(stream=stream) as response:
                assert response.status == 200, await response.text()
                assert "x-extproc-retry" not in response.headers
            retries = await running.sample("extproc_pd_decode_retries_total")
        assert (retries >= 1) is (mode == "two_pass")
        await running.at_rest()


async def test_clients_get_503_when_all_decode_workers_refuse(tmp_path: Path) -> None:
    async with pd_stack(tmp_path, decodes=2) as running:
        for worker in running.decodes:
            await worker.stop()
            running.fleet.workers.remove(worker)
        async with running.chat() as response:
            assert await running.error(response) == (503, "upstream_unreachable")
        await running.at_rest()
        for _ in range(3):
            async with running.chat() as response:
                await response.read()
        async with running.chat() as response:
            # Their breakers are open, so they are tried as the last resort.
            assert await running.error(response) == (503, "upstream_unreachable")
        assert await running.sample("extproc_last_resort_total") > 0
        await running.at_rest()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", [{"status": 500}, {"die_before_headers": True}])
async def test_a_decode_worker_that_fails_ends_the_prefill(
    tmp_path: Path, fault: dict[str, Any], mode: str
) -> None:
    settings = {"pd": {"decode": mode}}
    async with pd_stack(tmp_path, decodes=2, settings=settings) as running:
        for worker in running.decodes:
            await running.fault(worker, **fault)
        status, code, seconds = await timed(running, False)
        assert (status, code) == ((500, "") if "status" in fault else (503, "upstream_unreachable"))
        assert seconds < SOON
        # One attempt uses the room up, and the prefill does not wait for another.
        assert sum([len(await running.legs([worker])) for worker in running.decodes]) == 1
        await running.at_rest()
        name = 'extproc_pd_pairs_total{model="m",outcome="decode_failed"}'
        assert await running.sample(name) == 1


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("mode", MODES)
async def test_a_client_disconnect_ends_both_legs(tmp_path: Path, mode: str, stream: bool) -> None:
    settings = {"pd": {"decode": mode, "prefill_linger_secs": 0.2}}
    async with pd_stack(tmp_path, settings=settings) as running:
        await running.fault(running.prefills[0], hang=True)
        chat = asyncio.create_task(timed(running, stream))
        await running.arrived(running.prefills[0])
        chat.cancel()
        with pytest.raises(asyncio.CancelledError):
            await chat
        await running.at_rest()


async def test_a_stopping_service_answers_clients_whose_prefill_runs(tmp_path: Path) -> None:
    async with pd_stack(tmp_path) as running:
        await running.fault(running.prefills[0], hang=True)
        chat = asyncio.create_task(timed(running, False))
        await running.arrived(running.prefills[0])
        await running.stack.service.stop()
        status, code, seconds = await chat
        assert (status, code) == (502, "prefill_failed")
        assert seconds < SOON


async def test_a_service_that_is_killed_leaves_no_client_hanging(tmp_path: Path) -> None:
    settings = {"pd": {"response_timeout_secs": 1.5}}
    async with pd_stack(tmp_path, settings=settings) as running:
        await running.fault(running.prefills[0], hang=True)
        chat = asyncio.create_task(timed(running, False))
        await running.arrived(running.prefills[0])
        os.kill(running.stack.service.pid, signal.SIGKILL)
        status, code, seconds = await chat
        assert (status, code) == (504, "upstream_timeout")
        assert seconds < SOON


async def test_random_failures_leave_nothing_behind(tmp_path: Path) -> None:
    """Workers die and come back while 500 requests are made, 50 at a time."""
    worker = {"bootstrap_timeout_seconds": 3.0}
    settings = {
        "models": [{"id": "m", "circuit_breaker": {"threshold": 3, "cool_down_secs": 0.3}}],
        "pd": {"response_timeout_secs": 8},
        "discovery": {"introspection_interval_secs": 0.5},
    }
    async with pd_stack(
        tmp_path, prefills=2, decodes=2, worker=worker, settings=settings
    ) as running:
        seen: Counter[tuple[int, str]] = Counter()
        slowest = 0.0
        places = asyncio.Semaphore(50)
        done = asyncio.Event()

        async def send(number: int) -> None:
            nonlocal slowest
            async with places:
                started = time.monotonic()
                try:
                    status, code, _ = await timed(running, number % 2 == 0)
                except aiohttp.ClientPayloadError:
                    status, code = 0, "cut"
                seen[status, code] += 1
                slowest = max(slowest, time.monotonic() - started)
                await asyncio.sleep(random.random() * 0.2)

        async def restart(pool: list[RunningSimulator], number: int) -> None:
            old = pool[number]
            bootstrap_port = old.bootstrap_port or 0
            await old.stop()
            running.fleet.workers.remove(old)
            await asyncio.sleep(random.random())
            pool[number] = await start(
                msgspec.structs.replace(
                    old.settings, port=old.port, disaggregation_bootstrap_port=bootstrap_port
                )
            )
            running.fleet.workers.append(pool[number])

        async def disturb() -> None:
            while not done.is_set():
                await restart(random.choice([running.prefills, running.decodes]), 0)
                await asyncio.sleep(0.3)

        disturbing = asyncio.create_task(disturb())
        await asyncio.gather(*(send(number) for number in range(500)))
        done.set()
        await disturbing
        assert sum(seen.values()) == 500
        allowed = {
            (200, ""),
            (502, "prefill_failed"),
            (503, "no_prefill_workers_available"),
            (503, "no_decode_workers_available"),
            (503, "upstream_unreachable"),
            (504, "upstream_timeout"),
            (500, ""),  # the engine's own error: its partner was gone
            (0, "cut"),
        }
        assert set(seen) <= allowed, seen
        assert seen[200, ""] > 200, seen
        assert slowest < 8 + SOON, slowest
        await running.at_rest()
        for one in [*running.prefills, *running.decodes]:
            with contextlib.suppress(Exception):
                await one.stop()
