"""Decides whether the 5xx answers of a worker are its own fault.

Requests of one kind may fail on every worker: then the request or the model is at fault, and
avoiding workers would turn one client's errors into an outage for all. A policy may also send all
of these requests to one worker, which then looks broken. So a worker that answers most requests
with 5xx, while the others of its pool do better, is suspected: it is avoided for a moment, and its
requests go to the others. If one of those fails now, the fault came with the requests. If not, the
worker gets requests again, and its next 5xx makes it suspected for twice as long.

Counts are of a window of 5 to 10 seconds. Pure: the caller passes the time.
"""

import math
from typing import Final

__all__ = ["PoolFaults"]

_SUSPICION_SECONDS: Final = 2.0
_SUSPICION_DOUBLINGS_MAX: Final = 4
_HALF_WINDOW_SECONDS: Final = 5.0
# Of a worker's answers: below it most of its requests are served.
_RATE_MIN: Final = 0.5
# How long answers that are not streamed may take is remembered for minutes: few are long.
_SLOWEST_HALVED_SECONDS: Final = 300.0
# After the requests were found at fault no worker is suspected for this long.
_BLAMELESS_SECONDS: Final = 10.0
# A suspicion that was not confirmed for so long is forgotten.
_MEMORY_SECONDS: Final = 60.0


class _Counts:
    """Answers of one worker, in this half of the window and in the half before."""

    __slots__ = ("bad", "bad_before", "good", "good_before")

    def __init__(self) -> None:
        self.good = self.bad = self.good_before = self.bad_before = 0

    @property
    def all_good(self) -> int:
        return self.good + self.good_before

    @property
    def all_bad(self) -> int:
        return self.bad + self.bad_before


class _Suspicion:
    """`rate` is the share of 5xx among the others' answers when it began; `times` how often it
    has begun. `good` and `bad` are the others' answers since.
    """

    __slots__ = ("bad", "good", "rate", "times", "until")

    def __init__(self) -> None:
        self.times = 0
        self.until = -math.inf
        self.rate = 0.0
        self.good = self.bad = 0


class PoolFaults:
    """The workers of one model and role, by id; those without recent answers are forgotten."""

    __slots__ = (
        "_blameless_until",
        "_counts",
        "_last",
        "_last_of_others",
        "_suspicions",
        "_turned",
        "slowest_whole_seconds",
    )

    def __init__(self) -> None:
        self._counts: dict[str, _Counts] = {}
        self._suspicions: dict[str, _Suspicion] = {}
        self._turned = -math.inf
        # The slowest answer of late that is not streamed, fading; NaN before the first.
        self.slowest_whole_seconds = math.nan
        self._blameless_until = -math.inf
        # The worker that answered last, and when the last other one did.
        self._last: tuple[str, float] = ("", -math.inf)
        self._last_of_others = -math.inf

    def answered(self, worker: str, now: float, whole_seconds: float | None = None) -> None:
        """A good answer; `whole_seconds` is how long one took that is not streamed."""
        counts = self._counts_of(worker, now)
        counts.good += 1
        if whole_seconds is not None and not whole_seconds <= self.slowest_whole_seconds:
            self.slowest_whole_seconds = whole_seconds
        if self._suspicions:
            for suspect, suspicion in self._suspicions.items():
                if suspect != worker:
                    suspicion.good += 1
            if worker in self._suspicions and counts.all_bad < counts.all_good:
                del self._suspicions[worker]

    def heard_from(self, worker: str, now: float) -> None:
        """An answer that is neither good nor bad: the worker is full."""
        self._counts_of(worker, now)

    def failed(self, worker: str, now: float, threshold: int) -> float:
        """A 5xx answer; returns for how many seconds the worker is to be avoided.

        A worker is suspected after `threshold` of them at least, and again after one.
        """
        counts = self._counts_of(worker, now)
        counts.bad += 1
        if self._acquits(worker, now) or now < self._blameless_until:
            return 0.0
        suspicion = self._suspicions.get(worker)
        if suspicion is not None:
            if now < suspicion.until:
                return 0.0  # sent before
            if now - suspicion.until < _MEMORY_SECONDS:
                threshold = 1
            else:
                suspicion = None
        bad, good = counts.all_bad, counts.all_good
        rate = self._rate_of_others(worker)
        share = bad / (bad + good)
        if bad < threshold or share < _RATE_MIN or 2 * rate >= share:
            return 0.0
        if suspicion is None:
            suspicion = self._suspicions[worker] = _Suspicion()
        seconds = _SUSPICION_SECONDS * 2 ** min(suspicion.times, _SUSPICION_DOUBLINGS_MAX)
        suspicion.times += 1
        suspicion.until = now + seconds
        suspicion.rate = rate
        suspicion.good = suspicion.bad = 0
        return float(seconds)

    def others_answered_since(self, worker: str, since: float) -> bool:
        """True if another worker has answered after `since`."""
        last_worker, last_at = self._last
        return (self._last_of_others if last_worker == worker else last_at) > since

    def _acquits(self, worker: str, now: float) -> bool:
        """True if this 5xx shows that the requests of suspected workers fail elsewhere, too."""
        acquitted = False
        for suspect, suspicion in list(self._suspicions.items()):
            if suspect == worker or now >= suspicion.until:
                continue
            suspicion.bad += 1
            if suspicion.bad > 2 * suspicion.rate * (suspicion.good + suspicion.bad):
                del self._suspicions[suspect]
                self._blameless_until = now + _BLAMELESS_SECONDS
                acquitted = True
        return acquitted

    def _counts_of(self, worker: str, now: float) -> _Counts:
        if now - self._turned >= _HALF_WINDOW_SECONDS:
            self._turn(now)
        last_worker, last_at = self._last
        if last_worker != worker:
            self._last_of_others = last_at
        self._last = (worker, now)
        counts = self._counts.get(worker)
        if counts is None:
            counts = self._counts[worker] = _Counts()
        return counts

    def _turn(self, now: float) -> None:
        """Begin a new half of the window."""
        passed = now - self._turned
        long_ago = passed >= 2 * _HALF_WINDOW_SECONDS
        self._turned = now
        self.slowest_whole_seconds *= 0.5 ** (passed / _SLOWEST_HALVED_SECONDS)
        for worker, counts in list(self._counts.items()):
            if long_ago or not (counts.good or counts.bad):
                del self._counts[worker]
            counts.good_before, counts.bad_before = counts.good, counts.bad
            counts.good = counts.bad = 0
        for worker, suspicion in list(self._suspicions.items()):
            if now - suspicion.until >= _MEMORY_SECONDS:
                del self._suspicions[worker]

    def _rate_of_others(self, worker: str) -> float:
        """The share of 5xx among the answers of all others; 0 without any."""
        others = [counts for one, counts in self._counts.items() if one != worker]
        bad = sum([counts.all_bad for counts in others])
        answers = bad + sum([counts.all_good for counts in others])
        return bad / answers if answers else 0.0
