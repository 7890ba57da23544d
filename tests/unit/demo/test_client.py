"""Clients of the demo against a simulated worker."""

import time
from pathlib import Path

import aiohttp
import pytest

from extproc.demo.client import hold_conversations
from extproc.demo.figures import Outcome
from extproc.demo.tiny_model import write_model_folder
from extproc.demo.workload import Conversation, Turn
from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings

SYSTEM = "sea " * 40


def worker(**fields: object) -> SimulatorSettings:
    defaults = {"page_size": 1, "decode_milliseconds_per_token": 0.0, "model": "m"}
    return SimulatorSettings(**(defaults | fields))  # type: ignore[arg-type]


def conversation(*due: float, system: str = SYSTEM) -> Conversation:
    return Conversation(0, system, [Turn(at, "tell the story", 4) for at in due])


async def held(url: str, *planned: Conversation) -> list[Outcome]:
    outcomes: list[Outcome] = []
    await hold_conversations(url, "m", planned, outcomes.append)
    return outcomes


async def test_a_turn_repeats_all_earlier_messages(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    async with await start(worker(tokenizer_path=str(folder))) as simulator:
        first, second = await held(simulator.url, conversation(0, 0))
    assert first.good
    assert second.good
    assert first.worker == second.worker == str(simulator.port)
    assert first.cached_tokens == 0
    # The first turn whole, and the four tokens of its answer.
    assert second.cached_tokens == first.prompt_tokens + 4
    assert second.prompt_tokens > second.cached_tokens


async def test_ttft_is_the_time_to_the_first_token() -> None:
    settings = worker(prefill_tokens_per_second=1000.0, decode_milliseconds_per_token=100.0)
    async with await start(settings) as simulator:
        began = time.monotonic()
        (only,) = await held(simulator.url, conversation(0, system="x" * 100))
        took = time.monotonic() - began
    assert only.ttft_seconds >= only.prompt_tokens / 1000
    # Three more tokens come after it, each due at a time of its own.
    assert took >= only.prompt_tokens / 1000 + 0.3
    assert only.ttft_seconds < took


async def test_turns_wait_until_they_are_due() -> None:
    async with await start(worker()) as simulator:
        began = time.monotonic()
        outcomes = await held(simulator.url, conversation(0, 0.2), conversation(0.1))
        assert time.monotonic() - began >= 0.2
    assert [outcome.good for outcome in outcomes] == [True] * 3


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"die_before_headers": True}, {"die_after_tokens": 2}]
)
async def test_a_conversation_ends_with_a_failed_turn(fault: dict[str, object]) -> None:
    async with await start(worker()) as simulator:
        async with (
            aiohttp.ClientSession(simulator.url) as session,
            session.post("/simulator/faults", json=fault | {"count": 1}) as response,
        ):
            assert response.status == 200
        outcomes = await held(simulator.url, conversation(0, 0, 0), conversation(0.3))
    assert [outcome.good for outcome in outcomes] == [False, True]


async def test_a_service_that_is_gone() -> None:
    async with await start(worker()) as simulator:
        url = simulator.url
    (only,) = await held(url, conversation(0, 0))
    assert (only.good, only.worker) == (False, "")
