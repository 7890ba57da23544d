"""What a routed request holds until its ext_proc stream ends.

The session passes on what Envoy reports. The lease records the outcome for the worker that
really served, which is not always the chosen one. Whatever happens, `close` ends it, and no
outcome is recorded twice.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from msgspec import Struct

from extproc.clock import Clock
from extproc.errors import RouterError
from extproc.metrics.service import Metrics
from extproc.routing.claim import Claim
from extproc.routing.decision import Decision
from extproc.routing.gateway_watch import GatewayWatch
from extproc.routing.outcomes import BUSY_STATUSES, WorkerOutcomes
from extproc.routing.walk import read_walk
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Worker

__all__ = ["BusyAnswers", "Lease", "LeaseParts"]

# Addresses whose workers answered 503 or 429 in attempts of one request; True if recorded already.
BusyAnswers: TypeAlias = Sequence[tuple[str, bool]]

_CLIENT_ERROR = 400
_NOT_FOUND = 404
_SERVER_ERROR = 500
_TOO_MANY_REQUESTS = 429
# Envoy's `response.code_details` for an answer of the upstream; others are Envoy's own replies.
_VIA_UPSTREAM = "via_upstream"
# Envoy's own replies that a worker has caused: refused, broken off, silent for too long.
_WORKER_FAILED = (
    "upstream_reset",
    "upstream_response_timeout",
    "upstream_per_try",
    "response_timeout",
    "stream_idle_timeout",
)
# Envoy's own connection limit.
_OVERFLOW = "overflow"


class LeaseParts(Struct, frozen=True, kw_only=True):
    """What all leases of one service use.

    `recheck` is called with a worker that may have become another engine: it refused a connection
    or answered 404. `estimated_stream_seconds` is how long a streamed response is taken to run;
    None where the gateway tells us its end.
    """

    clock: Clock
    registry: WorkerRegistry
    metrics: Metrics
    outcomes: WorkerOutcomes
    gateway: GatewayWatch
    recheck: Callable[[Worker], None]
    estimated_stream_seconds: float | None


class Lease:
    """One routed request, from the decision to the end of its ext_proc stream.

    `served` is the worker that answered, once that is known. `on_abort` is called once, with
    the error for the client, when the request must end before its response does.
    """

    __slots__ = (
        "_closed",
        "_decided_at",
        "_named",
        "_parts",
        "_settled",
        "claim",
        "decision",
        "on_abort",
        "served",
    )

    def __init__(
        self,
        parts: LeaseParts,
        decision: Decision,
        named: Sequence[Worker],
        claim: Claim,
        decided_at: float,
    ) -> None:
        """`named` are the workers behind `decision.destinations`, in that order."""
        self._parts = parts
        self._named = named
        self._decided_at = decided_at
        self._settled = False
        self._closed = False
        self.claim = claim
        self.decision = decision
        self.served: Worker | None = None
        self.on_abort: Callable[[RouterError], None] | None = None
        claim.ticket.owner = self

    @property
    def served_urls(self) -> tuple[str, str | None]:
        """The URL of the worker that served, and of the one that decodes if that is another."""
        return (self.served.url if self.served is not None else "unknown"), None

    @property
    def served_overlap(self) -> tuple[int, int]:
        """Cached and total tokens of the worker that served; (0, 0) where they are not known."""
        decision, served = self.decision, self.served
        if served is None:
            return 0, 0
        if served is self._named[0]:
            return decision.cached_tokens, decision.total_tokens
        for worker, overlap in zip(self._named[1:], decision.fallback_overlaps, strict=False):
            if worker is served:
                return overlap
        return 0, 0

    @property
    def holds_stream(self) -> bool:
        """True while the stream must stay open though the decision is out."""
        return False

    def responded(
        self,
        status: int,
        address: str,
        code_details: str,
        streamed: bool,
        attempts: int = 0,
        busy: BusyAnswers = (),
        retry_after: float | None = None,
    ) -> None:
        """Envoy has response headers, its own or the worker's.

        `address` is the `ip:port` that was tried last, "" without a try; `code_details` as
        Envoy's `response.code_details`, "" from gateways that do not send it. `attempts` is the
        number of attempts, 0 from gateways that do not send it. `busy` are the answers of attempts
        that were reported before. `retry_after` is the value of that header in seconds.
        """
        if self._settled:
            return
        self._settled = True
        parts, decision = self._parts, self.decision
        now = parts.clock.monotonic()
        parts.metrics.response_seconds(decision.model).observe(now - self._decided_at)
        if streamed and parts.estimated_stream_seconds is not None:
            self.claim.ticket.release_after(parts.estimated_stream_seconds)
        # A gateway that sends no details is trusted to have asked the worker.
        answered = code_details in (_VIA_UPSTREAM, "")
        if not address:
            self._settle(self._named[0], status, code_details, answered, retry_after)
            return
        destinations, gateway = decision.destinations, parts.gateway
        if address == destinations[0]:
            position = 0
            if gateway.doubts:
                gateway.followed(address)
        else:
            position = destinations.index(address) if address in destinations else -1
            self._tried_others(address, position, attempts, busy, now)
        served = self._named[position] if position >= 0 else parts.registry.at_address(address)
        if served is not None:
            if status >= _CLIENT_ERROR:
                self._answered_with_error(served, status)
            if served is not self.claim.worker:
                self.claim.move(served, now)
        if position >= 0 and busy and answered and status in BUSY_STATUSES:
            self._was_busy(self._named[position], busy, now)
        elif position >= 0:
            self._settle(self._named[position], status, code_details, answered, retry_after)
        elif answered:
            # The address may be a translated one, so no worker gets the outcome.
            self.served = served
        if position > 0 and answered:
            parts.metrics.fallbacks(decision.model).inc()

    def _tried_others(
        self, address: str, position: int, attempts: int, busy: BusyAnswers, now: float
    ) -> None:
        """The worker at `address`, which is not the chosen one, was tried last."""
        parts, named, model = self._parts, self._named, self.decision.model
        walk = read_walk(position, attempts, len(named))
        answered = {one for one, _ in busy}
        for tried in named[: walk.failed]:
            if tried.address in answered:
                self._was_busy(tried, busy, now)
            else:
                parts.outcomes.failed(tried, model, now, self._decided_at)
                parts.recheck(tried)
        if walk.passed_over:
            parts.gateway.passed_over(model, named[: walk.passed_over], address)
        elif position < 0:
            parts.gateway.left_the_list(model)
        if not walk.failed:
            self.claim.give_back_probe()

    def _was_busy(self, worker: Worker, busy: BusyAnswers, now: float) -> None:
        """The worker answered 503 or 429: it is full, not broken."""
        self.claim.give_back_probe()
        outcomes = self._parts.outcomes
        if (worker.address, False) in busy:
            outcomes.is_full(worker, now)
        outcomes.count_busy(worker, self.decision.model)

    def _settle(
        self,
        worker: Worker,
        status: int,
        code_details: str,
        answered: bool,
        retry_after: float | None,
    ) -> None:
        """Record what this response says about the worker."""
        outcomes, model = self._parts.outcomes, self.decision.model
        now, sent_at = self._parts.clock.monotonic(), self._decided_at
        if answered:
            self.served = worker
            if status < _CLIENT_ERROR:
                self.claim.started(now)
            if status < _SERVER_ERROR and status != _TOO_MANY_REQUESTS:
                outcomes.succeeded(worker, model, now, sent_at, streamed=self._is_streamed)
                return
            if not self._failed_for_want_of_prefill():
                if status in BUSY_STATUSES:
                    outcomes.busy(worker, model, now, retry_after, sent_at)
                else:
                    outcomes.server_error(worker, model, now, sent_at)
                return
        elif code_details.startswith(_WORKER_FAILED) and _OVERFLOW not in code_details:
            outcomes.failed(worker, model, now, sent_at)
            self._parts.recheck(worker)
            return
        # Envoy's own reply, or another worker's fault.
        self.claim.give_back_probe()
        outcomes.undecided(worker, model)

    @property
    def _is_streamed(self) -> bool:
        """True if the client has asked for a stream: only other requests have a time-out."""
        return not self.decision.timeout_ms

    def _failed_for_want_of_prefill(self) -> bool:
        """True if a 5xx of the worker is another worker's fault."""
        return False

    def _answered_with_error(self, worker: Worker, status: int) -> None:
        """The worker, or Envoy in its place, answered with a 4xx or 5xx."""
        if status == _NOT_FOUND or (status == _CLIENT_ERROR and self.decision.adapter is not None):
            # It may serve another model by now, or have unloaded the adapter.
            self._parts.recheck(worker)

    def abort(self, error: RouterError) -> None:
        """End the request with `error`. A worker that has not begun to answer has failed."""
        if not self._settled:
            self._settled = True
            parts, model, chosen = self._parts, self.decision.model, self._named[0]
            if parts.gateway.ignores(model):
                # Another worker has the request.
                parts.outcomes.undecided(chosen, model)
            else:
                now = parts.clock.monotonic()
                parts.outcomes.failed(chosen, model, now, self._decided_at)
        on_abort, self.on_abort = self.on_abort, None
        if on_abort is not None:
            on_abort(error)

    def close(self) -> None:
        """The stream has ended, in whatever way; idempotent."""
        if self._closed:
            return
        self._closed = True
        claim = self.claim
        if not self._settled:
            self._settled = True
            self._left_without_an_answer()
        self.on_abort = None
        claim.ticket.owner = None
        if not claim.ticket.estimated:
            claim.release()

    def _left_without_an_answer(self) -> None:
        """The client left before the response headers."""
        parts, model, worker = self._parts, self.decision.model, self.claim.worker
        if parts.gateway.ignores(model):
            parts.outcomes.undecided(worker, model)
        else:
            now = parts.clock.monotonic()
            streamed = self._is_streamed
            parts.outcomes.abandoned(worker, model, now, self._decided_at, streamed=streamed)
