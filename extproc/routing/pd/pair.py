"""A request on two workers: the prefill we have sent ourselves, and the decode Envoy carries.

The first pass of the request holds the Pair. It ends the prefill when nobody needs it any more,
and tells the client at once when it has failed: the decode worker would wait for it for minutes.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterator
from typing import Final

import structlog

from extproc.errors import RouterError, prefill_failed, prefill_refused
from extproc.routing.decision import Decision
from extproc.routing.lease import Lease, WorkerOutcomes
from extproc.workers.engine_calls import (
    EngineAnswer,
    EngineTimeoutError,
    EngineUnreachableError,
    PrefillCall,
)
from extproc.workers.tickets import Ticket
from extproc.workers.worker import Worker

__all__ = ["Pair", "Pairs", "PrefillLeg", "Reservation"]

_log = structlog.get_logger()

_OK: Final = 200
_REDIRECT: Final = 300
_CLIENT_ERROR: Final = 400
_SERVER_ERROR: Final = 500
_PAIR_ID_BYTES: Final = 12
_OWN_FAILURE_SECONDS: Final = 1.0


class PrefillLeg:
    """The prefill worker's part: its load, its breaker's probe, and its answer."""

    __slots__ = (
        "_books",
        "_probe",
        "_request_id",
        "_sent_at",
        "_settled",
        "call",
        "model",
        "ticket",
        "worker",
    )

    def __init__(
        self,
        books: WorkerOutcomes,
        model: str,
        worker: Worker,
        ticket: Ticket,
        probe: int,
        now: float,
        *,
        request_id: str = "",
    ) -> None:
        self._books = books
        self.model = model
        self._request_id = request_id
        self._probe = probe
        self._sent_at = now
        self._settled = False
        self.worker = worker
        self.ticket = ticket
        self.call: PrefillCall | None = None

    @property
    def is_open(self) -> bool:
        return not self._settled

    async def answer(self) -> EngineAnswer | str:
        """The worker's answer, or why there is none, as the cause of a failure."""
        assert self.call is not None  # noqa: S101 (made before)
        try:
            return await self.call.answer()
        except EngineTimeoutError:
            return "timeout"
        except EngineUnreachableError:
            return "broken"

    def ended(self, answer: EngineAnswer | str) -> RouterError | None:
        """Settle the books by what `answer` gave; as `answered` and `failed`."""
        return self.failed(answer) if isinstance(answer, str) else self.answered(answer)

    def answered(self, answer: EngineAnswer) -> RouterError | None:
        """Settle the books; gives what the client is to be told, None if all is well."""
        now = self._books.clock.monotonic()
        status = answer.status
        if not (_OK <= status < _REDIRECT or _CLIENT_ERROR <= status < _SERVER_ERROR):
            return self.failed("status_5xx")
        pd = self._books.metrics.pd
        if status >= _CLIENT_ERROR:
            pd.prefill_failures(self.model, "status_4xx").inc()
        else:
            pd.prefill_seconds(self.model).observe(now - self._sent_at)
            if self.ticket.booking is not None:
                self.ticket.booking.started(now)
        self._books.succeeded(self.worker, self.model)
        self._end()
        if status < _CLIENT_ERROR:
            return None
        return prefill_refused(status, answer.body, answer.headers)

    def failed(self, cause: str) -> RouterError:
        """It has failed, and by the worker's fault; gives what the client is to be told."""
        _log.warning(
            "prefill_attempt_failed",
            request_id=self._request_id,
            model=self.model,
            worker=self.worker.url,
            reason=cause,
        )
        self._books.metrics.pd.prefill_failures(self.model, cause).inc()
        self._books.failed(self.worker, self.model, self._books.clock.monotonic())
        self._end()
        return prefill_failed()

    def age_seconds(self) -> float:
        """Since it was sent."""
        return self._books.clock.monotonic() - self._sent_at

    def silent(self) -> None:
        """The decode worker, or the proxy, has given up waiting for it."""
        if self.call is not None:
            self.call.cancel()
        if not self._settled:
            self.failed("silent")

    def cancel(self) -> None:
        """Nobody needs it any more; idempotent."""
        if self.call is not None:
            self.call.cancel()
        if not self._settled:
            self._books.undecided(self.worker, self.model, self._probe)
            self._end()

    def _end(self) -> None:
        self._settled = True
        self.ticket.release()


class Reservation:
    """A decode worker that will be picked in a moment: counted, so that others see it."""

    __slots__ = ("_probe", "_ticket", "worker")

    def __init__(self, worker: Worker, ticket: Ticket, probe: int) -> None:
        self.worker = worker
        self._ticket = ticket
        self._probe = probe

    def release(self) -> None:
        """Idempotent."""
        if self._probe:
            self.worker.breaker.give_back(self._probe)
            self._probe = 0
        self._ticket.release()


class Pair:
    """As Lease, for a request on two workers.

    `decode` is the lease of the decode worker where it was picked together with the prefill
    worker; else another pass has it, and `reservation` counts until that has begun.
    """

    __slots__ = (
        "_books",
        "_closed",
        "_failed_at",
        "_followed",
        "_linger_seconds",
        "_outcome",
        "_pairs",
        "_responded",
        "decision",
        "decode",
        "id",
        "leg",
        "on_abort",
        "on_recheck",
        "reservation",
    )

    def __init__(
        self,
        books: WorkerOutcomes,
        pairs: "Pairs",
        decision: Decision,
        leg: PrefillLeg,
        *,
        pair_id: str,
        decode: Lease | None,
        reservation: Reservation | None,
        linger_seconds: float,
        on_recheck: Callable[[Worker], None],
    ) -> None:
        self._books = books
        self._pairs = pairs
        self._linger_seconds = linger_seconds
        self._closed = False
        self._responded = 0
        self._outcome = ""
        self._failed_at: float | None = None
        self._followed: asyncio.Task[None] | None = None
        self.id = pair_id
        self.decision = decision
        self.leg = leg
        self.decode = decode
        self.reservation = reservation
        # Called once, by what ends the request before its response has ended.
        self.on_abort: Callable[[RouterError], None] | None = None
        self.on_recheck = on_recheck
        # Of its two tickets, one is enough for the janitor.
        self.ticket.owner = self
        pairs.add(self)

    @property
    def ticket(self) -> Ticket:
        """What the janitor watches in this pass."""
        return self.leg.ticket if self.decode is None else self.decode.ticket

    @property
    def served(self) -> Worker | None:
        """For the debug headers: who prefills."""
        return self.leg.worker

    @property
    def holds_stream(self) -> bool:
        """While the prefill runs, only this stream can tell the client that it has failed."""
        return self.leg.is_open and not self._closed

    def follow(self) -> None:
        """Wait for the prefill worker's answer, beside everything else."""
        self._followed = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        leg = self.leg
        try:
            answer = await leg.answer()
        except asyncio.CancelledError:
            return  # by ourselves, and settled
        if not leg.is_open:
            return  # cancelled while the answer was on its way to us
        error = leg.ended(answer)
        self._pairs.leg_ended(self)
        if error is None:
            return
        self.on_recheck(leg.worker)
        self._end(error.code)
        self._fail(error)

    def _fail(self, error: RouterError) -> None:
        if self._closed:
            return
        self._failed_at = self._books.clock.monotonic()
        self._notify(error)

    def _notify(self, error: RouterError) -> None:
        on_abort, self.on_abort = self.on_abort, None
        if on_abort is not None:
            on_abort(error)

    def answer_written(self) -> None:
        """The client's answer after an abort is written."""
        if self._failed_at is None:
            return  # the request was too old
        seconds = self._books.clock.monotonic() - self._failed_at
        self._books.metrics.pd.fail_fast_seconds().observe(seconds)

    def abandon(self) -> None:
        """The prefill can come to nothing any more: its worker has another role, or we stop."""
        if self.leg.is_open:
            self.leg.cancel()
            self._pairs.leg_ended(self)
            self._end("abandoned")
            self._fail(prefill_failed())

    def responded(self, status: int, address: str, code_details: str, streamed: bool) -> bool:
        """As Lease.responded, for the response of the decode worker."""
        self._responded = status
        known = True
        if self.decode is not None:
            known = self.decode.responded(status, address, code_details, streamed)
        if status >= _CLIENT_ERROR:
            # The other half of the request is over.
            if status >= _SERVER_ERROR and self.waits_for_prefill():
                self.leg.silent()
                self._end("prefill_failed")
            else:
                self.leg.cancel()
                self._end("decode_failed")
        return known

    def waits_for_prefill(self) -> bool:
        """Whether a decode worker that fails now does so for want of the prefill.

        It has nothing else to do but to wait for it; what fails at once, fails by itself.
        """
        return self.leg.is_open and self.leg.age_seconds() >= _OWN_FAILURE_SECONDS

    def abort(self, error: RouterError) -> None:
        """As Lease.abort."""
        if self.decode is not None:
            self.decode.abort(error)
        self._notify(error)

    def close(self) -> None:
        """The stream has ended, in whatever way; idempotent."""
        if self._closed:
            return
        self._closed = True
        self.on_abort = None
        self.release_reservation()
        if self.decode is not None:
            self.decode.close()
        self.ticket.owner = None
        if self.leg.is_open and self._responded and self._linger_seconds:
            asyncio.get_running_loop().call_later(self._linger_seconds, self._cut)
        else:
            self._cut()
        self._end("ok" if self._responded else "cancelled")

    def release_reservation(self) -> None:
        """The decode worker is being picked, or will not be."""
        if self.reservation is not None:
            self.reservation.release()
            self.reservation = None

    def _cut(self) -> None:
        self.leg.cancel()
        self._pairs.remove(self)

    def _end(self, outcome: str) -> None:
        """Count the first outcome only."""
        if not self._outcome:
            self._outcome = outcome
            self._books.metrics.pd.pairs(self.decision.model, outcome).inc()


class Pairs:
    """The pairs that hold something: an open stream or a prefill that still runs."""

    def __init__(self) -> None:
        self._by_id: dict[str, Pair] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Pair]:
        return iter(list(self._by_id.values()))

    @staticmethod
    def new_id() -> str:
        return secrets.token_hex(_PAIR_ID_BYTES)

    def get(self, pair_id: str) -> Pair | None:
        """None where another replica has it."""
        return self._by_id.get(pair_id)

    def add(self, pair: Pair) -> None:
        self._by_id[pair.id] = pair

    def leg_ended(self, pair: Pair) -> None:
        if pair._closed:
            self.remove(pair)

    def remove(self, pair: Pair) -> None:
        self._by_id.pop(pair.id, None)

    def abandon(self, worker: Worker | None = None) -> None:
        """Give up all whose prefill runs, or those on one worker."""
        for pair in self:
            if worker is None or pair.leg.worker is worker:
                pair.abandon()
