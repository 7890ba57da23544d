"""The pages of one request in the cache of its rank, from the queue to the last token.

A prompt's pages are held from the start of its prefill. Other requests find them when the
prefill ends, as in the engine. The prompts of a batch are prefilled together, so they share
only pages that were cached before.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

from extproc.simulator.cache_events import Namespace, pages_of
from extproc.simulator.radix_cache import Lease, RadixCache
from extproc.simulator.time_model import reusable_tokens

__all__ = ["Holding"]


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
