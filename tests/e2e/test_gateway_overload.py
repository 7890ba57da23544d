"""The rendered Envoy refuses and cuts off requests before its memory is full, and never hangs.

The levels are tested with a pressure that the test sets, in place of the heap's.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running
from tests.e2e.pd_fleet import pd_stack
from tests.e2e.raw_http import port_of, post

MEBIBYTE = 1024 * 1024
PATH = "/v1/completions"
VERSIONS = ("HTTP/1.1", "HTTP/2")
HEAP = "envoy.resource_monitors.fixed_heap"
INJECTED = "envoy.resource_monitors.injected_resource"
INJECTED_TYPE = (
    "type.googleapis.com/envoy.extensions.resource_monitors.injected_resource.v3"
    ".InjectedResourceConfig"
)
FAST = {"prefill_tokens_per_second": 1e9}
REFUSED = (503, "gateway_overloaded")


def completion(size: int, *, tokens: int = 1) -> bytes:
    """A body of this size that costs the worker little: most of it is not the prompt."""
    head = b'{"model":"m","max_tokens":%d,"prompt":"hello","padding":"' % tokens
    return head + b"x" * (size - len(head) - 2) + b'"}'


class Pressure:
    """Replaces the monitor of the heap; the pressure is what a file says."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "pressure"
        self.set(0)

    def set(self, value: float) -> None:
        beside = self._file.with_suffix(".new")
        beside.write_text(str(value))
        beside.replace(self._file)

    def edit(self, bootstrap: dict[str, Any]) -> None:
        manager = bootstrap["overload_manager"]
        monitors = manager["resource_monitors"]
        (monitor,) = [one for one in monitors if one["name"] == HEAP]
        monitor["name"] = INJECTED
        monitor["typed_config"] = {"@type": INJECTED_TYPE, "filename": str(self._file)}
        for one in (*manager["actions"], *manager["loadshed_points"]):
            for trigger in one["triggers"]:
                assert trigger["name"] == HEAP
                trigger["name"] = INJECTED


@pytest.fixture
def pressure(tmp_path: Path) -> Pressure:
    return Pressure(tmp_path)


async def stat(running: Running, name: str) -> int:
    """One of Envoy's counters or gauges."""
    url = f"{running.stack.envoy_admin_url}/stats?filter=^{name}$"
    async with running.http.get(url) as answer:
        _, _, value = (await answer.text()).strip().rpartition(": ")
        return int(value or 0)


async def result(running: Running, path: str, body: bytes, version: str) -> tuple[int, str]:
    """Status and code of an answer; (0, "") if the connection or stream ends without one."""
    try:
        answer = await post(port_of(running), path, body, version=version)
    except ConnectionError:
        return 0, ""
    if answer.status == 200:
        return 200, ""
    assert answer.headers.get("retry-after") == ("1" if answer.status == 503 else None)
    code = answer.json()["error"]["code"]
    assert answer.headers["x-router-error-code"] == code
    return answer.status, code


async def becomes(
    expected: tuple[int, str], running: Running, version: str, path: str = PATH
) -> None:
    async def seen() -> bool:
        return await result(running, path, completion(100), version) == expected

    await wait_until(seen, f"requests over {version} get {expected}")


@contextlib.asynccontextmanager
async def upload(
    running: Running, sent: int
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A request over HTTP/1.1 of whose body so many bytes have been sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(running))
    head = f"POST {PATH} HTTP/1.1\r\nhost: api\r\ntransfer-encoding: chunked\r\n\r\n{sent:x}\r\n"
    writer.write(head.encode() + completion(sent) + b"\r\n")
    await writer.drain()
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_requests_are_refused_and_then_cut_off_and_responses_go_on(
    launch: Launch, pressure: Pressure
) -> None:
    running = await launch(
        1,
        worker=FAST | {"decode_milliseconds_per_token": 10},
        edit_bootstrap=pressure.edit,
    )

    async def large(version: str) -> tuple[int, str]:
        return await result(running, PATH, completion(4 * MEBIBYTE, tokens=500), version)

    async def in_flight(number: int) -> None:
        async def reached() -> bool:
            return await running.stack.in_flight() == number

        await wait_until(reached, f"{number} requests are in flight")

    async with (
        running.chat(stream=True, tokens=1000) as response,
        upload(running, MEBIBYTE) as (
            reader,
            writer,
        ),
    ):
        assert response.status == 200
        waiting = {version: asyncio.create_task(large(version)) for version in VERSIONS}
        await in_flight(3)
        # New requests are refused, and all others go on.
        pressure.set(0.8)
        for version in VERSIONS:
            await becomes(REFUSED, running, version)
        answer = await post(port_of(running), "/v1/messages", completion(100))
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["type"] == "overloaded_error"
        assert await running.stack.in_flight() == 3
        # What uploads is cut off over HTTP/1, and what has much memory over HTTP/2.
        pressure.set(1.0)
        assert await waiting["HTTP/2"] == (0, "")
        await becomes((0, ""), running, "HTTP/1.1")
        await becomes(REFUSED, running, "HTTP/2")
        with contextlib.suppress(ConnectionError):
            writer.write(b"5\r\nxxxxx\r\n")
            assert await asyncio.wait_for(reader.read(), 30) == b""
        # Responses, and the request over HTTP/1 that a worker has, are not touched.
        assert await waiting["HTTP/1.1"] == (200, "")
        text = await response.text()
        assert text.endswith("data: [DONE]\n\n")
    pressure.set(0)
    for version in VERSIONS:
        await becomes((200, ""), running, version)
    await running.stack.idle()


async def test_a_pair_that_was_accepted_gets_its_decode_worker(
    tmp_path: Path, pressure: Pressure
) -> None:
    async with pd_stack(
        tmp_path,
        worker={"pd_protocol": "nixl"},
        model={"pd": {"protocol": "nixl"}},
        edit_bootstrap=pressure.edit,
    ) as running:

        async def chat() -> int:
            async with running.chat() as response:
                return int(response.status)

        # The first pass waits for the prefill, the second one comes after it.
        await running.fault(running.prefills[0], hang=6)
        accepted = asyncio.create_task(chat())
        await running.arrived(running.prefills[0])
        pressure.set(0.8)
        # The service answers this path without a worker.
        await becomes(REFUSED, running, "HTTP/1.1", "/unknown")
        assert not await running.legs(running.decodes)
        assert await accepted == 200
        await running.at_rest()


@pytest.mark.parametrize("version", VERSIONS)
async def test_many_large_bodies_at_once_leave_the_gateway_alive(
    launch: Launch, version: str
) -> None:
    # Without limits of the service, so that all bodies are the gateway's to bear.
    running = await launch(
        1,
        worker=FAST,
        settings={"envoy": {"max_heap_mb": 160}, "server": {"max_buffered_bytes": 2**40}},
    )
    pid = running.stack.envoy.pid
    body = completion(12 * MEBIBYTE)
    highest = 0
    done = asyncio.Event()

    async def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, await stat(running, f"overload.{HEAP}.pressure"))
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    # No request waits until the client's time-out.
    found = Counter(
        await asyncio.gather(*[result(running, PATH, body, version) for _ in range(40)])
    )
    done.set()
    await watching
    assert set(found) <= {(200, ""), (0, ""), REFUSED, (503, "router_unavailable")}, found
    # It was under pressure. How high that rises is a matter of how fast the bodies come.
    assert highest > 75 or set(found) - {(200, "")}, (highest, found)
    for each in VERSIONS:
        await becomes((200, ""), running, each)
    assert (running.stack.envoy.pid, running.stack.envoy.returncode) == (pid, None)


async def test_connections_over_the_limit_are_closed_at_once(launch: Launch) -> None:
    running = await launch(1, settings={"envoy": {"max_connections": 3}})

    async def opened() -> bool:
        return await stat(running, "http.ingress.downstream_cx_active") == 3

    async with contextlib.AsyncExitStack() as held:
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", port_of(running))
            held.callback(writer.close)
        await wait_until(opened, "three connections are open")
        assert await result(running, PATH, completion(100), "HTTP/1.1") == (0, "")
    await becomes((200, ""), running, "HTTP/1.1")
