"""An engine process under a test's control, and an indexer to compare with its pages."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import numpy as np
from msgspec import Struct

from extproc.clock import SystemClock
from extproc.kv.events import LoadStat
from extproc.kv.indexer import KvIndexer, RankSource, RankState
from extproc.kv.rank_pages import RankPages
from extproc.kv.subscriptions.subscription import EventEndpoint, SubscriberSettings
from tests.kv_survival.prompts import PAGE, PROMPT_PAGES, PROMPTS, page_tokens

__all__ = ["EngineProcess", "Truth", "Watched", "until", "watching"]

_TOKENS = [
    np.array([t for n in range(PROMPT_PAGES) for t in page_tokens(prompt, n)], np.uint64)
    for prompt in range(PROMPTS)
]


DEFAULTS = SubscriberSettings()


class Truth(Struct):
    """The pages that the engine holds: of each prompt, and in total."""

    seq: int
    pages: list[int]
    held: int
    subscribed: int
    requests: int


class EngineProcess:
    """A process of `tests.kv_survival.engine`, which documents the commands."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.port = 0
        self.replay_port = 0

    @classmethod
    async def start(cls, **options: Any) -> Self:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.kv_survival.engine", json.dumps(options)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        engine = cls(process)
        engine.port, engine.replay_port = await engine.do("ports")
        return engine

    async def successor(self, **options: Any) -> "EngineProcess":
        """Another process at the same ports; this one must be dead."""
        return await EngineProcess.start(port=self.port, replay_port=self.replay_port, **options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def do(self, command: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
        line = await asyncio.wait_for(self._process.stdout.readline(), 60)
        return json.loads(line)

    async def truth(self) -> Truth:
        return Truth(**await self.do("truth"))

    async def seen(self, what: str) -> None:
        """Wait until the engine counts a subscription (`subscribed`) or a request (`requests`)."""
        for _ in range(1500):
            if getattr(await self.truth(), what):
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"no {what} came")

    async def kill(self) -> None:
        """Kill with signal 9; returns when the process is dead."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        # The event loop closes its pipes on the next turn.
        await asyncio.sleep(0)


class Watched:
    """An indexer that follows one rank, and the rank's load reports."""

    def __init__(self, indexer: KvIndexer, worker: str = "http://worker:1") -> None:
        self.indexer = indexer
        self.worker = worker
        self._rank_pages: RankPages | None = None
        self.loads: list[LoadStat] = []
        # How often the engine may have been replaced by another process.
        self.breaks = 0

    def follow(self, engine: EngineProcess, *, replay: bool = True) -> None:
        endpoint = EventEndpoint(
            "127.0.0.1", engine.port, replay_port=engine.replay_port if replay else None
        )
        source = RankSource(worker=self.worker, dp_rank=0, endpoint=endpoint, page_size=PAGE)
        self._rank_pages = self.indexer.follow(source, self.loads.append, self.count_break)

    def count_break(self) -> None:
        self.breaks += 1

    @property
    def rank_pages(self) -> RankPages:
        assert self._rank_pages is not None
        return self._rank_pages

    @property
    def state(self) -> RankState:
        state = self.indexer.state(self.rank_pages)
        assert state is not None
        return state

    def pages(self) -> list[int]:
        """The pages that routing would find of each prompt; 0 if the rank is not trusted."""
        pages = self.rank_pages
        if not pages.trusted:
            return [0] * PROMPTS
        found = [self.indexer.index.match(tokens, [pages]).get(pages) for tokens in _TOKENS]
        return [overlap.pages if overlap else 0 for overlap in found]

    def is_right(self, truth: Truth) -> bool:
        """Whether the pages are trusted, complete, and exactly those of the engine."""
        state = self.state
        return (
            state.trusted
            and not state.partial
            and state.pages == truth.held
            and self.pages() == truth.pages
        )

    async def becomes_right(self, engine: EngineProcess, seconds: float = 60.0) -> Truth:
        """Wait until all published batches are applied; the engine must not publish meanwhile."""
        truth = await engine.truth()
        await until(lambda: self.is_right(truth), seconds)
        return truth

    def claims_nothing_untrue(self, truth: Truth) -> bool:
        return all(claimed <= held for claimed, held in zip(self.pages(), truth.pages, strict=True))


@contextlib.asynccontextmanager
async def watching(
    engine: EngineProcess,
    *,
    replay: bool = True,
    settings: SubscriberSettings = DEFAULTS,
) -> AsyncIterator[Watched]:
    indexer = KvIndexer(SystemClock(), max_pages=1_000_000, settings=settings)
    sweeping = asyncio.create_task(indexer.run())
    watched = Watched(indexer)
    try:
        watched.follow(engine, replay=replay)
        yield watched
    finally:
        await asyncio.wait_for(indexer.close(), 60)
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for a condition; the time-out allows for a busy machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come true"
        await asyncio.sleep(0.01)
