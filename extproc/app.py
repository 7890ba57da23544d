"""The life cycle of the service: starts its parts, drains and stops them (`live` has them)."""

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from extproc import __version__
from extproc.admin.http import AdminServer, Questions
from extproc.admin.runtime_workers import RuntimeWorkerPages
from extproc.admin.token_page import TokenPage
from extproc.clock import Clock
from extproc.config.schema import Config
from extproc.config.warnings import config_warnings
from extproc.envoy_config.endpoints_file import EndpointsFile, configured_endpoints
from extproc.event_loop import EventLoop
from extproc.live import LiveParts
from extproc.reload import Reloader
from extproc.routing.pd.passes import Disaggregation
from extproc.routing.router import Router
from extproc.tokenization.encoder import PromptEncoder
from extproc.workers.observer import WorkerObserver

__all__ = ["App", "run_app"]

_log = structlog.get_logger()

_LAG_PROBE_SECONDS = 0.5
_GC_YOUNG_OBJECTS = 20_000
_TELLING_SECONDS = 0.2


class App(WorkerObserver):
    """One running service."""

    def __init__(
        self,
        config: Config,
        encoders: Mapping[str, PromptEncoder],
        clock: Clock | None = None,
        config_file: Path | None = None,
    ) -> None:
        """`encoders` by model id, as load_encoders gives them; closed at the end of `run`.

        `config_file` is the file of `config`, which is followed if it is given.
        """
        parts = self._parts = LiveParts(config, encoders, clock)
        shared, self._manager, self.server = parts.shared, parts.manager, parts.server
        self._clock = shared.clock
        self.metrics = shared.metrics
        self.workers = shared.registry
        self.tickets = shared.tickets
        self.ranks = parts.kv.ranks
        gateway = parts.routing.lease_parts.gateway
        self._endpoints = self._build_endpoints()
        if parts.publisher is not None:
            parts.publisher.known_changed = self.workers_changed
        for observer in (
            self.ranks,
            parts.prover,
            self.pd,
            gateway,
            self._endpoints,
            parts.publisher,
            self,
        ):
            if observer is not None:
                self._manager.observe(observer)
        self._reloader = (
            None if config_file is None else Reloader(config_file, config, self, self.metrics)
        )
        self._admin = self._build_admin()
        # The models without which the service is not ready. One that a reload adds is not among
        # them before it was served once: its workers may still be starting.
        self._needed = self._models_that_count()
        self._warned_of_failing_open = False
        self._changed = asyncio.Event()
        self._may_serve = asyncio.Event()

    @property
    def config(self) -> Config:
        """The configuration in use."""
        return self._parts.config

    @property
    def router(self) -> Router:
        """The router of new requests."""
        return self._parts.routing.router

    @property
    def pd(self) -> Disaggregation:
        """Both passes of new requests."""
        return self._parts.routing.pd

    def ask_for_reload(self) -> None:
        """Read the configuration file again."""
        if self._reloader is not None:
            self._reloader.ask()

    async def prepare(self, config: Config) -> Callable[[], None]:
        """Get ready for another configuration; see ReloadTarget."""
        use = await self._parts.prepare(config)

        def commit() -> None:
            use()
            self._needed.intersection_update(self._models_that_count())
            self.workers_changed()

        return commit

    def _build_admin(self) -> AdminServer:
        parts, shared = self._parts, self._parts.shared
        return AdminServer(
            parts.config.server,
            metrics=shared.prometheus,
            workers=self.workers,
            ranks=self.ranks,
            gateway=parts.routing.lease_parts.gateway,
            questions=Questions(
                is_ready=self.is_ready,
                models=lambda: self.router.model_ids,
                refused=self._manager.refused,
                reloads=lambda: None if self._reloader is None else self._reloader.status,
                discovery=lambda: shared.sources.show(self._clock.monotonic()),
                is_added=parts.runtime.is_added,
                proofs=parts.kv.truth.proofs,
                envoys=lambda: [] if parts.publisher is None else parts.publisher.show(),
            ),
            more=[
                RuntimeWorkerPages(parts.runtime, self.workers, lambda: self.config),
                TokenPage(lambda: self.router, lambda: self.config),
            ],
        )

    def _build_endpoints(self) -> EndpointsFile | None:
        envoy = self.config.envoy
        if envoy.endpoints_file is None:
            return None
        return EndpointsFile(
            Path(envoy.endpoints_file),
            envoy.cluster,
            self.workers,
            self._clock,
            all_named=lambda: self._manager.first_round_done,
            known_changed=self.workers_changed,
        )

    def is_ready(self) -> bool:
        """True after the first round if every configured model has a worker that can serve it.

        A model with `ready_without_workers` does not count, and one that a reload has added counts
        from the moment when it is served.

        Breakers do not count: readiness that follows them would take the last router away
        while workers recover.
        """
        return (
            self._manager.first_round_done
            and not self.server.draining
            and self._all_models_served()
        )

    def _all_models_served(self) -> bool:
        return all(self.workers.is_served(model) for model in self._needed)

    def _models_that_count(self) -> set[str]:
        """Those that must have workers for the service to be ready."""
        return {model.id for model in self.config.models if not model.ready_without_workers}

    def _warn_of_failing_open(self) -> None:
        """Warn once: without this service no pair is made, and neither worker can serve alone."""
        config = self.config
        if not config.fails_open:
            return
        model = config.models[0].id
        if self.workers.is_disaggregated(model) and not self._warned_of_failing_open:
            self._warned_of_failing_open = True
            _log.warning(
                "disaggregated_model_fails_open", model=model, fix="envoy.fail_open: false"
            )

    def workers_changed(self) -> None:
        self._changed.set()
        self._needed.update(filter(self.workers.is_served, self._models_that_count()))
        self._warn_of_failing_open()
        if self._first_workers_are_known() or all(
            map(self.workers.is_served, self.router.model_ids)
        ):
            self._may_serve.set()

    def _first_workers_are_known(self) -> bool:
        publisher = self._parts.publisher
        return self._manager.first_round_done and (publisher is None or publisher.settled)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain; raises ConfigError for addresses in use."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._parts.close)
            await stack.enter_async_context(self._parts.client)
            self._parts.prefill_client.open()
            stack.push_async_callback(self._parts.prefill_client.close)
            stack.push_async_callback(self.ranks.indexer.close)
            stack.push_async_callback(self.server.stop)
            if self._parts.discovery is not None:
                stack.callback(self._parts.discovery.close)
            self.server.bind()
            stack.push_async_callback(self._admin.stop)
            await self._admin.start()
            self._log_start()
            background = [
                self._manager.run(),
                self.tickets.run_janitor(),
                self._serve_when_workers_are_known(),
                self._probe_lag(),
                self.ranks.indexer.run(),
                self._parts.polled_load.run(),
                self._parts.prover.run(),
            ]
            if self.config.load.release == "estimate":
                background.append(self.tickets.run_estimates())
            if self._endpoints is not None:
                background.append(self._endpoints.run(configured_endpoints(self.config)))
            if self._parts.publisher is not None:
                background.append(self._parts.publisher.run())
            if self._reloader is not None:
                background.append(self._reloader.run())
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
            self._parts.kv.truth.engines.close()
            results = await asyncio.gather(stopping, *tasks, return_exceptions=True)
            for result in results:
                # A failed background task has ended the wait.
                if isinstance(result, Exception):
                    raise result
        _log.info("stopped")

    async def _give_up_prefills(self) -> None:
        """Answer clients whose prefill still runs: its connection ends with this process, and the
        decode worker would wait for it.
        """
        if len(self.pd.pairs):
            self.pd.pairs.abandon()
            await asyncio.sleep(_TELLING_SECONDS)

    async def _serve_when_workers_are_known(self) -> None:
        """Start to answer, and publish readiness from then on.

        Before introspection has answered, the service would refuse requests that Envoy can
        place without it. With ADS, Envoys must have the workers before they send requests here.
        """
        if self._parts.publisher is not None:
            await self.server.start(alive=False)
            await self._may_serve.wait()
        else:
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
        listed = config.discovery.listed
        _log.info(
            "started",
            version=__version__,
            grpc=f"{config.server.host}:{config.server.port}",
            unix_socket=config.server.unix_socket,
            admin=f"{config.server.admin_host}:{config.server.admin_port}",
            tls=config.server.tls is not None,
            models=",".join(f"{model.id}:{model.policy}" for model in config.models),
            discovery=config.discovery.backend,
            workers=0 if listed is None else len(listed.urls),
        )
        told = config.discovery.cluster is not None or (
            listed is not None and listed.prefill_urls and listed.decode_urls
        )
        for one in config_warnings(config):
            _log.warning("config_doubtful", name=one.key, error=one.text, fix=one.fix)
        for model in config.models:
            if model.pd.protocol == "nixl" and not told:
                _log.warning(
                    "roles_not_configured",
                    model=model.id,
                    fix="name them in prefill_urls and decode_urls of the section of discovery",
                )


def run_app(config: Config, encoders: Mapping[str, PromptEncoder], config_file: Path) -> None:
    """Run until SIGTERM or SIGINT; returns after a drain, raises ConfigError at start.

    A second signal ends the process at once. SIGHUP reads the file of `config` again.
    """

    # This process does not fork, and gRPC's fork support costs time on every poll.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

    # All objects of the start live as long as the process, so the collector need not visit
    # them again. Objects of requests are freed by reference counts.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_YOUNG_OBJECTS, 50, 100)
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(_until_signal(config, encoders, config_file))


async def _until_signal(
    config: Config, encoders: Mapping[str, PromptEncoder], config_file: Path
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    stopping = (signal.SIGTERM, signal.SIGINT)

    def stop_or_end() -> None:
        stop.set()
        for number in stopping:
            # The next one has its default effect: it ends the process, whatever it waits for.
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in stopping:
        loop.add_signal_handler(number, stop_or_end)
    app = App(config, encoders, config_file=config_file)
    loop.add_signal_handler(signal.SIGHUP, app.ask_for_reload)
    await app.run(stop)
