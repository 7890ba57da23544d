"""The parts of the service that a reload changes, and how it changes them.

Each part either takes other settings while it works, or is built again around what the old one
knew. Separate from the application, which starts and stops them once.
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping

import msgspec
from msgspec import Struct, UnsetType
from prometheus_client import GCCollector, PlatformCollector, ProcessCollector

from extproc.admin.collector import GatewayCollector, WorkerCollector
from extproc.admin.kv_collector import EncoderCollector, KvCollector, ProofCollector
from extproc.admin.pool_collector import PoolCollector
from extproc.build import (
    api_key_of,
    build_kv,
    build_manager,
    build_router,
    build_shared,
    introspection_settings,
    place_models,
    worker_tls_of,
)
from extproc.clock import Clock
from extproc.config.schema import Config
from extproc.discovery.static_urls import StaticUrls
from extproc.encoders import LoadedEncoders, load_encoders, proven_models
from extproc.errors import ConfigError
from extproc.logs import set_log_level
from extproc.routing.polled_load import PolledLoad
from extproc.routing.pool_signals import PoolSignals, PoolSources
from extproc.routing.token_proof.prover import TokenProver
from extproc.server.admission_collector import AdmissionCollector
from extproc.server.certificates import Certificate
from extproc.serving import (
    admission_limits,
    build_server,
    session_context,
    stream_settings,
)
from extproc.sources import build_source
from extproc.tokenization.encoder import PromptEncoder
from extproc.workers.engine_tokenizer import EngineTokenizer
from extproc.workers.introspection_client import AiohttpIntrospectionClient
from extproc.workers.prefill_client import AiohttpPrefillClient
from extproc.workers.runtime_workers import RuntimeWorkers
from extproc.workers.worker import Worker
from extproc.xds.publisher import Publisher
from extproc.xds.service import DiscoveryService

__all__ = ["LiveParts"]


class _Read(Struct, frozen=True):
    """What was read from the files of a new configuration."""

    api_key: str | None
    worker_tls: ssl.SSLContext | None
    certificate: Certificate | None
    encoders: Mapping[str, PromptEncoder]


class LiveParts:
    """The parts, for the configuration that is in use."""

    def __init__(
        self, config: Config, encoders: Mapping[str, PromptEncoder], clock: Clock | None
    ) -> None:
        """`encoders` by model id, as load_encoders gives them; `close` closes them."""
        self.config = config
        shared = self.shared = build_shared(config, clock=clock)
        self._encoders = dict(encoders)
        # Those of an earlier configuration that may still be in use.
        self._retired: set[PromptEncoder] = set()
        worker_tls = worker_tls_of(config)
        self.client = AiohttpIntrospectionClient(shared.api_key, worker_tls)
        self.prefill_client = AiohttpPrefillClient(worker_tls)
        self._source = build_source(config, shared)
        limit = config.discovery.runtime_workers_max
        self.runtime = RuntimeWorkers(self._source, limit=limit)
        self.manager = build_manager(config, shared, self.client, self.runtime)
        engines = EngineTokenizer(self.client)
        self.kv = build_kv(config, shared, engines, self._engine_restarted)
        self.routing = build_router(
            config, shared, self.kv, encoders, self.prefill_client, self.manager.recheck
        )
        self.polled_load = PolledLoad(
            shared.registry,
            self.kv.ranks,
            self.client,
            shared.clock,
            shared.random,
            shared.metrics,
        )
        self.prover = TokenProver(
            shared.registry,
            engines,
            self.kv.truth.proofs,
            shared.clock,
            shared.random,
            shared.metrics,
        )
        self.prover.use(proven_models(config, self._encoders))
        self.publisher = self._build_publisher()
        self.discovery = None if self.publisher is None else DiscoveryService(self.publisher)
        self.server = build_server(config, shared, self.routing, self.discovery)
        registry = shared.registry
        shared.metrics.keep_only(
            models=lambda: self.routing.choosers.keys(),
            workers=lambda: {worker.url for worker in registry},
        )
        self._register_collectors()

    def _engine_restarted(self, worker: Worker) -> None:
        """The KV events of a worker come from another process."""
        self.manager.recheck(worker)
        self.prover.restarted(worker)

    def _build_publisher(self) -> Publisher | None:
        config, shared = self.config, self.shared
        if not config.envoy.has_ads:
            return None
        return Publisher(
            config,
            shared.registry,
            shared.clock,
            shared.metrics,
            all_named=lambda: self.manager.first_round_done,
        )

    def _register_collectors(self) -> None:
        shared = self.shared
        ProcessCollector(registry=shared.prometheus)
        PlatformCollector(registry=shared.prometheus)
        GCCollector(registry=shared.prometheus)
        signals = PoolSignals(
            PoolSources(
                registry=shared.registry,
                ranks=self.kv.ranks,
                tickets=shared.tickets,
                spare=self.routing.lease_parts.outcomes.spare,
                demand=self.routing.demand,
                clock=shared.clock,
                queues=lambda: self.routing.queues,
            )
        )
        for collector in (
            WorkerCollector(shared.registry, shared.tickets, shared.sources),
            KvCollector(self.kv.ranks, shared.clock),
            EncoderCollector(self._encoders),
            ProofCollector(self.kv.truth.proofs),
            GatewayCollector(self.routing.lease_parts.gateway),
            PoolCollector(signals, lambda: self.routing.choosers),
            AdmissionCollector(self.server.streams.session_context.admission),
        ):
            shared.prometheus.register(collector)

    async def prepare(self, config: Config) -> Callable[[], None]:
        """Read what another configuration needs; returns what puts it into use.

        Until that is called, nothing changes. Raises ConfigError.
        """
        before = LoadedEncoders(self.config, dict(self._encoders))
        certificates, tls = self.server.certificates, config.server.tls

        def read() -> _Read:
            certificate = None
            if certificates is not None and tls is not None:
                certificate = certificates.read(tls)
            key, authorities = api_key_of(config), worker_tls_of(config)
            # At last: encoders that were loaded would have to be closed.
            return _Read(key, authorities, certificate, load_encoders(config, before))

        try:
            found = await asyncio.to_thread(read)
        except (OSError, ValueError) as error:
            # A file that has changed since it was checked.
            raise ConfigError([f"a file of this configuration cannot be used: {error}"]) from error
        return lambda: self._use(config, found)

    def _use(self, config: Config, found: _Read) -> None:
        """Put a configuration into use, in one step of the event loop. Open streams go on."""
        shared = self.shared = msgspec.structs.replace(self.shared, api_key=found.api_key)
        place_models(config, shared, self.kv)
        self.routing = build_router(
            config,
            shared,
            self.kv,
            found.encoders,
            self.prefill_client,
            self.manager.recheck,
            self.routing,
        )
        router = self.routing.router
        admission = self.server.streams.session_context.admission
        admission.limits = admission_limits(config)
        context = session_context(config, shared, router, admission)
        self.server.streams.use(context, router, stream_settings(config))
        if self.server.certificates is not None and found.certificate is not None:
            self.server.certificates.use(found.certificate)
        self.client.use(found.api_key, found.worker_tls)
        self.prefill_client.use(found.worker_tls)
        self._replace_encoders(found.encoders)
        self.prover.use(proven_models(config, self._encoders))
        if config.observability.log_level != self.config.observability.log_level:
            set_log_level(config.observability)
        self.config = config
        if self.publisher is not None:
            self.publisher.use(config)
        self.manager.reconfigure(config.models, introspection_settings(config))
        self.runtime.limit = config.discovery.runtime_workers_max
        static_urls = config.discovery.static_urls
        if isinstance(self._source, StaticUrls) and not isinstance(static_urls, UnsetType):
            self._source.replace(static_urls)
        shared.tickets.limit(config.active_load.stale_request_timeout_secs)

    def _replace_encoders(self, encoders: Mapping[str, PromptEncoder]) -> None:
        gone = set(self._encoders.values()) - set(encoders.values())
        self._encoders.clear()
        self._encoders.update(encoders)
        # Requests that began with them are decided by then.
        loop, seconds = asyncio.get_running_loop(), self.config.routing_deadline_secs
        for encoder in gone:
            self._retired.add(encoder)
            loop.call_later(seconds, self._retire, encoder)

    def _retire(self, encoder: PromptEncoder) -> None:
        self._retired.discard(encoder)
        encoder.close()

    def close(self) -> None:
        """Close the encoders, and give up questions to engines."""
        self.kv.truth.engines.close()
        for encoder in {*self._encoders.values(), *self._retired}:
            encoder.close()
