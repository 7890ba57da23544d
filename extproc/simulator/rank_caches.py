"""The prefix cache of a rank: pages in a tree as in SGLang, or blocks as in vLLM."""

from typing import Protocol

from extproc.simulator.block_cache import BlockCache
from extproc.simulator.cache_events import CacheEvent
from extproc.simulator.generation import Job
from extproc.simulator.holdings import BlockHolding, HeldPages, Holding
from extproc.simulator.radix_cache import RadixCache
from extproc.simulator.settings import SimulatorSettings

__all__ = ["RankCache", "new_cache"]


class RankCache(Protocol):
    """A cache, and the pages that requests hold in it."""

    @property
    def used_tokens(self) -> int: ...

    @property
    def host_used_tokens(self) -> int: ...

    def usage(self) -> float:
        """The part that cannot be used for other requests, from 0 to 1."""
        ...

    def take_events(self) -> list[CacheEvent]: ...

    def flush(self) -> None: ...

    def holding(self, job: Job) -> HeldPages: ...


class _Pages(RadixCache):
    def __init__(self, settings: SimulatorSettings, *, record_events: bool) -> None:
        self._bigram = settings.caches_bigrams
        self._capacity_tokens = settings.max_total_num_tokens
        super().__init__(
            capacity_tokens=settings.max_total_num_tokens,
            page_size=settings.page_size,
            host_capacity_tokens=settings.host_cache_tokens,
            record_events=record_events,
        )

    def usage(self) -> float:
        return self.used_tokens / self._capacity_tokens

    def holding(self, job: Job) -> HeldPages:
        return Holding(self, job.prompts, job.namespace, bigram=self._bigram)


class _Blocks(BlockCache):
    def __init__(self, settings: SimulatorSettings, *, record_events: bool) -> None:
        super().__init__(
            blocks=settings.blocks,
            block_size=settings.page_size,
            window=settings.sliding_window,
            record_events=record_events,
        )

    def holding(self, job: Job) -> HeldPages:
        return BlockHolding(self, job.prompts, job.namespace, reads_cache=job.reads_cache)


def new_cache(settings: SimulatorSettings, *, record_events: bool) -> RankCache:
    """An empty cache as the engine of these settings has it."""
    kind = _Blocks if settings.is_vllm else _Pages
    return kind(settings, record_events=record_events)
