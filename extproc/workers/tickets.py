"""Requests in flight: a ticket for each, and the janitor that aborts requests that are too old.

A ticket is booked when a decision is made, so that the next decision already sees it, and
released exactly once however the ext_proc stream ends. The janitor does not release tickets of
live requests: it aborts the request, and the end of the request releases the ticket.
"""

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from extproc.clock import Clock
from extproc.errors import RouterError, stale_request_expired
from extproc.metrics.instruments import Counter
from extproc.workers.worker import Worker

__all__ = ["RankBooking", "Ticket", "TicketOwner", "Tickets"]

_JANITOR_MIN_SECONDS = 1.0
_JANITOR_MAX_SECONDS = 60.0
_ESTIMATE_TICK_SECONDS = 1.0


class RankBooking(Protocol):
    """The same request booked on one rank; both calls are idempotent."""

    def started(self, now: float) -> None:
        """Its response has begun."""
        ...

    def release(self, now: float) -> None:
        """It has ended, in whatever way."""
        ...


class TicketOwner(Protocol):
    """The request that a ticket counts."""

    def abort(self, error: RouterError) -> None:
        """End before the response does; `error` says why."""
        ...


class Ticket:
    """One request counted on one worker.

    `owner` is aborted, once, when the request is too old or in vain; None where there is nothing
    to abort. `booking` is the request on a rank, if a policy chose one; it ends with the ticket.
    `streamed`: the beginning of the response shows when the worker begins with the request.
    `estimated` is set once `release_after` decides, and not the end of the stream.
    """

    __slots__ = (
        "_load",
        "_open",
        "_started",
        "_streamed",
        "booked_at",
        "booking",
        "estimated",
        "owner",
        "worker",
    )

    def __init__(
        self, load: "Tickets", worker: Worker, booked_at: float, *, streamed: bool
    ) -> None:
        self._load = load
        self._open = True
        self._started = False
        self._streamed = streamed
        self.worker = worker
        self.booked_at = booked_at
        self.estimated = False
        self.owner: TicketOwner | None = None
        self.booking: RankBooking | None = None

    def started(self, now: float) -> None:
        """A good response has begun; idempotent."""
        if self._open and not self._started:
            self._started = True
            if self._streamed:
                self.worker.pace.began(now)
            if self.booking is not None:
                self.booking.started(now)

    def release(self) -> None:
        """Stop counting; later calls do nothing."""
        if self._open:
            self._open = False
            self.worker.in_flight -= 1
            self.owner = None
            self._load.forget(self)
            now = self._load.now()
            if self._started:
                self.worker.pace.ended(now - self.booked_at)
            elif self._streamed:
                self.worker.pace.withdrew()
            if self.booking is not None:
                self.booking.release(now)

    def release_after(self, seconds: float) -> None:
        """Stop counting after a time, for gateways that do not tell us the end of a response."""
        if self._open and not self.estimated:
            self.estimated = True
            self._load.release_after(self, seconds)

    def move(self, worker: Worker, now: float) -> bool:
        """Count the request on the worker that serves it; returns False if nothing changed."""
        if not self._open or worker is self.worker:
            return False
        self.worker.in_flight -= 1
        worker.in_flight += 1
        if self._streamed and not self._started:
            self.worker.pace.withdrew()
            worker.pace.sent(now)
        self.worker = worker
        return True


class Tickets:
    """All open tickets, oldest first."""

    def __init__(self, clock: Clock, stale_seconds: float, stale_total: Counter) -> None:
        self._clock = clock
        self._stale_seconds = stale_seconds
        self._stale_total = stale_total
        # A dict keeps insertion order and forgets in O(1).
        self._tickets: dict[Ticket, None] = {}
        self._releases: deque[tuple[float, Ticket]] = deque()

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets)

    def book(self, worker: Worker, now: float, *, streamed: bool = True) -> Ticket:
        """Count one more request on the worker; `now` is the clock's monotonic time."""
        ticket = Ticket(self, worker, now, streamed=streamed)
        worker.in_flight += 1
        if streamed:
            worker.pace.sent(now)
        self._tickets[ticket] = None
        return ticket

    def now(self) -> float:
        """Return the monotonic seconds of the clock of all tickets."""
        return self._clock.monotonic()

    def forget(self, ticket: Ticket) -> None:
        """Drop a ticket; called by Ticket.release only."""
        self._tickets.pop(ticket, None)

    def release_after(self, ticket: Ticket, seconds: float) -> None:
        """Release a ticket later; called by Ticket.release_after only.

        All delays are the same, so the queue is in order.
        """
        self._releases.append((self._clock.monotonic() + seconds, ticket))

    def sweep(self) -> int:
        """Abort the requests that are too old; returns their number."""
        now = self._clock.monotonic()
        stale: list[Ticket] = []
        for ticket in self._tickets:
            if now - ticket.booked_at < self._stale_seconds:
                break
            if ticket.owner is not None:
                stale.append(ticket)
        for ticket in stale:
            if ticket.owner is not None:
                self._stale_total.inc()
                _abort(ticket)
        return len(stale)

    def limit(self, stale_seconds: float) -> None:
        """Take another time-out: requests that are too old by it are aborted now."""
        self._stale_seconds = stale_seconds
        self.sweep()

    def expire(self, worker: Worker) -> None:
        """Abort all requests on a worker, since they are in vain."""
        for ticket in [one for one in self._tickets if one.worker is worker]:
            _abort(ticket)

    async def run_janitor(self) -> None:
        """Sweep for ever: ten times within the stale time-out, and at least every minute."""
        while True:
            stale = self._stale_seconds
            period = min(max(stale / 10, _JANITOR_MIN_SECONDS), _JANITOR_MAX_SECONDS)
            await self._clock.sleep(stale if stale < _JANITOR_MIN_SECONDS else period)
            self.sweep()

    def release_due(self) -> None:
        """Release the tickets whose estimated end has come."""
        now = self._clock.monotonic()
        while self._releases and self._releases[0][0] <= now:
            self._releases.popleft()[1].release()

    async def run_estimates(self) -> None:
        """Release what is due every second, for ever; needed only where ends are estimated."""
        while True:
            await self._clock.sleep(_ESTIMATE_TICK_SECONDS)
            self.release_due()


def _abort(ticket: Ticket) -> None:
    owner, ticket.owner = ticket.owner, None
    if owner is not None:
        owner.abort(stale_request_expired())
