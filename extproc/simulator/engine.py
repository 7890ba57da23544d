"""The engine's queue and time model, without sockets.

A rank has a FIFO queue and a prefix cache, prefills one prompt at a time, in the time that
`TimeModel` gives for what the cache lacks, and decodes up to `max_running_requests` sequences
at once. A full cache delays no request: pages that do not fit are not kept.

Every moment is an absolute deadline on the event loop's clock: a prefill starts where the
previous one ended, and token n is due at the first token's time plus n steps, so a busy
event loop delays tokens but never makes the worker slower than its settings say.
"""

from extproc.simulator.generation import FinishReason, Generation, Job
from extproc.simulator.ranks import Observer, OutputIds, Rank, RankLoad
from extproc.simulator.settings import SimulatorSettings

__all__ = ["Engine", "FinishReason", "Generation", "Job", "Observer", "QueueFullError", "RankLoad"]


class QueueFullError(Exception):
    """The rank has as many waiting requests as it may have."""


class Engine:
    """The ranks of one worker and their counters."""

    def __init__(
        self,
        settings: SimulatorSettings,
        *,
        output_ids: OutputIds = range,
        observer: Observer | None = None,
    ) -> None:
        """`output_ids` gives the token ids of an output of that length."""
        self._requests_max = settings.max_running_requests + settings.max_queued_requests
        self._seconds_per_token = settings.decode_milliseconds_per_token / 1000
        self._ranks = [
            Rank(number, settings, output_ids, observer) for number in range(settings.dp_size)
        ]

    def submit(self, job: Job) -> Generation:
        """A place in the queue for this request, taken when its context is entered.

        Raises LookupError when the job names a rank the worker does not have, and QueueFullError.
        """
        if job.rank is None:
            rank = min(self._ranks, key=len)
        elif 0 <= job.rank < len(self._ranks):
            rank = self._ranks[job.rank]
        else:
            raise LookupError(f"rank {job.rank} is not below dp_size {len(self._ranks)}")
        if len(rank) >= self._requests_max:
            raise QueueFullError
        return Generation(rank, job)

    def abort(self, rid: str | None) -> int:
        """End the requests whose ids have this prefix, or all for None; returns their number."""
        prefix = rid or ""
        doomed = [item for rank in self._ranks for item in rank if item.job.rid.startswith(prefix)]
        for generation in doomed:
            generation.abort()
        return len(doomed)

    def flush_cache(self) -> bool:
        """Empty the caches; returns False and changes nothing while requests use them."""
        if not self.is_idle:
            return False
        for rank in self._ranks:
            rank.flush_cache()
        return True

    def announce(self) -> None:
        """Report the state of every rank to the observer, empty caches included."""
        for rank in self._ranks:
            rank.report()

    def load(self, rank: int) -> RankLoad:
        return self._ranks[rank].load()

    def loads(self) -> list[RankLoad]:
        """The counters of every rank, in the order of the ranks."""
        return [rank.load() for rank in self._ranks]

    def cached_tokens(self) -> list[tuple[int, int]]:
        """Tokens that the cache of each rank holds on the device and on the host."""
        return [rank.cached_tokens() for rank in self._ranks]

    def kv_usages(self) -> list[float]:
        """The part of each rank's cache that running requests use, from 0 to 1."""
        return [rank.kv_usage() for rank in self._ranks]

    @property
    def is_idle(self) -> bool:
        return all(rank.is_idle for rank in self._ranks)

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
