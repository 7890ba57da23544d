"""The queue and the time model without sockets, on an event loop with a fake clock."""

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from extproc.simulator.engine import Engine, Job
from extproc.simulator.settings import SimulatorSettings

_tokens = itertools.count(step=1_000_000)


class FakeTimeLoop(asyncio.SelectorEventLoop):
    """Time passes only while everything sleeps, and then at once to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._now = max(self._now, self._scheduled[0]._when)
        super()._run_once()  # type: ignore[misc]

    _ready: Any
    _scheduled: Any


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=FakeTimeLoop) as runner:
        yield runner


def engine(**fields: Any) -> Engine:
    # 1000 tokens a second: one second for 1000 tokens of prompt; 10 ms a token.
    defaults = {"prefill_tokens_per_second": 1000.0, "decode_milliseconds_per_token": 10.0}
    return Engine(SimulatorSettings(**(defaults | fields)))


def job(rid: str = "r", prompt_tokens: int = 1000, max_tokens: int = 3, **fields: Any) -> Job:
    """A prompt that shares nothing with those of other jobs, unless `prompts` are given."""
    first = next(_tokens)
    defaults: dict[str, Any] = {"prompts": [range(first, first + prompt_tokens)]}
    return Job(rid=rid, max_tokens=max_tokens, **(defaults | fields))


async def token_times(engine: Engine, job: Job) -> list[float]:
    loop = asyncio.get_running_loop()
    with engine.submit(job) as generation:
        times = []
        while await generation.next_token():
            times.append(round(loop.time(), 6))
        return times


def together(runner: asyncio.Runner, engine: Engine, *jobs: Job) -> list[list[float]]:
    async def run() -> list[list[float]]:
        return await asyncio.gather(*(token_times(engine, job) for job in jobs))

    return runner.run(run())


def test_the_first_token_is_ready_after_the_prefill(runner: asyncio.Runner) -> None:
    assert together(runner, engine(), job()) == [[1.0, 1.01, 1.02]]


def test_prefills_go_one_after_the_other_and_decodes_together(runner: asyncio.Runner) -> None:
    times = together(runner, engine(), job(), job(), job(max_tokens=1, prompt_tokens=500))
    # 1 s, then another 1 s, then 0.5 s of prefill; decoding does not hold up a prefill.
    assert times == [[1.0, 1.01, 1.02], [2.0, 2.01, 2.02], [2.5]]


def test_requests_over_the_limit_wait_in_order(runner: asyncio.Runner) -> None:
    small = engine(max_running_requests=1)
    times = together(runner, small, job(), job(), job())
    # Each needs 1 s of prefill and 20 ms to its last token.
    assert [item[0] for item in times] == [1.0, 2.02, 3.04]
    assert small.most_running == 1


def test_a_late_consumer_does_not_slow_the_pace(runner: asyncio.Runner) -> None:
    async def run() -> float:
        with engine().submit(job(max_tokens=101)) as generation:
            await generation.next_token()
            await asyncio.sleep(0.5)  # 50 tokens fall due meanwhile
            while await generation.next_token():
                pass
        return asyncio.get_running_loop().time()

    assert runner.run(run()) == pytest.approx(2.0)


def test_a_request_may_have_its_own_pace(runner: asyncio.Runner) -> None:
    assert together(runner, engine(), job(seconds_per_token=0.5)) == [[1.0, 1.5, 2.0]]


def test_an_abort_in_prefill_frees_the_place_at_once(runner: asyncio.Runner) -> None:
    async def run() -> list[float]:
        busy = engine()
        first = asyncio.ensure_future(token_times(busy, job(prompt_tokens=10_000)))
        second = asyncio.ensure_future(token_times(busy, job()))
        await asyncio.sleep(0.25)
        first.cancel()
        return await second

    assert runner.run(run())[0] == 1.25


def test_an_abort_in_the_queue_removes_the_request(runner: asyncio.Runner) -> None:
    async def run() -> Engine:
        busy = engine(max_running_requests=1)
        tasks = [asyncio.ensure_future(token_times(busy, job())) for _ in range(3)]
        await asyncio.sleep(0.25)
        assert [(load.running, load.waiting) for load in busy.loads()] == [(1, 2)]
        tasks[1].cancel()
        await asyncio.sleep(0.25)
        assert [(load.running, load.waiting) for load in busy.loads()] == [(1, 1)]
        assert (await tasks[2])[0] == 2.02
        return busy

    assert runner.run(run()).is_idle


@pytest.mark.parametrize(("delay", "tokens"), [(0.5, 0), (1.005, 1)])
def test_an_abort_ends_the_output_at_once(
    runner: asyncio.Runner, delay: float, tokens: int
) -> None:
    async def run() -> tuple[int, str | None, float]:
        busy = engine()
        with busy.submit(job("a", seconds_per_token=100.0)) as generation:
            asyncio.get_running_loop().call_later(delay, busy.abort, "a")
            while await generation.next_token():
                pass
            return generation.produced, generation.finish_reason, asyncio.get_running_loop().time()

    assert runner.run(run()) == (tokens, "abort", delay)


def test_an_abort_reaches_the_queue_and_only_that_id(runner: asyncio.Runner) -> None:
    async def run() -> int:
        busy = engine(max_running_requests=1)
        tasks = [asyncio.ensure_future(token_times(busy, job(rid))) for rid in ("a", "b", "c")]
        await asyncio.sleep(0.25)
        ended = busy.abort("b")
        assert await tasks[1] == []
        assert asyncio.get_running_loop().time() == 0.25
        assert len(await tasks[2]) == 3
        return ended

    assert runner.run(run()) == 1


def test_the_end_is_natural_or_the_limit(runner: asyncio.Runner) -> None:
    async def reason(wanted: Job) -> str | None:
        with engine().submit(wanted) as generation:
            while await generation.next_token():
                pass
            return generation.finish_reason

    assert runner.run(reason(job())) == "length"
    assert runner.run(reason(job(natural_end=True))) == "stop"


def test_decoding_without_a_pause_still_lets_others_run(runner: asyncio.Runner) -> None:
    async def run() -> list[str]:
        order: list[str] = []
        instant = engine(decode_milliseconds_per_token=0.0)

        async def one(name: str) -> None:
            with instant.submit(job(name, prompt_tokens=0, max_tokens=20)) as generation:
                while await generation.next_token():
                    order.append(name)

        await asyncio.gather(one("a"), one("b"))
        return order

    order = runner.run(run())
    assert order.index("b") < 20  # not only when all of a's tokens are out


def test_load_counts_prompts_and_output(runner: asyncio.Runner) -> None:
    async def run() -> None:
        busy = engine(max_running_requests=1)
        with ExitStack() as stack:
            generation = stack.enter_context(busy.submit(job(prompt_tokens=100, sequences=2)))
            stack.enter_context(busy.submit(job(prompt_tokens=7)))
            await generation.next_token()
            (load,) = busy.loads()
            assert (load.running, load.waiting) == (1, 1)
            assert (load.used_tokens, load.waiting_tokens) == (100 + 2, 7)
            assert busy.tokens_generated == 2

    runner.run(run())


def test_ranks_have_queues_of_their_own(runner: asyncio.Runner) -> None:
    both = engine(dp_size=2)
    assert [item[0] for item in together(runner, both, job(), job())] == [1.0, 1.0]
    pinned = together(runner, both, job(rank=1), job(rank=1))
    assert pinned[1][0] - pinned[0][0] == pytest.approx(1.0)
    with pytest.raises(LookupError, match="rank 2"):
        both.submit(job(rank=2))


def test_what_is_cached_is_not_prefilled(runner: asyncio.Runner) -> None:
    busy = engine(page_size=100)
    again = job(prompts=[range(1000)], max_tokens=1)
    longer = job(prompts=[range(1500)], max_tokens=1)
    times = [together(runner, busy, item)[0][0] for item in (again, again, longer)]
    # 1 s; then only the last page, which has the prompt's last token: 0.1 s; then 500 tokens.
    assert times == [1.0, 1.1, 1.6]
    (load,) = busy.loads()
    assert (load.prefilled_tokens, load.prefill_microseconds) == (1600, 1_600_000)


def test_a_prompt_waiting_behind_its_own_prefix_profits_from_it(runner: asyncio.Runner) -> None:
    busy = engine(page_size=100)
    item = job(prompts=[range(1000)], max_tokens=1)
    assert together(runner, busy, item, item) == [[1.0], [1.1]]


def test_the_output_is_cached_for_the_next_turn(runner: asyncio.Runner) -> None:
    busy = engine(page_size=10)
    together(runner, busy, job(prompts=[range(1000, 1100)], max_tokens=20))
    turn = [*range(1000, 1100), *range(20), *range(50, 60)]  # prompt, output, a new message
    assert together(runner, busy, job(prompts=[turn], max_tokens=1))[0][0] == pytest.approx(0.3)


def test_an_abort_in_prefill_caches_no_pages(runner: asyncio.Runner) -> None:
    async def run() -> int:
        busy = engine(page_size=100)
        item = job(prompts=[range(1000)])
        task = asyncio.ensure_future(token_times(busy, item))
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.wait([task])
        with busy.submit(item) as generation:
            await generation.prefill()
            return generation.holding.cached_tokens

    assert runner.run(run()) == 0


def test_a_cache_in_use_is_not_flushed(runner: asyncio.Runner) -> None:
    async def run() -> tuple[bool, bool]:
        busy = engine()
        with busy.submit(job()):
            refused = busy.flush_cache()
        return refused, busy.flush_cache()

    assert runner.run(run()) == (False, True)
