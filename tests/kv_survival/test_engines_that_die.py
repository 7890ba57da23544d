"""Tests engines that are killed with -9 and started again at the same port, during traffic."""

import asyncio

import pytest

from tests.kv_survival.rig import EngineProcess, Watched, until, watching


async def _reconnected(watched: Watched, engine: EngineProcess) -> None:
    """Wait until the indexer is connected to the new process of the engine."""
    await engine.seen("subscribed")
    await until(lambda: watched.state.connected)


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 0), (1, 1), (1, 3), (1, 400), (300, 0), (300, 1), (300, 299), (300, 300), (300, 2000)],
)
async def test_another_process_at_the_same_port_is_followed_from_scratch(
    before: int, after: int
) -> None:
    """With many new batches the numbers look like progress, with one like a repetition."""
    first = await EngineProcess.start()
    async with first, watching(first) as watched:
        await first.do("publish", batches=before)
        await watched.becomes_right(first)
        assert watched.breaks <= 1  # until the first connection was made
        before_death = watched.breaks
        await first.kill()
        async with await first.successor() as second:
            await second.do("publish", batches=after)
            await watched.becomes_right(second)
            await second.do("publish", batches=20)
            await watched.becomes_right(second)
            assert watched.state.stream.restarts == 1
            assert watched.breaks > before_death


async def test_an_engine_may_be_killed_again_and_again_during_traffic() -> None:
    engine = await EngineProcess.start()
    async with watching(engine) as watched:
        for _ in range(3):
            await engine.do("traffic", per_second=1000)
            await until(lambda: watched.state.trusted)
            await asyncio.sleep(0.1)
            await engine.kill()
            await until(lambda: not watched.state.trusted)
            assert watched.pages() == [0] * len(watched.pages())
            engine = await engine.successor()
        async with engine:
            await engine.do("publish", batches=20)
            await watched.becomes_right(engine)


async def test_an_engine_may_be_killed_while_it_answers_a_replay() -> None:
    first = await EngineProcess.start()
    async with first, watching(first) as watched:
        await first.do("publish", batches=8000)
        await until(lambda: watched.state.stream.batches > 0)
        await first.kill()
        async with await first.successor() as second:
            await second.do("publish", batches=50)
            await watched.becomes_right(second)


@pytest.mark.parametrize("before", [1, 200])
async def test_without_a_replay_no_page_of_the_dead_engine_stays(before: int) -> None:
    first = await EngineProcess.start()
    async with first, watching(first, replay=False) as watched:
        await _reconnected(watched, first)
        await first.do("publish", batches=before)
        truth = await first.truth()
        await until(lambda: watched.pages() == truth.pages)
        await first.kill()
        async with await first.successor() as second:
            # These batches may be published before the connection is there.
            await second.do("publish", batches=before + 5)
            await _reconnected(watched, second)
            # Enough batches to store all prompts again.
            await second.do("publish", batches=500)
            truth = await second.truth()
            await until(lambda: watched.state.trusted and sum(watched.pages()) > 0)
            await until(lambda: watched.claims_nothing_untrue(truth))
            assert watched.state.partial


async def test_an_engine_that_never_comes_back_is_not_trusted() -> None:
    first = await EngineProcess.start()
    async with first, watching(first) as watched:
        await first.do("publish", batches=50)
        await watched.becomes_right(first)
        await first.kill()
        await until(lambda: not watched.state.trusted)
        assert watched.state.reason == "disconnected"
        assert not watched.rank_pages.trusted
