"""Builds the parts of the service from a Config: the one place where constructors meet.

The application, the tests and the benchmarks build through these functions, so tests and
measurements run the same wiring as the service. Nothing here starts, opens or listens; that
is the application's life cycle (`app`).
"""

import ssl
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

from msgspec import Struct, UnsetType
from prometheus_client import CollectorRegistry

from extproc.clock import Clock, SystemClock
from extproc.config.files import read_api_key
from extproc.config.models import TOKEN_POLICIES, QueueConfig
from extproc.config.schema import Config, StaticUrlsConfig
from extproc.kv.subscriptions.subscription import SubscriberSettings
from extproc.metrics.service import Metrics
from extproc.policies.factory import create_kv_policy, create_policy
from extproc.routing.chooser import Chooser, WorkerChooser
from extproc.routing.claim import Claims, WorkerRanks
from extproc.routing.demand import Demand
from extproc.routing.dispatch import Dispatch
from extproc.routing.engine_prompts import EngineOnly, EnginePrompts
from extproc.routing.gateway_watch import GatewayWatch
from extproc.routing.lease import LeaseParts
from extproc.routing.local_endpoints import LocalEndpoints
from extproc.routing.outcomes import WorkerOutcomes
from extproc.routing.pd.decode_chooser import DecodeChooser
from extproc.routing.pd.decode_lease import DecodeLeases
from extproc.routing.pd.pair import Pairs
from extproc.routing.pd.passes import Disaggregation
from extproc.routing.pd.prefill_leg import LegParts
from extproc.routing.pd.prefill_sender import PrefillSender
from extproc.routing.pd.settings import PdSettings
from extproc.routing.placement import Placement
from extproc.routing.rank_chooser import Encoder, RankChooser, TokenTruth
from extproc.routing.ranks import Ranks
from extproc.routing.router import Router
from extproc.routing.spare_capacity import SpareCapacity
from extproc.routing.token_proof.proofs import TokenProofs
from extproc.routing.wait_queue import WaitQueue, renew_queues
from extproc.tokenization.encoder import PromptEncoder
from extproc.workers.configured_models import ConfiguredModels
from extproc.workers.engine_calls import IntrospectionClient, PrefillClient
from extproc.workers.engine_tokenizer import EngineTokenizer
from extproc.workers.manager import IntrospectionSettings, WorkerManager
from extproc.workers.membership import Membership
from extproc.workers.registry import WorkerRegistry
from extproc.workers.resolver import SystemResolver
from extproc.workers.source import WorkerSource
from extproc.workers.source_health import SourceHealth
from extproc.workers.tickets import Tickets
from extproc.workers.worker import Worker

__all__ = [
    "Kv",
    "Routing",
    "RoutingSettings",
    "Shared",
    "api_key_of",
    "assemble_routing",
    "build_kv",
    "build_manager",
    "build_router",
    "build_shared",
    "forwarded_authorization",
    "introspection_settings",
    "place_models",
    "worker_tls_of",
]

# Share of the time for a decision; a prompt without tokens by then is routed by load.
_PATIENCE_SHARE: Final = 0.5


class Shared(Struct, frozen=True, kw_only=True):
    """What the parts have in common. `prometheus` holds every metric of this service.

    `api_key` is for workers; where it comes from a file, the file is read once.
    """

    api_key: str | None
    clock: Clock
    random: Random
    prometheus: CollectorRegistry
    metrics: Metrics
    registry: WorkerRegistry
    tickets: Tickets
    sources: SourceHealth


class Kv(Struct, kw_only=True):
    """The ranks that are followed, and the placements of models with a KV-aware policy, by id.

    `truth` is what engines say of their tokens.
    """

    ranks: Ranks
    placements: Mapping[str, Placement]
    truth: TokenTruth


class Routing(Struct, frozen=True, kw_only=True):
    """The router, and both passes of models with prefill and decode workers."""

    router: Router
    pd: Disaggregation
    choosers: Mapping[str, Chooser]
    claims: Claims
    lease_parts: LeaseParts
    leg_parts: LegParts
    queues: Mapping[str, WaitQueue]
    demand: Demand


class RoutingSettings(Struct, frozen=True, kw_only=True):
    """The part of the configuration that routing needs."""

    request_timeout_seconds: float
    destinations_max: int
    retry_busy: bool
    first_byte_timeouts: Mapping[str, float]
    estimated_stream_seconds: float | None
    pd: PdSettings
    queues: Mapping[str, QueueConfig] = {}

    @classmethod
    def of(cls, config: Config, api_key: str | None) -> "RoutingSettings":
        return cls(
            request_timeout_seconds=config.proxy.request_timeout_secs,
            destinations_max=config.destinations_max,
            retry_busy=config.proxy.retry_busy,
            first_byte_timeouts={
                model.id: model.first_byte_timeout_secs or config.proxy.first_byte_timeout_secs
                for model in config.models
            },
            estimated_stream_seconds=config.load.estimate_secs,
            pd=PdSettings.of(config, forwarded_authorization(config, api_key)),
            queues={model.id: model.queue for model in config.models if model.queue.max_requests},
        )


def build_shared(
    config: Config, *, clock: Clock | None = None, random: Random | None = None
) -> Shared:
    """Make what all parts share; `clock` and `random` default to the system's."""
    clock = clock or SystemClock()
    prometheus = CollectorRegistry()
    metrics = Metrics(prometheus)
    return Shared(
        api_key=api_key_of(config),
        clock=clock,
        random=random or Random(),  # noqa: S311 (load spreading, not secrets)
        prometheus=prometheus,
        metrics=metrics,
        registry=WorkerRegistry(clock),
        tickets=Tickets(
            clock, config.active_load.stale_request_timeout_secs, metrics.stale_requests
        ),
        sources=SourceHealth(),
    )


def build_kv(
    config: Config, shared: Shared, engines: EngineTokenizer, recheck: Callable[[Worker], None]
) -> Kv:
    """The index of KV pages and a placement for each model whose policy looks at tokens.

    `recheck` is called with a worker that may have become another engine.
    """
    ranks = Ranks(
        shared.clock,
        max_pages=config.kv.max_pages,
        settings=SubscriberSettings(
            replay_timeout_seconds=config.kv.replay_timeout_secs,
            replay_cool_down_seconds=config.kv.replay_retry_secs,
        ),
        recheck=recheck,
    )
    asked = EnginePrompts(engines, shared.registry, shared.clock, shared.metrics)
    kv = Kv(ranks=ranks, placements={}, truth=TokenTruth(TokenProofs(), asked))
    place_models(config, shared, kv)
    return kv


def place_models(config: Config, shared: Shared, kv: Kv) -> None:
    """Make the placements that the models need, and keep what is known of models that had one."""
    index = kv.ranks.indexer.index
    index.max_pages = config.kv.max_pages
    placements = {}
    for model in config.models:
        if model.policy not in TOKEN_POLICIES:
            continue
        policy = create_kv_policy(model, shared.random)
        speed = model.min_ttft.prefill_tokens_per_second
        placement = kv.placements.get(model.id)
        if placement is None:
            placement = Placement(policy, index, prefill_tokens_per_second=speed)
        else:
            placement.policy = policy
            placement.model_speed.default_tokens_per_second = speed
        placements[model.id] = placement
        shared.metrics.begin_tokens(model.id)
    kv.placements = placements
    models = config.models
    kv.truth.proofs.route_by_load(frozenset(one.id for one in models if one.differences_by_load))
    kv.truth.engines.use([model.id for model in models if model.tokens_from == "engine"])
    kv.ranks.serve({model: one.model_speed for model, one in placements.items()})


def introspection_settings(config: Config) -> IntrospectionSettings:
    """How often workers are asked, and their names resolved."""
    static_urls = config.discovery.static_urls
    if isinstance(static_urls, UnsetType):
        # Only workers that an operator adds have names.
        static_urls = StaticUrlsConfig(urls=[])
    return IntrospectionSettings(
        retry_seconds=config.discovery.introspection_retry_secs,
        interval_seconds=config.discovery.introspection_interval_secs,
        dns_ttl_seconds=static_urls.dns_ttl_secs,
        ranks_max=config.kv.ranks_per_worker_max,
        generating_check_seconds=config.discovery.generating_check_secs,
        hold_seconds=config.discovery.mass_removal_hold_secs,
    )


def build_manager(
    config: Config, shared: Shared, client: IntrospectionClient, source: WorkerSource
) -> WorkerManager:
    """Introspection of the workers that `source` names."""
    models = ConfiguredModels(config.models)
    return WorkerManager(
        source=source,
        registry=shared.registry,
        membership=Membership(shared.registry, models, shared.metrics),
        client=client,
        resolver=SystemResolver(config.discovery.lookup_family),
        clock=shared.clock,
        metrics=shared.metrics,
        settings=introspection_settings(config),
    )


def build_router(
    config: Config,
    shared: Shared,
    kv: Kv,
    encoders: Mapping[str, Encoder],
    prefill_client: PrefillClient,
    recheck: Callable[[Worker], None],
    before: Routing | None = None,
) -> Routing:
    """The router with both PD passes.

    `encoders` are by model id; a model without one has its tokens from its engines. `recheck` is
    called with a worker that may have become another engine. What `before` knows of requests and
    workers goes on in the new one.
    """
    for model in config.models:
        shared.metrics.begin(model.id)
    return assemble_routing(
        RoutingSettings.of(config, shared.api_key),
        shared,
        kv.ranks,
        _choosers(config, shared, kv, encoders, before),
        LocalEndpoints(
            {model: one for model, one in encoders.items() if isinstance(one, PromptEncoder)},
            kv.ranks.engines_of,
        ),
        prefill_client,
        recheck,
        before,
    )


def _choosers(
    config: Config,
    shared: Shared,
    kv: Kv,
    encoders: Mapping[str, Encoder],
    before: Routing | None,
) -> dict[str, Chooser]:
    choosers: dict[str, Chooser] = {}
    for model in config.models:
        placement = kv.placements.get(model.id)
        if placement is None:
            known = None if before is None else before.choosers.get(model.id)
            if not isinstance(known, WorkerChooser) or known.policy_name != model.policy:
                known = WorkerChooser(create_policy(model.policy, shared.random))
            choosers[model.id] = known
            continue
        choosers[model.id] = RankChooser(
            model.id,
            encoders.get(model.id) or EngineOnly(),
            placement,
            kv.ranks,
            kv.truth,
            metrics=shared.metrics,
            clock=shared.clock,
            patience_seconds=config.server.step_deadline_secs * _PATIENCE_SHARE,
        )
    return choosers


def assemble_routing(
    settings: RoutingSettings,
    shared: Shared,
    ranks: WorkerRanks,
    choosers: Mapping[str, Chooser],
    local_endpoints: LocalEndpoints,
    prefill_client: PrefillClient,
    recheck: Callable[[Worker], None],
    before: Routing | None = None,
) -> Routing:
    """The router over `choosers`, which are by model id; see build_router for the others."""
    clock, metrics = shared.clock, shared.metrics
    shared.registry.names.serve(list(choosers))
    claims = Claims(shared.tickets, ranks, metrics.last_resort)
    if before is None:
        outcomes = WorkerOutcomes(metrics, shared.registry, SpareCapacity(shared.registry, ranks))
        gateway = GatewayWatch(clock, shared.registry, metrics, choosers)
        pairs = Pairs(clock, metrics.pd, linger_seconds=settings.pd.linger_seconds)
    else:
        outcomes, gateway = before.lease_parts.outcomes, before.lease_parts.gateway
        pairs = before.pd.pairs
        pairs.linger_seconds = settings.pd.linger_seconds
        gateway.watch(choosers)
    lease_parts = LeaseParts(
        clock=clock,
        registry=shared.registry,
        metrics=metrics,
        outcomes=outcomes,
        gateway=gateway,
        recheck=recheck,
        estimated_stream_seconds=settings.estimated_stream_seconds,
    )
    leg_parts = LegParts(clock=clock, metrics=metrics.pd, outcomes=outcomes, recheck=recheck)
    pd = Disaggregation(
        settings.pd,
        PrefillSender(settings.pd, shared.registry, claims, prefill_client, leg_parts),
        DecodeChooser(ranks, shared.random),
        DecodeLeases(lease_parts, claims),
        pairs,
        claims,
    )
    dispatch = _dispatch(settings, shared, claims, lease_parts)
    make_queue = partial(WaitQueue, spare=outcomes.spare, clock=clock, metrics=metrics.queue)
    queues = renew_queues(settings.queues, {} if before is None else before.queues, make_queue)
    demand = Demand() if before is None else before.demand
    router = Router(choosers, lease_parts, dispatch, local_endpoints, pd, queues, demand)
    return Routing(
        router=router,
        queues=queues,
        demand=demand,
        pd=pd,
        choosers=choosers,
        claims=claims,
        lease_parts=lease_parts,
        leg_parts=leg_parts,
    )


def _dispatch(
    settings: RoutingSettings, shared: Shared, claims: Claims, lease_parts: LeaseParts
) -> Dispatch:
    return Dispatch(
        claims,
        lease_parts,
        shared.random,
        request_timeout_seconds=settings.request_timeout_seconds,
        destinations_max=settings.destinations_max,
        retry_busy=settings.retry_busy,
        first_byte_timeouts=settings.first_byte_timeouts,
    )


def api_key_of(config: Config) -> str | None:
    """The token for workers; where it is in a file, the file is read now."""
    if config.workers.api_key_file is not None:
        return read_api_key(Path(config.workers.api_key_file))
    return config.workers.api_key


def worker_tls_of(config: Config) -> ssl.SSLContext | None:
    """The certificate authorities for https workers; None for the system's."""
    if config.workers.ca_file is None:
        return None
    return ssl.create_default_context(cafile=config.workers.ca_file)


def forwarded_authorization(config: Config, api_key: str | None) -> str | None:
    """The header that replaces those of clients; None where theirs stay."""
    return f"Bearer {api_key}" if config.workers.forward_api_key else None
