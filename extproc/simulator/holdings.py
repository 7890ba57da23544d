"""The pages of one request in the cache of its rank, from the queue to the last token.

`Holding` is that of a worker like SGLang, `BlockHolding` that of one like vLLM.

A prompt's pages are held from the start of its prefill. Other requests find them when the
prefill ends, as in the engine. The prompts of a batch are prefilled together, so they share
only pages that were cached before.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Protocol

from extproc.simulator.block_cache import BlockCache, BlockRequest
from extproc.simulator.cache_events import Namespace, pages_of
from extproc.simulator.radix_cache import Lease, RadixCache
from extproc.simulator.time_model import reusable_tokens

__all__ = ["BlockHolding", "HeldPages", "Holding"]


class HeldPages(Protocol):
    """What a rank does with the pages of a request."""

    cached_tokens: int

    def tokens_found(self) -> int: ...

    def fits(self) -> bool:
        """True if the prefill can begin now, as far as memory is concerned."""
        ...

    def acquire(self, now: float) -> None: ...

    def insert(self, now: float) -> None: ...

    def decoded(self, produced: int, output_ids: Callable[[int], Sequence[int]]) -> bool:
        """A token more was produced; True if pages were stored for that."""
        ...

    def release(self, now: float, output: Sequence[int] | None) -> None: ...


class BlockHolding:
    """The blocks of one request's prompts, which are computed in one step.

    `cached_tokens` is known after `acquire`. Outputs are stored block by block.
    """

    def __init__(
        self,
        cache: BlockCache,
        prompts: Sequence[Sequence[int]],
        namespace: Namespace,
        *,
        reads_cache: bool = True,
    ) -> None:
        self.cached_tokens = 0
        self._cache = cache
        self._reads_cache = reads_cache
        self._in_step = False
        self._requests = [BlockRequest(cache, prompt, namespace) for prompt in prompts]

    def tokens_found(self) -> int:
        if not self._reads_cache:
            return 0
        return sum(len(one.found()[0]) for one in self._requests) * self._cache.block_size

    def fits(self) -> bool:
        needed = sum(one.missing(one.found()) for one in self._requests)
        return needed <= self._cache.pool.free

    def acquire(self, now: float) -> None:
        self._in_step = True
        self._cache.begin_step()
        for one in self._requests:
            one.begin(reads_cache=self._reads_cache)
        self.cached_tokens = sum(one.cached_tokens for one in self._requests)

    def insert(self, now: float) -> None:
        self._end_step()

    def decoded(self, produced: int, output_ids: Callable[[int], Sequence[int]]) -> bool:
        return sum(one.grow(produced, output_ids) for one in self._requests) > 0

    def release(self, now: float, output: Sequence[int] | None) -> None:
        self._end_step()
        for one in self._requests:
            one.end()

    def _end_step(self) -> None:
        if self._in_step:
            self._in_step = False
            self._cache.end_step()


class Holding:
    """The pages that one request holds; `cached_tokens` is known after `acquire`."""

    def __init__(
        self,
        cache: RadixCache,
        prompts: Sequence[Sequence[int]],
        namespace: Namespace,
        *,
        bigram: bool = False,
    ) -> None:
        self.cached_tokens = 0
        self._cache = cache
        self._prompts = prompts
        self._namespace = namespace
        self._bigram = bigram
        self._pages = [pages_of(prompt, cache.page_size, bigram=bigram) for prompt in prompts]
        self._leases: list[Lease] = []

    def tokens_found(self) -> int:
        """How many prompt tokens would be cached if the prefill began now."""
        found = (self._cache.match(pages, self._namespace).tokens for pages in self._pages)
        return self._reusable(found)

    def fits(self) -> bool:
        """True: pages that do not fit are not kept, and delay no request."""
        return True

    def decoded(self, produced: int, output_ids: Callable[[int], Sequence[int]]) -> bool:
        """False: an output is stored at its end."""
        return False

    def acquire(self, now: float) -> None:
        """Hold the cached pages; the prefill begins."""
        self._leases = [self._cache.acquire(pages, now, self._namespace) for pages in self._pages]
        self.cached_tokens = self._reusable(lease.cached.tokens for lease in self._leases)

    def insert(self, now: float) -> None:
        """Hold all pages of the prompts; the prefill has ended."""
        for lease, pages in zip(self._leases, self._pages, strict=True):
            self._cache.insert(lease, pages, now)

    def release(self, now: float, output: Sequence[int] | None) -> None:
        """Release the pages. The cache keeps prompts and output; with None only what it has."""
        held = zip(self._leases, self._prompts, self._pages, strict=bool(self._leases))
        for lease, prompt, pages in held:
            grown = None if output is None else self._grown(prompt, pages, output)
            self._cache.release(lease, now, grown)
        self._leases = []

    def _grown(
        self, prompt: Sequence[int], pages: list[tuple[object, ...]], output: Sequence[int]
    ) -> list[tuple[object, ...]]:
        size = self._cache.page_size
        rest = [*chain(prompt[len(pages) * size :], output)]
        return pages + pages_of(rest, size, bigram=self._bigram)

    def _reusable(self, found: Iterable[int]) -> int:
        size = self._cache.page_size
        return sum(
            reusable_tokens(tokens, len(prompt), size)
            for tokens, prompt in zip(found, self._prompts, strict=True)
        )
