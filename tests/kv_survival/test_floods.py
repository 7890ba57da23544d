"""Tests publishers that are faster than the indexer can read."""

import asyncio
from pathlib import Path

import pytest

from tests.kv_survival.rig import EngineProcess, Truth, Watched, until, watching

# Memory that a flood may take for a while: queues, and batches in the reorder buffer.
_MEMORY_BYTES = 256 << 20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(
    ("queue", "buffered"),
    [(100_000, 10_000), (1000, 10_000), (1000, 100)],
    ids=["kept", "lost and replayed", "lost for good"],
)
async def test_after_a_flood_the_pages_are_right(queue: int, buffered: int) -> None:
    async with (
        await EngineProcess.start(queue=queue, buffered=buffered) as engine,
        watching(engine) as watched,
    ):
        await until(lambda: watched.state.trusted)
        before = _resident_bytes()
        turns = 0
        await engine.do("flood", on=True)
        # These are the turns in which requests would be served.
        while watched.state.stream.batches < 10_000 and turns < 10_000:
            await asyncio.sleep(0.001)
            watched.pages()
            turns += 1
        await engine.do("flood", on=False)
        assert turns > 20
        await _settled(watched, await engine.truth())
        assert _resident_bytes() - before < _MEMORY_BYTES
        await engine.do("publish", batches=1500)
        await _settled(watched, await engine.truth())
        assert sum(watched.pages()) > 0


async def _settled(watched: Watched, truth: Truth) -> None:
    """A gap that no replay fills leaves fewer pages than the engine has, never more."""
    await until(
        lambda: (
            watched.state.trusted
            and (watched.is_right(truth) or watched.state.partial)
            and watched.claims_nothing_untrue(truth)
        ),
        120,
    )


async def test_a_flood_on_one_rank_leaves_the_others_current() -> None:
    async with (
        await EngineProcess.start() as quiet,
        await EngineProcess.start() as loud,
        watching(loud) as flooded,
    ):
        watched = Watched(flooded.indexer, "http://quiet:1")
        watched.follow(quiet)
        await until(lambda: flooded.state.trusted and watched.state.trusted)
        await loud.do("flood", on=True)
        for _ in range(5):
            await quiet.do("publish", batches=20)
            await watched.becomes_right(quiet)
        await loud.do("flood", on=False)
