"""Runs a fleet in simulated time, with the simulator's caches and speeds.

Workers prefill their queue one prompt after the other and decode at the same time. The router
sees only their cache events and load reports, a moment late, and the start and end of responses.

A trace names the prompt's blocks of 512 tokens by numbers. Every token of a block gets that
number as its id: prompts are hashed and indexed at full length, and two prompts are equal as
far as their blocks are. A trace has no ids of output: only prompts are cached, and the next
turn repeats the output in its prompt.
"""

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Final, Protocol

import numpy as np
from msgspec import Struct

from extproc.kv.events import LoadStat
from extproc.kv.index import PrefixIndex
from extproc.kv.prefix_hash import TokenIds
from extproc.kv.rank_pages import RankPages
from extproc.simulator.cache_events import CacheEvent, Cleared, Removed
from extproc.simulator.radix_cache import Lease, RadixCache
from extproc.simulator.time_model import TimeModel, reusable_tokens

__all__ = [
    "BLOCK_TOKENS",
    "FleetSettings",
    "FleetWorker",
    "Observer",
    "Run",
    "Schedule",
    "TraceRequest",
    "apply_events",
    "pages_of",
    "replay",
    "tokens_of",
]

BLOCK_TOKENS: Final = 512
_REPORT_SECONDS: Final = 1.0
_MAX_RUNNING: Final = 1 << 16  # in effect no limit: the model's engine runs all requests


class TraceRequest(Struct, frozen=True):
    """One line of a trace; `arrived_at` in seconds, `blocks` are the trace's block numbers."""

    arrived_at: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


class FleetSettings(Struct, frozen=True, kw_only=True):
    workers: int
    capacity_tokens: int
    page_tokens: int
    times: TimeModel
    event_delay_seconds: float
    load_stat: bool


class Ticket(Protocol):
    """The router's record of a request."""

    def started(self, now: float) -> None: ...

    def release(self, now: float) -> None: ...


class Observer(Protocol):
    """The router's side: it decides, and receives the same events as a live router."""

    def route(self, request: TraceRequest, now: float) -> tuple[int, Ticket]:
        """The number of the chosen worker, and the ticket for start and end of the response."""
        ...

    def cache_changed(self, worker: int, events: Sequence[CacheEvent]) -> None: ...

    def load_changed(self, worker: int, stat: LoadStat, now: float) -> None: ...


class Schedule:
    """The events of the simulation, in the order of simulated time."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = count()

    def at(self, moment: float, action: Callable[[float], None]) -> None:
        """Call `action` with `moment` then; actions of one moment keep their order."""
        heappush(self._due, (moment, next(self._numbers), action))

    def run(self, until: float) -> None:
        """Run all events before `until`."""
        while self._due and self._due[0][0] < until:
            moment, _, action = heappop(self._due)
            action(moment)

    def __bool__(self) -> bool:
        return bool(self._due)


class _Job:
    """A request on its worker."""

    __slots__ = ("cached_tokens", "lease", "pages", "request", "ticket", "uncached_tokens")

    def __init__(self, request: TraceRequest, pages: Sequence[int], ticket: Ticket) -> None:
        self.request = request
        self.pages = pages
        self.ticket = ticket
        self.lease: Lease | None = None
        self.cached_tokens = 0
        self.uncached_tokens = request.input_tokens


class Run(Struct):
    """The result of one replay."""

    ttft_seconds: list[float]
    input_tokens: int
    cached_tokens: int
    prefill_tokens: list[int]  # by worker


class FleetWorker:
    """One engine of one rank."""

    def __init__(
        self, number: int, settings: FleetSettings, schedule: Schedule, observer: Observer, run: Run
    ) -> None:
        self._number = number
        self._settings = settings
        self._schedule = schedule
        self._observer = observer
        self._run = run
        self._cache = RadixCache(
            capacity_tokens=settings.capacity_tokens, page_size=settings.page_tokens
        )
        self._waiting: deque[_Job] = deque()
        self._prefilling: _Job | None = None
        self._running = 0
        self._used_tokens = 0
        self._busy_seconds = 0.0
        self._stat_sent_at = float("-inf")

    def take(self, job: _Job, now: float) -> None:
        job.uncached_tokens -= self._reusable(job, self._cache.match(job.pages).tokens)
        self._waiting.append(job)
        if self._prefilling is None:
            self._begin(now)
        self.report(now)

    def report(self, now: float) -> None:
        """Send the changes; they arrive a moment later."""
        number, observer = self._number, self._observer
        arrives_at = now + self._settings.event_delay_seconds
        if events := self._cache.take_events():
            self._schedule.at(arrives_at, lambda _: observer.cache_changed(number, events))
        if self._settings.load_stat:
            self._stat_sent_at = now
            stat = self._load_stat()
            self._schedule.at(arrives_at, lambda at: observer.load_changed(number, stat, at))

    def report_if_silent(self, now: float) -> None:
        if now - self._stat_sent_at >= _REPORT_SECONDS:
            self.report(now)

    def _load_stat(self) -> LoadStat:
        return LoadStat(
            num_running_reqs=self._running + (self._prefilling is not None),
            num_waiting_reqs=len(self._waiting),
            num_tokens=self._used_tokens,
            max_total_num_tokens=self._settings.capacity_tokens,
            attn_dp_rank=0,
            num_waiting_uncached_tokens=sum(job.uncached_tokens for job in self._waiting),
            num_total_tokens=self._used_tokens,
            max_running_requests=_MAX_RUNNING,
            total_prefill_uncached_tokens=self._run.prefill_tokens[self._number],
            total_prefill_busy_us=round(self._busy_seconds * 1e6),
        )

    def _reusable(self, job: _Job, held_tokens: int) -> int:
        return reusable_tokens(held_tokens, job.request.input_tokens, self._settings.page_tokens)

    def _begin(self, now: float) -> None:
        if not self._waiting:
            return
        job = self._prefilling = self._waiting.popleft()
        job.lease = self._cache.acquire(job.pages, now)
        job.cached_tokens = self._reusable(job, job.lease.cached.tokens)
        job.uncached_tokens = job.request.input_tokens - job.cached_tokens
        self._used_tokens += job.request.input_tokens
        first_token_at = self._settings.times.first_token_at(now, job.uncached_tokens)
        self._schedule.at(first_token_at, lambda at: self._prefilled(job, at))

    def _prefilled(self, job: _Job, now: float) -> None:
        run, times = self._run, self._settings.times
        run.ttft_seconds.append(now - job.request.arrived_at)
        run.input_tokens += job.request.input_tokens
        run.cached_tokens += job.cached_tokens
        run.prefill_tokens[self._number] += job.uncached_tokens
        self._busy_seconds += times.prefill_seconds(job.uncached_tokens)
        assert job.lease is not None
        self._cache.insert(job.lease, job.pages, now)
        job.ticket.started(now)
        self._prefilling = None
        self._running += 1
        ends_at = times.token_at(now, max(0, job.request.output_tokens - 1))
        self._schedule.at(ends_at, lambda at: self._finished(job, at))
        self._begin(now)
        self.report(now)

    def _finished(self, job: _Job, now: float) -> None:
        assert job.lease is not None
        self._cache.release(job.lease, now)
        self._running -= 1
        self._used_tokens -= job.request.input_tokens
        job.ticket.release(now)
        self.report(now)


def replay(trace: Sequence[TraceRequest], settings: FleetSettings, observer: Observer) -> Run:
    """Send every request at its time; returns when the last one has its last token."""
    schedule = Schedule()
    run = Run([], 0, 0, [0] * settings.workers)
    workers = [
        FleetWorker(number, settings, schedule, observer, run) for number in range(settings.workers)
    ]
    # A trace may start at any time.
    next_beat = trace[0].arrived_at if trace else 0.0
    for worker in workers:
        worker.report(next_beat)  # as with an engine, the first event says that the cache is empty
    for request in trace:
        now = request.arrived_at
        while settings.load_stat and next_beat <= now:
            schedule.run(next_beat)
            for worker in workers:
                worker.report_if_silent(next_beat)
            next_beat += _REPORT_SECONDS / 4
        schedule.run(now)
        number, ticket = observer.route(request, now)
        workers[number].take(_Job(request, pages_of(request, settings.page_tokens), ticket), now)
    schedule.run(float("inf"))
    return run


def pages_of(request: TraceRequest, page_tokens: int) -> Sequence[int]:
    """The whole pages of the prompt as opaque numbers; `page_tokens` divides BLOCK_TOKENS."""
    whole = request.input_tokens // page_tokens
    each = BLOCK_TOKENS // page_tokens
    if each == 1:
        return request.blocks[:whole]
    pages = [block * each + part for block in request.blocks for part in range(each)]
    return pages[:whole]


def tokens_of(request: TraceRequest) -> TokenIds:
    """The prompt's token ids; uint64."""
    blocks = np.array(request.blocks, dtype=np.uint64)
    return np.repeat(blocks, BLOCK_TOKENS)[: request.input_tokens]


def apply_events(index: PrefixIndex, rank_pages: RankPages, events: Sequence[CacheEvent]) -> None:
    """Apply the events of `pages_of` pages to the index."""
    page_tokens = rank_pages.page_size
    each = np.uint64(BLOCK_TOKENS // page_tokens)
    for event in events:
        if isinstance(event, Cleared):
            index.clear(rank_pages)
        elif isinstance(event, Removed):
            index.remove(rank_pages, event.hashes, 0)
        else:
            blocks = np.array(event.pages, dtype=np.uint64) // each
            tokens = np.repeat(blocks, page_tokens)
            index.store(rank_pages, event.hashes, event.parent, tokens, page_tokens)
