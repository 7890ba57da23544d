"""Builders of workers and of one fleet, wired by the service's own `build` functions.

Tests build through here, so a change of a constructor is a change of `build` and of this file.
"""

import json
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Final

import msgspec
import numpy as np
from prometheus_client import CollectorRegistry

from extproc.build import RoutingSettings, Shared, assemble_routing
from extproc.clock import Clock
from extproc.config.models import TOKEN_POLICIES, ModelConfig, PolicyName
from extproc.config.schema import LoadConfig
from extproc.engines.engine import DEFAULT_ENGINE, EngineName
from extproc.kv.prefix_hash import TokenIds
from extproc.kv.subscriptions.subscription import SubscriberSettings
from extproc.metrics.service import Metrics
from extproc.policies.base import Policy
from extproc.policies.factory import create_kv_policy, create_policy
from extproc.routing.chooser import Chooser, WorkerChooser
from extproc.routing.engine_prompts import EnginePrompts
from extproc.routing.lease import Lease
from extproc.routing.local_endpoints import LocalEndpoints
from extproc.routing.pd.settings import PdSettings
from extproc.routing.placement import Placement
from extproc.routing.rank import Rank
from extproc.routing.rank_chooser import Encoder, RankChooser, TokenTruth
from extproc.routing.ranks import Ranks
from extproc.routing.request import Request, find_endpoint
from extproc.routing.token_proof.proofs import TokenProofs
from extproc.tokenization.encoder import Encoded
from extproc.tokenization.fields import BodyFields
from extproc.tokenization.prompts import Prompt, PromptRules, read_prompt
from extproc.worker_url import format_endpoint, parse_worker_url
from extproc.workers.circuit_breaker import CircuitBreaker
from extproc.workers.engine_calls import PrefillClient
from extproc.workers.engine_tokenizer import EngineTokenizer
from extproc.workers.registry import WorkerRegistry
from extproc.workers.source_health import SourceHealth
from extproc.workers.tickets import Tickets
from extproc.workers.worker import KvEvents, Role, Worker, WorkerSpec
from tests.fakes import FakeClock, FakeEngineClient, NoPrefillClient, NoRanks

__all__ = [
    "PAGE",
    "ByteEncoder",
    "Fleet",
    "byte_tokens",
    "make_fleet",
    "make_shared",
    "make_spec",
    "make_worker",
    "pd_settings",
    "routing_settings",
    "running_fleet",
]

# Tokens of a page, where a fleet's policy looks at KV pages.
PAGE: Final = 4


def make_spec(
    url: str = "http://10.0.0.1:8000",
    *,
    id: str | None = None,  # noqa: A002 (the field's name)
    role: Role = "plain",
    model_ids: Sequence[str] = (),
    bootstrap_port: int | None = None,
    kv_events: KvEvents | None = None,
    engine: EngineName | None = None,
    adapters: Sequence[str] = (),
) -> WorkerSpec:
    """A spec as discovery gives it: no model unless said; the id is the URL."""
    parsed = parse_worker_url(url)
    return WorkerSpec(
        id=id if id is not None else str(parsed),
        url=parsed,
        role=role,
        model_ids=tuple(model_ids),
        bootstrap_port=bootstrap_port,
        kv_events=kv_events,
        engine=engine,
        adapters=tuple(adapters),
    )


def make_worker(
    url: str = "http://10.0.0.1:8000",
    *,
    order: int = 0,
    id: str | None = None,  # noqa: A002 (the field's name)
    role: Role = "plain",
    model_ids: Sequence[str] = ("m",),
    threshold: int = 3,
    cool_down_seconds: float = 30.0,
    in_flight: int = 0,
    resolved: bool = True,
    kv_events: KvEvents | None = None,
    engine: EngineName | None = None,
    adapters: Sequence[str] = (),
) -> Worker:
    """A worker of model `m` whose address is its URL's host and port."""
    spec = make_spec(
        url,
        id=id,
        role=role,
        model_ids=model_ids,
        kv_events=kv_events,
        engine=engine,
        adapters=adapters,
    )
    worker = Worker(
        spec,
        order=order,
        breaker=CircuitBreaker(threshold, cool_down_seconds),
        address=format_endpoint(spec.url.host, spec.url.port) if resolved else None,
    )
    worker.in_flight = in_flight
    return worker


def make_shared(
    workers: Iterable[Worker] = (),
    *,
    clock: Clock | None = None,
    seed: int = 0,
    stale_seconds: float = 600.0,
) -> Shared:
    """What the parts of a router share; the time stands still unless a clock is given."""
    clock, registry, prometheus = clock or FakeClock(), WorkerRegistry(), CollectorRegistry()
    for worker in workers:
        registry.upsert(worker)
    metrics = Metrics(prometheus)
    return Shared(
        api_key=None,
        clock=clock,
        random=Random(seed),
        prometheus=prometheus,
        metrics=metrics,
        registry=registry,
        tickets=Tickets(clock, stale_seconds, metrics.stale_requests),
        sources=SourceHealth(),
    )


def pd_settings(**changes: Any) -> PdSettings:
    """Settings for prefill and decode workers of model `m`."""
    settings = PdSettings(
        inline=False,
        protocols={"m": "sglang"},
        min_prefill_tokens={"m": 0},
        decode_attempts=3,
        connect_seconds=1.5,
        prefill_seconds=120.0,
        kv_seconds=120.0,
        linger_seconds=0.0,
        request_timeout_ms=300_000,
    )
    return msgspec.structs.replace(settings, **changes)


def routing_settings(
    *,
    destinations_max: int = 3,
    retry_busy: bool = False,
    request_timeout_seconds: float = 300.0,
    load: LoadConfig | None = None,
    pd: PdSettings | None = None,
) -> RoutingSettings:
    estimated = load is not None and load.release == "estimate"
    return RoutingSettings(
        request_timeout_seconds=request_timeout_seconds,
        destinations_max=destinations_max,
        retry_busy=retry_busy,
        first_byte_timeouts={"m": 120.0},
        estimated_stream_seconds=load.estimated_stream_secs if load and estimated else None,
        pd=pd or pd_settings(),
    )


def byte_tokens(text: str) -> TokenIds:
    """One token for each byte."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.uint64)


class ByteEncoder:
    """An encoder that makes one token of each byte of a completion's prompt."""

    async def read(
        self,
        rules: PromptRules,
        path: str,
        body: bytes | bytearray,
        fields: BodyFields | None,
    ) -> Prompt:
        return read_prompt(rules, path, body)

    async def encode(self, prompt: Prompt) -> Encoded:
        if prompt.reason or prompt.text is None:
            return Encoded(None, prompt.reason or "no_text")
        return Encoded(byte_tokens(prompt.text), "")


class Fleet:
    """A router over workers, wired as in the service. Time stands still; engines are fakes.

    Every model has the same policy, and random draws are seeded. With a KV-aware policy the test
    says which pages a rank holds. Such a fleet has sockets: use `running_fleet`, or `close` it.
    """

    def __init__(
        self,
        workers: Iterable[Worker] = (),
        *,
        policy: PolicyName | Policy = "round_robin",
        models: Sequence[str] = ("m",),
        settings: RoutingSettings | None = None,
        shared: Shared | None = None,
        follows_kv: bool = False,
        encoder: Encoder | None = None,
        prefill_client: PrefillClient | None = None,
    ) -> None:
        """`follows_kv` makes ranks for a policy that does not look at them, too."""
        self.workers = list(workers)
        shared = shared or make_shared()
        self.shared = shared
        self.random = shared.random
        self.prometheus, self.metrics = shared.prometheus, shared.metrics
        self.registry, self.tickets = shared.registry, shared.tickets
        self.rechecked: list[Worker] = []
        self._ranks: Ranks | None = None
        self._encoder = encoder or ByteEncoder()
        self._placement: Placement | None = None
        self.proofs = TokenProofs()
        self.proofs.route_by_load(frozenset(models))
        self.engine_client = FakeEngineClient()
        asked = EngineTokenizer(self.engine_client)
        self.engines = EnginePrompts(asked, self.registry, shared.clock, self.metrics)
        if follows_kv or policy in TOKEN_POLICIES:
            self._follow_kv(policy if policy in TOKEN_POLICIES else "min_ttft", models)
        for worker in self.workers:
            self.registry.upsert(worker)
            if self._ranks is not None:
                self._ranks.joined(worker)
        routing = assemble_routing(
            settings or routing_settings(),
            shared,
            self._ranks or NoRanks(),
            {model: self._chooser(model, policy) for model in models},
            LocalEndpoints({}, lambda model: (DEFAULT_ENGINE,)),
            prefill_client or NoPrefillClient(),
            self.rechecked.append,
        )
        self.router, self.pd = routing.router, routing.pd
        self.claims = routing.claims
        self.lease_parts, self.leg_parts = routing.lease_parts, routing.leg_parts

    def _follow_kv(self, policy: Any, models: Sequence[str]) -> None:
        self._ranks = Ranks(
            self.shared.clock,
            max_pages=10_000,
            settings=SubscriberSettings(),
            recheck=self.rechecked.append,
        )
        model = ModelConfig(id=models[0], policy=policy, tokenizer_path="-")
        self._placement = Placement(create_kv_policy(model, self.random), self._ranks.indexer.index)
        self._ranks.serve(dict.fromkeys(models, self._placement.model_speed))

    def _chooser(self, model: str, policy: PolicyName | Policy) -> Chooser:
        if not isinstance(policy, str):
            return WorkerChooser(policy)
        if policy not in TOKEN_POLICIES or self._placement is None:
            return WorkerChooser(create_policy(policy, self.random))
        return RankChooser(
            model,
            self._encoder,
            self._placement,
            self.ranks,
            TokenTruth(self.proofs, self.engines),
            metrics=self.metrics,
            clock=self.shared.clock,
            patience_seconds=0.05,
        )

    async def close(self) -> None:
        """Close the sockets of a fleet with a KV-aware policy."""
        if self._ranks is not None:
            await self._ranks.indexer.close()

    @property
    def clock(self) -> FakeClock:
        assert isinstance(self.shared.clock, FakeClock), "this fleet runs on another clock"
        return self.shared.clock

    # -- requests

    async def route(self, model: str | None = "m", *, stream: bool = False) -> Lease:
        """Route a request whose body was not seen."""
        return await self.send(b"", model, stream, path="/generate")

    async def complete(self, text: str, **fields: Any) -> Lease:
        """Route a completion of this prompt."""
        body = json.dumps({"model": "m", "prompt": text} | fields).encode()
        return await self.send(body, fields.get("model", "m"), fields.get("stream", False))

    async def send(
        self,
        body: bytes,
        model: str | None = "m",
        stream: bool = False,
        *,
        path: str = "/v1/completions",
    ) -> Lease:
        endpoint = find_endpoint("POST", path)
        lease = await self.router.route(Request(endpoint, model, stream, body))
        assert isinstance(lease, Lease)
        return lease

    # -- KV pages

    @property
    def ranks(self) -> Ranks:
        assert self._ranks is not None, "this fleet follows no KV events"
        return self._ranks

    def rank(self, worker: Worker | int, dp_rank: int = 0) -> Rank:
        """The rank of a worker, which is given itself or by its number."""
        return self.ranks.of(self._worker(worker))[dp_rank]

    def hold(
        self,
        text: str,
        worker: Worker | int,
        dp_rank: int = 0,
        salt: str | None = None,
        adapter: str | None = None,
    ) -> None:
        """The rank is trusted and holds the whole pages of this text."""
        indexer, rank = self.ranks.indexer, self.rank(worker, dp_rank)
        if rank.pages is None:
            rank.pages = indexer.index.add(self._worker(worker).url, PAGE, dp_rank=dp_rank)
        rank.pages.trusted = True
        ids = byte_tokens(text)[: len(text) // PAGE * PAGE]
        names = [
            hash((salt, adapter, text[: end * PAGE])) for end in range(1, len(ids) // PAGE + 1)
        ]
        indexer.index.store(rank.pages, names, None, ids, PAGE, seed=indexer.seed(salt, adapter))

    def _worker(self, worker: Worker | int) -> Worker:
        return self.workers[worker] if isinstance(worker, int) else worker

    # -- what was counted

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample, 0 if it was never counted."""
        return self.prometheus.get_sample_value(name, labels) or 0.0

    def outcomes(self) -> Mapping[str, list[str]]:
        """Outcomes counted so far, by worker URL."""
        found: dict[str, list[str]] = defaultdict(list)
        for family in self.prometheus.collect():
            for sample in family.samples:
                if sample.name == "extproc_worker_requests_total":
                    found[sample.labels["worker"]] += [sample.labels["outcome"]] * int(sample.value)
        return {worker: sorted(outcomes) for worker, outcomes in found.items()}


def make_fleet(
    workers: Iterable[Worker] = (),
    *,
    policy: PolicyName | Policy = "round_robin",
    models: Sequence[str] = ("m",),
    destinations_max: int = 3,
    request_timeout_seconds: float = 300.0,
    stale_seconds: float = 600.0,
    load: LoadConfig | None = None,
    seed: int = 0,
) -> Fleet:
    """A fleet with these settings, for policies that do not look at KV pages."""
    return Fleet(
        workers,
        policy=policy,
        models=models,
        settings=routing_settings(
            destinations_max=destinations_max,
            request_timeout_seconds=request_timeout_seconds,
            load=load,
        ),
        shared=make_shared(seed=seed, stale_seconds=stale_seconds),
    )


@asynccontextmanager
async def running_fleet(*arguments: Any, **options: Any) -> AsyncIterator[Fleet]:
    """As Fleet; its sockets are closed at the end."""
    fleet = Fleet(*arguments, **options)
    try:
        yield fleet
    finally:
        await fleet.close()
