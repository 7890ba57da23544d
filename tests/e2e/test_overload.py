"""More than the service takes is refused at once, in the error envelope; the rest is served."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running
from tests.e2e.raw_http import completion, port_of, post

MEBIBYTE = 1024 * 1024
REFUSED = (503, "service_overloaded")
PATH = "/v1/completions"


async def outcome(running: Running, *, tokens: int) -> tuple[int, str]:
    async with running.chat(tokens=tokens) as response:
        if response.status == 200:
            await response.read()
            return 200, ""
        assert response.headers["retry-after"] == "1"
        return await running.error(response)


async def settled(running: Running) -> bool:
    metrics = await running.stack.metrics()
    return metrics["extproc_requests_open"] == metrics["extproc_buffered_bytes"] == 0


async def test_requests_over_the_limit_are_refused_and_logged_in_bounded_number(
    launch: Launch,
) -> None:
    running = await launch(
        2,
        worker={"decode_milliseconds_per_token": 20},
        settings={"server": {"max_requests": 20}},
    )
    found = Counter(await asyncio.gather(*[outcome(running, tokens=100) for _ in range(80)]))
    assert found == {(200, ""): 20, REFUSED: 60}
    assert len(await running.fleet.requests()) == 20
    metrics = await running.stack.metrics()
    assert metrics['extproc_overload_refusals_total{limit="max_requests"}'] == 60
    assert running.stack.service.log.read_text().count("request_refused") == 20
    # What was refused leaves nothing behind.
    await wait_until(lambda: settled(running), "no request is in flight")
    assert await outcome(running, tokens=1) == (200, "")


@asynccontextmanager
async def announced(running: Running, size: int) -> AsyncIterator[asyncio.StreamReader]:
    """A request with a body of which only the beginning comes."""
    port = port_of(running)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {PATH} HTTP/1.1\r\nhost: api\r\ncontent-length: {size}\r\n\r\n"
    writer.write(head.encode() + b'{"model":"m","prompt":"')
    await writer.drain()
    try:
        yield reader
    finally:
        writer.close()


async def test_large_bodies_that_do_not_come_leave_room_for_small_ones(launch: Launch) -> None:
    sizes = {"max_body_bytes": 4 * MEBIBYTE, "max_buffered_bytes": 8 * MEBIBYTE}
    running = await launch(1, worker={"prefill_tokens_per_second": 1e9}, settings={"server": sizes})
    port = port_of(running)

    async def held(expected: int) -> None:
        async def is_held() -> bool:
            metrics = await running.stack.metrics()
            return metrics["extproc_buffered_bytes"] == expected

        await wait_until(is_held, f"{expected} bytes are held")

    async with AsyncExitStack() as stalled:
        for _ in range(2):
            await stalled.enter_async_context(announced(running, 3 * MEBIBYTE))
        await held(6 * MEBIBYTE)
        # The third is refused at its headers: its body is still to come.
        async with announced(running, 3 * MEBIBYTE) as reader:
            async with asyncio.timeout(10):
                answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"x-router-error-code: service_overloaded" in answer
            assert b"retry-after: 1" in answer
        for version in ("HTTP/1.1", "HTTP/2"):
            refused = await post(port, PATH, completion(3 * MEBIBYTE), version=version)
            assert (refused.status, refused.json()["error"]["code"]) == REFUSED
            served = await post(port, PATH, completion(MEBIBYTE), version=version)
            assert served.status == 200, served.body
    await held(0)
    for _ in range(3):
        assert (await post(port, PATH, completion(3 * MEBIBYTE))).status == 200
    await wait_until(lambda: settled(running), "nothing is held")


async def test_clients_that_send_slowly_do_not_keep_others_out(launch: Launch) -> None:
    running = await launch(1, settings={"server": {"max_requests": 3}})
    async with AsyncExitStack() as stalled:
        slow = [await stalled.enter_async_context(announced(running, 1000)) for _ in range(3)]

        async def all_are_there() -> bool:
            return (await running.stack.metrics())["extproc_requests_open"] == 3

        await wait_until(all_are_there, "the slow ones are in flight")
        assert await outcome(running, tokens=1) == REFUSED

        async def is_served() -> bool:
            # Each refusal ends the oldest of them, once it has waited for 2 s.
            return await outcome(running, tokens=1) == (200, "")

        await wait_until(is_served, "a request is served", 30)
        async with asyncio.timeout(10):
            answer = await slow[0].readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 408 ")
    await wait_until(lambda: settled(running), "no request is in flight")


async def test_limits_change_while_the_service_runs(launch: Launch) -> None:
    running = await launch(
        1,
        worker={"decode_milliseconds_per_token": 20},
        settings={"server": {"max_requests": 2}},
    )
    slow = [asyncio.create_task(outcome(running, tokens=200)) for _ in range(2)]

    async def both_run() -> bool:
        return await running.stack.in_flight() == 2

    await wait_until(both_run, "both are in flight")
    assert await outcome(running, tokens=1) == REFUSED
    server: dict[str, Any] = running.stack.config["server"]
    server["max_requests"] = 3
    await running.stack.reload()
    assert await outcome(running, tokens=1) == (200, "")
    assert await asyncio.gather(*slow) == [(200, "")] * 2
