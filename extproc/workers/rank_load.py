"""Estimates the load of one data-parallel rank, from our own bookings and its engine's reports.

Our bookings are exact and immediate, but do not include the requests of other routers. The
engine's reports include all requests, but come a moment late. So each figure is the larger of
the two: a report can only add what others have sent. Callers pass the time, in monotonic
seconds.

The engine is modelled as a queue: it prefills prompts one after the other in the order of
their arrival. The start of a streamed response shows that its prefill has ended. A response
that is not streamed starts after its last token, so the end of its prefill is estimated.
"""

import math
from collections import deque
from typing import Final

from extproc.workers.load_report import EngineState, LoadReport, RunningPrefill
from extproc.workers.prefill_speed import EngineCounters, PrefillSpeed

__all__ = ["Booking", "RankLoad"]

# Engines report at least every second.
_REPORT_FRESH_SECONDS: Final = 3.0
# A report may still count a request that ended up to so long before it. So many ends are
# remembered to allow for that.
_REPORT_DELAY_SECONDS: Final = 0.25
_RELEASES_MAX: Final = 256
# A report with higher figures is wrong.
_REQUESTS_MAX: Final = 100_000
_TOKENS_MAX: Final = 1 << 40
# How long a request decodes: the first estimate, and the weight of each observed request.
_DECODE_DEFAULT_SECONDS: Final = 5.0
_DECODE_WEIGHT: Final = 1 / 32


class Booking:
    """One request on the rank. `started` and `release` are idempotent, in any order."""

    __slots__ = (
        "_load",
        "_open",
        "_queued",
        "_report",
        "_started_at",
        "prefill_tokens",
        "streamed",
    )

    def __init__(self, load: "RankLoad", prefill_tokens: int, streamed: bool, report: int) -> None:
        self._load = load
        self._open = True
        self._queued = True  # its prefill has not ended, as far as we know
        self._report = report  # the number of the last report before it
        self._started_at: float | None = None
        self.prefill_tokens = prefill_tokens
        self.streamed = streamed

    def started(self, now: float) -> None:
        """A successful response has begun; if it is streamed, the prefill has just ended."""
        if self._open and self._started_at is None:
            self._started_at = now
            self._load._start(self, now)

    def release(self, now: float) -> None:
        """The request has ended, in whatever way, perhaps before its response began."""
        if self._open:
            self._open = False
            self._load._release(self, now)


class RankLoad:
    """The load of one data-parallel rank of one worker."""

    __slots__ = (
        "_counters",
        "_decode_seconds",
        "_head_exact",
        "_head_since",
        "_max_running",
        "_net_booked",
        "_open",
        "_queue",
        "_queued",
        "_queued_tokens",
        "_released_at",
        "_report_at",
        "_report_number",
        "_reported_requests",
        "_reported_running",
        "_reported_tokens",
        "_reported_waiting_tokens",
        "_running_prefill",
        "_speed",
        "_strangers",
        "_tokens_booked",
    )

    def __init__(self, model_speed: PrefillSpeed) -> None:
        """`model_speed` is shared by all ranks of a model; a new rank starts with it."""
        self._speed = PrefillSpeed(model_speed)
        self._open = 0
        # Bookings whose prefill has not ended, oldest first. Some have ended and are skipped.
        self._queue: deque[Booking] = deque()
        self._queued = 0
        self._queued_tokens = 0
        # When the prefill of the first booking began, and whether that was observed.
        self._head_since = 0.0
        self._head_exact = True
        self._decode_seconds = _DECODE_DEFAULT_SECONDS
        self._report_at = float("-inf")
        self._report_number = 0
        self._reported_requests = 0
        self._reported_running = 0
        self._reported_waiting_tokens: int | None = None
        self._reported_tokens: tuple[int, int] | None = None  # used and capacity
        self._max_running: int | None = None
        # The prefill that runs is inferred; `_strangers` is True if other routers send, too.
        self._running_prefill = RunningPrefill()
        self._strangers = False
        self._released_at: deque[float] = deque(maxlen=_RELEASES_MAX)
        # Our bookings minus our releases, and the tokens booked, since the last report.
        self._net_booked = 0
        self._tokens_booked = 0
        self._counters = EngineCounters(self._speed)

    # -- what happens

    def book(self, prefill_tokens: int, now: float, *, streamed: bool = True) -> Booking:
        """Count a request with so many tokens to prefill; fewer than 1 count as 1."""
        tokens = max(1, prefill_tokens)
        booking = Booking(self, tokens, streamed, self._report_number)
        if self._queued:
            self._settle_unseen(now, self._speed.tokens_per_second)
        if not self._queued:
            self._head_since, self._head_exact = now, True
        self._queue.append(booking)
        self._queued += 1
        self._queued_tokens += tokens
        self._open += 1
        self._net_booked += 1
        self._tokens_booked += tokens
        return booking

    def report(self, stat: LoadReport, now: float) -> None:
        """Take over the engine's figures; each one that is not plausible is ignored."""
        running, waiting = stat.num_running_reqs, stat.num_waiting_reqs
        if not (0 <= running <= _REQUESTS_MAX and 0 <= waiting <= _REQUESTS_MAX):
            return
        if now - self._report_at > _REPORT_FRESH_SECONDS:
            self._running_prefill.forget()
        self._report_at = now
        self._report_number += 1
        self._net_booked = 0
        self._tokens_booked = 0
        self._reported_running = running
        self._reported_requests = running + waiting
        uncached = stat.num_waiting_uncached_tokens
        sane = uncached is not None and 0 <= uncached <= _TOKENS_MAX
        self._reported_waiting_tokens = uncached if sane else None
        used, capacity = stat.num_tokens, stat.max_total_num_tokens
        self._reported_tokens = (used, capacity) if 0 <= used <= capacity <= _TOKENS_MAX else None
        self._running_prefill.read(
            EngineState(
                running,
                waiting,
                self._reported_waiting_tokens,
                None if self._reported_tokens is None else used,
                stat.total_prefill_uncached_tokens,
            ),
            now,
        )
        while self._released_at and self._released_at[0] < now - _REPORT_DELAY_SECONDS:
            self._released_at.popleft()
        self._strangers = running + waiting > self._open + len(self._released_at)
        limit = stat.max_running_requests
        self._max_running = limit if limit is not None and 0 < limit <= _REQUESTS_MAX else None
        self._counters.read(stat.total_prefill_uncached_tokens, stat.total_prefill_busy_us, now)

    # -- estimates

    @property
    def in_flight(self) -> int:
        """Our bookings that have not been released."""
        return self._open

    @property
    def prefill_tokens_per_second(self) -> float:
        return self._speed.tokens_per_second

    def requests(self, now: float) -> int:
        """Requests on the rank, waiting or running, with those of other routers."""
        if now - self._report_at > _REPORT_FRESH_SECONDS:
            return self._open
        return max(self._open, self._reported_requests + self._net_booked)

    def running(self, now: float) -> int:
        """Requests whose prefill has ended: they decode."""
        if self._queued:
            self._settle_unseen(now, self._speed.tokens_per_second)
        own = self._open - self._queued
        if now - self._report_at > _REPORT_FRESH_SECONDS:
            return own
        return max(own, self._reported_running)

    def prefill_tokens_ahead(self, now: float) -> float:
        """Tokens that the rank has to prefill before a request that is sent now."""
        queue, speed = self._queue, self._speed.tokens_per_second
        ahead: float = 0.0
        if self._queued:
            self._settle_unseen(now, speed)
            ahead = self._queued_tokens
            if queue:
                ahead -= min(queue[0].prefill_tokens, max(0.0, now - self._head_since) * speed)
        waiting = self._reported_waiting_tokens
        if waiting is not None:
            age = now - self._report_at
            if age <= _REPORT_FRESH_SECONDS:
                reported: float = waiting + self._tokens_booked
                if self._strangers:
                    reported += self._running_prefill.tokens_left(self._report_at, speed)
                return max(ahead, reported - age * speed)
        return ahead

    def kv_usage(self, now: float) -> float:
        """How full the KV cache is, from 0 to 1, as reported; 0 without a fresh report."""
        if self._reported_tokens is None or now - self._report_at > _REPORT_FRESH_SECONDS:
            return 0.0
        used, capacity = self._reported_tokens
        return used / capacity if capacity else 0.0

    def spare_requests(self, waiting_max: int, now: float) -> float:
        """How many more requests the engine takes before more than so many wait in its queue.

        Infinite without a fresh report. Requests booked since the report may all wait.
        """
        if now - self._report_at > _REPORT_FRESH_SECONDS:
            return math.inf
        if self._max_running is not None:
            return self._max_running + waiting_max - self.requests(now)
        waiting = self._reported_requests - self._reported_running
        if not waiting:
            return math.inf
        return waiting_max - waiting - max(0, self._net_booked)

    def prefill_seconds_ahead(self, now: float) -> float:
        """How long the rank is busy with prefills before a request that is sent now.

        A prefill that should have ended by now is expected to need as long again as it is late,
        and those behind it to be as slow. So the figure of a rank that hangs rises with time, and
        that of a rank whose speed is not known yet is soon right.
        """
        speed = self._speed.tokens_per_second
        ahead = self.prefill_tokens_ahead(now) / speed
        if not (self._queued and self._queue):
            return ahead
        head = self._queue[0].prefill_tokens
        elapsed = now - self._head_since
        late = elapsed - head / speed
        if late <= 0:
            return ahead
        if not self._strangers:  # or it may have waited behind theirs
            rest = self._queued_tokens - head
            # A prompt of few tokens says little about the speed.
            late += elapsed * min(rest / head, self._queued - 1)
        return max(ahead, late)

    def occupancy(self, now: float) -> float | None:
        """How full the rank is, from 0 to 1: its KV cache, or its running requests if that is more.

        Both as the engine reports them; None without a fresh report of either.
        """
        if now - self._report_at > _REPORT_FRESH_SECONDS:
            return None
        parts = []
        if self._reported_tokens is not None and self._reported_tokens[1]:
            parts.append(self.kv_usage(now))
        if self._max_running is not None:
            parts.append(min(1.0, self.requests(now) / self._max_running))
        return max(parts, default=None)

    def slot_wait_seconds(
        self, prompt_tokens: int, now: float, decode_seconds: float | None = None
    ) -> float:
        """How long one more request would wait until others have ended and made room for it.

        0 while there is room, and if the engine reports neither how many requests it runs at
        once nor how full its KV cache is. `decode_seconds` is how long a request decodes, where
        that is not learnt from the rank's bookings.
        """
        if now - self._report_at > _REPORT_FRESH_SECONDS:
            return 0.0
        requests = self.requests(now)
        to_end = 0.0
        if self._max_running is not None:
            to_end = requests + 1 - self._max_running
        if self._reported_tokens is not None and self._reported_running:
            used, capacity = self._reported_tokens
            if used and used + prompt_tokens > capacity:
                each = used / self._reported_running
                to_end = max(to_end, (used + prompt_tokens - capacity) / each)
        if to_end <= 0:
            return 0.0
        at_once = max(1, min(requests, self._max_running or requests))
        return to_end * (decode_seconds or self._decode_seconds) / at_once

    # -- bookings

    def _start(self, booking: Booking, now: float) -> None:
        if not booking._queued:
            return
        self._settle_unseen(now, self._speed.tokens_per_second)
        if not booking._queued:
            return
        in_order = True
        if self._queue[0] is booking:
            if self._head_exact and booking.streamed:
                self._learn(booking.prefill_tokens, now - self._head_since, now)
        else:
            for earlier in self._queue:
                if earlier is booking:
                    break
                if not earlier._queued:
                    continue
                if earlier.streamed:
                    in_order = False
                else:  # the engine works in order, and this one's start is not observed
                    self._unqueue(earlier)
        self._unqueue(booking)
        self._head_since, self._head_exact = now, in_order

    def _release(self, booking: Booking, now: float) -> None:
        self._open -= 1
        self._net_booked -= 1
        self._released_at.append(now)
        if booking._queued:
            self._settle_unseen(now, self._speed.tokens_per_second)
        if booking._queued:
            was_head = self._queue[0] is booking
            self._unqueue(booking)
            if booking._report == self._report_number:
                self._tokens_booked -= booking.prefill_tokens
            if was_head:
                self._head_since = max(self._head_since, now)
        elif booking._started_at is not None and booking.streamed:
            seconds = now - booking._started_at
            self._decode_seconds += (seconds - self._decode_seconds) * _DECODE_WEIGHT

    def _unqueue(self, booking: Booking) -> None:
        booking._queued = False
        self._queued -= 1
        self._queued_tokens -= booking.prefill_tokens

    def _settle_unseen(self, now: float, speed: float) -> None:
        """Drop bookings from the head of the queue until its prefill has not ended."""
        queue = self._queue
        while queue:
            head = queue[0]
            if head._queued:
                if head.streamed:
                    return
                ends_at = self._head_since + head.prefill_tokens / speed
                if ends_at > now:
                    return
                self._unqueue(head)
                self._head_since, self._head_exact = ends_at, False
            queue.popleft()

    # -- speed

    def _learn(self, tokens: int, seconds: float, now: float) -> None:
        if not self._counters.are_fresh(now):
            self._speed.observe(tokens, seconds)
