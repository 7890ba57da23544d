"""Workers whose front end answers while their engine generates nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from prometheus_client import CollectorRegistry

from extproc.metrics.service import Metrics
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.engine_calls import EngineAnswer, EngineUnreachableError
from extproc.workers.generating_check import GeneratingCheck
from extproc.workers.registry import WorkerRegistry
from tests.builders import make_worker
from tests.fakes import FakeClock, FakeEngineClient

PATH = "/health_generate"
GOOD, BAD = EngineAnswer(200, b""), EngineAnswer(503, b"")
LATE = EngineUnreachableError("late")


class Case:
    def __init__(self) -> None:
        self.clock, self.client = FakeClock(), FakeEngineClient()
        self.registry = WorkerRegistry()
        self.worker = make_worker()
        self.registry.upsert(self.worker)
        self.prometheus = CollectorRegistry()
        self.check = GeneratingCheck(
            self.registry, self.client, self.clock, Metrics(self.prometheus)
        )
        self.check.seconds = 5.0

    def answers(self, answer: EngineAnswer | EngineUnreachableError) -> None:
        self.client.script(self.worker.url, PATH, answer)

    def allowed(self) -> bool:
        return self.worker.breaker.would_allow(self.clock.monotonic())


@asynccontextmanager
async def running() -> AsyncIterator[Case]:
    case = Case()
    task = asyncio.create_task(case.check.run())
    await case.clock.advance(0.0)
    try:
        yield case
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("bad", [BAD, LATE])
async def test_a_worker_that_fails_twice_is_avoided_until_it_passes(
    bad: EngineAnswer | EngineUnreachableError,
) -> None:
    async with running() as case:
        case.answers(bad)
        await case.clock.advance(5.0)
        assert case.allowed()
        for _ in range(10):
            await case.clock.advance(5.0)
            assert not case.allowed()
            # Requests from before are answered with headers at once.
            now = case.clock.monotonic()
            case.worker.breaker.success(now, now - 60.0)
            assert not case.allowed()
        case.answers(GOOD)
        await case.clock.advance(5.0)
        assert case.worker.breaker.state is BreakerState.CLOSED


async def test_one_late_answer_changes_nothing() -> None:
    async with running() as case:
        for answer in (LATE, GOOD, BAD, GOOD):
            case.answers(answer)
            await case.clock.advance(5.0)
            assert case.allowed()


async def test_engines_without_the_path_are_not_asked_again() -> None:
    async with running() as case:
        case.answers(EngineAnswer(404, b""))
        await case.clock.advance(60.0)
        assert case.client.asked(case.worker.url) == [PATH]
        assert case.allowed()


async def test_a_check_that_is_off_asks_no_worker_and_can_be_turned_on() -> None:
    async with running() as case:
        case.check.seconds = None
        await case.clock.advance(60.0)
        assert case.client.asked(case.worker.url) == []
        case.check.seconds = 5.0
        case.answers(GOOD)
        await case.clock.advance(10.0)
        assert case.client.asked(case.worker.url) != []


async def test_a_worker_that_left_is_forgotten() -> None:
    async with running() as case:
        case.answers(BAD)
        await case.clock.advance(30.0)
        case.registry.remove(case.worker.id)
        other = make_worker("http://10.0.0.2:8000")
        case.registry.upsert(other)
        case.client.script(other.url, PATH, GOOD)
        await case.clock.advance(5.0)
        assert set(case.check._failures) == set()
