"""The picture that routing reads, with real sockets below it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Hashable

import msgspec
import numpy as np
import pytest

from extproc.clock import SystemClock
from extproc.kv.indexer import KvIndexer, RankSource
from extproc.kv.rank_pages import RankPages
from extproc.kv.subscriptions.subscriber import EventEndpoint
from extproc.kv.wire import LoadStat
from tests.unit.kv.publisher import Publisher
from tests.unit.kv.subscriptions.test_subscriber import until

_PAGE = 4


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


class Told:
    """A picture and everything it said."""

    def __init__(self) -> None:
        self.clears: list[Hashable] = []
        self.trust: list[tuple[Hashable, bool]] = []
        self.loads: list[LoadStat] = []
        self.picture = KvIndexer(
            SystemClock(),
            max_pages=100_000,
            on_clear=self.clears.append,
            on_trust=lambda key, trusted: self.trust.append((key, trusted)),
        )

    def follow(self, key: Hashable, engine: Publisher, load: Publisher | None = None) -> RankPages:
        endpoint = EventEndpoint(
            "127.0.0.1",
            engine.port,
            replay_port=engine.replay_port,
            load_port=load.port if load else None,
        )
        source = RankSource(endpoint=endpoint, page_size=_PAGE)
        return self.picture.follow(key, source, self.loads.append)

    def pages(self, holder: RankPages) -> int:
        found = self.picture.index.match(np.arange(4000, dtype=np.uint64), [holder])
        return found[holder].pages if holder in found else 0


@contextlib.asynccontextmanager
async def telling() -> AsyncIterator[Told]:
    told = Told()
    sweeping = asyncio.create_task(told.picture.run())
    try:
        yield told
    finally:
        await told.picture.close()
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)


async def test_a_rank_is_followed_and_believed() -> None:
    async with KvEngine() as engine, telling() as told:
        engine.publish(20)
        holder = told.follow("w/0", engine)
        assert told.picture.trusted_holder("w/0") is None
        state = told.picture.state("w/0")
        assert state is not None
        assert (state.trusted, state.reason, state.pages) == (False, "connecting", 0)
        await until(lambda: told.picture.trusted_holder("w/0") is holder)
        engine.publish(10)
        await until(lambda: told.pages(holder) == 30)
        assert (told.trust, told.clears) == ([("w/0", True)], [])
        state = told.picture.states()["w/0"]
        assert (state.connected, state.trusted, state.reason) == (True, True, "complete")
        assert (state.pages, state.pages_by_tier, state.partial) == (30, (30, 0, 0), False)
        assert state.last_event_age_seconds is not None
        assert state.counts.stored_pages == [30, 0, 0]
        assert state.stream.replays == 1


async def test_the_holder_stays_the_same_through_a_restart() -> None:
    async with telling() as told:
        async with KvEngine() as first:
            holder = told.follow("w/0", first)
            first.publish(5)
            await until(lambda: told.pages(holder) == 5)
        await until(lambda: told.picture.trusted_holder("w/0") is None)
        async with KvEngine(port=first.port, replay_port=first.replay_port) as second:
            second.publish(3)
            await until(lambda: told.picture.trusted_holder("w/0") is holder)
            await until(lambda: told.pages(holder) == 3)
        assert told.clears == ["w/0"]
        assert told.trust[:3] == [("w/0", True), ("w/0", False), ("w/0", True)]


async def test_a_rank_that_leaves_is_forgotten() -> None:
    async with KvEngine() as engine, telling() as told:
        engine.publish(50)
        holder = told.follow("w/0", engine)
        other = told.follow("w/1", engine)
        await until(lambda: told.pages(holder) == 50 and told.pages(other) == 50)
        await told.picture.unfollow("w/0")
        await told.picture.unfollow("w/0")
        await told.picture.unfollow("never followed")
        assert told.picture.state("w/0") is None
        assert told.picture.trusted_holder("w/0") is None
        engine.publish(10)
        await until(lambda: told.pages(other) == 60)
        assert told.pages(holder) == 0
        await until(lambda: told.picture.totals().retired_pages == 0)
        totals = told.picture.totals()
        assert (totals.ranks, totals.trusted_ranks, totals.connected_ranks) == (1, 1, 1)
        # What it did is not forgotten.
        assert totals.events.stored_pages == [110, 0, 0]
        assert totals.streams.batches == 110
        assert (totals.pages, totals.estimated_bytes) == (60, 60 * 250)
        assert totals.index.stored == 110
        again = told.follow("w/0", engine)
        assert again is not holder
        await until(lambda: told.pages(again) == 60)


async def test_a_rank_may_come_back_while_it_still_leaves() -> None:
    async with KvEngine() as engine, telling() as told:
        engine.publish(50)
        first = told.follow("w/0", engine)
        await until(lambda: told.pages(first) == 50)
        leaving = asyncio.create_task(told.picture.unfollow("w/0"))
        await asyncio.sleep(0)
        second = told.follow("w/0", engine)
        await leaving
        await until(lambda: told.pages(second) == 50)
        assert told.pages(first) == 0
        assert told.picture.trusted_holder("w/0") is second


async def test_load_reports_reach_their_owner() -> None:
    class LoadEngine(Publisher):
        def payload(self, seq: int) -> bytes:
            return msgspec.msgpack.encode(["LoadStat", seq, 2, 3, 4, 0])

    async with KvEngine() as engine, LoadEngine(topic=b"load") as load, telling() as told:
        told.follow("w/0", engine, load)
        await until(lambda: load.subscribed == 1)
        load.publish(3)
        await until(lambda: bool(told.loads))
        assert told.loads[-1] == LoadStat(2, 2, 3, 4, 0)


async def test_seeds_are_those_of_the_index() -> None:
    async with telling() as told:
        seed = told.picture.seed
        assert seed(None, None) == 0
        assert seed("tenant", None) == told.picture.index.hasher.seed("tenant")
        assert seed("tenant", "a") == seed("tenant", "a") != seed("tenant", "b")


async def test_a_rank_is_followed_once_and_not_after_the_end() -> None:
    async with KvEngine() as engine, telling() as told:
        told.follow("w/0", engine)
        with pytest.raises(ValueError, match="already followed"):
            told.follow("w/0", engine)
        await told.picture.close()
        assert told.picture.trusted_holder("w/0") is None
        with pytest.raises(RuntimeError, match="closed"):
            told.follow("w/1", engine)
        assert told.picture.state("w/1") is None
