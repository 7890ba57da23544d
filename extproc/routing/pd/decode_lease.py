"""The lease of a decode worker, whose failure can be the fault of the prefill worker."""

from collections.abc import Sequence

from extproc.routing.claim import Claim, Claims
from extproc.routing.decision import Decision
from extproc.routing.lease import Lease, LeaseParts
from extproc.routing.pd.prefill_leg import PrefillLeg
from extproc.workers.worker import Worker

__all__ = ["DecodeLease", "DecodeLeases"]


class DecodeLease(Lease):
    """As Lease. `leg` is the prefill of the same request, None in another replica."""

    __slots__ = ("_leg",)

    def __init__(
        self,
        parts: LeaseParts,
        decision: Decision,
        named: Sequence[Worker],
        claim: Claim,
        decided_at: float,
        leg: PrefillLeg | None,
    ) -> None:
        super().__init__(parts, decision, named, claim, decided_at)
        self._leg = leg

    def _failed_for_want_of_prefill(self) -> bool:
        return self._leg is not None and self._leg.explains_decode_failure()

    def _answered_with_error(self, worker: Worker, status: int) -> None:
        self._parts.recheck(worker)  # it may have another role by now


class DecodeLeases:
    """Claims decode workers."""

    def __init__(self, parts: LeaseParts, claims: Claims) -> None:
        self.parts = parts
        self._claims = claims

    def reserve(self, worker: Worker, now: float) -> Claim:
        """Claim a worker that is going to be picked in a moment, so that others see it."""
        return self._claims.take(worker, now)

    def take(
        self, decision: Decision, named: Sequence[Worker], now: float, leg: PrefillLeg | None
    ) -> DecodeLease:
        """Claim the first of `named`, the workers behind `decision.destinations`."""
        claim = self._claims.take(named[0], now)
        return DecodeLease(self.parts, decision, named, claim, now, leg)
