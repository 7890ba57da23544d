"""What one data-parallel rank has to do: this router's own bookings, and what its engine says.

The own book is exact and at once there, but knows nothing of other routers; the engine's
reports know everything, a moment late. So a question is answered by the larger of the two:
reports can only add what others have sent. Whoever asks gives the time, in monotonic seconds.

The model of the engine is a queue: prompts are prefilled one after the other in the order
they came, and the start of a streamed response says that its prefill is over. A response that
is not streamed starts when all is said, so its prefill is taken to end when it should.
"""

from collections import deque
from typing import Final

from extproc.workers.load_report import EngineState, LoadReport, RunningPrefill
from extproc.workers.prefill_speed import EngineCounters, PrefillSpeed

__all__ = ["Booking", "RankLoad"]

# Engines report at least every second.
_REPORT_FRESH_SECONDS: Final = 3.0
# An end that we have seen may be missing in reports that come within that time, and the most
# ends that are remembered for it.
_REPORT_DELAY_SECONDS: Final = 0.25
_RELEASES_MAX: Final = 256
# No rank has so many; a report beyond is a fault of its sender.
_REQUESTS_MAX: Final = 100_000
_TOKENS_MAX: Final = 1 << 40
# How long a request decodes, until some have been seen to end, and how slowly that is forgotten.
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
        self._queued = True  # its prefill is not over yet, as far as is known
        self._report = report  # number of the last report before it
        self._started_at: float | None = None
        self.prefill_tokens = prefill_tokens
        self.streamed = streamed

    def started(self, now: float) -> None:
        """A good response has begun: if it is streamed, the prompt's prefill is just over."""
        if self._open and self._started_at is None:
            self._started_at = now
            self._load._start(self, now)

    def release(self, now: float) -> None:
        """The request has ended, well or not, perhaps before its response began."""
        if self._open:
            self._open = False
            self._load._release(self, now)


class RankLoad:
    """The load book of one (worker, data-parallel rank)."""

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
        """`model_speed` is shared by the ranks of a model: where a new rank starts from."""
        self._speed = PrefillSpeed(model_speed)
        self._open = 0
        # Those before their response, oldest first; some may be over already and are skipped.
        self._queue: deque[Booking] = deque()
        self._queued = 0
        self._queued_tokens = 0
        # When the prefill of the first of them began, and whether that was seen or reckoned.
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
        # What others have sent can only be inferred, and matters only if there are others.
        self._running_prefill = RunningPrefill()
        self._strangers = False
        self._released_at: deque[float] = deque(maxlen=_RELEASES_MAX)
        # Own bookings less own releases, and tokens booked, since the report.
        self._net_booked = 0
        self._tokens_booked = 0
        self._counters = EngineCounters(self._speed)

    # -- what is told

    def book(self, prefill_tokens: int, now: float, *, streamed: bool = True) -> Booking:
        """Count a request whose prompt has that many tokens to prefill; less than 1 is 1."""
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
        """The engine's own figures; absurd ones are ignored, one by one."""
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

    # -- what is asked

    @property
    def in_flight(self) -> int:
        """Own bookings that have not been released."""
        return self._open

    @property
    def prefill_tokens_per_second(self) -> float:
        return self._speed.tokens_per_second

    def requests(self, now: float) -> int:
        """Requests on the rank, waiting or running, those of other routers included."""
        if now - self._report_at > _REPORT_FRESH_SECONDS:
            return self._open
        return max(self._open, self._reported_requests + self._net_booked)

    def running(self, now: float) -> int:
        """Requests whose prefill is over: they decode."""
        if self._queued:
            self._settle_unseen(now, self._speed.tokens_per_second)
        own = self._open - self._queued
        if now - self._report_at > _REPORT_FRESH_SECONDS:
            return own
        return max(own, self._reported_running)

    def prefill_tokens_ahead(self, now: float) -> float:
        """Tokens the rank has to prefill before a request that is sent now."""
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
        """How full the engine says its KV cache is, 0 to 1; 0 where it does not."""
        if self._reported_tokens is None or now - self._report_at > _REPORT_FRESH_SECONDS:
            return 0.0
        used, capacity = self._reported_tokens
        return used / capacity if capacity else 0.0

    def slot_wait_seconds(self, prompt_tokens: int, now: float) -> float:
        """How long one more request would wait for others to end, for its place among them.

        Zero while the engine says neither how many it runs at once nor how full its memory is,
        and while there is room.
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
        return to_end * self._decode_seconds / at_once

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
                else:  # the engine works in order, and its start is not seen
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
        """Bring the queue up to date: leave a booking at its head whose prefill is under way."""
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
