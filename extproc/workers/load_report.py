"""What an engine says of its load, and what it is prefilling just now, which can be inferred.

A report has the prompts that wait and not what is left of the one at work, which on a rank
with a short queue is most of the wait. But it shows: what has left the queue since the report
before is what began, and a prompt that never waited comes to the tokens in use, its cached
part included. Measured with four routers that share a fleet, this makes their estimates as
good as those of one.
"""

from typing import NamedTuple, Protocol

__all__ = ["EngineState", "LoadReport", "RunningPrefill"]


class LoadReport(Protocol):
    """The fields of an engine's load report that are read here; counts since the start last."""

    @property
    def num_running_reqs(self) -> int: ...
    @property
    def num_waiting_reqs(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def max_total_num_tokens(self) -> int: ...
    @property
    def num_waiting_uncached_tokens(self) -> int | None: ...
    @property
    def max_running_requests(self) -> int | None: ...
    @property
    def total_prefill_uncached_tokens(self) -> int | None: ...
    @property
    def total_prefill_busy_us(self) -> int | None: ...


class EngineState(NamedTuple):
    """Figures of one report; None where the engine does not say."""

    running: int
    waiting: int
    waiting_tokens: int | None
    used_tokens: int | None
    prefilled_tokens: int | None  # ever


class RunningPrefill:
    """The prompt at work on one rank.

    An engine may count what it has prefilled when a prompt is done, or after every piece of it.
    """

    __slots__ = ("_before", "_exact", "_since", "_tokens")

    def __init__(self) -> None:
        self._before: EngineState | None = None
        self._tokens = 0
        self._exact = False
        self._since = 0.0

    def forget(self) -> None:
        """The reports so far are too old to be compared with."""
        self._before = None
        self._tokens = 0

    def read(self, state: EngineState, now: float) -> None:
        """The next report."""
        before, self._before = self._before, state
        if before is None:
            return
        left_queue = _increase(state.waiting_tokens, before.waiting_tokens)
        came_to_memory = _increase(before.used_tokens, state.used_tokens)
        if state.waiting < before.waiting and left_queue:
            self._tokens, self._exact, self._since = left_queue, True, now
        elif state.running > before.running and came_to_memory:
            self._tokens, self._exact, self._since = came_to_memory, False, now
        elif state.prefilled_tokens != before.prefilled_tokens:
            done = _increase(before.prefilled_tokens, state.prefilled_tokens)
            self._tokens = max(0, self._tokens - done) if self._exact and done else 0
            self._since = now

    def tokens_left(self, now: float, tokens_per_second: float) -> float:
        return max(0.0, self._tokens - max(0.0, now - self._since) * tokens_per_second)


def _increase(before: int | None, after: int | None) -> int:
    return max(0, after - before) if before is not None and after is not None else 0
