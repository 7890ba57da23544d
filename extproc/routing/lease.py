"""What a routed request holds: its load ticket and, perhaps, a breaker's probe.

The session tells the lease what Envoy reports, and the lease settles the books of the worker
that really served, which is not always the chosen one. Whatever happens, `close` ends it,
and nothing is counted twice.
"""

from collections.abc import Callable, Sequence

import structlog

from extproc.clock import Clock
from extproc.config.schema import LoadConfig
from extproc.errors import RouterError
from extproc.metrics.service import Metrics
from extproc.routing.decision import Decision
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.registry import WorkerRegistry
from extproc.workers.tickets import RankBooking, Ticket
from extproc.workers.worker import Worker

__all__ = ["Lease", "WorkerOutcomes"]

_log = structlog.get_logger()

_CLIENT_ERROR = 400
_SERVER_ERROR = 500
# Envoy's word for "the upstream answered"; anything else is a local reply of Envoy's own.
_VIA_UPSTREAM = "via_upstream"
# Local replies of Envoy that a worker has caused: refused, broken off, silent for too long.
_WORKER_FAILED = (
    "upstream_reset",
    "upstream_response_timeout",
    "upstream_per_try",
    "response_timeout",
    "stream_idle_timeout",
)
# Envoy's own connection limit.
_OVERFLOW = "overflow"


class WorkerOutcomes:
    """What all leases of one router share."""

    __slots__ = ("clock", "load", "metrics", "registry")

    def __init__(
        self, clock: Clock, registry: WorkerRegistry, metrics: Metrics, load: LoadConfig
    ) -> None:
        self.clock = clock
        self.registry = registry
        self.metrics = metrics
        self.load = load

    def succeeded(self, worker: Worker, model: str) -> None:
        """The worker has answered, and no 5xx."""
        if worker.breaker.state is not BreakerState.CLOSED:
            _log.info("breaker_closed", worker=worker.url, model=model)
        worker.breaker.success()
        self.count(worker, model, "success")

    def failed(self, worker: Worker, model: str, now: float) -> None:
        """The worker has answered 5xx, or not at all."""
        breaker = worker.breaker
        before = breaker.state
        breaker.failure(now)
        if breaker.state is not before:
            _log.warning(
                "breaker_opened",
                worker=worker.url,
                model=model,
                failures=breaker.threshold,
                cool_down_secs=breaker.cool_down_seconds,
            )
        self.count(worker, model, "error")

    def undecided(self, worker: Worker, model: str, probe: int) -> None:
        """Nothing was learnt of the worker: its probe, if that was one, is free again."""
        worker.breaker.give_back(probe)
        self.count(worker, model, "cancelled")

    def count(self, worker: Worker, model: str, outcome: str) -> None:
        self.metrics.worker_requests(worker.url, model, worker.role, outcome).inc()


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
        "excuse",
        "on_abort",
        "on_bad_answer",
        "rebook",
        "served",
        "ticket",
    )

    def __init__(
        self,
        books: WorkerOutcomes,
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
        # Called once, by what ends the request before its response has ended.
        self.on_abort: Callable[[RouterError], None] | None = None
        # Asked when the worker has answered 5xx: true if that was another one's fault.
        self.excuse: Callable[[], bool] | None = None
        # Told of a worker that answered with an error: it may have another role by now.
        self.on_bad_answer: Callable[[Worker], None] | None = None
        # Books the request on a rank of another worker than the chosen one.
        self.rebook: Callable[[Worker, float], RankBooking | None] | None = None
        ticket.owner = self

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
        # A gateway that says nothing is trusted to have asked the worker.
        answered = code_details in (_VIA_UPSTREAM, "")
        if not address:
            self._settle(chosen, status, code_details, answered, now)
            self.served = chosen if answered else None
            self._start_booking(status, answered, now)
            return True
        destinations = decision.destinations
        position = destinations.index(address) if address in destinations else -1
        served = self._named[position] if position >= 0 else books.registry.at_address(address)
        # Those before the one that served were tried first and could not be reached.
        for failed in self._named[: position if position >= 0 else 1]:
            books.failed(failed, decision.model, now)
        if served is not None:
            self._settle(served, status, code_details, answered, now)
            if status >= _CLIENT_ERROR and self.on_bad_answer is not None:
                self.on_bad_answer(served)
            if self.ticket.move(served) and self.rebook is not None:
                self._move_booking(self.rebook(served, now), now)
            self.served = served if answered else None
            self._start_booking(status, answered, now)
        if position > 0 and answered:
            books.metrics.fallbacks(decision.model).inc()
        if position < 0:
            books.metrics.missed(decision.model).inc()
        return position >= 0

    @property
    def holds_stream(self) -> bool:
        """Whether something of ours still depends on the stream once the decision is out."""
        return False

    def _start_booking(self, status: int, answered: bool, now: float) -> None:
        """A good answer has begun: its prompt is prefilled."""
        booking = self.ticket.booking
        if booking is not None and answered and status < _CLIENT_ERROR:
            booking.started(now)

    def _move_booking(self, booking: RankBooking | None, now: float) -> None:
        if self.ticket.booking is not None:
            self.ticket.booking.release(now)
        self.ticket.booking = booking

    def abort(self, error: RouterError) -> None:
        """The request is too old, and its ext_proc stream answers with `error`.

        A worker that never began to answer has failed.
        """
        if not self._settled:
            self._settled = True
            books = self._books
            books.failed(self._named[0], self.decision.model, books.clock.monotonic())
        on_abort, self.on_abort = self.on_abort, None
        if on_abort is not None:
            on_abort(error)

    def close(self) -> None:
        """The stream has ended, in whatever way; idempotent."""
        if self._closed:
            return
        self._closed = True
        if not self._settled:
            # The client left before an answer: neutral, but the probe is free again.
            self._settled = True
            self._books.undecided(self._named[0], self.decision.model, self._probe)
        self.on_abort = None
        self.ticket.owner = None
        if not self.ticket.estimated:
            self.ticket.release()

    def _settle(
        self, worker: Worker, status: int, code_details: str, answered: bool, now: float
    ) -> None:
        """Book what this response says of the worker."""
        if answered:
            if status < _SERVER_ERROR:
                self._books.succeeded(worker, self.decision.model)
            elif self.excuse is not None and self.excuse():
                self._books.undecided(worker, self.decision.model, self._probe)
            else:
                self._books.failed(worker, self.decision.model, now)
        elif code_details.startswith(_WORKER_FAILED) and _OVERFLOW not in code_details:
            self._books.failed(worker, self.decision.model, now)
        else:
            # Envoy's own reply, for a reason that says nothing of the worker.
            self._named[0].breaker.give_back(self._probe)
            self._books.count(worker, self.decision.model, "cancelled")
