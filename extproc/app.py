"""The composition root: builds every part from a Config, starts, drains and stops them."""

import asyncio
import contextlib
import gc
import os
import signal
import ssl
from collections.abc import Mapping
from pathlib import Path
from random import Random

import msgspec
import structlog
from msgspec import UnsetType
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from extproc import __version__
from extproc.admin.collector import WorkerCollector
from extproc.admin.http import AdminServer
from extproc.admin.kv_collector import EncoderCollector, KvCollector
from extproc.clock import Clock, SystemClock
from extproc.config.files import read_api_key
from extproc.config.schema import TOKEN_POLICIES, Config
from extproc.discovery.static_urls import StaticUrls
from extproc.errors import ConfigError
from extproc.event_loop import EventLoop
from extproc.kv.subscriber import SubscriberSettings
from extproc.metrics.service import Metrics
from extproc.policies.factory import create_kv_policy, create_policy
from extproc.routing.lease import WorkerOutcomes
from extproc.routing.local_endpoints import LocalEndpoints
from extproc.routing.pd.passes import Disaggregation, PdSettings
from extproc.routing.placement import Placement
from extproc.routing.rank_chooser import RankChooser
from extproc.routing.ranks import Ranks
from extproc.routing.router import Router
from extproc.routing.usable import UsableWorkers
from extproc.server.grpc_server import ExtProcServer
from extproc.server.replies import ReplyBuilder
from extproc.server.request_heads import RequestHeadTable
from extproc.server.responses import ResponseTable
from extproc.server.session import SessionContext
from extproc.tokenization.bodies.openai_chat import NO_TEMPLATE_KWARGS
from extproc.tokenization.encoder import EncoderSettings, PromptEncoder
from extproc.tokenization.errors import TokenizerError
from extproc.workers.introspection_client import AiohttpIntrospectionClient
from extproc.workers.manager import WorkerManager
from extproc.workers.prefill_client import AiohttpPrefillClient
from extproc.workers.registry import WorkerRegistry
from extproc.workers.resolver import SystemResolver
from extproc.workers.tickets import Tickets
from extproc.workers.worker import Mode, Worker

__all__ = ["App", "load_encoders", "run_app"]

_log = structlog.get_logger()

_LAG_PROBE_SECONDS = 0.5
# Of the time for a decision: a prompt without tokens by then is routed without them.
_PATIENCE_SHARE = 0.5
_GC_YOUNG_OBJECTS = 20_000
_TELLING_SECONDS = 0.2


class App:
    """One running service."""

    def __init__(
        self,
        config: Config,
        encoders: Mapping[str, PromptEncoder],
        clock: Clock | None = None,
    ) -> None:
        """`encoders` by model id, as load_encoders gives them; closed at the end of `run`."""
        self.config = config
        self._encoders = encoders
        self._clock = clock or SystemClock()
        self._prometheus = CollectorRegistry()
        ProcessCollector(registry=self._prometheus)
        PlatformCollector(registry=self._prometheus)
        GCCollector(registry=self._prometheus)
        self.metrics = Metrics(self._prometheus)
        self.workers = WorkerRegistry()
        self.active_load = Tickets(
            self._clock,
            config.active_load.stale_request_timeout_secs,
            self.metrics.stale_requests,
        )
        self._prometheus.register(WorkerCollector(self.workers, self.active_load))
        api_key = _api_key(config)
        self._client = AiohttpIntrospectionClient(api_key, _worker_tls(config))
        static_urls = config.discovery.static_urls
        if isinstance(static_urls, UnsetType):
            raise ConfigError(["discovery.static_urls: this section is needed"])
        self._configured_workers = len(static_urls.urls)
        random = Random()  # noqa: S311 (load spreading, not secrets)
        self.ranks = Ranks(
            self._clock,
            max_pages=config.kv.max_pages,
            settings=SubscriberSettings(
                replay_timeout_seconds=config.kv.replay_timeout_secs,
                replay_cool_down_seconds=config.kv.replay_retry_secs,
            ),
        )
        placements = self._place_models(random)
        self._prometheus.register(KvCollector(self.ranks, self._clock))
        self._prometheus.register(EncoderCollector(encoders))
        self._manager = WorkerManager(
            source=StaticUrls(static_urls),
            registry=self.workers,
            client=self._client,
            resolver=SystemResolver(),
            clock=self._clock,
            models=config.models,
            metrics=self.metrics,
            retry_seconds=config.discovery.introspection_retry_secs,
            dns_ttl_seconds=static_urls.dns_ttl_secs,
            on_change=self._workers_changed,
            follower=self.ranks,
            interval_seconds=config.discovery.introspection_interval_secs,
            on_mode_change=self._on_mode_change,
        )
        for model in config.models:
            # Alerts on a rate need the series to be there before the first event.
            self.metrics.missed(model.id)
            self.metrics.fallbacks(model.id)
        forwarded = f"Bearer {api_key}" if config.workers.forward_api_key else None
        books = WorkerOutcomes(self._clock, self.workers, self.metrics, config.load)
        self._caller = AiohttpPrefillClient(_worker_tls(config))
        self.pd = Disaggregation(
            PdSettings.of(config, forwarded),
            books,
            self.active_load,
            self._caller,
            UsableWorkers(self.workers),
            self.ranks,
            random,
            recheck=self._manager.recheck,
        )
        self.router = Router(
            policies={
                model.id: None if model.id in placements else create_policy(model.policy, random)
                for model in config.models
            },
            active_load=self.active_load,
            books=books,
            random=random,
            request_timeout_seconds=config.proxy.request_timeout_secs,
            destinations_max=config.destinations_max,
            kv=RankChooser(
                placements,
                encoders,
                self.ranks,
                self.metrics,
                self._clock,
                patience_seconds=config.server.step_deadline_secs * _PATIENCE_SHARE,
            ),
            token_endpoints=LocalEndpoints(encoders),
            pd=self.pd,
        )
        self.server = ExtProcServer(
            config.server,
            session_context=SessionContext(
                builder=ReplyBuilder(config.envoy, forwarded),
                metrics=self.metrics,
                heads=RequestHeadTable(),
                responses=ResponseTable(),
                max_body_bytes=config.server.max_body_bytes,
                models_body=_models_body(self.router.model_ids),
                only_model=self.router.only_model,
                debug_headers=config.observability.debug_headers,
                model_header=config.envoy.model_header,
                pick_decode=self.pd.pick_decode,
            ),
            route=self.router.route,
            answer=self.router.answer,
            metrics=self.metrics,
            body_deadline_seconds=config.proxy.request_timeout_secs,
            step_deadline_seconds=config.routing_deadline_secs,
            log_decisions=config.observability.log_level == "debug",
        )
        self._admin = AdminServer(
            config.server,
            metrics=self._prometheus,
            workers=self.workers,
            is_ready=self.is_ready,
            models=self.router.model_ids,
            ranks=self.ranks,
        )
        self._warned_of_failing_open = False
        self._changed = asyncio.Event()
        self._may_serve = asyncio.Event()

    def _place_models(self, random: Random) -> dict[str, Placement]:
        """The routing cores of the models whose policy looks at tokens."""
        placements = {}
        for model in self.config.models:
            if model.policy not in TOKEN_POLICIES:
                continue
            placements[model.id] = Placement(
                create_kv_policy(model, random),
                self.ranks.picture.index,
                prefill_tokens_per_second=model.min_ttft.prefill_tokens_per_second,
            )
            self.ranks.serve(model.id, placements[model.id])
            self.metrics.prompt_tokens(model.id)
            self.metrics.cached_tokens(model.id)
        return placements

    def is_ready(self) -> bool:
        """After the first round: every configured model has a worker that could serve it.

        Breakers do not count: readiness that flaps with them would take the last router away
        from workers that are just recovering.
        """
        return (
            self._manager.first_round_done
            and not self.server.draining
            and self._all_models_served()
        )

    def _all_models_served(self) -> bool:
        return all(self.workers.is_served(model) for model in self.router.model_ids)

    def _warn_of_failing_open(self) -> None:
        """Nobody pairs workers when we are gone, and neither half can serve alone."""
        config = self.config
        if not config.envoy.fail_open or len(config.models) > 1 or config.is_disaggregated:
            return
        model = config.models[0].id
        if self.workers.is_disaggregated(model) and not self._warned_of_failing_open:
            self._warned_of_failing_open = True
            _log.warning(
                "disaggregated_model_fails_open", model=model, fix="envoy.fail_open: false"
            )

    def _on_mode_change(self, worker: Worker, old: Mode, new: Mode) -> None:
        self.pd.role_changed(worker, old, new)

    def _workers_changed(self) -> None:
        self._changed.set()
        self._warn_of_failing_open()
        if self._manager.first_round_done or self._all_models_served():
            self._may_serve.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain; raises ConfigError for addresses in use."""
        async with contextlib.AsyncExitStack() as stack:
            for encoder in self._encoders.values():
                stack.callback(encoder.close)
            await stack.enter_async_context(self._client)
            self._caller.open()
            stack.push_async_callback(self._caller.close)
            stack.push_async_callback(self.ranks.picture.close)
            stack.push_async_callback(self.server.stop)
            self.server.bind()
            stack.push_async_callback(self._admin.stop)
            await self._admin.start()
            self._log_start()
            background = [
                self._manager.run(),
                self.active_load.run_janitor(),
                self._serve_when_workers_are_known(),
                self._probe_lag(),
                self.ranks.picture.run(),
            ]
            if self.config.load.release == "estimate":
                background.append(self.active_load.run_estimates())
            stopping = asyncio.create_task(stop.wait())
            tasks = [asyncio.create_task(work) for work in background]
            done, _ = await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if stopping in done:
                _log.info("draining", open_streams=self.server.open_streams)
                await self.server.drain(self.config.server.drain_secs)
                await self._give_up_prefills()
            stopping.cancel()
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(stopping, *tasks, return_exceptions=True)
            for result in results:
                # A background task that died is the reason we are here.
                if isinstance(result, Exception):
                    raise result
        _log.info("stopped")

    async def _give_up_prefills(self) -> None:
        """Tell clients whose prefill still runs: with us its connection ends, and nothing else
        would tell the decode worker.
        """
        if len(self.pd.pairs):
            self.pd.pairs.abandon()
            await asyncio.sleep(_TELLING_SECONDS)

    async def _serve_when_workers_are_known(self) -> None:
        """Start to answer, and publish readiness from then on.

        A service that answered before it has asked its workers who they are would refuse
        requests that Envoy can place without it.
        """
        await self._may_serve.wait()
        await self.server.start()
        ready: bool | None = None
        while True:
            if self.is_ready() is not ready:
                ready = self.is_ready()
                await self.server.set_health(ready=ready)
                usable = len(self.workers.usable(self.router.model_ids))
                _log.info("ready" if ready else "not_ready", usable_workers=usable)
            await self._changed.wait()
            self._changed.clear()

    async def _probe_lag(self) -> None:
        while True:
            due = self._clock.monotonic() + _LAG_PROBE_SECONDS
            await self._clock.sleep(_LAG_PROBE_SECONDS)
            self.metrics.event_loop_lag_seconds.set(max(0.0, self._clock.monotonic() - due))
            self.metrics.asyncio_tasks.set(len(asyncio.all_tasks()))

    def _log_start(self) -> None:
        config = self.config
        _log.info(
            "started",
            version=__version__,
            grpc=f"{config.server.host}:{config.server.port}",
            unix_socket=config.server.unix_socket,
            admin=f"{config.server.admin_host}:{config.server.admin_port}",
            tls=config.server.tls is not None,
            models=",".join(f"{model.id}:{model.policy}" for model in config.models),
            discovery=config.discovery.backend,
            workers=self._configured_workers,
        )
        static = config.discovery.static_urls
        told = not isinstance(static, UnsetType) and static.prefill_urls and static.decode_urls
        for model in config.models:
            if model.pd.protocol == "nixl" and not told:
                _log.warning(
                    "roles_not_configured",
                    model=model.id,
                    fix="name them in discovery.static_urls.prefill_urls and decode_urls",
                )


def load_encoders(config: Config) -> dict[str, PromptEncoder]:
    """The tokenizers that the configuration names, by model id; raises ConfigError.

    Models that agree in all of it share a tokenizer and its cache. Large vocabularies take
    seconds.
    """
    settings = config.tokenization
    loaded: dict[object, PromptEncoder] = {}
    encoders: dict[str, PromptEncoder] = {}
    problems = []
    for index, model in enumerate(config.models):
        path, template_kwargs = model.tokenizer_path, model.chat_template_kwargs
        if path is None:
            continue
        if taken := sorted(NO_TEMPLATE_KWARGS.intersection(template_kwargs)):
            problems.append(
                f"models[{index}].chat_template_kwargs: not for the template: {', '.join(taken)}"
            )
            continue
        key = (path, model.chat_template_name, repr(template_kwargs))
        if key not in loaded:
            try:
                loaded[key] = PromptEncoder.load(
                    Path(path),
                    EncoderSettings(
                        template_name=model.chat_template_name,
                        template_kwargs=template_kwargs,
                        cache_bytes=settings.cache_bytes,
                        inline_chars=settings.inline_chars,
                        threads=settings.threads,
                    ),
                )
            except TokenizerError as error:
                problems.append(f"models[{index}].tokenizer_path: {error}")
                continue
        encoders[model.id] = loaded[key]
    if problems:
        raise ConfigError(problems)
    return encoders


def run_app(config: Config, encoders: Mapping[str, PromptEncoder]) -> None:
    """Run until SIGTERM or SIGINT; returns after a drain, raises ConfigError at start."""

    # grpc forks nothing here, and its fork support costs time on every poll.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

    # What exists now lives as long as the process: the collector need not walk it again, and
    # what requests leave behind is freed by reference counts.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_YOUNG_OBJECTS, 50, 100)
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(_until_signal(config, encoders))


async def _until_signal(config: Config, encoders: Mapping[str, PromptEncoder]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await App(config, encoders).run(stop)


def _models_body(model_ids: list[str]) -> bytes:
    data = [
        {"id": model, "object": "model", "created": 0, "owned_by": "sglang"} for model in model_ids
    ]
    return msgspec.json.encode({"object": "list", "data": data})


def _api_key(config: Config) -> str | None:
    if config.workers.api_key_file is not None:
        return read_api_key(Path(config.workers.api_key_file))
    return config.workers.api_key


def _worker_tls(config: Config) -> ssl.SSLContext | None:
    if config.workers.ca_file is None:
        return None
    return ssl.create_default_context(cafile=config.workers.ca_file)
