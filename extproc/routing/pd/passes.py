"""Models whose workers prefill and decode apart: from a request to a pair of workers.

The first pass picks the prefill worker, sends it the request on a connection of its own, and
only when that is made says where the client's request goes on. The second pass picks the decode
worker. With `inline` the first pass picks both.

SGLang's workers meet by a room while both have the request. vLLM's decode worker needs what the
prefill worker answers, so there the first pass waits for it.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Final, NamedTuple

from msgspec import Struct

from extproc.config.schema import Config
from extproc.errors import (
    no_decode_workers,
    no_prefill_workers,
    not_disaggregated,
    service_overloaded,
    unsupported_body_mode,
)
from extproc.policies.decode_affinity import DecodeAffinity
from extproc.routing.decision import Decision
from extproc.routing.json_members import with_members
from extproc.routing.lease import Lease, WorkerOutcomes
from extproc.routing.pd.decode_order import DecodeOrder
from extproc.routing.pd.handoff import (
    KV_PREFILL_MEMBERS,
    bootstrap_members,
    kv_decode_members,
    prompts_of_a_batch,
)
from extproc.routing.pd.pair import Pair, Pairs, PrefillLeg, Reservation
from extproc.routing.placement import Placed
from extproc.routing.ranks import Ranks
from extproc.routing.request import ClientHeaders, Request
from extproc.workers.engine_calls import (
    EngineUnreachableError,
    PrefillCall,
    PrefillClient,
    PrefillClientOverloadedError,
)
from extproc.workers.observer import WorkerObserver
from extproc.workers.registry import WorkerRegistry
from extproc.workers.tickets import Tickets
from extproc.workers.worker import Role, Worker

__all__ = ["Chosen", "DecodeQuery", "Disaggregation", "PdSettings"]

# Of the time for a decision: how long one prefill worker may take to accept a connection.
_CONNECT_SHARE: Final = 0.3
# Of the engine's answer: enough for its own words about a 4xx, and for a handle to its cache.
_KEPT_BYTES: Final = 64 * 1024
_KEPT_OF_KV_ANSWER_BYTES: Final = 1024 * 1024
_CLIENT_ERROR: Final = 400


class PdSettings(Struct, frozen=True, kw_only=True):
    """`protocols` and `min_prefill_tokens` by model id; times in seconds, 0 attempts is 1.

    `decode_attempts` bounds how many decode workers are tried for one request.
    """

    inline: bool
    protocols: Mapping[str, str]
    min_prefill_tokens: Mapping[str, int]
    decode_attempts: int
    connect_seconds: float
    prefill_seconds: float
    kv_seconds: float
    linger_seconds: float
    request_timeout_ms: int
    authorization: str | None = None

    @classmethod
    def of(cls, config: Config, authorization: str | None) -> "PdSettings":
        pd, proxy = config.pd, config.proxy
        estimated = config.load.release == "estimate"
        return cls(
            inline=pd.decode == "inline",
            protocols={model.id: model.pd.protocol for model in config.models},
            min_prefill_tokens={model.id: model.pd.min_prefill_tokens for model in config.models},
            decode_attempts=config.destinations_max,
            connect_seconds=min(
                proxy.connect_timeout_secs, config.server.step_deadline_secs * _CONNECT_SHARE
            ),
            prefill_seconds=config.prefill_silence_secs,
            kv_seconds=pd.prefill_timeout_secs,
            # A gateway that ends our stream at the response headers does not tell when a good
            # response has ended.
            linger_seconds=pd.prefill_timeout_secs if estimated else pd.prefill_linger_secs,
            request_timeout_ms=max(1, round(proxy.request_timeout_secs * 1000)),
            authorization=authorization,
        )


class Chosen(NamedTuple):
    """A worker chosen by the model's policy; `placed` where that looked at tokens."""

    worker: Worker
    policy: str
    reason: str
    dp_rank: int = 0
    placed: Placed | None = None


class DecodeQuery(NamedTuple):
    """What the second pass is asked: attempt 1, 2, … of a request."""

    model: str
    order: DecodeOrder
    attempt: int


Choose = Callable[[Sequence[Worker], float], Chosen]


class _DecodeCandidate:
    """A decode worker beside a request; see policies.decode_affinity."""

    __slots__ = ("host", "kv_usage", "requests", "worker")

    def __init__(self, worker: Worker, requests: int, kv_usage: float) -> None:
        self.worker = worker
        self.host = worker.spec.url.host
        self.requests = requests
        self.kv_usage = kv_usage


class Disaggregation(WorkerObserver):
    """Both passes, for all models; all calls from one event loop."""

    def __init__(
        self,
        settings: PdSettings,
        books: WorkerOutcomes,
        active_load: Tickets,
        caller: PrefillClient,
        registry: WorkerRegistry,
        ranks: Ranks,
        random: Random,
        *,
        recheck: Callable[[Worker], None],
    ) -> None:
        """`recheck` is told of a worker whose answer may mean that it has another role."""
        self._settings = settings
        self._books = books
        self._active_load = active_load
        self._caller = caller
        self._registry = registry
        self._ranks = ranks
        self._affinity = DecodeAffinity(random)
        self._recheck = recheck
        self.pairs = Pairs()

    # -- first pass

    def check(self, request: Request, model: str) -> None:
        """Raise RouterError where no work can come to anything, before any is done."""
        if not request.endpoint.generates:
            raise not_disaggregated()
        if not request.body:
            raise unsupported_body_mode()
        now = self._books.clock.monotonic()
        if not self._registry.candidates(model, "prefill", now):
            raise no_prefill_workers()
        if not self._registry.candidates(model, "decode", now):
            raise no_decode_workers()

    def decode_alone(self, model: str, placed: Placed) -> bool:
        """Whether a decode worker that was chosen for what it holds is better left alone with
        the prompt.
        """
        least = self._settings.min_prefill_tokens[model]
        return 0 < placed.total_tokens < placed.cached_tokens + least

    def may_decode_alone(self, model: str) -> bool:
        """Whether `decode_alone` can be true."""
        return self._settings.min_prefill_tokens[model] > 0

    async def route(self, request: Request, model: str, choose: Choose) -> Pair:
        """Send the prefill, and decide where decode goes; `choose` is the model's policy.

        Raises RouterError.
        """
        forwarded = request.forwarded()
        waits = self._settings.protocols[model] == "nixl"
        prompts = None if waits else prompts_of_a_batch(request)
        leg, chosen, members = await self._send_prefill(
            request, model, choose, forwarded, None if waits else _Rooms(prompts)
        )
        try:
            if waits:
                members = await self._kv_of(leg)
            pair = self._pair(request, model, leg, chosen, members)
        except BaseException:
            leg.cancel()
            raise
        if leg.is_open:
            pair.follow()
        return pair

    async def _send_prefill(
        self,
        request: Request,
        model: str,
        choose: Choose,
        forwarded: ClientHeaders,
        rooms: "_Rooms | None",
    ) -> tuple[PrefillLeg, Chosen, bytes]:
        """Try prefill workers until one accepts the connection."""
        tried: set[Worker] = set()
        headers = self._headers(forwarded)
        while True:
            now = self._books.clock.monotonic()
            usable = self._registry.candidates(model, "prefill", now)
            candidates = [worker for worker in usable if worker not in tried]
            if not candidates:
                raise no_prefill_workers()
            if not self._registry.candidates(model, "decode", now):
                raise no_decode_workers()
            chosen = choose(candidates, now)
            worker = chosen.worker
            members = KV_PREFILL_MEMBERS if rooms is None else rooms.members(worker, chosen.dp_rank)
            ticket = self._active_load.book(worker, now)
            probe = worker.breaker.claim(now)
            leg = PrefillLeg(
                self._books, model, worker, ticket, probe, now, request_id=forwarded.request_id
            )
            if chosen.placed is not None:
                ticket.booking = chosen.placed.book(now, streamed=True)
            try:
                leg.call = await self._call(
                    worker, forwarded.path, headers, request, members, waits=rooms is None
                )
            except PrefillClientOverloadedError:
                leg.cancel()
                raise service_overloaded() from None
            except EngineUnreachableError:
                leg.failed("connect")
                tried.add(worker)
                self._recheck(worker)
            except BaseException:
                leg.cancel()
                raise
            else:
                return leg, chosen, members

    async def _call(
        self,
        worker: Worker,
        path: str,
        headers: Sequence[tuple[str, str]],
        request: Request,
        members: bytes,
        *,
        waits: bool,
    ) -> PrefillCall:
        settings = self._settings
        return await self._caller.post(
            worker.spec.url,
            path,
            headers,
            with_members(request.body, members),
            connect_seconds=settings.connect_seconds,
            answer_seconds=settings.kv_seconds if waits else settings.prefill_seconds,
            keep_bytes=_KEPT_OF_KV_ANSWER_BYTES if waits else _KEPT_BYTES,
        )

    def _headers(self, forwarded: ClientHeaders) -> list[tuple[str, str]]:
        headers = [("content-type", "application/json")]
        authorization = self._settings.authorization
        for name, value in forwarded.headers:
            if name != "authorization" or authorization is None:
                headers.append((name, value))
        if authorization is not None:
            headers.append(("authorization", authorization))
        return headers

    async def _kv_of(self, leg: PrefillLeg) -> bytes:
        """Wait for the prefill; gives what its answer has for the decode worker."""
        answer = await leg.answer()
        members = None if isinstance(answer, str) else kv_decode_members(answer.body)
        if members is None and not isinstance(answer, str) and answer.status < _CLIENT_ERROR:
            answer = "no_kv"
        error = leg.ended(answer)
        if error is not None:
            self._recheck(leg.worker)
            self._books.metrics.pd.pairs(leg.model, error.code).inc()
            raise error
        return members or b""

    def _pair(
        self, request: Request, model: str, leg: PrefillLeg, chosen: Chosen, members: bytes
    ) -> Pair:
        books, settings = self._books, self._settings
        now = books.clock.monotonic()
        candidates = self._decode_candidates(self._registry.candidates(model, "decode", now), now)
        if not candidates:
            raise no_decode_workers()
        host = leg.worker.spec.url.host
        ordered = [one.worker for one in self._affinity.order(candidates, host)]
        attempts = min(settings.decode_attempts, len(ordered))
        pair_id = self.pairs.new_id()
        placed = chosen.placed
        addresses = tuple([worker.address or "" for worker in ordered])
        order = DecodeOrder(attempts, host, pair_id, addresses)
        decision = Decision(
            model=model,
            policy=chosen.policy,
            reason=chosen.reason,
            worker_url=chosen.worker.url,
            destinations=addresses[:attempts] if settings.inline else (),
            timeout_ms=0 if request.stream else settings.request_timeout_ms,
            cached_tokens=placed.cached_tokens if placed is not None else 0,
            total_tokens=placed.total_tokens if placed is not None else 0,
            body_members=members,
            decode_order="" if settings.inline else order.to_header(),
            attempts=attempts,
        )
        books.metrics.decisions(model, decision.policy, decision.reason).inc()
        first = ordered[0]
        probe, ticket = first.breaker.claim(now), self._active_load.book(first, now)
        decode = reservation = None
        if settings.inline:
            decode = Lease(books, decision, ordered[:attempts], ticket, probe, now)
            decode.on_bad_answer = self._recheck
            _, reason = self._affinity.choose(candidates, host)
            books.metrics.pd.decode_choices(model, reason).inc()
        else:
            reservation = Reservation(first, ticket, probe)
        pair = Pair(
            books,
            self.pairs,
            decision,
            leg,
            pair_id=pair_id,
            decode=decode,
            reservation=reservation,
            linger_seconds=settings.linger_seconds,
            on_recheck=self._recheck,
        )
        if decode is not None:
            decode.excuse = pair.waits_for_prefill
        return pair

    # -- second pass

    def pick_decode(self, query: DecodeQuery) -> Lease:
        """Pick the decode worker of an attempt; raises RouterError.

        Where no worker of its hand can be had, the next attempt may find one in its own.
        """
        books, model, order = self._books, query.model, query.order
        if query.attempt > 1:
            books.metrics.pd.decode_retries(model).inc()
        pair = self.pairs.get(order.pair)
        if pair is not None:
            pair.release_reservation()
        now = books.clock.monotonic()
        hand = set(order.attempt_group(query.attempt))
        usable = [
            worker
            for worker in self._registry.candidates(model, "decode", now)
            if worker.address in hand
        ]
        if not usable:
            raise no_decode_workers()
        choice = self._affinity.choose(self._decode_candidates(usable, now), order.prefill_host)
        worker = choice.candidate.worker
        books.metrics.pd.decode_choices(model, choice.reason).inc()
        decision = Decision(
            model=model,
            policy="decode_affinity",
            reason=choice.reason,
            worker_url=worker.url,
            destinations=(worker.address or "",),
            timeout_ms=0,
        )
        probe = worker.breaker.claim(now)
        ticket = self._active_load.book(worker, now)
        lease = Lease(books, decision, [worker], ticket, probe, now)
        lease.on_bad_answer = self._recheck
        if pair is not None:
            lease.excuse = pair.waits_for_prefill
        return lease

    def _decode_candidates(self, workers: Sequence[Worker], now: float) -> list[_DecodeCandidate]:
        """With their load: our own requests, or what the engine reports, whichever is more."""
        candidates = []
        for worker in workers:
            loads = [rank.load for rank in self._ranks.of(worker)]
            reported = sum([load.requests(now) for load in loads])
            usage = max([load.kv_usage(now) for load in loads], default=0.0)
            candidates.append(_DecodeCandidate(worker, max(worker.in_flight, reported), usage))
        return candidates

    def role_changed(self, worker: Worker, old: Role, new: Role) -> None:
        """What was sent to it comes to nothing.

        An engine changes its role while it is idle. So whatever we take to be there came later,
        in the role it no longer has, and waits for a partner that has another one.
        """
        self._books.metrics.pd.role_changes(old, new).inc()
        self.pairs.abandon(worker)
        self._active_load.expire(worker)


class _Rooms:
    """Where a prefill and a decode worker meet; new ones for every worker that is tried."""

    def __init__(self, prompts: int | None) -> None:
        self._prompts = prompts

    def members(self, worker: Worker, dp_rank: int) -> bytes:
        events = worker.spec.kv_events
        return bootstrap_members(
            worker.spec.url.host,
            worker.spec.bootstrap_port,
            dp_rank=dp_rank,
            dp_size=events.dp_size if events is not None else 1,
            prompts=self._prompts,
        )
