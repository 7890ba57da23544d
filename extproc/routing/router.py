"""The one path every request takes: from a parsed request to a decision and its lease."""

from collections.abc import Mapping, Sequence

from extproc.engines.engine import Engine
from extproc.errors import (
    model_not_found,
    no_decode_workers,
    no_healthy_workers,
    no_workers_in_subset,
    no_workers_with_adapter,
)
from extproc.routing.chooser import Chooser, Chosen
from extproc.routing.demand import Demand
from extproc.routing.dispatch import Dispatch
from extproc.routing.lease import Lease, LeaseParts
from extproc.routing.local_endpoints import Answer, LocalEndpoints
from extproc.routing.pd.decode_order import DecodeQuery
from extproc.routing.pd.pair import Pair
from extproc.routing.pd.passes import Disaggregation
from extproc.routing.placement import NO_TOKENS, PromptTokens
from extproc.routing.request import Request
from extproc.routing.subset import workers_in
from extproc.routing.wait_queue import WaitQueue
from extproc.tokenization.encoder import Encoded
from extproc.workers.model_names import ResolvedModel
from extproc.workers.worker import Worker

__all__ = ["Router"]


class Router:
    """Routes requests for the configured models over the registered workers."""

    def __init__(
        self,
        choosers: Mapping[str, Chooser],
        lease_parts: LeaseParts,
        dispatch: Dispatch,
        local_endpoints: LocalEndpoints,
        pd: Disaggregation,
        queues: Mapping[str, WaitQueue],
        demand: Demand,
    ) -> None:
        """`choosers` by model id, in the order of the configuration.

        `queues` are of the models whose requests may wait.
        """
        self._choosers = dict(choosers)
        self._only_model = next(iter(choosers)) if len(choosers) == 1 else None
        self._registry = lease_parts.registry
        self._clock = lease_parts.clock
        self._outcomes = lease_parts.outcomes
        self._adapter_requests = lease_parts.metrics.adapter_requests
        self._decodes_alone = lease_parts.metrics.pd.decode_alone
        self._dispatch = dispatch
        self._local_endpoints = local_endpoints
        self._pd = pd
        self._queues = queues
        self._demand = demand

    @property
    def model_ids(self) -> list[str]:
        return list(self._choosers)

    @property
    def only_model(self) -> str | None:
        """The model of a request that does not name one, if there is just one model."""
        return self._only_model

    async def answer(self, request: Request) -> Answer:
        """Return what the client of an endpoint `answered_locally` gets; raises RouterError."""
        return await self._local_endpoints.answer(request, self._resolve(request.model).model)

    async def tokens(self, request: Request) -> dict[Engine, Encoded]:
        """The tokens of a request for each engine of its model; raises RouterError."""
        return await self._local_endpoints.tokens(request, self._resolve(request.model).model)

    def pick_decode(self, query: DecodeQuery) -> Lease:
        """Pick the decode worker for an attempt of the second pass; raises RouterError."""
        return self._pd.pick_decode(query)

    def answered_busy(self, address: str, retry_after_seconds: float | None) -> bool:
        """The worker at this address has answered 503 or 429 in an attempt of some request.

        Returns False if that is not recorded here. Of a decode worker it can be the fault of the
        prefill worker, which the lease of the request knows.
        """
        worker = self._registry.at_address(address)
        if worker is None or worker.role != "plain":
            return False
        # The lease of the request, which knows its model, counts the answer.
        self._outcomes.is_full(worker, self._clock.monotonic(), retry_after_seconds)
        return True

    async def route(self, request: Request) -> Lease | Pair:
        """Decide and claim; the caller closes the lease however the request ends.

        Raises RouterError: 404 for an unknown model or adapter (before any worker is asked), 503
        when no worker of the model may be tried, or all are full and the request cannot wait.
        """
        model, adapter = self._resolve(request.model)
        if adapter is None and request.lora_path is not None:
            adapter = self._listed(model, request.lora_path)
        if adapter is not None:
            request.adapter = adapter
            self._adapter_requests(model).inc()
        self._demand.asked(model, self._clock.monotonic())
        queue = self._queues.get(model)
        if queue is None:
            return await self._route(request, model)
        await queue.enter(request)
        try:
            return await self._route(request, model, queue)
        finally:
            queue.leave()

    async def _route(
        self, request: Request, model: str, queue: WaitQueue | None = None
    ) -> Lease | Pair:
        chooser = self._choosers[model]
        if self._registry.is_disaggregated(model):
            return await self._route_disaggregated(request, model, chooser)
        prompt = NO_TOKENS
        if chooser.reads_prompts:
            # No work for a request without any.
            self._candidates(model, request, self._clock.monotonic())
            prompt = await chooser.read(request, request.adapter)
        # Workers may have come and gone while text became tokens in a thread.
        now = self._clock.monotonic()
        candidates = self._candidates(model, request, now)
        if queue is not None:
            candidates = queue.with_capacity(candidates, now)
        chosen = chooser.choose(candidates, prompt, now)
        lease = self._dispatch.send(request, model, chosen, candidates, now)
        chooser.decided(chosen)
        return lease

    async def _route_disaggregated(
        self, request: Request, model: str, chooser: Chooser
    ) -> Lease | Pair:
        """Two workers, for prefill and decode; or a decode worker that needs no other."""
        pd = self._pd
        pd.check(request, model)
        must = pd.needs_decode_alone(request, model)
        prompt = await chooser.read(request, request.adapter)
        if must:
            return self._decode_alone(request, model, chooser, prompt)
        if chooser.reads_prompts and pd.may_decode_alone(model):
            now = self._clock.monotonic()
            decodes = self._decodes(request, model, now)
            if decodes:
                chosen = chooser.choose(decodes, prompt, now)
                if chosen.placed is not None and pd.decode_alone(model, chosen.placed):
                    return self._send_alone(request, model, chooser, chosen, decodes, now)
        pair = await pd.route(request, model, chooser, prompt)
        return pair or self._decode_alone(request, model, chooser, prompt)

    def _decodes(self, request: Request, model: str, now: float) -> list[Worker]:
        decodes = self._registry.candidates(model, "decode", now, request.adapter)
        return workers_in(request.subset, decodes)

    def _decode_alone(
        self, request: Request, model: str, chooser: Chooser, prompt: PromptTokens
    ) -> Lease:
        """A decode worker has to serve it alone; raises RouterError 503 without one."""
        now = self._clock.monotonic()
        decodes = self._decodes(request, model, now)
        if not decodes:
            raise no_decode_workers()
        chosen = chooser.choose(decodes, prompt, now)
        return self._send_alone(request, model, chooser, chosen, decodes, now)

    def _send_alone(
        self,
        request: Request,
        model: str,
        chooser: Chooser,
        chosen: Chosen,
        decodes: Sequence[Worker],
        now: float,
    ) -> Lease:
        self._decodes_alone(model).inc()
        lease = self._dispatch.send(request, model, chosen, decodes, now)
        chooser.decided(chosen)
        return lease

    def _resolve(self, name: str | None) -> ResolvedModel:
        """Return the configured model, and the adapter that the name means; raises RouterError."""
        if name is None:
            name = self._only_model
            if name is None:
                raise model_not_found("(no model named, and several are served)")
        found = self._registry.names.find(name)
        if found is not None and found.model in self._choosers:
            return found
        if name in self._choosers:
            # Of an earlier configuration, with which this request began.
            return ResolvedModel(name, None)
        raise model_not_found(name)

    def _listed(self, model: str, adapter: str) -> str | None:
        """The adapter of SGLang's member; None if no worker lists it, so that engines decide."""
        found = self._registry.names.find(f"{model}:{adapter}")
        return None if found is None or found.model != model else found.adapter

    def _candidates(self, model: str, request: Request, now: float) -> list[Worker]:
        """Return the workers that may be tried; raises RouterError 503 without one."""
        candidates = self._registry.candidates(model, "plain", now, request.adapter)
        if not candidates:
            if request.adapter is not None and self._registry.pool_of(model, "plain"):
                raise no_workers_with_adapter()
            raise no_healthy_workers()
        if request.subset is not None:
            candidates = workers_in(request.subset, candidates)
            if not candidates:
                raise no_workers_in_subset()
        return candidates
