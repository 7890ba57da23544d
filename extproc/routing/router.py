"""The one path every request takes: from a parsed request to a decision and its lease."""

from collections.abc import Mapping, Sequence
from random import Random

from extproc.errors import model_not_found, no_healthy_workers
from extproc.policies.base import Policy
from extproc.routing.decision import Decision
from extproc.routing.lease import Lease, WorkerOutcomes
from extproc.routing.local_endpoints import Answer, LocalEndpoints
from extproc.routing.pd.pair import Pair
from extproc.routing.pd.passes import Chosen, Disaggregation
from extproc.routing.rank_chooser import PromptTokens, RankChooser
from extproc.routing.request import Request
from extproc.workers.tickets import RankBooking, Tickets
from extproc.workers.worker import Worker

__all__ = ["Router"]


class Router:
    """Routes requests for the configured models over the registered workers."""

    def __init__(
        self,
        *,
        policies: Mapping[str, Policy | None],
        active_load: Tickets,
        books: WorkerOutcomes,
        random: Random,
        request_timeout_seconds: float,
        destinations_max: int,
        kv: RankChooser | None = None,
        token_endpoints: LocalEndpoints | None = None,
        pd: Disaggregation | None = None,
    ) -> None:
        """`policies` by model id, in the order of the configuration; None where `kv` chooses.

        `destinations_max` is the number of workers named for one request, 1 for gateways that
        can not walk a list.
        """
        self._policies = dict(policies)
        self._only_model = next(iter(policies)) if len(policies) == 1 else None
        self._active_load = active_load
        self._books = books
        self._random = random
        self._timeout_ms = max(1, round(request_timeout_seconds * 1000))
        self._destinations_max = destinations_max
        self._kv = kv
        self._token_endpoints = token_endpoints or LocalEndpoints({})
        self._pd = pd

    @property
    def model_ids(self) -> list[str]:
        return list(self._policies)

    @property
    def only_model(self) -> str | None:
        """The model that is meant when a request names none, if there is just one."""
        return self._only_model

    async def answer(self, request: Request) -> Answer:
        """What the client of an endpoint `answered_locally` gets; raises RouterError."""
        return await self._token_endpoints.answer(request, self._resolve(request.model)[0])

    async def route(self, request: Request) -> Lease | Pair:
        """Decide, book and claim; the caller closes the lease however the request ends.

        Raises RouterError: 404 for an unknown model (before anything is asked of workers),
        503 when none of its workers may be tried.
        """
        model, adapter = self._resolve(request.model)
        if self._pd is not None and self._books.registry.is_disaggregated(model):
            return await self._route_apart(self._pd, request, model, adapter)
        prompt = None
        if self._policies[model] is None:
            self._candidates(model, self._books.clock.monotonic())  # before any work for nobody
            prompt = await self._read(request, model, adapter)
        # Workers and their books may have changed while text became tokens in a thread.
        now = self._books.clock.monotonic()
        candidates = self._candidates(model, now)
        chosen = self._choose(model, candidates, prompt, now)
        return self._placed(request, model, chosen, candidates, now)

    async def _route_apart(
        self, pd: Disaggregation, request: Request, model: str, adapter: str | None
    ) -> Lease | Pair:
        """A prefill worker and a decode worker; or a decode worker that needs no other."""
        pd.check(request, model)
        prompt = await self._read(request, model, adapter)
        if prompt is not None and pd.may_decode_alone(model):
            now = self._books.clock.monotonic()
            decodes = self._books.registry.candidates(model, "decode", now)
            if decodes:
                chosen = self._choose(model, decodes, prompt, now)
                if chosen.placed is not None and pd.decode_alone(model, chosen.placed):
                    self._books.metrics.pd.decode_alone(model).inc()
                    return self._placed(request, model, chosen, decodes, now)

        last: Chosen | None = None

        def choose(candidates: Sequence[Worker], now: float) -> Chosen:
            nonlocal last
            last = self._choose(model, candidates, prompt, now)
            return last

        pair = await pd.route(request, model, choose)
        if self._kv is not None and last is not None and last.placed is not None:
            self._kv.decided(model, last.placed)
        return pair

    async def _read(self, request: Request, model: str, adapter: str | None) -> PromptTokens | None:
        """The prompt's tokens, for a policy that looks at them."""
        if self._policies[model] is not None or self._kv is None:
            return None
        return await self._kv.read(model, request, adapter)

    def _choose(
        self, model: str, candidates: Sequence[Worker], prompt: PromptTokens | None, now: float
    ) -> Chosen:
        policy = self._policies[model]
        if policy is not None:
            worker, reason = policy.choose(candidates)
            return Chosen(worker, policy.name, reason)
        kv = self._kv
        assert kv is not None and prompt is not None  # noqa: S101, PT018 (see _read)
        placed = kv.place(model, candidates, prompt, now)
        rank = placed.rank
        return Chosen(rank.worker, kv.policy_name(model), placed.reason, rank.dp_rank, placed)

    def _placed(
        self,
        request: Request,
        model: str,
        chosen: Chosen,
        candidates: Sequence[Worker],
        now: float,
    ) -> Lease:
        """The request goes to the chosen worker as it is, with others to fall back to."""
        worker, policy, reason, dp_rank, placed = chosen
        members = b""
        kv = self._kv
        if placed is not None and kv is not None and kv.has_ranks(worker) and request.body:
            members = b'"routed_dp_rank":%d' % dp_rank
            # The body goes as it is to whoever serves: all of them must have that rank.
            candidates = [other for other in candidates if kv.has_rank(other, dp_rank)]
        named = [worker, *self._fallbacks(worker, candidates)]
        decision = Decision(
            model=model,
            policy=policy,
            reason=reason,
            worker_url=worker.url,
            destinations=tuple([one.address or "" for one in named]),
            timeout_ms=0 if request.stream else self._timeout_ms,
            cached_tokens=placed.cached_tokens if placed is not None else 0,
            total_tokens=placed.total_tokens if placed is not None else 0,
            body_members=members,
        )
        self._books.metrics.decisions(model, policy, reason).inc()
        probe, ticket = worker.breaker.claim(now), self._active_load.book(worker, now)
        lease = Lease(self._books, decision, named, ticket, probe, now)
        if placed is None or kv is None:
            return lease
        kv.decided(model, placed)
        ticket.booking = placed.book(now, streamed=request.stream)

        def rebook(other: Worker, at: float) -> RankBooking | None:
            return kv.book_served(other, dp_rank, placed.prefill_tokens, request.stream, at)

        lease.rebook = rebook
        return lease

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

    def _candidates(self, model: str, now: float) -> list[Worker]:
        """The workers that may be tried; raises RouterError 503 when there are none."""
        candidates = self._books.registry.candidates(model, "plain", now)
        if not candidates:
            raise no_healthy_workers()
        return candidates

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
