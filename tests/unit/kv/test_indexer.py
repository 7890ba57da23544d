"""Tests the indexer with real sockets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import numpy as np
import pytest

from extproc.clock import SystemClock
from extproc.kv.events import LoadStat
from extproc.kv.index import PrefixIndex
from extproc.kv.indexer import KvIndexer, RankSource
from extproc.kv.prefix_hash import PrefixHasher
from extproc.kv.rank_pages import RankPages
from extproc.kv.subscriptions.subscription import EventEndpoint, SubscriberSettings
from tests.unit.kv.publisher import Publisher
from tests.unit.kv.subscriptions.test_subscriber import until

_PAGE = 4
_WORKER = "http://w:1"


class KvEngine(Publisher):
    """Each batch stores the next page of one prompt."""

    def payload(self, seq: int) -> bytes:
        page = {
            "type": "BlockStored",
            "block_hashes": [seq + 1],
            "parent_block_hash": seq or None,
            "token_ids": list(range(seq * _PAGE, (seq + 1) * _PAGE)),
            "block_size": _PAGE,
        }
        return msgspec.msgpack.encode([float(self.name), [page], 0])


class Followers:
    """An indexer, and the load reports of the ranks it follows."""

    def __init__(self) -> None:
        self.loads: list[LoadStat] = []
        self.breaks = 0
        self.indexer = KvIndexer(SystemClock(), max_pages=100_000, settings=SubscriberSettings())

    def follow(
        self, engine: Publisher, load: Publisher | None = None, *, dp_rank: int = 0
    ) -> RankPages:
        endpoint = EventEndpoint(
            "127.0.0.1",
            engine.port,
            replay_port=engine.replay_port,
            load_port=load.port if load else None,
        )
        source = RankSource(worker=_WORKER, dp_rank=dp_rank, endpoint=endpoint, page_size=_PAGE)
        return self.indexer.follow(source, self.loads.append, self.count_break)

    def count_break(self) -> None:
        self.breaks += 1

    def held(self, pages: RankPages) -> int:
        """Number of pages that the rank holds from the start of the prompt."""
        found = self.indexer.index.match(np.arange(4000, dtype=np.uint64), [pages])
        return found[pages].pages if pages in found else 0


@contextlib.asynccontextmanager
async def following() -> AsyncIterator[Followers]:
    ranks = Followers()
    sweeping = asyncio.create_task(ranks.indexer.run())
    try:
        yield ranks
    finally:
        await ranks.indexer.close()
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)


async def test_a_rank_is_followed_and_trusted() -> None:
    async with KvEngine() as engine, following() as ranks:
        engine.publish(20)
        pages = ranks.follow(engine, dp_rank=2)
        assert (pages.worker, pages.dp_rank) == (_WORKER, 2)
        state = ranks.indexer.state(pages)
        assert state is not None
        assert (state.trusted, state.reason, state.pages) == (False, "connecting", 0)
        await until(lambda: pages.trusted)
        engine.publish(10)
        await until(lambda: ranks.held(pages) == 30)
        assert (pages.trusted, pages.reason, pages.generation) == (True, "complete", 0)
        state = ranks.indexer.states()[pages]
        assert (state.connected, state.trusted, state.reason) == (True, True, "complete")
        assert (state.pages, state.pages_by_tier, state.partial) == (30, (30, 0, 0), False)
        assert state.last_event_age_seconds is not None
        assert state.counts.stored_pages == [30, 0, 0]
        assert state.stream.replays == 1


async def test_the_pages_are_the_same_object_through_a_restart_and_of_a_new_generation() -> None:
    async with following() as ranks:
        async with KvEngine() as first:
            pages = ranks.follow(first)
            first.publish(5)
            await until(lambda: ranks.held(pages) == 5 and pages.trusted)
            assert pages.generation == 0
        await until(lambda: not pages.trusted)
        async with KvEngine(port=first.port, replay_port=first.replay_port) as second:
            second.publish(3)
            await until(lambda: pages.trusted)
            await until(lambda: ranks.held(pages) == 3)
        assert pages.generation == 1


async def test_a_rank_that_leaves_is_forgotten() -> None:
    async with KvEngine() as engine, following() as ranks:
        engine.publish(50)
        pages = ranks.follow(engine)
        other = ranks.follow(engine, dp_rank=1)
        await until(lambda: ranks.held(pages) == 50 and ranks.held(other) == 50)
        await ranks.indexer.unfollow(pages)
        await ranks.indexer.unfollow(pages)
        await ranks.indexer.unfollow(PrefixIndex(PrefixHasher(), 1).add("never followed", 4))
        assert ranks.indexer.state(pages) is None
        assert (pages.trusted, pages.reason, pages.generation) == (False, "unfollowed", 1)
        engine.publish(10)
        await until(lambda: ranks.held(other) == 60)
        assert ranks.held(pages) == 0
        await until(lambda: ranks.indexer.totals().retired_pages == 0)
        totals = ranks.indexer.totals()
        assert (totals.ranks, totals.trusted_ranks, totals.connected_ranks) == (1, 1, 1)
        # Its counts are kept.
        assert totals.events.stored_pages == [110, 0, 0]
        assert totals.streams.batches == 110
        assert (totals.pages, totals.estimated_bytes) == (60, 60 * 250)
        assert (totals.index.orphans, totals.index.mismatched, totals.index.over_limit) == (0, 0, 0)
        again = ranks.follow(engine)
        assert again is not pages
        await until(lambda: ranks.held(again) == 60)


async def test_a_rank_may_come_back_while_it_still_leaves() -> None:
    async with KvEngine() as engine, following() as ranks:
        engine.publish(50)
        first = ranks.follow(engine)
        await until(lambda: ranks.held(first) == 50)
        leaving = asyncio.create_task(ranks.indexer.unfollow(first))
        await asyncio.sleep(0)
        assert not first.trusted
        second = ranks.follow(engine)
        await leaving
        await until(lambda: ranks.held(second) == 50 and second.trusted)
        assert ranks.held(first) == 0
        assert not first.trusted


async def test_load_reports_reach_their_owner() -> None:
    class LoadEngine(Publisher):
        def payload(self, seq: int) -> bytes:
            return msgspec.msgpack.encode(["LoadStat", seq, 2, 3, 4, 0])

    async with KvEngine() as engine, LoadEngine(topic=b"load") as load, following() as ranks:
        ranks.follow(engine, load)
        await until(lambda: load.subscribed == 1)
        load.publish(3)
        await until(lambda: bool(ranks.loads))
        assert ranks.loads[-1] == LoadStat(2, 2, 3, 4, 0)


async def test_seeds_are_those_of_the_index() -> None:
    async with following() as ranks:
        seed = ranks.indexer.seed
        assert seed(None, None) == 0
        assert seed("tenant", None) == ranks.indexer.index.hasher.seed("tenant")
        assert seed("tenant", "a") == seed("tenant", "a") != seed("tenant", "b")


async def test_two_ranks_of_one_name_are_kept_apart() -> None:
    """While a pod is replaced, two workers have one URL."""
    async with KvEngine() as engine, following() as ranks:
        old, new = ranks.follow(engine), ranks.follow(engine)
        assert old is not new
        assert len(ranks.indexer.states()) == 2
        await ranks.indexer.unfollow(old)
        assert list(ranks.indexer.states()) == [new]


async def test_no_rank_is_followed_or_trusted_after_the_end() -> None:
    async with KvEngine() as engine, following() as ranks:
        pages = ranks.follow(engine)
        await until(lambda: pages.trusted)
        await ranks.indexer.close()
        assert not pages.trusted
        with pytest.raises(RuntimeError, match="closed"):
            ranks.follow(engine)
        assert list(ranks.indexer.states()) == [pages]
