"""A started worker and a client for it: real TCP on free ports, stopped after each test."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import aiohttp
import pytest

from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings

from .clients import Launch, SimulatedWorker
from .kv_clients import Connect, KvClient


@pytest.fixture
async def launch() -> AsyncIterator[Launch]:
    """Starts workers with the given settings; decoding and prefill take no time by default."""
    async with AsyncExitStack() as stack:

        async def launch(settings: SimulatorSettings | None = None) -> SimulatedWorker:
            simulator = await stack.enter_async_context(await start(settings or instant()))
            session = aiohttp.ClientSession(simulator.url)
            await stack.enter_async_context(session)
            return SimulatedWorker(simulator, session)

        yield launch


@pytest.fixture
async def worker(launch: Launch) -> SimulatedWorker:
    return await launch()


@pytest.fixture
def connect() -> Iterator[Connect]:
    clients: list[KvClient] = []

    def connect(worker: SimulatedWorker) -> KvClient:
        clients.append(KvClient(worker))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def instant() -> SimulatorSettings:
    return SimulatorSettings(prefill_tokens_per_second=1e9, decode_milliseconds_per_token=0)
