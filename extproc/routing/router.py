"""The one path every request takes: from a parsed request to a decision and its lease."""

from collections.abc import Mapping
from random import Random

from extproc.clock import Clock
from extproc.errors import model_not_found, no_healthy_workers
from extproc.policies.base import Policy, Query
from extproc.routing.decision import Decision
from extproc.routing.lease import Lease, LeaseBooks
from extproc.routing.request import Request
from extproc.workers.active_load import ActiveLoad
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.worker import Worker

__all__ = ["Router"]

_CLOSED = BreakerState.CLOSED


class Router:
    """Routes requests for the configured models over the registered workers."""

    def __init__(
        self,
        *,
        policies: Mapping[str, Policy],
        active_load: ActiveLoad,
        books: LeaseBooks,
        random: Random,
        request_timeout_seconds: float,
        destinations_max: int,
    ) -> None:
        """`policies` by model id, in the order of the configuration.

        `destinations_max` is the number of workers named for one request, 1 for gateways that
        can not walk a list.
        """
        self._policies = dict(policies)
        self._queries = {model: Query(model) for model in policies}
        self._only_model = next(iter(policies)) if len(policies) == 1 else None
        self._active_load = active_load
        self._books = books
        self._random = random
        self._timeout_ms = max(1, round(request_timeout_seconds * 1000))
        self._destinations_max = destinations_max

    @property
    def model_ids(self) -> list[str]:
        return list(self._policies)

    @property
    def only_model(self) -> str | None:
        """The model that is meant when a request names none, if there is just one."""
        return self._only_model

    async def route(self, request: Request) -> Lease:
        """Decide, book and claim; the caller closes the lease however the request ends.

        Raises RouterError: 404 for an unknown model (before anything is asked of workers),
        503 when none of its workers may be tried.
        """
        model = request.model if request.model is not None else self._only_model
        policy = self._policies.get(model) if model is not None else None
        if model is None or policy is None:
            raise model_not_found(model or "(none named, and several are served)")
        clock: Clock = self._books.clock
        now = clock.monotonic()
        candidates = [
            worker
            for worker in self._books.registry.pool(model)
            if worker.breaker.state is _CLOSED or worker.breaker.would_allow(now)
        ]
        if not candidates:
            raise no_healthy_workers()
        chosen, reason = policy.choose(candidates, self._queries[model])
        named = [chosen, *self._fallbacks(chosen, candidates)]
        decision = Decision(
            model=model,
            policy=policy.name,
            reason=reason,
            worker_url=chosen.url,
            destinations=tuple([worker.address or "" for worker in named]),
            timeout_ms=0 if request.stream else self._timeout_ms,
        )
        self._books.metrics.decisions(model, policy.name, reason).inc()
        probe = chosen.breaker.claim(now)
        return Lease(self._books, decision, named, self._active_load.book(chosen, now), probe, now)

    def _fallbacks(self, chosen: Worker, candidates: list[Worker]) -> list[Worker]:
        """Whom to try when the chosen worker refuses the connection, less loaded first.

        A few are taken from a random place on before the loads are compared: with a fixed
        order every request of a dead worker would land on the same next one.
        """
        count = self._destinations_max - 1
        if count <= 0 or len(candidates) == 1:
            return []
        start = int(self._random.random() * len(candidates))
        wanted = min(2 * count + 1, len(candidates))
        looked_at = candidates[start : start + wanted]
        looked_at += candidates[: wanted - len(looked_at)]
        # By address: two names of one host must not make two attempts at it.
        others = {worker.address: worker for worker in looked_at}
        others.pop(chosen.address, None)
        return sorted(others.values(), key=_in_flight)[:count]


def _in_flight(worker: Worker) -> int:
    return worker.in_flight
