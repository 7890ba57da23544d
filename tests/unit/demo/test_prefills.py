"""Prefill workers say what they had cached."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from extproc.demo.prefills import Prefilled, prefilled
from extproc.simulator.http import RunningSimulator, start
from extproc.simulator.settings import SimulatorSettings

PROMPT = "sea " * 20  # as many tokens as bytes
FAKE_HOST = "2.2.2.2"  # nothing is transferred, so that no other worker is needed


@pytest.fixture
async def worker() -> AsyncIterator[RunningSimulator]:
    settings = SimulatorSettings(
        page_size=1,
        prefill_tokens_per_second=200.0,
        disaggregation_mode="prefill",
        disaggregation_bootstrap_port=0,
    )
    async with await start(settings) as running:
        yield running


async def prefill(session: aiohttp.ClientSession, worker: RunningSimulator, name: str) -> None:
    body = {"text": PROMPT, "bootstrap_host": FAKE_HOST, "bootstrap_room": 1}
    headers = {"x-request-id": name}
    async with session.post(f"{worker.url}/generate", json=body, headers=headers) as response:
        assert response.status == 200


async def test_each_request_gets_its_own_figures(worker: RunningSimulator) -> None:
    async with aiohttp.ClientSession() as session:
        await prefill(session, worker, "first")
        await prefill(session, worker, "second")
        first = await prefilled(session, worker.url, "first")
        second = await prefilled(session, worker.url, "second")
    assert first is not None
    assert second is not None
    tokens = len(PROMPT)
    assert (first.prompt_tokens, first.cached_tokens) == (tokens, 0)
    # The last token is always computed.
    assert (second.prompt_tokens, second.cached_tokens) == (tokens, tokens - 1)


async def test_a_running_prefill_is_waited_for(worker: RunningSimulator) -> None:
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        group.create_task(prefill(session, worker, "slow"))
        asked = group.create_task(prefilled(session, worker.url, "slow"))
    found = asked.result()
    assert isinstance(found, Prefilled)
    assert found.prompt_tokens == len(PROMPT)


async def test_a_worker_that_is_gone() -> None:
    async with await start(SimulatorSettings()) as gone:
        url = gone.url
    async with aiohttp.ClientSession() as session:
        assert await prefilled(session, url, "any") is None
        assert await prefilled(session, "", "any") is None
