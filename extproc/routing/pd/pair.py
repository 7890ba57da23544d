"""A request on two workers: the prefill that we sent, and the decode that Envoy sends.

The ext_proc stream of the first pass holds the pair. The pair cancels the prefill as soon as it is
not needed any more. It aborts the request at once when the prefill fails; otherwise the decode
worker would wait for it for minutes.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterator
from typing import Final

from extproc.clock import Clock
from extproc.errors import RouterError, prefill_failed
from extproc.metrics.service import PdMetrics
from extproc.routing.claim import Claim
from extproc.routing.decision import Decision
from extproc.routing.lease import BusyAnswers
from extproc.routing.pd.decode_lease import DecodeLease
from extproc.routing.pd.prefill_leg import PrefillLeg
from extproc.workers.worker import Worker

__all__ = ["Pair", "Pairs"]

_CLIENT_ERROR: Final = 400
_SERVER_ERROR: Final = 500
_PAIR_ID_BYTES: Final = 12


class Pair:
    """As Lease, for a request on two workers.

    `decode` is the lease of the decode worker if it was picked together with the prefill worker.
    Otherwise the second pass picks it, and `reservation` counts on the likely one until then.
    """

    __slots__ = (
        "_closed",
        "_failed_at",
        "_followed",
        "_outcome",
        "_pairs",
        "_responded",
        "decision",
        "decode",
        "id",
        "leg",
        "on_abort",
        "reservation",
    )

    def __init__(
        self,
        pairs: "Pairs",
        pair_id: str,
        decision: Decision,
        leg: PrefillLeg,
        *,
        decode: DecodeLease | None,
        reservation: Claim | None,
    ) -> None:
        self._pairs = pairs
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
        self.on_abort: Callable[[RouterError], None] | None = None
        # One of its two tickets is enough for the janitor.
        self.claim.ticket.owner = self
        pairs.add(self)

    @property
    def claim(self) -> Claim:
        """The claim by whose age the janitor judges the request."""
        return self.leg.claim if self.decode is None else self.decode.claim

    @property
    def served(self) -> Worker | None:
        """The prefill worker, for the debug headers."""
        return self.leg.worker

    @property
    def served_urls(self) -> tuple[str, str | None]:
        """The URLs of the prefill worker, and of the decode worker once it is known."""
        decoded = None if self.decode is None else self.decode.served
        return self.leg.worker.url, None if decoded is None else decoded.url

    @property
    def served_overlap(self) -> tuple[int, int]:
        """Cached and total tokens of the prefill worker, which is the first of `served_urls`."""
        return self.decision.cached_tokens, self.decision.total_tokens

    @property
    def holds_stream(self) -> bool:
        """True while the prefill runs: only this stream can end the request if it fails."""
        return self.leg.is_open and not self._closed

    def follow(self) -> None:
        """Wait for the prefill worker's answer in a task."""
        self._followed = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        leg = self.leg
        try:
            answer = await leg.answer()
        except asyncio.CancelledError:
            return  # by the leg, whose outcome is recorded
        if not leg.is_open:
            return  # cancelled while the answer was on its way to us
        error = leg.ended(answer)
        self._leg_ended()
        if error is not None:
            self._end(error.code)
            self._fail(error)

    def abandon(self) -> None:
        """End a prefill that is in vain: its worker has another role, or this service stops."""
        if self.leg.is_open:
            self.leg.cancel()
            self._leg_ended()
            self._end("abandoned")
            self._fail(prefill_failed())

    def _leg_ended(self) -> None:
        if self._closed:
            self._pairs.remove(self)

    def _fail(self, error: RouterError) -> None:
        """The prefill has failed: end the request, unless it is over."""
        if not self._closed:
            self._failed_at = self._pairs.clock.monotonic()
            self._call_on_abort(error)

    def abort(self, error: RouterError) -> None:
        """As Lease.abort."""
        if self.decode is not None:
            self.decode.abort(error)
        self._call_on_abort(error)

    def _call_on_abort(self, error: RouterError) -> None:
        # The janitor would abort it again, and record a failure of the decode worker.
        self.claim.ticket.owner = None
        on_abort, self.on_abort = self.on_abort, None
        if on_abort is not None:
            on_abort(error)

    def answer_written(self) -> None:
        """The error for the client is written; measures how long that took after a failure."""
        if self._failed_at is not None:
            seconds = self._pairs.clock.monotonic() - self._failed_at
            self._pairs.metrics.fail_fast_seconds().observe(seconds)

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
        """As Lease.responded, for the response of the decode worker."""
        self._responded = status
        if self.decode is not None:
            self.decode.responded(
                status, address, code_details, streamed, attempts, busy, retry_after
            )
        if status >= _CLIENT_ERROR:
            # The decode half of the request is over, so the prefill is not needed.
            if status >= _SERVER_ERROR and self.leg.explains_decode_failure():
                self.leg.silent()
                self._end("prefill_failed")
            else:
                self.leg.cancel()
                self._end("decode_failed")

    def close(self) -> None:
        """The stream has ended, in whatever way; idempotent."""
        if self._closed:
            return
        self._closed = True
        self.on_abort = None
        self.claim.ticket.owner = None
        self.release_reservation()
        if self.decode is not None:
            self.decode.close()
        linger_seconds = self._pairs.linger_seconds
        if self.leg.is_open and self._responded and linger_seconds:
            asyncio.get_running_loop().call_later(linger_seconds, self._cut)
        else:
            self._cut()
        self._end("ok" if self._responded else "cancelled")

    def release_reservation(self) -> None:
        """The decode worker is picked now, or never; idempotent."""
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
            self._pairs.metrics.pairs(self.decision.model, outcome).inc()


class Pairs:
    """The pairs that have an open stream or a prefill that still runs.

    `linger_seconds` is how long a prefill may run on after a good response has ended.
    """

    def __init__(self, clock: Clock, metrics: PdMetrics, *, linger_seconds: float) -> None:
        self.clock = clock
        self.metrics = metrics
        self.linger_seconds = linger_seconds
        self._by_id: dict[str, Pair] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Pair]:
        return iter(list(self._by_id.values()))

    @staticmethod
    def new_id() -> str:
        return secrets.token_hex(_PAIR_ID_BYTES)

    def get(self, pair_id: str) -> Pair | None:
        """Return the pair; None if another replica has it."""
        return self._by_id.get(pair_id)

    def add(self, pair: Pair) -> None:
        self._by_id[pair.id] = pair

    def remove(self, pair: Pair) -> None:
        self._by_id.pop(pair.id, None)

    def abandon(self, worker: Worker | None = None) -> None:
        """Abandon all pairs whose prefill runs, or those of one prefill worker."""
        for pair in self:
            if worker is None or pair.leg.worker is worker:
                pair.abandon()
