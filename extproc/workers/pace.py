"""How quickly a worker begins and ends its requests, as this service sees it.

For pools of whose engines nothing else is known: no tokens, no reports. The figures are kept as
requests come and go, at the price of a few additions each, so that a reader needs no history.
"""

from typing import Final

__all__ = ["Pace"]

# About so many observations count: of the first ones the mean, then older ones fade.
_BEGINNINGS: Final = 16
_REQUESTS: Final = 32


class Pace:
    """One worker's. Only streamed requests show when the worker begins to answer them.

    `waiting` counts those that it has not begun to answer, `begin_seconds` is the time from one
    beginning to the next while some wait, and `request_seconds` how long requests take that were
    answered. Both are averages that follow the last few dozen requests, 0 before the first one.
    Callers pass monotonic seconds.
    """

    __slots__ = ("_begun", "_ended", "_since", "begin_seconds", "request_seconds", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self.begin_seconds = 0.0
        self.request_seconds = 0.0
        self._begun = 0
        self._ended = 0
        # Of the last beginning, or of the first request that found no other one waiting.
        self._since = 0.0

    def sent(self, now: float) -> None:
        """A streamed request goes to the worker."""
        if not self.waiting:
            self._since = now
        self.waiting += 1

    def began(self, now: float) -> None:
        """The worker begins to answer one of them."""
        self.waiting -= 1
        seconds = max(0.0, now - self._since)
        self._since = now
        if self._begun < _BEGINNINGS:
            self._begun += 1
        self.begin_seconds += (seconds - self.begin_seconds) / self._begun

    def withdrew(self) -> None:
        """One of them has ended without an answer, or went to another worker."""
        self.waiting -= 1

    def ended(self, seconds: float) -> None:
        """A request of any kind has ended after so long; it was answered."""
        if self._ended < _REQUESTS:
            self._ended += 1
        self.request_seconds += (max(0.0, seconds) - self.request_seconds) / self._ended

    def wait_seconds(self, now: float) -> float:
        """How long a request that is sent now would wait until those before it have begun.

        A worker that should have begun one by now is expected to need as long again as it is
        late: so the wait of one that hangs rises with time.
        """
        if self.waiting <= 0:
            return 0.0
        each = self.begin_seconds
        return (self.waiting - 1) * each + abs(max(0.0, now - self._since) - each)
