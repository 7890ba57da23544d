"""Disconnects, aborts by id and stopping workers free the place of a request."""

import asyncio
import socket
import struct
from random import Random

import aiohttp
import pytest

from .clients import CHAT, FOREVER_MILLISECONDS, Launch, chat, endless, events


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_while_decoding(launch: Launch, stream: bool) -> None:
    worker = await launch(endless())
    task = asyncio.ensure_future(worker.post(CHAT, chat(stream=stream)))
    await worker.until(running=1, tokens_generated=1)
    task.cancel()
    stats = await worker.until(aborted=1, running=0)
    assert (stats["completed"], stats["failed"]) == (0, 0)
    assert stats["requests"][0]["outcome"] == "aborted"


async def test_disconnects_in_prefill_and_in_the_queue(launch: Launch) -> None:
    worker = await launch(endless(prefill_tokens_per_second=0.001))
    first = asyncio.ensure_future(worker.post(CHAT, chat()))
    await worker.until(running=1)
    second = asyncio.ensure_future(worker.post(CHAT, chat()))
    await worker.until(waiting=1)
    second.cancel()
    await worker.until(aborted=1, waiting=0, running=1)
    first.cancel()
    await worker.until(aborted=2, running=0)


async def test_a_freed_place_goes_to_the_next_request(launch: Launch) -> None:
    worker = await launch(endless(max_running_requests=1))
    first = asyncio.ensure_future(worker.post(CHAT, chat()))
    await worker.until(running=1)
    second = asyncio.ensure_future(worker.post(CHAT, chat(max_tokens=1)))
    await worker.until(waiting=1)
    first.cancel()
    assert (await second)[0] == 200
    stats = await worker.until(aborted=1, completed=1, running=0)
    assert stats["max_running"] == 1


async def test_a_body_that_never_ends(launch: Launch) -> None:
    worker = await launch()
    _, writer = await asyncio.open_connection("127.0.0.1", worker.simulator.port)
    writer.write(b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
    await worker.until(received=1)
    writer.close()
    await writer.wait_closed()
    await worker.until(aborted=1)


@pytest.mark.parametrize(
    "fault", ["", "die-before-headers, reset", "die-after-tokens=1, reset", "error-after-tokens=1"]
)
async def test_resets_at_any_moment_are_handled_silently(
    launch: Launch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    worker = await launch(endless(decode_milliseconds_per_token=0))
    random = Random(fault)

    async def reset() -> None:
        tokens, stream = random.choice((0, 1, 2, 50)), random.choice(("true", "false"))
        body = f'{{"prompt": "a", "stream": {stream}, "max_tokens": {tokens}}}'.encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
        named = f"x-simulator-fault: {fault}\r\n" if fault else ""
        connection = socket.create_connection(("127.0.0.1", worker.simulator.port))
        with connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(head.encode() + named.encode() + b"\r\n" + body)
            await asyncio.sleep(random.random() * 0.01)

    for _ in range(10):
        await asyncio.gather(*(reset() for _ in range(40)))
    await worker.until(running=0, waiting=0)
    stats = await worker.stats()
    assert stats["received"] == sum(stats[name] for name in ("completed", "aborted", "failed"))
    assert not caplog.records


async def test_an_abort_by_id_ends_the_stream_cleanly(launch: Launch) -> None:
    worker = await launch(endless())

    async def read() -> bytes:
        async with worker.session.post(CHAT, json=chat(stream=True, rid="mine")) as response:
            return await response.read()

    task = asyncio.ensure_future(read())
    await worker.until(running=1, tokens_generated=1)
    assert (await worker.post("/abort_request", {"rid": "other"}))[0] == 200
    assert (await worker.post("/abort_request", {"rid": "mine-too"}))[0] == 200
    assert (await worker.stats())["running"] == 1
    assert (await worker.post("/abort_request", {"rid": "mi"}))[0] == 200  # a prefix is enough
    payloads = events(await task)
    assert payloads[-1] == "[DONE]"
    assert payloads[-2]["choices"][0]["finish_reason"] == "abort"
    await worker.until(aborted=1, completed=0, running=0)


async def test_an_abort_of_all(launch: Launch) -> None:
    worker = await launch(endless(max_running_requests=1))
    tasks = [asyncio.ensure_future(worker.post("/generate", {"text": "a"})) for _ in range(3)]
    await worker.until(running=1, waiting=2)
    await worker.post("/abort_request", {"abort_all": True})
    answers = [await task for task in tasks]
    assert {answer["meta_info"]["finish_reason"]["type"] for _, answer in answers} == {"abort"}
    await worker.until(aborted=3)


async def test_an_abort_needs_an_id(launch: Launch) -> None:
    worker = await launch()
    assert (await worker.post("/abort_request", {}))[0] == 400
    assert (await worker.post("/abort_request", {"rid": ""}))[0] == 400


async def test_a_stop_aborts_running_requests(launch: Launch) -> None:
    worker = await launch(endless(decode_milliseconds_per_token=FOREVER_MILLISECONDS))
    async with worker.session.post(CHAT, json=chat(stream=True)) as response:
        hanging = asyncio.ensure_future(worker.post(CHAT, chat(), fault="hang"))
        await worker.until(received=2, running=1)
        await worker.simulator.stop()
        with pytest.raises(aiohttp.ClientError):
            await response.read()
        with pytest.raises(aiohttp.ClientError):
            await hanging
    with pytest.raises(aiohttp.ClientConnectorError):
        await worker.get("/health")
