"""Tests gaps in the events, with replays that can fill them and without."""

import asyncio

import pytest

from extproc.kv.subscriptions.subscription import SubscriberSettings
from tests.kv_survival.rig import EngineProcess, until, watching

_IMPATIENT = SubscriberSettings(replay_timeout_seconds=0.3, replay_cool_down_seconds=0.5)


async def test_a_late_subscription_gets_the_earlier_pages() -> None:
    async with await EngineProcess.start() as engine:
        await engine.do("publish", batches=3000)
        truth = await engine.truth()
        async with watching(engine) as watched:
            await until(lambda: watched.is_right(truth))
            assert watched.state.stream.replays == 1


async def test_a_subscription_may_start_during_traffic() -> None:
    async with await EngineProcess.start() as engine:
        await engine.do("publish", batches=2000)
        await engine.do("traffic", per_second=2000)
        async with watching(engine) as watched:
            await until(lambda: watched.state.trusted)
            await engine.do("traffic", per_second=0)
            truth = await watched.becomes_right(engine)
            assert watched.state.stream.batches == truth.seq


async def test_pages_whose_batches_are_no_longer_buffered_are_left_out() -> None:
    async with await EngineProcess.start(buffered=30) as engine:
        await engine.do("publish", batches=500)
        async with watching(engine) as watched:
            await until(lambda: watched.state.trusted)
            await engine.do("publish", batches=300)
            truth = await engine.truth()
            await until(lambda: watched.state.trusted and watched.state.stream.batches == 330)
            assert watched.claims_nothing_untrue(truth)
            assert watched.state.partial
            assert sum(watched.pages()) > 0


async def test_a_gap_is_filled() -> None:
    async with await EngineProcess.start() as engine, watching(engine) as watched:
        await engine.do("publish", batches=200)
        await until(lambda: watched.state.stream.batches == 200)
        for lost in (1, 7, 100):
            await engine.do("publish", batches=lost, lost=True)
            await engine.do("publish", batches=3)
            await watched.becomes_right(engine)
        assert watched.state.stream.gaps == 3
        assert watched.state.stream.clears == 0


@pytest.mark.parametrize("replay", [True, False], ids=["out of the buffer", "no replay"])
async def test_a_gap_that_cannot_be_filled_leaves_no_stale_page(replay: bool) -> None:
    async with await EngineProcess.start() as engine, watching(engine, replay=replay) as watched:
        await engine.seen("subscribed")
        await until(lambda: watched.state.trusted)
        for _ in range(5):
            await engine.do("publish", batches=100)
            await engine.do("publish", batches=60, lost=True, buffered=False)
            await engine.do("publish", batches=30)
        truth = await engine.truth()
        await until(lambda: watched.state.stream.clears == 5)
        await until(lambda: watched.state.stream.batches == 5 * 130)
        await until(lambda: watched.state.trusted)
        assert watched.claims_nothing_untrue(truth)
        assert watched.state.partial


@pytest.mark.parametrize("how", ["silent", "trickle", "elsewhere"])
async def test_a_replay_without_answer_leaves_the_live_batches(how: str) -> None:
    async with await EngineProcess.start(replay=how) as engine:
        await engine.do("publish", batches=100)
        async with watching(engine, settings=_IMPATIENT) as watched:
            await engine.seen("requests")
            await engine.do("publish", batches=300)
            truth = await engine.truth()
            await until(lambda: watched.state.trusted and watched.state.stream.batches == 300)
            assert watched.claims_nothing_untrue(truth)
            assert sum(watched.pages()) > 0
            # A later replay may bring it.
            await engine.do("replays", how="answer")
            if how != "elsewhere":
                await until(lambda: watched.is_right(truth))


async def test_a_worker_may_leave_while_its_replay_runs() -> None:
    async with await EngineProcess.start() as engine:
        await engine.do("publish", batches=9000)
        async with watching(engine) as watched:
            index = watched.indexer.index
            await until(lambda: watched.state.stream.batches > 10)
            pages = watched.rank_pages
            assert watched.state.stream.batches < 9000
            leaving = asyncio.create_task(watched.indexer.unfollow(pages))
            await asyncio.sleep(0)
            # At once, before the sockets are closed.
            assert not pages.trusted
            await leaving
            await watched.indexer.unfollow(pages)
            assert index.page_count == 0
            await engine.do("publish", batches=50)
            assert index.page_count == 0
            await until(lambda: index.retired_pages == 0)
            # It may be followed again.
            watched.follow(engine)
            assert watched.rank_pages is not pages
            await watched.becomes_right(engine)
