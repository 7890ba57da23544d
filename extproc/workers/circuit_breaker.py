"""The circuit breaker of one worker.

Asking and claiming are separate: candidates are filtered with `would_allow`, which changes
nothing, and only the chosen worker is claimed. A worker that is merely busy is avoided for a
moment. An open breaker becomes half-open after its cool-down and lets a few requests through, the
probes: one at first, and twice as many each few seconds, up to eight, so that a probe without an
answer does not keep a healthy worker away. Each time a probe fails the next cool-down is longer.

The outcome of a probe must be recorded, or the probe given back, on every way the request can
end. Its number makes it safe to give back a probe that the breaker no longer waits for.
"""

import enum
import math
from typing import Final

__all__ = ["NO_PROBE", "BreakerState", "CircuitBreaker"]

# The result of `claim` for a request that is not a probe.
NO_PROBE: Final = 0

# An engine's `retry-after` is often a guess; a client may still wait.
_BUSY_MAX_SECONDS: Final = 5.0
# Without `retry-after`: doubled each time the worker is still busy.
_BUSY_FIRST_SECONDS: Final = 0.25
_BUSY_DOUBLINGS_MAX: Final = 3
# How long a probe may take before more are let through beside it.
_PROBE_SECONDS: Final = 5.0
_PROBE_DOUBLINGS_MAX: Final = 3
_COOL_DOWN_DOUBLINGS_MAX: Final = 2


class BreakerState(enum.IntEnum):
    """The values are those of the metric."""

    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2
    # Avoided for a moment: full, or suspected of a fault.
    BUSY = 3


class CircuitBreaker:
    """Closed until `threshold` consecutive failures, then open for `cool_down_seconds`.

    Times are seconds of the caller's monotonic clock. All calls come from one event loop. Others
    only read `state` and these: `failed_at` is the time of the last failure or busy answer,
    `answered_at` that of the last answer of any kind; both are -inf before the first.
    """

    __slots__ = (
        "_avoided_since",
        "_avoided_until",
        "_busy_answers",
        "_failures",
        "_half_open_since",
        "_openings",
        "_probe_number",
        "_probes",
        "_suspected",
        "answered_at",
        "cool_down_seconds",
        "failed_at",
        "state",
        "threshold",
    )

    def __init__(self, threshold: int, cool_down_seconds: float) -> None:
        self.threshold = threshold
        self.cool_down_seconds = cool_down_seconds
        self.state = BreakerState.CLOSED
        self.failed_at = -math.inf
        self.answered_at = -math.inf
        self._failures = 0
        self._busy_answers = 0
        self._avoided_since = 0.0
        self._avoided_until = 0.0
        self._openings = 0
        self._half_open_since = 0.0
        self._probe_number = NO_PROBE
        self._probes: set[int] = set()
        self._suspected = False

    def would_allow(self, now: float) -> bool:
        """Return True if a request may be sent now; changes nothing."""
        if self.state is BreakerState.CLOSED:
            return True
        if self.state is BreakerState.HALF_OPEN:
            return len(self._probes) < self._places(now)
        return now >= self._avoided_until

    def claim(self, now: float) -> int:
        """Take the right to send one request; returns NO_PROBE or a probe to give back.

        A worker that `would_allow` refuses may be claimed as the last resort.
        """
        if self.state is BreakerState.CLOSED or not self.would_allow(now):
            return NO_PROBE
        if self.state is BreakerState.BUSY:
            self.state = BreakerState.CLOSED
            self._suspected = False
            return NO_PROBE
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN
            self._half_open_since = now
        self._probe_number += 1
        self._probes.add(self._probe_number)
        return self._probe_number

    def give_back(self, probe: int) -> None:
        """The request ended without a sign of the worker's health; idempotent."""
        self._probes.discard(probe)

    def success(self, now: float, sent_at: float) -> None:
        """The worker answered well. The breaker closes, unless the request was sent before that.

        A worker that is suspected may answer some requests well: it is avoided for its time.
        """
        self.answered_at = now
        self._failures = 0
        if self.state is BreakerState.CLOSED:
            self._busy_answers = 0
        elif sent_at >= self._avoided_since and not (
            self.state is BreakerState.BUSY and self._suspected and now < self._avoided_until
        ):
            self._close()

    def error(self, now: float) -> None:
        """The worker answered with an error. It answers, but that is neither success nor failure:
        a half-open breaker stays so, and failures before it still count.
        """
        self.answered_at = now

    def acquit(self, now: float) -> None:
        """The worker has passed a check that it had failed."""
        self.answered_at = now
        self._close()

    def busy(self, now: float, retry_after: float | None = None, sent_at: float = math.inf) -> None:
        """The worker answered that it is full, so it is alive; `retry_after` in seconds."""
        self.answered_at = self.failed_at = now
        self._failures = 0
        if (
            self.state in (BreakerState.OPEN, BreakerState.HALF_OPEN)
            and sent_at < self._avoided_since
        ):
            return
        if self.state is BreakerState.BUSY and now < self._avoided_until:
            # Sent before the first of these answers came.
            if retry_after is not None:
                until = now + min(max(retry_after, _BUSY_FIRST_SECONDS), _BUSY_MAX_SECONDS)
                self._avoided_until = max(self._avoided_until, until)
            return
        answers = self._busy_answers
        self._close()
        self._busy_answers = answers + 1
        if retry_after is None:
            seconds = _BUSY_FIRST_SECONDS * 2 ** min(answers, _BUSY_DOUBLINGS_MAX)
        else:
            seconds = min(max(retry_after, _BUSY_FIRST_SECONDS), _BUSY_MAX_SECONDS)
        self._avoid(now, seconds)

    def avoid(self, now: float, seconds: float) -> None:
        """The worker is suspected: send nothing for this time at least.

        An open breaker stays open for its own time.
        """
        self._suspected = True
        self._avoid(now, seconds)

    def _avoid(self, now: float, seconds: float) -> None:
        if self.state is BreakerState.CLOSED:
            self.state = BreakerState.BUSY
            self._avoided_since = now
            self._avoided_until = now + seconds
        elif self.state is BreakerState.BUSY:
            self._avoided_until = max(self._avoided_until, now + seconds)

    def failure(self, now: float, sent_at: float = math.inf) -> None:
        """The worker failed.

        Ignored while open, so that the cool-down counts from the opening, and of a request that
        was sent before.
        """
        self.failed_at = now
        if self.state is BreakerState.OPEN:
            return
        if self.state is BreakerState.HALF_OPEN and sent_at < self._avoided_since:
            return
        self._failures += 1
        if self._failures >= self.threshold or self.state is BreakerState.HALF_OPEN:
            longer = 2 ** min(self._openings, _COOL_DOWN_DOUBLINGS_MAX)
            self.state = BreakerState.OPEN
            self._avoided_since = now
            self._avoided_until = now + self.cool_down_seconds * longer
            self._openings += 1
            self._probes.clear()

    def probe_at_once(self, now: float) -> None:
        """There is a sign of life: an open breaker lets a probe through without further delay."""
        if self.state is BreakerState.OPEN:
            self._avoided_until = min(self._avoided_until, now)

    def _places(self, now: float) -> int:
        """Probes that may be under way at this time."""
        doublings = int((now - self._half_open_since) / _PROBE_SECONDS)
        return 1 << min(doublings, _PROBE_DOUBLINGS_MAX)

    def _close(self) -> None:
        self.state = BreakerState.CLOSED
        self._suspected = False
        self._failures = self._busy_answers = self._openings = 0
        self._probes.clear()
