"""Claims: a request counted on a worker, with everything that the worker keeps of it.

A claim is a ticket of the worker's load, the probe of its circuit breaker where the breaker is
half open, and a booking on one of its ranks where a KV-aware policy chose that. All of it is
taken in one step of the event loop, so that the next decision sees it, and given back by one
object on every way a request can end. Claims are made nowhere else.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from extproc.metrics.instruments import Counter
from extproc.routing.placement import Placed, PlacedBooking
from extproc.routing.rank import Rank
from extproc.workers.circuit_breaker import NO_PROBE, BreakerState
from extproc.workers.tickets import Tickets
from extproc.workers.worker import Worker

__all__ = ["Claim", "Claims", "WorkerRanks"]

_CLOSED: Final = BreakerState.CLOSED


class WorkerRanks(Protocol):
    """The data-parallel ranks of workers."""

    def of(self, worker: Worker) -> Sequence[Rank]:
        """Empty for a worker of models without a KV-aware policy."""
        ...


class Claim:
    """One request on one worker. `worker` is the claimed one, also after `move`."""

    __slots__ = ("_booking", "_claims", "_probe", "ticket", "worker")

    def __init__(
        self,
        claims: "Claims",
        worker: Worker,
        now: float,
        booking: PlacedBooking | None,
        *,
        streamed: bool,
    ) -> None:
        self._claims = claims
        self._booking = booking
        breaker = worker.breaker
        if breaker.state is not _CLOSED and not breaker.would_allow(now):
            claims.last_resort(worker.url, worker.role).inc()
        self._probe = breaker.claim(now)
        self.worker = worker
        self.ticket = claims.tickets.book(worker, now, streamed=streamed)
        if booking is not None:
            self.ticket.booking = booking

    def started(self, now: float) -> None:
        """A good response has begun, so the prompt is prefilled."""
        self.ticket.started(now)

    def move(self, worker: Worker, now: float) -> None:
        """Count the request on the worker that serves it, on the same rank as the chosen one."""
        booking = self._booking
        if self.ticket.move(worker, now) and booking is not None:
            booking.release(now)
            self._booking = self.ticket.booking = booking.again(self._claims.ranks.of(worker), now)

    def give_back_probe(self) -> None:
        """Nothing was learned about the worker: the next request may probe. Idempotent."""
        self.worker.breaker.give_back(self._probe)

    def release(self) -> None:
        """The request is over. Frees the probe if no outcome was recorded; idempotent."""
        if self._probe != NO_PROBE:
            self.worker.breaker.give_back(self._probe)
        self.ticket.release()


class Claims:
    """Makes claims."""

    def __init__(
        self, tickets: Tickets, ranks: WorkerRanks, last_resort: Callable[[str, str], Counter]
    ) -> None:
        """`last_resort` counts, by URL and role, claims that the breaker would not allow."""
        self.tickets = tickets
        self.ranks = ranks
        self.last_resort = last_resort

    def take(
        self, worker: Worker, now: float, placed: Placed | None = None, *, streamed: bool = True
    ) -> Claim:
        """Count a request on a worker; `placed` is where on the worker, if a policy chose that.

        The caller got the worker from `WorkerRegistry.candidates` in the same turn of the loop.
        """
        booking = None if placed is None else placed.book(now, streamed=streamed)
        return Claim(self, worker, now, booking, streamed=streamed)
