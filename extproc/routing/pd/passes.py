"""Models with prefill and decode workers: from a request to a pair of workers, in two passes.

The first pass picks the prefill worker and sends it the request on a connection of its own. Once
the connection is made, the client's request goes on, and the second pass picks the decode worker.
With `inline` the first pass picks both.

SGLang's workers exchange the KV cache while both have the request. vLLM's decode worker needs the
answer of the prefill worker, so there the first pass waits for the answer.
"""

from collections.abc import Sequence
from typing import Final

import structlog

from extproc.errors import (
    no_decode_workers,
    no_prefill_workers,
    no_workers_in_subset,
    no_workers_with_adapter,
    not_disaggregated,
    unsupported_body_mode,
)
from extproc.routing.adapters import joined_members, model_member
from extproc.routing.chooser import Chooser
from extproc.routing.claim import Claims
from extproc.routing.decision import Decision
from extproc.routing.lease import Lease
from extproc.routing.pd.decode_chooser import DecodeChooser
from extproc.routing.pd.decode_lease import DecodeLease, DecodeLeases
from extproc.routing.pd.decode_order import DecodeOrder, DecodeQuery
from extproc.routing.pd.handoff import kv_decode_members
from extproc.routing.pd.pair import Pair, Pairs
from extproc.routing.pd.prefill_leg import PrefillLeg
from extproc.routing.pd.prefill_sender import PrefillSender, SentPrefill
from extproc.routing.pd.settings import PdSettings
from extproc.routing.pd.splitting import NEWER_PATHS, check_for_sglang, needs_one_worker
from extproc.routing.placement import Placed, PromptTokens
from extproc.routing.request import Request
from extproc.routing.subset import workers_in
from extproc.workers.observer import WorkerObserver
from extproc.workers.worker import Role, Worker

__all__ = ["Disaggregation"]

_log = structlog.get_logger()

_CLIENT_ERROR: Final = 400
# For so long no prefill worker is asked again for what one has ignored.
_IGNORED_SECONDS: Final = 60.0


class Disaggregation(WorkerObserver):
    """Both passes, for all models; all calls from one event loop."""

    def __init__(
        self,
        settings: PdSettings,
        sender: PrefillSender,
        chooser: DecodeChooser,
        leases: DecodeLeases,
        pairs: Pairs,
        claims: Claims,
    ) -> None:
        self._settings = settings
        self._sender = sender
        self._chooser = chooser
        self._leases = leases
        self._claims = claims
        self._clock = leases.parts.clock
        self._registry = leases.parts.registry
        self._metrics = leases.parts.metrics
        # By model and path.
        self._ignored_until: dict[tuple[str, str], float] = {}
        self.pairs = pairs

    # -- first pass

    def check(self, request: Request, model: str) -> None:
        """Raise RouterError if the request cannot be served, before any work is done for it."""
        if not request.endpoint.generates:
            raise not_disaggregated()
        if not request.body:
            raise unsupported_body_mode()
        now = self._clock.monotonic()
        if not self._registry.candidates(model, "prefill", now, request.adapter):
            if request.adapter is not None and self._registry.pool_of(model, "prefill"):
                raise no_workers_with_adapter()
            raise no_prefill_workers()
        self._decode_workers_for(request, model, now)

    def needs_decode_alone(self, request: Request, model: str) -> bool:
        """True if the engines cannot hand the cache over for this request: one serves it alone.

        Raises RouterError 400 where one worker cannot serve it either.
        """
        if self._settings.protocols[model] == "nixl":
            return self._ignores_member(request, model) or needs_one_worker(request)
        check_for_sglang(request)
        return False

    def _ignores_member(self, request: Request, model: str) -> bool:
        """True if a prefill worker has lately ignored the member for a hand-over on this path."""
        key = model, request.endpoint.path
        return self._ignored_until.get(key, 0.0) > self._clock.monotonic()

    def decode_alone(self, model: str, placed: Placed) -> bool:
        """True if the decode worker lacks so little of the prompt that it should serve without a
        prefill worker.
        """
        least = self._settings.min_prefill_tokens[model]
        return 0 < placed.total_tokens < placed.cached_tokens + least

    def may_decode_alone(self, model: str) -> bool:
        """True if `decode_alone` can be true."""
        return self._settings.min_prefill_tokens[model] > 0

    async def route(
        self, request: Request, model: str, chooser: Chooser, prompt: PromptTokens
    ) -> Pair | None:
        """Send the prefill, and decide where decode goes; raises RouterError.

        Returns None if the prefill worker answered, and its engine cannot hand the cache over on
        this path: the request is for a decode worker alone.
        """
        waits = self._settings.protocols[model] == "nixl"
        sent = await self._sender.send(request, model, chooser, prompt, waits=waits)
        try:
            if waits:
                members = await self._kv_of(sent.leg, request)
                if members is None:
                    return None
                sent = sent._replace(members=members)
            pair = self._pair(request, model, sent)
        except BaseException:
            sent.leg.cancel()
            raise
        if sent.leg.is_open:
            pair.follow()
        chooser.decided(sent.chosen)
        return pair

    async def _kv_of(self, leg: PrefillLeg, request: Request) -> bytes | None:
        """Wait for the prefill; returns the JSON member of its answer for the decode worker.

        None means that the engine does not know the member on this path; raises RouterError.
        """
        answer = await leg.answer()
        members = None if isinstance(answer, str) else kv_decode_members(answer.body)
        path, ignored = request.endpoint.path, False
        if members is None and not isinstance(answer, str) and answer.status < _CLIENT_ERROR:
            ignored = path in NEWER_PATHS
            if not ignored:
                answer = "no_kv"
        error = leg.ended(answer)
        if error is not None:
            self._metrics.pd.pairs(leg.model, error.code).inc()
            raise error
        if ignored:
            self._ignored_until[leg.model, path] = self._clock.monotonic() + _IGNORED_SECONDS
            _log.warning(
                "kv_transfer_not_supported",
                model=leg.model,
                worker=leg.worker.url,
                path=path,
                fix="upgrade the engine (vLLM 0.32 has it); decode workers serve this path alone",
            )
        return members

    def _pair(self, request: Request, model: str, sent: SentPrefill) -> Pair:
        leg, settings = sent.leg, self._settings
        now = self._clock.monotonic()
        workers = self._decode_workers_for(request, model, now)
        host = leg.worker.spec.url.host
        ordered = self._chooser.order(workers, host, now)
        attempts = min(settings.decode_attempts, len(ordered))
        addresses = tuple([worker.address or "" for worker in ordered])
        order = DecodeOrder(attempts, host, self.pairs.new_id(), addresses)
        decision = self._decision(request, model, sent, order, ordered[0])
        self._metrics.decisions(model, decision.policy, decision.reason).inc()
        decode: DecodeLease | None = None
        reservation = None
        if settings.inline:
            _, reason = self._chooser.choose(workers, host, now)
            self._metrics.pd.decode_choices(model, reason).inc()
            decode = self._leases.take(decision, ordered[:attempts], now, leg)
        else:
            reservation = self._leases.reserve(ordered[0], now)
        return Pair(self.pairs, order.pair, decision, leg, decode=decode, reservation=reservation)

    def _decision(
        self,
        request: Request,
        model: str,
        sent: SentPrefill,
        order: DecodeOrder,
        decode: Worker,
    ) -> Decision:
        settings, chosen = self._settings, sent.chosen
        placed = chosen.placed
        member = model_member(request, model, decode)
        return Decision(
            model=model,
            policy=chosen.policy,
            reason=chosen.reason,
            worker_url=chosen.worker.url,
            destinations=order.addresses[: order.attempts] if settings.inline else (),
            timeout_ms=0 if request.stream else settings.request_timeout_ms,
            cached_tokens=placed.cached_tokens if placed is not None else 0,
            total_tokens=placed.total_tokens if placed is not None else 0,
            predicted_tokens=placed.predicted_tokens if placed is not None else 0,
            body_members=joined_members(sent.members, member),
            decode_order="" if settings.inline else order.to_header(),
            attempts=order.attempts,
            role="decode",
            adapter=request.adapter,
        )

    def _decode_workers_for(self, request: Request, model: str, now: float) -> list[Worker]:
        """Those to which the gateway can send the request; raises RouterError 503 without one."""
        adapter = request.adapter
        workers = workers_in(request.subset, self._decode_workers(model, now, adapter=adapter))
        if not workers:
            raise no_workers_in_subset()
        return workers

    # -- second pass

    def pick_decode(self, query: DecodeQuery) -> Lease:
        """Pick the decode worker of an attempt; raises RouterError.

        Where no worker of its group is available, the next attempt may find one in its own.
        """
        model, order = query.model, query.order
        if query.attempt > 1:
            self._metrics.pd.decode_retries(model).inc()
        pair = self.pairs.get(order.pair)
        if pair is not None:
            pair.release_reservation()
        now = self._clock.monotonic()
        workers = self._decode_workers(model, now, order.attempt_group(query.attempt))
        worker, reason = self._chooser.choose(workers, order.prefill_host, now)
        self._metrics.pd.decode_choices(model, reason).inc()
        decision = Decision(
            model=model,
            policy="decode_affinity",
            reason=reason,
            worker_url=worker.url,
            destinations=(worker.address or "",),
            timeout_ms=0,
            role="decode",
        )
        return self._leases.take(decision, [worker], now, None if pair is None else pair.leg)

    def _decode_workers(
        self,
        model: str,
        now: float,
        addresses: Sequence[str] | None = None,
        adapter: str | None = None,
    ) -> list[Worker]:
        """Return the decode workers that may be tried, those of `addresses` if that is given.

        Raises RouterError 503 if no worker may be tried.
        """
        workers = self._registry.candidates(model, "decode", now, adapter)
        if addresses is not None:
            if workers and not workers[0].breaker.would_allow(now):
                # The last resort: those of this attempt are as good as any.
                workers = list(self._registry.pool_of(model, "decode"))
            workers = [worker for worker in workers if worker.address in addresses]
        if not workers:
            if adapter is not None and self._registry.pool_of(model, "decode"):
                raise no_workers_with_adapter()
            raise no_decode_workers()
        return workers

    def role_changed(self, worker: Worker, old: Role, new: Role) -> None:
        """Abort what was sent to the worker in its old role.

        An engine changes its role while it is idle. So the requests that are counted there were
        sent later, in a role that it no longer has, and wait for a partner that never comes.
        """
        self._metrics.pd.role_changes(old, new).inc()
        self.pairs.abandon(worker)
        self._claims.tickets.expire(worker)
