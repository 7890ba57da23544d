"""vLLM is asked for its load: at a bounded rate, by rank, and old figures count no more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from extproc.engines.engine import EngineName
from extproc.routing import polled_load
from extproc.routing.polled_load import PolledLoad
from extproc.workers.engine_calls import EngineAnswer, EngineTimeoutError
from extproc.workers.vllm_answers import read_vllm_load
from tests.builders import Fleet, make_worker
from tests.fakes import FakeClock, FakeEngineClient

URLS = [f"http://10.0.0.{n}:8000" for n in range(1, 101)]
PAGE = """
vllm:num_requests_running{{engine="{engine}"}} {running}
vllm:num_requests_waiting{{engine="{engine}"}} 1.0
"""


class Setup:
    def __init__(self, workers: int, engine: EngineName = "vllm") -> None:
        self.fleet = Fleet(
            [make_worker(url, order=n, engine=engine) for n, url in enumerate(URLS[:workers])],
            policy="min_ttft",
        )
        self.clock = self.fleet.clock
        self.client = FakeEngineClient()
        for url in URLS[:workers]:
            self.tell(url, 3)
        self.polled = PolledLoad(
            self.fleet.registry,
            self.fleet.ranks,
            self.client,
            self.clock,
            self.fleet.random,
            self.fleet.metrics,
        )

    def tell(self, url: str, running: int, engine: int = 0) -> None:
        page = PAGE.format(engine=engine, running=running).encode()
        self.client.script(url, "/metrics", EngineAnswer(200, page))

    def requests(self, number: int = 0) -> int:
        return self.fleet.rank(number).load.requests(self.clock.monotonic())

    def polls(self, outcome: str) -> float:
        return self.fleet.metric("extproc_load_polls_total", outcome=outcome)


@asynccontextmanager
async def polling(setup: Setup) -> AsyncIterator[FakeClock]:
    task = asyncio.create_task(setup.polled.run())
    try:
        yield setup.clock
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await setup.fleet.close()


async def test_the_load_of_a_worker_is_that_of_its_last_answer() -> None:
    setup = Setup(1)
    async with polling(setup) as clock:
        await clock.advance(0.1)
        assert setup.requests() == 4
        setup.tell(URLS[0], 7)
        await clock.advance(1.5)
        assert setup.requests() == 8


async def test_a_server_of_one_rank_of_several_is_read_whatever_its_number() -> None:
    setup = Setup(1)
    setup.tell(URLS[0], 5, engine=3)
    async with polling(setup) as clock:
        await clock.advance(0.1)
        assert setup.requests() == 6


async def test_figures_that_are_old_count_no_more() -> None:
    setup = Setup(1)
    async with polling(setup) as clock:
        await clock.advance(0.1)
        setup.client.script(URLS[0], "/metrics", EngineTimeoutError("no answer in time"))
        await clock.advance(2.0)
        assert setup.requests() == 4
        await clock.advance(2.0)
        assert setup.requests() == 0
        assert setup.polls("failed") > 0


async def test_a_large_fleet_is_asked_at_most_twenty_times_a_second() -> None:
    setup = Setup(100)
    async with polling(setup) as clock:
        await clock.advance(10.0)
        asked = [len(setup.client.asked(url)) for url in URLS]
        assert 150 <= sum(asked) <= 201
        assert min(asked) >= 1


async def test_a_page_without_figures_is_asked_for_seldom() -> None:
    setup = Setup(1)
    setup.client.script(URLS[0], "/metrics", EngineAnswer(404, b""))
    async with polling(setup) as clock:
        await clock.advance(20.0)
        assert setup.client.asked(URLS[0]) == ["/metrics"]
        assert setup.polls("without_figures") == 1


async def test_an_answer_that_cannot_be_read_does_not_end_the_questions_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup = Setup(2)

    def read(page: bytes) -> Any:
        if page == b"bad":
            raise IndexError("a fault of the reader")
        return read_vllm_load(page)

    monkeypatch.setattr(polled_load, "read_vllm_load", read)
    setup.client.script(URLS[0], "/metrics", EngineAnswer(200, b"bad"))
    async with polling(setup) as clock:
        with capture_logs() as logs:
            await clock.advance(3.0)
        assert setup.requests(1) == 4
        assert setup.polls("failed") > 0
    assert logs[0]["event"] == "load_not_read"


async def test_other_engines_are_not_asked() -> None:
    setup = Setup(2, engine="sglang")
    async with polling(setup) as clock:
        await clock.advance(5.0)
        assert setup.client.calls == []


async def test_a_worker_that_left_is_not_asked_again() -> None:
    setup = Setup(2)
    async with polling(setup) as clock:
        await clock.advance(0.5)
        gone = setup.fleet.workers[0]
        setup.fleet.registry.remove(gone.id)
        await setup.fleet.ranks.left(gone)
        setup.client.calls.clear()
        await clock.advance(5.0)
        assert {url for url, _, _ in setup.client.calls} == {URLS[1]}
