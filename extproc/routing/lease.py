"""What a routed request holds: its load ticket and, perhaps, a breaker's probe.

The session tells the lease what Envoy reports, and the lease settles the books of the worker
that really served, which is not always the chosen one. Whatever happens, `close` ends it,
and nothing is counted twice.
"""

from collections.abc import Sequence

from extproc.clock import Clock
from extproc.config import LoadConfig
from extproc.metrics import Metrics
from extproc.routing.decision import Decision
from extproc.workers.active_load import Ticket
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Worker

__all__ = ["Lease", "LeaseBooks"]

_SERVER_ERROR = 500
# Envoy's word for "the upstream answered"; anything else is a local reply of Envoy's own.
_VIA_UPSTREAM = "via_upstream"


class LeaseBooks:
    """What all leases of one router share."""

    __slots__ = ("clock", "load", "metrics", "registry")

    def __init__(
        self, clock: Clock, registry: WorkerRegistry, metrics: Metrics, load: LoadConfig
    ) -> None:
        self.clock = clock
        self.registry = registry
        self.metrics = metrics
        self.load = load


class Lease:
    """One routed request, from the decision to the end of its stream."""

    __slots__ = (
        "_books",
        "_closed",
        "_decided_at",
        "_named",
        "_probe",
        "_settled",
        "decision",
        "served",
        "ticket",
    )

    def __init__(
        self,
        books: LeaseBooks,
        decision: Decision,
        named: Sequence[Worker],
        ticket: Ticket,
        probe: int,
        decided_at: float,
    ) -> None:
        """`named` are the workers behind `decision.destinations`, in that order."""
        self._books = books
        self._named = named
        self._probe = probe
        self._decided_at = decided_at
        self._settled = False
        self._closed = False
        self.decision = decision
        self.ticket = ticket
        self.served: Worker | None = None

    def responded(self, status: int, address: str, code_details: str, streamed: bool) -> bool:
        """Envoy has response headers, its own or the worker's; returns False when missed.

        `address` is the `ip:port` that was tried last, "" when none was; `code_details` as
        Envoy's `response.code_details`, "" from gateways that do not send it.
        """
        if self._settled:
            return True
        self._settled = True
        books, decision, chosen = self._books, self.decision, self._named[0]
        now = books.clock.monotonic()
        books.metrics.response_seconds(decision.model).observe(now - self._decided_at)
        if streamed and books.load.release == "estimate":
            self.ticket.release_after(books.load.estimated_stream_secs)
        if not address:
            if code_details in ("", _VIA_UPSTREAM):
                # A gateway without response attributes: trust that it followed us.
                self._outcome(chosen, status, now)
                self.served = chosen
            else:
                # Envoy reached nobody (overflow, no route): it says nothing of a worker.
                chosen.breaker.give_back(self._probe)
                self._count(chosen, "cancelled")
            return True
        destinations = decision.destinations
        position = destinations.index(address) if address in destinations else -1
        served = self._named[position] if position >= 0 else books.registry.at_address(address)
        # Those before the one that served were tried first and could not be reached.
        for failed in self._named[: position if position >= 0 else 1]:
            failed.breaker.failure(now)
            self._count(failed, "error")
        if served is not None:
            self._outcome(served, status, now)
            self.ticket.move(served)
            self.served = served
        if position > 0:
            books.metrics.fallbacks(decision.model).inc()
        if position < 0:
            books.metrics.missed(decision.model).inc()
        return position >= 0

    def expired(self) -> None:
        """The request is too old. A worker that never began to answer has failed."""
        if not self._settled:
            self._settled = True
            chosen = self._named[0]
            chosen.breaker.failure(self._books.clock.monotonic())
            self._count(chosen, "error")

    def close(self) -> None:
        """The stream has ended, in whatever way; idempotent."""
        if self._closed:
            return
        self._closed = True
        if not self._settled:
            # The client left before an answer: neutral, but the probe is free again.
            self._settled = True
            self._named[0].breaker.give_back(self._probe)
            self._count(self._named[0], "cancelled")
        if not self.ticket.estimated:
            self.ticket.release()

    def _outcome(self, worker: Worker, status: int, now: float) -> None:
        if status >= _SERVER_ERROR:
            worker.breaker.failure(now)
            self._count(worker, "error")
        else:
            worker.breaker.success()
            self._count(worker, "success")

    def _count(self, worker: Worker, outcome: str) -> None:
        self._books.metrics.worker_request(worker.url, self.decision.model, worker.mode, outcome)
