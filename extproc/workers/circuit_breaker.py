"""Circuit breaker of one worker.

Asking and claiming are two things: candidates are filtered with `would_allow`, which changes
nothing, and only the worker that was chosen is claimed. A half-open breaker lets one probe
through; whoever claimed it must resolve it with an outcome or give it back, on every way its
request can end. The generation number makes giving back safe when the breaker has moved on.
"""

import enum
from typing import Final

__all__ = ["NO_PROBE", "BreakerState", "CircuitBreaker"]

# What `claim` returns for a request that is not the probe of a half-open breaker.
NO_PROBE: Final = 0


class BreakerState(enum.IntEnum):
    """The value is what the metric shows."""

    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2


class CircuitBreaker:
    """Closed until `threshold` consecutive failures, then open for `cool_down_seconds`.

    Times are seconds of the caller's monotonic clock; no I/O, no locks: one event loop.
    `state` is for others to read.
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
        """True when a request could be claimed now; changes nothing."""
        if self.state is BreakerState.CLOSED:
            return True
        if self.state is BreakerState.HALF_OPEN:
            return not self._probing
        return now - self._opened_at >= self.cool_down_seconds

    def claim(self, now: float) -> int:
        """Take the right to send one request; the result is NO_PROBE or a probe to give back.

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
        """The claimed request ended without saying anything about the worker."""
        if probe != NO_PROBE and probe == self._generation and self._probing:
            self._probing = False

    def success(self) -> None:
        """The worker answered: closed again, whatever was before."""
        self.state = BreakerState.CLOSED
        self._failures = 0
        self._probing = False

    def failure(self, now: float) -> None:
        """The worker failed; ignored while open, so that the cool-down counts from the opening."""
        if self.state is BreakerState.OPEN:
            return
        self._failures += 1
        if self._failures >= self.threshold:
            self.state = BreakerState.OPEN
            self._opened_at = now
            self._probing = False
