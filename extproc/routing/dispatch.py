"""From a chosen worker to a decision and its lease: the request goes to that worker as it is.

Others are named beside it, which Envoy tries when the chosen one refuses the connection.
"""

from collections.abc import Mapping, Sequence
from random import Random

from extproc.routing.adapters import joined_members, model_member
from extproc.routing.chooser import Chosen
from extproc.routing.claim import Claims
from extproc.routing.decision import Decision
from extproc.routing.lease import Lease, LeaseParts
from extproc.routing.placement import NO_OVERLAP, Placed
from extproc.routing.request import Request
from extproc.workers.worker import Worker

__all__ = ["Dispatch"]


class Dispatch:
    """Claims chosen workers.

    `destinations_max` is the number of workers named for one request, 1 for gateways that
    cannot walk a list. With `retry_busy` a worker's 503 or 429 goes to the next one, too.
    `first_byte_timeouts` are seconds by model, for streamed responses.
    """

    def __init__(
        self,
        claims: Claims,
        lease_parts: LeaseParts,
        random: Random,
        *,
        request_timeout_seconds: float,
        destinations_max: int,
        retry_busy: bool,
        first_byte_timeouts: Mapping[str, float],
    ) -> None:
        self._claims = claims
        self._lease_parts = lease_parts
        self._decisions = lease_parts.metrics.decisions
        self._random = random
        self._timeout_ms = max(1, round(request_timeout_seconds * 1000))
        self._destinations_max = destinations_max
        self._retry_busy = retry_busy
        self._first_byte_ms = {
            model: max(1, round(seconds * 1000)) for model, seconds in first_byte_timeouts.items()
        }

    def send(
        self,
        request: Request,
        model: str,
        chosen: Chosen,
        candidates: Sequence[Worker],
        now: float,
    ) -> Lease:
        """Claim the chosen worker; the others of `candidates` may serve instead."""
        worker, policy, reason, placed, dp_rank = chosen
        members, rank_header = b"", None
        in_header = dp_rank is not None and worker.engine.ranks_in_header
        if dp_rank is not None and (request.body or in_header):
            if in_header:
                rank_header = dp_rank
            else:
                members = b'"routed_dp_rank":%d' % dp_rank
            # The request is the same for all destinations, so each must have that rank, and read
            # it from the same place.
            of = self._claims.ranks.of
            candidates = [
                other
                for other in candidates
                if dp_rank < len(of(other)) and other.engine.ranks_in_header is in_header
            ]
        name = model_member(request, model, worker)
        if request.adapter is not None:
            candidates = [one for one in candidates if model_member(request, model, one) == name]
        fallbacks = self._fallbacks(worker, candidates)
        named = [worker, *fallbacks]
        decision = Decision(
            model=model,
            policy=policy,
            reason=reason,
            worker_url=worker.url,
            destinations=tuple([one.address or "" for one in named]),
            timeout_ms=0 if request.stream else self._timeout_ms,
            cached_tokens=placed.cached_tokens if placed is not None else 0,
            total_tokens=placed.total_tokens if placed is not None else 0,
            predicted_tokens=placed.predicted_tokens if placed is not None else 0,
            fallback_overlaps=self._overlaps(placed, fallbacks),
            body_members=joined_members(members, name),
            rank_header=rank_header,
            retry_busy=self._retry_busy and len(named) > 1 and worker.role == "plain",
            first_byte_timeout_ms=self._first_byte_ms.get(model, 0) if request.stream else 0,
            role=worker.role,
            adapter=request.adapter,
        )
        self._decisions(model, policy, reason).inc()
        claim = self._claims.take(worker, now, placed, streamed=request.stream)
        return Lease(self._lease_parts, decision, named, claim, now)

    def _overlaps(
        self, placed: Placed | None, fallbacks: Sequence[Worker]
    ) -> tuple[tuple[int, int], ...]:
        """What each fallback holds of the prompt, on the rank that it would serve it on."""
        if placed is None or not placed.total_tokens:
            return ()
        of, dp_rank = self._claims.ranks.of, placed.rank.dp_rank
        return tuple(
            [
                placed.overlap_of(ranks[dp_rank if dp_rank < len(ranks) else 0])
                if (ranks := of(worker))
                else NO_OVERLAP
                for worker in fallbacks
            ]
        )

    def _fallbacks(self, chosen: Worker, candidates: Sequence[Worker]) -> list[Worker]:
        """The workers to try when the chosen one refuses the connection, less loaded first.

        A few are taken from a random place on before the loads are compared: with a fixed
        order every request of a dead worker would land on the same next one.
        """
        count = self._destinations_max - 1
        if count <= 0 or len(candidates) == 1:
            return []
        start = int(self._random.random() * len(candidates))
        wanted = min(2 * count + 1, len(candidates))
        looked_at = [*candidates[start : start + wanted]]
        looked_at += candidates[: wanted - len(looked_at)]
        # By address: two names of one host must not make two attempts at it.
        others = {worker.address: worker for worker in looked_at}
        others.pop(chosen.address, None)
        return sorted(others.values(), key=_in_flight)[:count]


def _in_flight(worker: Worker) -> int:
    return worker.in_flight
