"""The engine's queue and time model, without sockets.

A rank has a FIFO queue and a prefix cache, prefills one prompt at a time, in the time that
`TimeModel` gives for what the cache lacks, and decodes up to `max_running_requests` sequences
at once. A full cache delays nobody: what finds no room is only not kept.

Every moment is an absolute deadline on the event loop's clock: a prefill starts where the
previous one ended, and token n is due at the first token's time plus n steps, so a busy
event loop delays tokens but never makes the worker slower than it was told to be.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Literal, Protocol, Self

import msgspec

from extproc.simulator.cache_events import DEFAULT_NAMESPACE, CacheEvent, Namespace
from extproc.simulator.holdings import Holding
from extproc.simulator.radix_cache import RadixCache
from extproc.simulator.settings import SimulatorSettings
from extproc.simulator.time_model import TimeModel

__all__ = ["Engine", "FinishReason", "Generation", "Job", "Observer", "RankLoad"]

FinishReason = Literal["stop", "length", "abort"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine has to know of a request.

    `prompts` are token ids; `sequences` are decoded in step and count as one request;
    `seconds_per_token` replaces the worker's own pace; `rank` is the data-parallel rank, None
    for the least loaded.
    """

    rid: str
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    namespace: Namespace = DEFAULT_NAMESPACE
    natural_end: bool = False  # "stop" instead of "length" after max_tokens
    sequences: int = 1
    seconds_per_token: float | None = None
    rank: int | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


class RankLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's counters at one moment; tokens as the engine's own load report has them."""

    running: int
    waiting: int
    used_tokens: int  # prompts and output of what runs
    waiting_tokens: int  # prompts of what waits
    waiting_uncached_tokens: int  # the part of them that was not cached when they came
    prefilled_tokens: int  # ever, without what was cached
    prefill_microseconds: int  # that this took


class Observer(Protocol):
    """Who is told, at once, what changes on a rank."""

    def cache_changed(self, rank: int, events: list[CacheEvent]) -> None: ...

    def load_changed(self, rank: int) -> None: ...


OutputIds = Callable[[int], Sequence[int]]


class Generation:
    """One request in the engine: a context manager that holds its place in the rank.

    Leaving the context gives the place back at once, in whatever state the request is:
    that is all an abort on a client's disconnect needs.
    """

    def __init__(self, rank: "_Rank", job: Job) -> None:
        self.job = job
        self.holding = rank.holding(job)
        self.prompt_tokens = job.prompt_tokens
        self.uncached_tokens = self.prompt_tokens  # as far as is known
        self.produced = 0
        self.prefill_starts_at = 0.0
        self.arrived_at = 0.0
        self._rank = rank
        self._first_token_at: float | None = None
        self._aborted = False
        self._sleeper: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        self.arrived_at = asyncio.get_running_loop().time()
        self._rank.enter(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._rank.leave(self)

    @property
    def rank(self) -> int:
        """Number of the data-parallel rank it runs on."""
        return self._rank.number

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the output ended; None while it has not."""
        if self._aborted:
            return "abort"
        if self._first_token_at is None or self.produced < self.job.max_tokens:
            return None
        return "stop" if self.job.natural_end else "length"

    def abort(self) -> None:
        """End the output where it stands and wake whoever waits for more of it."""
        self._aborted = True
        self.wake()

    async def prefill(self) -> None:
        """Wait for the rank's turn and for the prompt's prefill, after which a token is ready.

        Returns early, with nothing produced, when the request is aborted.
        """
        if self._first_token_at is not None:
            return
        while not self._rank.is_prefilling(self) and not self._aborted:
            await self._sleep(None)
        if self._aborted:
            return
        prefilled_at = self._rank.times.first_token_at(self.prefill_starts_at, self.uncached_tokens)
        await self._sleep_until(prefilled_at)
        if not self._aborted:
            self._first_token_at = prefilled_at
            self._rank.prefilled(self, prefilled_at)

    async def next_token(self) -> bool:
        """True when one more token is out, False when `finish_reason` says why there is none."""
        await self.prefill()
        if self.finish_reason is not None or self._first_token_at is None:
            return False
        pace = self.job.seconds_per_token
        await self._sleep_until(
            self._rank.times.token_at(self._first_token_at, self.produced, pace)
        )
        if self._aborted:
            return False
        self.produced += 1
        self._rank.tokens_generated += self.job.sequences
        return True

    def wake(self) -> None:
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)

    async def _sleep_until(self, deadline: float) -> None:
        """Return at the deadline or on `wake`; yields to other tasks even when it is past."""
        if deadline <= asyncio.get_running_loop().time():
            await asyncio.sleep(0)
        elif not self._aborted:
            await self._sleep(deadline)

    async def _sleep(self, deadline: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._sleeper = loop.create_future()
        timer = None if deadline is None else loop.call_at(deadline, self.wake)
        try:
            await self._sleeper
        finally:
            self._sleeper = None
            if timer is not None:
                timer.cancel()


class _Rank:
    """One scheduler: who waits, who is in prefill, who runs."""

    def __init__(
        self,
        number: int,
        settings: SimulatorSettings,
        output_ids: OutputIds,
        observer: Observer | None,
    ) -> None:
        self.tokens_generated = 0
        self.most_running = 0
        self.times = TimeModel(
            prefill_tokens_per_second=settings.prefill_tokens_per_second,
            seconds_per_token=settings.decode_milliseconds_per_token / 1000,
        )
        self.number = number
        self._limit = settings.max_running_requests
        self._bigram = settings.caches_bigrams
        self._output_ids = output_ids
        self._observer = observer
        self._cache = RadixCache(
            capacity_tokens=settings.max_total_num_tokens,
            page_size=settings.page_size,
            host_capacity_tokens=settings.host_cache_tokens,
            record_events=observer is not None,
        )
        self._prefilled_tokens = 0
        self._prefill_seconds = 0.0
        self._waiting: deque[Generation] = deque()
        self._prefilling: Generation | None = None
        self._running: set[Generation] = set()  # the one in prefill included

    def __iter__(self) -> Iterator[Generation]:
        yield from self._running
        yield from self._waiting

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    def load(self) -> RankLoad:
        return RankLoad(
            running=len(self._running),
            waiting=len(self._waiting),
            used_tokens=sum(
                item.prompt_tokens + item.produced * item.job.sequences for item in self._running
            ),
            waiting_tokens=sum(item.prompt_tokens for item in self._waiting),
            waiting_uncached_tokens=sum(item.uncached_tokens for item in self._waiting),
            prefilled_tokens=self._prefilled_tokens,
            prefill_microseconds=round(self._prefill_seconds * 1e6),
        )

    def cached_tokens(self) -> tuple[int, int]:
        return self._cache.used_tokens, self._cache.host_used_tokens

    def holding(self, job: Job) -> Holding:
        return Holding(self._cache, job.prompts, job.namespace, bigram=self._bigram)

    def flush_cache(self) -> None:
        self._cache.flush()
        self.report()

    def report(self) -> None:
        """Tell the observer what has changed; nothing of it is kept here."""
        if self._observer is None:
            return
        if events := self._cache.take_events():
            self._observer.cache_changed(self.number, events)
        self._observer.load_changed(self.number)

    def is_prefilling(self, generation: Generation) -> bool:
        return self._prefilling is generation

    def enter(self, generation: Generation) -> None:
        generation.uncached_tokens -= generation.holding.tokens_found()
        self._waiting.append(generation)
        self._admit(generation.arrived_at)
        self.report()

    def prefilled(self, generation: Generation, at: float) -> None:
        if self._prefilling is generation:
            self._prefilling = None
            self._prefilled_tokens += generation.uncached_tokens
            self._prefill_seconds += self.times.prefill_seconds(generation.uncached_tokens)
            generation.holding.insert(at)
            self._admit(at)
            self.report()

    def leave(self, generation: Generation) -> None:
        now = asyncio.get_running_loop().time()
        output = self._output_ids(generation.produced) if generation.produced else None
        generation.holding.release(now, output)
        if self._prefilling is generation:
            self._prefilling = None
        if generation in self._running:
            self._running.remove(generation)
        else:
            self._waiting.remove(generation)
        self._admit(now)
        self.report()

    def _admit(self, at: float) -> None:
        """Start the next prefill if the rank is free for it; `at` is when it became free."""
        if self._prefilling is not None or not self._waiting or len(self._running) >= self._limit:
            return
        generation = self._waiting.popleft()
        self._prefilling = generation
        self._running.add(generation)
        self.most_running = max(self.most_running, len(self._running))
        started_at = self.times.prefill_starts_at(generation.arrived_at, at)
        generation.prefill_starts_at = started_at
        generation.holding.acquire(started_at)
        generation.uncached_tokens = generation.prompt_tokens - generation.holding.cached_tokens
        generation.wake()


class Engine:
    """The ranks of one worker and what they have done so far."""

    def __init__(
        self,
        settings: SimulatorSettings,
        *,
        output_ids: OutputIds = range,
        observer: Observer | None = None,
    ) -> None:
        """`output_ids` gives the token ids of an output of that length."""
        self._seconds_per_token = settings.decode_milliseconds_per_token / 1000
        self._ranks = [
            _Rank(number, settings, output_ids, observer) for number in range(settings.dp_size)
        ]

    def submit(self, job: Job) -> Generation:
        """A place for this request, taken when its context is entered.

        Raises LookupError when the job names a rank the worker does not have.
        """
        if job.rank is None:
            rank = min(self._ranks, key=len)
        elif 0 <= job.rank < len(self._ranks):
            rank = self._ranks[job.rank]
        else:
            raise LookupError(f"rank {job.rank} is not below dp_size {len(self._ranks)}")
        return Generation(rank, job)

    def abort(self, rid: str | None) -> int:
        """End the requests of that id, or all for None; gives how many there were."""
        doomed = [item for rank in self._ranks for item in rank if rid in (None, item.job.rid)]
        for generation in doomed:
            generation.abort()
        return len(doomed)

    def flush_cache(self) -> bool:
        """Empty the caches; refused, with False, while requests use them."""
        if not self.is_idle:
            return False
        for rank in self._ranks:
            rank.flush_cache()
        return True

    def announce(self) -> None:
        """Tell the observer how every rank stands, empty caches included."""
        for rank in self._ranks:
            rank.report()

    def load(self, rank: int) -> RankLoad:
        return self._ranks[rank].load()

    def loads(self) -> list[RankLoad]:
        """The counters of every rank, in the order of the ranks."""
        return [rank.load() for rank in self._ranks]

    def cached_tokens(self) -> list[tuple[int, int]]:
        """What the cache of each rank holds on the device and on the host."""
        return [rank.cached_tokens() for rank in self._ranks]

    @property
    def is_idle(self) -> bool:
        return not any(len(rank) for rank in self._ranks)

    @property
    def seconds_per_token(self) -> float:
        return self._seconds_per_token

    @property
    def tokens_generated(self) -> int:
        """Output tokens since the start, of every sequence of every request."""
        return sum(rank.tokens_generated for rank in self._ranks)

    @property
    def most_running(self) -> int:
        """The most requests that ever ran at once on one rank."""
        return max(rank.most_running for rank in self._ranks)
