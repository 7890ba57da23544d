"""A worker that dies and comes back at its ports, in place or as another."""

import asyncio
import socket as stdlib_socket
from contextlib import closing

import aiohttp
import pytest

from extproc.simulator.http import start

from .clients import CHAT, Launch, SimulatedWorker, chat
from .kv_clients import CLEARED, Batch, Connect, endless_fields, generate, publishing


async def test_a_restart_forgets_everything(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing(dp_size=2, **endless_fields()))
    client = connect(worker)
    _, before = await worker.get("/server_info")
    await worker.post("/generate", generate([1, 2, 3, 4, 5], 0, routed_dp_rank=0))
    assert len(await client.replay()) == 2
    async with worker.session.post(CHAT, json=chat(stream=True)) as running:
        await worker.until(running=1)
        assert (await worker.post("/simulator/restart", {}))[0] == 200
        with pytest.raises(aiohttp.ClientError):
            await running.read()
    _, after = await worker.get("/server_info")
    assert after["kv_events"] == before["kv_events"]
    assert after["startup_time"] > before["startup_time"]
    stats = await worker.stats()
    assert (stats["running"], stats["tokens_generated"], stats["aborted"]) == (0, 0, 1)
    for rank in range(2):
        assert await client.replay(0, rank) == [Batch(0, [CLEARED], rank)]
    _, answer = await worker.post("/generate", generate([1, 2, 3, 4, 5]))
    assert answer["meta_info"]["cached_tokens"] == 0


async def test_restarts_in_the_midst_of_each_other(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing())
    client = connect(worker)
    restarts = [worker.simulator.restart() for _ in range(3)]
    over_http = [worker.post("/simulator/restart", {}) for _ in range(3)]
    await asyncio.gather(*restarts, *over_http, return_exceptions=True)
    await worker.post("/generate", generate([1, 2, 3, 4]))
    assert [item.seq for item in await client.replay()] == [0, 1]


async def test_a_restart_waits_for_its_ports(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing())
    client = connect(worker)
    publisher = worker.simulator.publisher
    assert publisher is not None
    publisher.stop()
    with closing(stdlib_socket.create_server(("127.0.0.1", client.ports.events))) as taken:
        restart = asyncio.ensure_future(worker.post("/simulator/restart", {}))
        async with asyncio.timeout(20):
            while (await worker.get("/health"))[0] != 503:
                continue
        assert (await worker.post("/generate", generate([1])))[0] == 503
        assert (await restart)[0] == 500
        assert (await worker.get("/health"))[0] == 503
        restart = asyncio.ensure_future(worker.post("/simulator/restart", {}))
        await asyncio.sleep(0.1)
        taken.close()
    assert (await restart)[0] == 200
    assert (await worker.get("/health"))[0] == 200
    assert await client.replay() == [Batch(0, [CLEARED], 0)]


async def test_a_worker_takes_the_place_of_another(launch: Launch, connect: Connect) -> None:
    first = await start(publishing(dp_size=2))
    assert first.kv_ports is not None
    settings = publishing(
        dp_size=2,
        port=first.port,
        kv_events_port=first.kv_ports.events,
        kv_replay_port=first.kv_ports.replay,
        kv_load_port=first.kv_ports.load,
    )
    second = asyncio.ensure_future(launch(settings))
    await asyncio.sleep(0.1)
    await first.stop()
    worker = await second
    assert worker.simulator.port == settings.port
    assert await connect(worker).replay(0, 1) == [Batch(0, [CLEARED], 1)]


async def test_a_worker_that_publishes_nothing_restarts_too(worker: SimulatedWorker) -> None:
    await worker.post("/generate", generate([1, 2, 3]))
    assert (await worker.post("/simulator/restart", {}))[0] == 200
    assert (await worker.stats())["received"] == 1


async def test_a_subscriber_finds_the_restarted_worker(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing())
    client = connect(worker)
    socket = await client.subscribed()
    await worker.post("/simulator/restart", {})
    assert (await client.heard(socket)).events == [CLEARED]
