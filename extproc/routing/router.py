"""The one path every request takes: from a parsed request to a decision and its lease."""

from collections.abc import Mapping, Sequence
from random import Random

from extproc.errors import model_not_found, no_healthy_workers
from extproc.policies.base import Policy, Query
from extproc.routing.decision import Decision
from extproc.routing.kv_routing import KvRouting
from extproc.routing.lease import Lease, LeaseBooks
from extproc.routing.request import Request
from extproc.routing.token_endpoints import Answer, TokenEndpoints
from extproc.workers.active_load import ActiveLoad, RankBooking
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.worker import Worker

__all__ = ["Router"]

_CLOSED = BreakerState.CLOSED


class Router:
    """Routes requests for the configured models over the registered workers."""

    def __init__(
        self,
        *,
        policies: Mapping[str, Policy | None],
        active_load: ActiveLoad,
        books: LeaseBooks,
        random: Random,
        request_timeout_seconds: float,
        destinations_max: int,
        kv: KvRouting | None = None,
        token_endpoints: TokenEndpoints | None = None,
    ) -> None:
        """`policies` by model id, in the order of the configuration; None where `kv` chooses.

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
        self._kv = kv
        self._token_endpoints = token_endpoints or TokenEndpoints({})

    @property
    def model_ids(self) -> list[str]:
        return list(self._policies)

    @property
    def only_model(self) -> str | None:
        """The model that is meant when a request names none, if there is just one."""
        return self._only_model

    async def answer(self, request: Request) -> Answer:
        """What the client of an endpoint `for_us` gets; raises RouterError."""
        return await self._token_endpoints.answer(request, self._resolve(request.model)[0])

    async def route(self, request: Request) -> Lease:
        """Decide, book and claim; the caller closes the lease however the request ends.

        Raises RouterError: 404 for an unknown model (before anything is asked of workers),
        503 when none of its workers may be tried.
        """
        model, adapter = self._resolve(request.model)
        policy = self._policies[model]
        if policy is None:
            return await self._route_by_tokens(request, model, adapter)
        now = self._books.clock.monotonic()
        candidates = self._candidates(model, now)
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
        return self._lease(decision, named, now)

    def _resolve(self, name: str | None) -> tuple[str, str | None]:
        """The configured model, and the adapter where a name is `model:adapter`."""
        if name is None:
            name = self._only_model
            if name is None:
                raise model_not_found("(none named, and several are served)")
        if name in self._policies:
            return name, None
        base, _, adapter = name.rpartition(":")
        if base in self._policies and adapter:
            return base, adapter
        raise model_not_found(name)

    async def _route_by_tokens(self, request: Request, model: str, adapter: str | None) -> Lease:
        kv = self._kv
        assert kv is not None  # noqa: S101 (it has every model without a policy of its own)
        self._candidates(model, self._books.clock.monotonic())  # before any work for nobody
        prompt = await kv.read(model, request, adapter)
        # Workers and their books may have changed while text became tokens in a thread.
        now = self._books.clock.monotonic()
        candidates = self._candidates(model, now)
        placed = kv.place(model, candidates, prompt, now)
        chosen, rank, members = placed.target.worker, placed.target.rank, b""
        others: Sequence[Worker] = candidates
        if kv.has_ranks(chosen) and request.body:
            members = b'"routed_dp_rank":%d' % rank
            # The body goes as it is to whoever serves: all of them must have that rank.
            others = [worker for worker in candidates if kv.has_rank(worker, rank)]
        named = [chosen, *self._fallbacks(chosen, others)]
        decision = Decision(
            model=model,
            policy=kv.policy_name(model),
            reason=placed.reason,
            worker_url=chosen.url,
            destinations=tuple([worker.address or "" for worker in named]),
            timeout_ms=0 if request.stream else self._timeout_ms,
            cached_tokens=placed.cached_tokens,
            total_tokens=placed.total_tokens,
            body_members=members,
        )
        lease = self._lease(decision, named, now)
        lease.ticket.booking = placed.book(now, streamed=request.stream)

        def rebook(worker: Worker, at: float) -> RankBooking | None:
            return kv.book_served(worker, rank, placed.prefill_tokens, request.stream, at)

        lease.rebook = rebook
        return lease

    def _candidates(self, model: str, now: float) -> list[Worker]:
        """The workers that may be tried; raises RouterError 503 when there are none."""
        candidates = [
            worker
            for worker in self._books.registry.pool(model)
            if worker.breaker.state is _CLOSED or worker.breaker.would_allow(now)
        ]
        if not candidates:
            raise no_healthy_workers()
        return candidates

    def _lease(self, decision: Decision, named: list[Worker], now: float) -> Lease:
        self._books.metrics.decisions(decision.model, decision.policy, decision.reason).inc()
        chosen = named[0]
        probe = chosen.breaker.claim(now)
        return Lease(self._books, decision, named, self._active_load.book(chosen, now), probe, now)

    def _fallbacks(self, chosen: Worker, candidates: Sequence[Worker]) -> list[Worker]:
        """Whom to try when the chosen worker refuses the connection, less loaded first.

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
