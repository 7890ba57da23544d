"""Faults as a client meets them."""

import asyncio
import errno
import socket
from typing import Any

import aiohttp
import msgspec
import pytest

from .clients import CHAT, SimulatedWorker, broken_off, chat, events


async def test_a_status_with_a_retry_after(worker: SimulatedWorker) -> None:
    headers = {"x-simulator-fault": "status=503, retry-after=2"}
    async with worker.session.post(CHAT, json=chat(), headers=headers) as response:
        assert response.status == 503
        assert response.headers["retry-after"] == "2"
        assert (await response.json())["error"]["type"] == "server_error"
    stats = await worker.stats()
    assert (stats["failed"], stats["tokens_generated"]) == (1, 0)


async def test_a_wrong_fault_header_is_a_400(worker: SimulatedWorker) -> None:
    status, answer = await worker.post(CHAT, chat(), fault="explode")
    assert status == 400
    assert "x-simulator-fault" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("fault", "signs"),
    [("hang", {"received": 1}), ("stall-after-tokens=1", {"running": 1, "tokens_generated": 1})],
)
async def test_a_worker_that_never_answers(
    worker: SimulatedWorker, fault: str, signs: dict[str, int]
) -> None:
    task = asyncio.ensure_future(worker.post(CHAT, chat(), fault=fault))
    await worker.until(**signs)
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done
    task.cancel()
    await worker.until(aborted=1, running=0)


async def test_a_stream_that_falls_silent(worker: SimulatedWorker) -> None:
    headers = {"x-simulator-fault": "stall-after-tokens=2"}
    async with worker.session.post(CHAT, json=chat(stream=True), headers=headers) as response:
        for _ in range(1 + 2):  # role and two tokens
            assert events(await response.content.readuntil(b"\n\n"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(response.content.read(1), 0.05)
    await worker.until(aborted=1, running=0)


async def test_a_hang_of_some_seconds_answers_after_it(worker: SimulatedWorker) -> None:
    status, _ = await worker.post(CHAT, chat(), fault="hang=0.05")
    assert status == 200
    status, _ = await worker.post(CHAT, chat(), fault="hang=0.05, status=500")
    assert status == 500


@pytest.mark.parametrize("fault", ["die-before-headers", "die-before-headers, reset"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_death_before_the_headers(
    worker: SimulatedWorker, fault: str, stream: bool
) -> None:
    with pytest.raises(aiohttp.ClientConnectionError) as caught:
        await worker.post(CHAT, chat(stream=stream), fault=fault)
    is_reset = isinstance(caught.value, OSError) and caught.value.errno == errno.ECONNRESET
    assert is_reset == ("reset" in fault)
    await worker.until(failed=1, running=0, aborted=0)


async def test_a_death_in_mid_answer_without_streaming(worker: SimulatedWorker) -> None:
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await worker.post(CHAT, chat(), fault="die-after-tokens=3")
    stats = await worker.until(failed=1, running=0)
    assert stats["tokens_generated"] == 3


@pytest.mark.parametrize("fault", ["die-after-tokens=3", "die-after-tokens=3, reset"])
async def test_a_death_in_mid_stream_has_no_clean_end(worker: SimulatedWorker, fault: str) -> None:
    headers = {"x-simulator-fault": fault}
    async with worker.session.post(CHAT, json=chat(stream=True), headers=headers) as response:
        assert response.status == 200
        got, error = await broken_off(response)
    assert isinstance(error, aiohttp.ClientError)
    assert len(events(got)) == 1 + 3
    await worker.until(failed=1, running=0, aborted=0)


async def test_bytes_written_before_a_death_are_delivered(worker: SimulatedWorker) -> None:
    body = msgspec.json.encode(chat(stream=True, n=128, max_tokens=1000))
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
        "x-simulator-fault: die-after-tokens=200\r\n\r\n"
    )
    narrow = socket.socket()  # so that the worker is ahead of its client to the end
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.connect(("127.0.0.1", worker.simulator.port))
    reader, writer = await asyncio.open_connection(sock=narrow)
    writer.write(head.encode() + body)
    got = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert got.count(b"data: ") == 128 * (1 + 200)
    assert not got.endswith(b"\r\n0\r\n\r\n")


async def test_a_death_after_no_token_has_sent_the_headers(worker: SimulatedWorker) -> None:
    headers = {"x-simulator-fault": "die-after-tokens=0"}
    async with worker.session.post(CHAT, json=chat(stream=True), headers=headers) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses"])
async def test_an_error_event_in_mid_stream(worker: SimulatedWorker, path: str) -> None:
    body: dict[str, Any] = chat(stream=True, max_tokens=5, input="a")
    headers = {"x-simulator-fault": "error-after-tokens=2"}
    async with worker.session.post(path, json=body, headers=headers) as response:
        payloads = events(await response.read())
    assert any("simulated fault" in str(item) for item in payloads[-2:])
    await worker.until(failed=1, completed=0, running=0)


async def test_an_error_on_the_way_is_a_500_without_streaming(worker: SimulatedWorker) -> None:
    assert (await worker.post(CHAT, chat(), fault="error-after-tokens=2"))[0] == 500


async def test_a_fault_behind_the_last_token_changes_nothing(worker: SimulatedWorker) -> None:
    status, answer = await worker.post(CHAT, chat(max_tokens=2), fault="die-after-tokens=3")
    assert (status, answer["usage"]["completion_tokens"]) == (200, 2)


async def test_slow_tokens(worker: SimulatedWorker) -> None:
    async def read() -> None:
        await worker.post(CHAT, chat(max_tokens=2), fault="slow-token=3600")

    task = asyncio.ensure_future(read())
    await worker.until(running=1, tokens_generated=1)
    task.cancel()
    await worker.until(aborted=1, running=0)


async def test_the_whole_worker_fails_for_a_count(worker: SimulatedWorker) -> None:
    status, answer = await worker.post("/simulator/faults", {"status": 500, "count": 2})
    assert (status, answer) == (200, {"status": 500, "count": 2})
    assert (await worker.post(CHAT, chat(), fault="status=418"))[0] == 418  # not counted
    assert [(await worker.post(CHAT, chat()))[0] for _ in range(3)] == [500, 500, 200]


async def test_the_whole_worker_fails_until_cleared(worker: SimulatedWorker) -> None:
    await worker.post("/simulator/faults", {"die_before_headers": True})
    for _ in range(2):
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await worker.post(CHAT, chat())
    assert (await worker.get("/health"))[0] == 200
    async with worker.session.delete("/simulator/faults") as response:
        assert await response.json() == {}
    assert (await worker.post(CHAT, chat()))[0] == 200


async def test_the_paths_a_router_probes_fail_on_their_own(worker: SimulatedWorker) -> None:
    faults = {"health_status": 503, "server_info_status": 500, "models_status": 404}
    await worker.post("/simulator/faults", faults)
    paths = ("/health", "/health_generate", "/server_info", "/get_server_info", "/v1/models")
    assert [(await worker.get(path))[0] for path in paths] == [503, 503, 500, 500, 404]
    assert (await worker.post(CHAT, chat()))[0] == 200


async def test_a_probe_that_hangs(worker: SimulatedWorker) -> None:
    await worker.post("/simulator/faults", {"server_info_hang": True, "health_hang": 0.01})
    with pytest.raises(TimeoutError):
        await worker.session.get("/server_info", timeout=aiohttp.ClientTimeout(total=0.05))
    assert (await worker.get("/health"))[0] == 200


@pytest.mark.parametrize("body", [b"", b"[]", b'{"explode": true}', b'{"status": 9}'])
async def test_unknown_faults_are_refused(worker: SimulatedWorker, body: bytes) -> None:
    assert (await worker.post("/simulator/faults", body))[0] == 400
