"""An engine's report of its load, and the prompt that it prefills now, which is inferred.

A report counts the prompts that wait, and not the rest of the prompt whose prefill runs. On a
rank with a short queue that rest is most of the wait. It is inferred from two reports: tokens
that have left the queue belong to the prefill that began, and a prompt that never waited
appears in the tokens in use, with its cached part. Measured with four routers that share a
fleet, the estimates become as good as those of one router.
"""

from typing import NamedTuple, Protocol

__all__ = ["EngineState", "LoadReport", "RunningPrefill"]


class LoadReport(Protocol):
    """The fields that are read of an engine's load report.

    The two `total_` fields count from the engine's start.
    """

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
    """The figures of one report; None where the engine does not report one."""

    running: int
    waiting: int
    waiting_tokens: int | None
    used_tokens: int | None
    prefilled_tokens: int | None  # since the engine's start


class RunningPrefill:
    """The prompt whose prefill runs on one rank.

    An engine may count prefilled tokens when a prompt is done, or after every chunk of it.
    """

    __slots__ = ("_before", "_exact", "_since", "_tokens")

    def __init__(self) -> None:
        self._before: EngineState | None = None
        self._tokens = 0
        self._exact = False
        self._since = 0.0

    def forget(self) -> None:
        """Drop the reports so far: they are too old to compare the next one with."""
        self._before = None
        self._tokens = 0

    def read(self, state: EngineState, now: float) -> None:
        """Read the next report."""
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
        """How many tokens of the prompt are not prefilled yet, as estimated."""
        return max(0.0, self._tokens - max(0.0, now - self._since) * tokens_per_second)


def _increase(before: int | None, after: int | None) -> int:
    return max(0, after - before) if before is not None and after is not None else 0
