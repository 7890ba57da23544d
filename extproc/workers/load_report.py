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
    """The prompt at work on one rank."""

    __slots__ = ("_before", "_since", "_tokens")

    def __init__(self) -> None:
        self._before: EngineState | None = None
        self._tokens = 0
        self._since = 0.0

    def forget(self) -> None:
        """The reports so far are too old to be compared with."""
        self._before = None
        self._tokens = 0

    def read(self, state: EngineState, now: float) -> None:
        """The next report."""
        before, self._before = self._before, state
        if before is not None:
            began = _began(before, state)
            if began is not None:
                self._tokens, self._since = began, now

    def tokens_left(self, now: float, tokens_per_second: float) -> float:
        return max(0.0, self._tokens - max(0.0, now - self._since) * tokens_per_second)


def _began(before: EngineState, state: EngineState) -> int | None:
    """Tokens of the prompt that has come to work in between; None if it is still the same."""
    if state.waiting < before.waiting and _less(state.waiting_tokens, before.waiting_tokens):
        return _difference(before.waiting_tokens, state.waiting_tokens)
    if state.running > before.running and _less(before.used_tokens, state.used_tokens):
        return _difference(state.used_tokens, before.used_tokens)
    # One is done, and none has followed.
    return 0 if state.prefilled_tokens != before.prefilled_tokens else None


def _less(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one < other


def _difference(one: int | None, other: int | None) -> int:
    return (one or 0) - (other or 0)
