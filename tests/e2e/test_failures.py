"""Failing workers, clients and limits: each gets a clear answer and leaves nothing behind."""

import asyncio
import contextlib
import io
from typing import Any

import aiohttp
import pytest

from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running


async def no_load(running: Running) -> bool:
    return await running.stack.in_flight() == 0


async def test_a_dead_first_choice_is_served_by_the_next(launch: Launch) -> None:
    running = await launch(3)
    await running.fleet.workers[0].stop()
    dead = running.fleet.workers.pop(0)
    for _ in range(9):
        async with running.chat() as response:
            assert response.status == 200
    assert await running.sample("extproc_fallback_served_total") == 3
    assert await running.sample("extproc_destination_missed_total") == 0
    workers = {worker["url"]: worker for worker in await running.stack.workers()}
    # Three refused connections are the breaker's threshold: it gets no further requests.
    assert workers[dead.url]["breaker"] == "open"
    async with running.chat() as response:
        assert response.status == 200
    assert await running.sample("extproc_fallback_served_total") == 3
    await wait_until(lambda: no_load(running), "load released")


async def test_with_all_workers_dead_clients_get_503_until_they_recover(launch: Launch) -> None:
    cool_down = {"circuit_breaker": {"threshold": 1, "cool_down_secs": 1}}
    running = await launch(2, settings={"models": [{"id": "m", **cool_down}]})
    for worker in running.fleet.workers:
        await worker.stop()
    async with running.chat() as response:
        assert await running.error(response) == (503, "upstream_unreachable")
    # Their breakers are open: they are tried as the last resort.
    async with running.chat() as response:
        assert await running.error(response) == (503, "upstream_unreachable")
    assert await running.sample("extproc_last_resort_total") == 1
    again = await start(SimulatorSettings(model="m", port=running.fleet.workers[0].port))
    try:

        async def served() -> bool:
            async with running.chat() as response:
                return bool(response.status == 200)

        await wait_until(served, "a probe closes the breaker")
    finally:
        await again.stop()


async def test_clients_get_our_error_when_a_worker_dies_before_its_answer(launch: Launch) -> None:
    running = await launch(1)
    async with running.chat(fault="die-before-headers") as response:
        assert await running.error(response) == (503, "upstream_unreachable")
    assert await running.sample("extproc_worker_requests_total{model") == 1
    await wait_until(lambda: no_load(running), "load released")


async def test_the_stream_breaks_when_its_worker_dies(launch: Launch) -> None:
    running = await launch(1)
    async with running.chat(
        stream=True, tokens=10, fault="die-after-tokens=3, slow-token=0.5"
    ) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    await wait_until(lambda: no_load(running), "load released")


async def test_an_engines_own_5xx_passes_through_untouched(launch: Launch) -> None:
    running = await launch(1)
    async with running.chat(fault="status=500") as response:
        assert response.status == 500
        assert "x-router-error-code" not in response.headers
        assert "error" in await response.json()


async def test_a_client_disconnect_ends_the_upstream_request(launch: Launch) -> None:
    running = await launch(1)
    response = await running.chat(stream=True, tokens=100_000).__aenter__()
    await response.content.readline()
    assert await running.stack.in_flight() == 1
    response.close()

    async def aborted() -> bool:
        return bool((await running.fleet.stats())[0]["aborted"] == 1)

    await wait_until(aborted, "the worker sees the abort")
    await wait_until(lambda: no_load(running), "load released")


async def test_a_client_disconnect_before_the_answer_ends_the_upstream_request(
    launch: Launch,
) -> None:
    running = await launch(1)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            async with running.chat(fault="hang"):
                raise AssertionError("a hanging worker answered")
    await wait_until(lambda: no_load(running), "load released")
    workers = await running.stack.workers()
    assert workers[0]["breaker"] == "closed"


async def test_a_plain_request_has_a_time_limit(launch: Launch) -> None:
    running = await launch(1, settings={"proxy": {"request_timeout_secs": 1}})
    async with running.chat(fault="hang") as response:
        assert await running.error(response) == (504, "upstream_timeout")
    await wait_until(lambda: no_load(running), "load released")


async def test_a_request_that_is_too_old_is_ended(launch: Launch) -> None:
    running = await launch(1, settings={"active_load": {"stale_request_timeout_secs": 2}})
    async with running.chat(stream=True, fault="hang") as response:
        assert await running.error(response) == (504, "stale_request_expired")
    async with running.chat(stream=True, tokens=100_000) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    await wait_until(lambda: no_load(running), "load released")
    assert await running.sample("extproc_stale_requests_total") == 2


async def test_long_streams_go_on_while_tokens_arrive(launch: Launch) -> None:
    """All limits but the idle time-out are shorter than the stream, as with a 10-minute stream."""
    running = await launch(
        1,
        settings={
            "proxy": {"request_timeout_secs": 1},
            "envoy": {"stream_idle_timeout_secs": 2},
        },
    )
    # 16 tokens every half second: 8 s.
    async with running.chat(stream=True, tokens=16, fault="slow-token=0.5") as response:
        assert (await response.read()).count(b"data: ") == 19
    # The idle limit itself holds: a stream that falls silent is cut.
    async with running.chat(stream=True, tokens=16, fault="stall-after-tokens=2") as response:
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    await wait_until(lambda: no_load(running), "load released")


CONTROL_HEADERS = {
    "x-extproc-cluster": "extproc",
    "x-extproc-model": "other",
    "x-extproc-pass": "decode",
    "x-extproc-worker": "http://evil",
    "x-envoy-max-retries": "50",
    "x-envoy-retry-on": "5xx",
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-envoy-original-dst-host": "127.0.0.1:1",
}


@pytest.mark.parametrize("fail_open", [False, True])
async def test_control_headers_from_a_client_have_no_effect(
    launch: Launch, fail_open: bool
) -> None:
    patient = {"id": "m", "circuit_breaker": {"threshold": 1000}}
    running = await launch(2, settings={"models": [patient]})
    target = f"127.0.0.1:{running.fleet.workers[1].port}"
    headers = CONTROL_HEADERS | {"x-gateway-destination-endpoint": target}
    if fail_open:
        await running.stack.service.stop()

        async def noticed() -> bool:
            return not await running.stack.envoy_sees_service()

        await wait_until(noticed, "Envoy notices")
    # Enough for a random choice between two to show both.
    for _ in range(20):
        async with running.chat(headers=headers, fault="status=500") as response:
            assert response.status == 500
    received = [stats["received"] for stats in await running.fleet.stats()]
    # No retries on 5xx, and not all requests at the endpoint that the client named.
    assert sum(received) == 20
    assert received[0] > 0
    for request in await running.fleet.requests():
        for name in ("x-extproc-worker", "x-extproc-pass", "x-envoy-original-dst-host"):
            assert name not in request["headers"]


async def test_bad_input_gets_an_error_and_affects_no_other_request(launch: Launch) -> None:
    running = await launch(1, settings={"server": {"max_body_bytes": 2_000_000}})
    secret = "a-secret-in-the-prompt"

    async def post(
        data: bytes, path: str = "/v1/chat/completions", **kwargs: Any
    ) -> tuple[int, str]:
        # aiohttp warns about large bodies as plain bytes.
        sent = io.BytesIO(data)
        async with running.http.post(f"{running.url}{path}", data=sent, **kwargs) as response:
            return await running.error(response)

    async def steady() -> bytes:
        async with running.chat(stream=True, tokens=100, fault="slow-token=0.02") as response:
            return bytes(await response.read())

    other = asyncio.create_task(steady())
    bad = (400, "bad_request")
    assert await post(b"\x00\xff\x13\x37" * 100) == bad
    assert await post(f'{{"model": "m", "prompt": "{secret}'.encode()) == bad
    assert await post(b'{"model":"m","x":' + b"[" * 200_000) == bad
    assert await post(b'{"model":"m","prompt":"\xc3\x28"}') == bad
    assert await post(b"") == bad
    assert await post(b"[]") == bad
    assert await post(b'{"model":{}}') == bad
    assert await post(b'{"model":"' + b"x" * 1_000_000 + b'"}') == (404, "model_not_found")
    assert await post(b'{"model":"m","model":"n"}') == (404, "model_not_found")
    assert await post(b"{}", "/v1/nothing") == (404, "not_found")
    assert await post(b"x" * 2_000_001) == (413, "payload_too_large")
    async with running.http.get(f"{running.url}/v1/chat/completions") as response:
        assert await running.error(response) == (405, "method_not_allowed")
    async with running.http.options(f"{running.url}/v1/chat/completions") as response:
        assert (response.status, response.headers["allow"]) == (204, "POST, OPTIONS")
    async with running.http.head(f"{running.url}/v1/models") as response:
        assert response.status == 200
    many = {f"x-filler-{index}": "v" for index in range(400)}
    async with running.chat(headers=many) as response:
        assert response.status in (200, 400, 431)
    assert (await other).count(b"data: ") == 103
    # An upload of 100 MB: the client may still be sending when its 413 comes.
    with contextlib.suppress(aiohttp.ClientError):
        assert await post(b"x" * 100_000_000) == (413, "payload_too_large")
    async with running.chat() as response:
        assert response.status == 200
    assert secret not in running.stack.service.log.read_text()
    assert "Traceback" not in running.stack.service.log.read_text()
    await wait_until(lambda: no_load(running), "load released")
