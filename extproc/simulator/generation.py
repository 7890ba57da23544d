"""One request in the engine, from the queue to the last token."""

import asyncio
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import msgspec

from extproc.simulator.cache_events import DEFAULT_NAMESPACE, Namespace
from extproc.simulator.holdings import HeldPages
from extproc.simulator.time_model import TimeModel

__all__ = ["FinishReason", "Generation", "Job", "Scheduler"]

FinishReason = Literal["stop", "length", "abort"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The data of a request that the engine needs.

    `prompts` are token ids; `sequences` are decoded in step and count as one request;
    `seconds_per_token` replaces the worker's own pace; `rank` is the data-parallel rank, None
    for the least loaded one. The KV of a `transferred` request is computed by another worker:
    the request waits until its KV has arrived, and costs no prefill. Without `reads_cache` all
    tokens are computed, whatever is cached.
    """

    rid: str
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    namespace: Namespace = DEFAULT_NAMESPACE
    natural_end: bool = False  # "stop" instead of "length" after max_tokens
    sequences: int = 1
    seconds_per_token: float | None = None
    rank: int | None = None
    transferred: bool = False
    reads_cache: bool = True

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


class Scheduler(Protocol):
    """The rank that a generation runs on, as far as a generation uses it."""

    number: int
    times: TimeModel
    tokens_generated: int

    def holding(self, job: Job) -> HeldPages:
        """The job's prompts in the rank's cache."""
        ...

    def is_prefilling(self, generation: "Generation") -> bool: ...

    def enter(self, generation: "Generation") -> None: ...

    def prefilled(self, generation: "Generation", at: float) -> None: ...

    def decoded(self, generation: "Generation") -> None: ...

    def kv_arrived(self, generation: "Generation") -> None: ...

    def leave(self, generation: "Generation") -> None: ...

    def free_blocks(self, generation: "Generation") -> None: ...


class Generation:
    """One request in the engine: a context manager that holds its place in the rank.

    Leaving the context frees the place at once, in every state of the request. An abort on a
    client's disconnect needs nothing else.
    """

    def __init__(self, rank: Scheduler, job: Job) -> None:
        self.job = job
        self.holding = rank.holding(job)
        self.prompt_tokens = job.prompt_tokens
        self.uncached_tokens = self.prompt_tokens  # tokens that prefill computes, as far as known
        self.produced = 0
        self.prefill_starts_at = 0.0
        self.arrived_at = 0.0  # in the queue; if the KV is transferred, when it arrived
        self.keeps_blocks = False
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
        """Why the output ended; None while it goes on."""
        if self._aborted:
            return "abort"
        if self._first_token_at is None or self.produced < self.job.max_tokens:
            return None
        return "stop" if self.job.natural_end else "length"

    @property
    def is_aborted(self) -> bool:
        return self._aborted

    @property
    def sequences(self) -> int:
        return self.job.sequences

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the rank's own cache spared; known after the prefill."""
        return self.holding.cached_tokens

    def abort(self) -> None:
        """End the output at this token and wake the task that waits for the next one."""
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
        """True after one more token; False at the end, when `finish_reason` says why."""
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
        self._rank.decoded(self)
        return True

    async def unless_aborted(self, work: Coroutine[Any, Any, None]) -> None:
        """Await this work; an abort of the request cancels it and returns at once.

        Raises what the work raises.
        """
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self.wake())
        try:
            while not task.done() and not self._aborted:
                await self._sleep(None)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    def kv_arrived(self) -> None:
        """The KV of a transferred request has arrived: the request joins the queue now."""
        self.arrived_at = asyncio.get_running_loop().time()
        self._rank.kv_arrived(self)

    def keep_blocks(self) -> None:
        """Hold its pages past the end of the context, until `free_blocks`."""
        self.keeps_blocks = True

    def free_blocks(self) -> None:
        self._rank.free_blocks(self)

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
