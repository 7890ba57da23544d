"""The circuit breaker of one worker.

Asking and claiming are separate: candidates are filtered with `would_allow`, which changes
nothing, and only the chosen worker is claimed. A half-open breaker lets one request through, the
probe. Its outcome must be recorded, or the probe given back, on every way the request can end. The
generation number makes it safe to give back a probe that the breaker no longer waits for.
"""

import enum
from typing import Final

__all__ = ["NO_PROBE", "BreakerState", "CircuitBreaker"]

# The result of `claim` for a request that is not a probe.
NO_PROBE: Final = 0


class BreakerState(enum.IntEnum):
    """The values are those of the metric."""

    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2


class CircuitBreaker:
    """Closed until `threshold` consecutive failures, then open for `cool_down_seconds`.

    Times are seconds of the caller's monotonic clock. All calls come from one event loop. Others
    only read `state`.
    """

    __slots__ = (
        "_failures",
        "_generation",
        "_opened_at",
        "_probing",
        "cool_down_seconds",
        "state",
        "threshold",
    )

    def __init__(self, threshold: int, cool_down_seconds: float) -> None:
        self.threshold = threshold
        self.cool_down_seconds = cool_down_seconds
        self.state = BreakerState.CLOSED
        self._failures = 0
        self._opened_at = 0.0
        self._probing = False
        self._generation = NO_PROBE

    def would_allow(self, now: float) -> bool:
        """Return True if a request may be sent now; changes nothing."""
        if self.state is BreakerState.CLOSED:
            return True
        if self.state is BreakerState.HALF_OPEN:
            return not self._probing
        return now - self._opened_at >= self.cool_down_seconds

    def claim(self, now: float) -> int:
        """Take the right to send one request; returns NO_PROBE or a probe to give back.

        The caller has asked `would_allow` in the same turn of the loop.
        """
        if self.state is BreakerState.CLOSED:
            return NO_PROBE
        if self.state is BreakerState.OPEN:
            if now - self._opened_at < self.cool_down_seconds:
                return NO_PROBE
            self.state = BreakerState.HALF_OPEN
        elif self._probing:
            return NO_PROBE
        self._probing = True
        self._generation += 1
        return self._generation

    def give_back(self, probe: int) -> None:
        """The request ended without a sign of the worker's health; idempotent."""
        if probe != NO_PROBE and probe == self._generation and self._probing:
            self._probing = False

    def success(self) -> None:
        """The worker answered: the breaker closes, whatever its state was."""
        self.state = BreakerState.CLOSED
        self._failures = 0
        self._probing = False

    def failure(self, now: float) -> None:
        """The worker failed. Ignored while open, so that the cool-down counts from the opening."""
        if self.state is BreakerState.OPEN:
            return
        self._failures += 1
        if self._failures >= self.threshold:
            self.state = BreakerState.OPEN
            self._opened_at = now
            self._probing = False
