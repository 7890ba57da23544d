"""One prefill on one worker: its claim, its answer, and what that says about the worker.

The leg is separate from the pair because it begins earlier: the prefill is sent before the decode
worker is known, and may fail before there is a pair.
"""

from collections.abc import Callable
from typing import Final

import structlog
from msgspec import Struct

from extproc.clock import Clock
from extproc.errors import RouterError, prefill_failed, prefill_refused, retry_after_seconds
from extproc.headers import RETRY_AFTER_HEADER
from extproc.metrics.service import PdMetrics
from extproc.routing.claim import Claim
from extproc.routing.outcomes import BUSY_STATUSES, WorkerOutcomes
from extproc.workers.engine_calls import (
    EngineAnswer,
    EngineTimeoutError,
    EngineUnreachableError,
    PrefillCall,
)
from extproc.workers.worker import Worker

__all__ = ["LegParts", "PrefillLeg"]

_log = structlog.get_logger()

_OK: Final = 200
_REDIRECT: Final = 300
_CLIENT_ERROR: Final = 400
_TOO_MANY_REQUESTS: Final = 429
_SERVER_ERROR: Final = 500
# A decode worker that fails sooner has not failed because of the prefill: it has hardly waited.
_OWN_FAILURE_SECONDS: Final = 1.0


class LegParts(Struct, frozen=True, kw_only=True):
    """What all legs of one service use.

    `recheck` is called with a worker whose answer may mean that it has another role by now.
    """

    clock: Clock
    metrics: PdMetrics
    outcomes: WorkerOutcomes
    recheck: Callable[[Worker], None]


class PrefillLeg:
    """The prefill worker's part of a request. It ends once, by its answer or by `cancel`."""

    __slots__ = ("_parts", "_request_id", "_sent_at", "_settled", "call", "claim", "model")

    def __init__(
        self, parts: LegParts, model: str, claim: Claim, sent_at: float, *, request_id: str
    ) -> None:
        """The caller sets `call` as soon as the connection is made."""
        self._parts = parts
        self._request_id = request_id
        self._sent_at = sent_at
        self._settled = False
        self.model = model
        self.claim = claim
        self.call: PrefillCall | None = None

    @property
    def worker(self) -> Worker:
        return self.claim.worker

    @property
    def is_open(self) -> bool:
        return not self._settled

    def explains_decode_failure(self) -> bool:
        """Return True if a decode worker that fails now fails for want of this prefill."""
        if self._settled:
            return False
        return self._parts.clock.monotonic() - self._sent_at >= _OWN_FAILURE_SECONDS

    async def answer(self) -> EngineAnswer | str:
        """Wait for the worker's answer; returns the reason if it failed."""
        assert self.call is not None  # noqa: S101 (made before)
        try:
            return await self.call.answer()
        except EngineTimeoutError:
            return "timeout"
        except EngineUnreachableError:
            return "broken"

    def ended(self, answer: EngineAnswer | str) -> RouterError | None:
        """Record what `answer` returned; returns the error for the client, None if all is well."""
        error = self._failed(answer) if isinstance(answer, str) else self._answered(answer)
        if error is not None:
            self._parts.recheck(self.worker)
        return error

    def not_connected(self) -> None:
        """The worker did not accept the connection."""
        self._failed("connect")
        self._parts.recheck(self.worker)

    def _answered(self, answer: EngineAnswer) -> RouterError | None:
        parts, status, now = self._parts, answer.status, self._parts.clock.monotonic()
        if not (_OK <= status < _REDIRECT or _CLIENT_ERROR <= status < _SERVER_ERROR):
            return self._failed("status_5xx", answer)
        if status >= _CLIENT_ERROR:
            parts.metrics.prefill_failures(self.model, "status_4xx").inc()
        else:
            parts.metrics.prefill_seconds(self.model).observe(now - self._sent_at)
            self.claim.started(now)
        if status == _TOO_MANY_REQUESTS:
            parts.outcomes.busy(self.worker, self.model, now, _retry_after(answer), self._sent_at)
        else:
            parts.outcomes.succeeded(self.worker, self.model, now, self._sent_at)
        self._end()
        if status < _CLIENT_ERROR:
            return None
        return prefill_refused(status, answer.body, answer.headers)

    def _failed(self, reason: str, answer: EngineAnswer | None = None) -> RouterError:
        """It has failed, and not by the client's fault; returns the error for the client."""
        parts, worker, model = self._parts, self.worker, self.model
        now = parts.clock.monotonic()
        _log.warning(
            "prefill_attempt_failed",
            request_id=self._request_id,
            model=self.model,
            worker=self.worker.url,
            reason=reason,
        )
        parts.metrics.prefill_failures(self.model, reason).inc()
        if answer is None:
            parts.outcomes.failed(worker, model, now, self._sent_at)
        elif answer.status in BUSY_STATUSES:
            parts.outcomes.busy(worker, model, now, _retry_after(answer), self._sent_at)
        else:
            parts.outcomes.server_error(worker, model, now, self._sent_at)
        self._end()
        return prefill_failed()

    def silent(self) -> None:
        """The decode worker, or Envoy, has given up waiting for it."""
        if self.call is not None:
            self.call.cancel()
        if not self._settled:
            self._failed("silent")

    def cancel(self) -> None:
        """The prefill is not needed any more; idempotent."""
        if self.call is not None:
            self.call.cancel()
        if not self._settled:
            self._parts.outcomes.undecided(self.worker, self.model)
            self._end()

    def _end(self) -> None:
        self._settled = True
        self.claim.release()


def _retry_after(answer: EngineAnswer) -> float | None:
    """The header `retry-after` in seconds."""
    return retry_after_seconds(dict(answer.headers).get(RETRY_AFTER_HEADER, ""))
