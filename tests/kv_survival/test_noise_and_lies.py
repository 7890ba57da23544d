"""Tests publishers that send invalid messages and false events."""

from typing import Any

import pytest

from tests.kv_survival.prompts import PAGE
from tests.kv_survival.rig import EngineProcess, Truth, Watched, until, watching


def _stored(**fields: Any) -> dict[str, Any]:
    event = {
        "type": "BlockStored",
        "block_hashes": [1, 2],
        "parent_block_hash": None,
        "token_ids": list(range(2 * PAGE)),
        "block_size": PAGE,
    }
    return event | fields


def _removed(*hashes: int) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes)}


_LIES = {
    "tokens missing": [_stored(token_ids=[1, 2, 3])],
    "too many tokens": [_stored(token_ids=list(range(3 * PAGE)))],
    "no tokens": [_stored(token_ids=[])],
    "never stored": [_removed(*range(1, 1000))],
    "unknown parent": [_stored(parent_block_hash=77)],
    "its own parent": [_stored(block_hashes=[5], parent_block_hash=5, token_ids=[0] * PAGE)],
    "pairs among tokens": [_stored(token_ids=[[n, n + 1] for n in range(2 * PAGE)])],
    "unknown kinds": [{"type": "BlockRenamed"}, ["BlockPinned", 1]],
    "negative tokens": [_stored(token_ids=[-1] * 2 * PAGE)],
    "pages without size": [_stored(block_size=0)],
    "nothing": [],
}


@pytest.mark.parametrize("name", _LIES)
async def test_a_false_event_does_not_change_other_pages(name: str) -> None:
    async with await EngineProcess.start() as engine, watching(engine) as watched:
        await engine.do("publish", batches=50)
        await engine.do("tell", events=_LIES[name])
        await engine.do("publish", batches=50)
        await watched.becomes_right(engine)
        assert watched.state.stream.clears == 0
        totals = watched.indexer.totals()
        seen = {
            "tokens missing": totals.index.mismatched,
            "too many tokens": totals.index.mismatched,
            "no tokens": totals.index.mismatched,
            "never stored": totals.index.unknown_removals,
            "unknown parent": totals.index.orphans,
            "its own parent": totals.index.orphans,
            "pairs among tokens": totals.events.foreign_unit_pages,
            "unknown kinds": totals.events.skipped_events,
            "negative tokens": totals.events.skipped_events,
            "pages without size": totals.events.skipped_events,
            "nothing": 1,
        }
        assert seen[name] > 0


async def test_a_false_removal_only_removes_its_page() -> None:
    async with await EngineProcess.start() as engine, watching(engine) as watched:
        await engine.do("publish", batches=100)
        await engine.do("tell", events=[_removed(await engine.do("known"))])
        await engine.do("publish", batches=50)
        truth = await engine.truth()
        await until(lambda: watched.state.trusted and watched.state.stream.batches == truth.seq)
        assert watched.claims_nothing_untrue(truth)
        assert sum(watched.pages()) > 0


async def test_a_cleared_cache_is_followed() -> None:
    async with await EngineProcess.start() as engine, watching(engine) as watched:
        await engine.do("publish", batches=100)
        await engine.do("tell", events=[{"type": "AllBlocksCleared"}])
        # The event may come out of a replay; the rank is trusted when the replay has ended.
        await until(lambda: watched.state.trusted and watched.state.counts.cleared_events == 1)
        assert watched.state.pages == 0


@pytest.mark.parametrize("size", [0, 1, 10_000])
async def test_a_batch_of_random_bytes_is_requested_once_more(size: int) -> None:
    async with await EngineProcess.start() as engine, watching(engine) as watched:
        await engine.do("publish", batches=50)
        await watched.becomes_right(engine)
        await engine.do("payload", size=size, buffered=False)
        truth = await engine.truth()
        await until(lambda: watched.is_right(truth) and truth.seq == 51)
        assert watched.state.stream.clears == 0
        assert watched.state.counts.unreadable_batches == 1


async def test_an_engine_that_goes_on_sending_random_bytes_is_survived() -> None:
    """Its removals are unknown, so all pages before it are void; later pages count."""
    async with await EngineProcess.start() as engine, watching(engine) as watched:
        await engine.do("publish", batches=50)
        await watched.becomes_right(engine)
        for number in (1, 2, 3):
            await engine.do("payload", size=10_000, buffered=True)
            await engine.do("publish", batches=200)
            truth = await engine.truth()
            await _applied_again(watched, truth, clears=number)
        assert watched.state.partial


async def _applied_again(watched: Watched, truth: Truth, clears: int) -> None:
    await until(lambda: watched.state.stream.clears == clears and watched.state.trusted)
    await until(lambda: watched.claims_nothing_untrue(truth) and sum(watched.pages()) > 0)


_FRAMES = {
    "one": [10_000],
    "as number": [0, 10_000, 8],
    "random number": [0, 8, 100],
    "as topic": [10_000, 8, 8],
    "two": [0, 8],
    "many": [0] * 200,
    "none": [0],
}


@pytest.mark.parametrize("name", _FRAMES)
async def test_messages_of_random_bytes_change_no_page(name: str) -> None:
    async with await EngineProcess.start() as engine, watching(engine) as watched:
        await engine.do("publish", batches=50)
        await watched.becomes_right(engine)
        await engine.do("frames", sizes=_FRAMES[name])
        await engine.do("publish", batches=50)
        await watched.becomes_right(engine)


async def test_a_message_of_64_megabytes_is_refused() -> None:
    async with await EngineProcess.start() as engine, watching(engine) as watched:
        await engine.do("publish", batches=50)
        await watched.becomes_right(engine)
        await engine.do("frames", sizes=[0, 8, 64 << 20])
        await until(lambda: not watched.state.connected)
        await engine.do("publish", batches=50)
        await watched.becomes_right(engine)
