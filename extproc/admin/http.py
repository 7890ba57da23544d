"""The admin HTTP server: `/metrics`, `/healthz`, `/readyz`, `/workers`, `/config`.

For operators and probes inside the mesh. It names workers, so it listens on loopback unless it is
configured otherwise, and can ask for a token.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec
import structlog
from aiohttp import web
from msgspec import Struct
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

from extproc.admin.access import require_token
from extproc.config.files import read_admin_token
from extproc.config.server import ServerConfig
from extproc.config.status import ReloadStatus
from extproc.errors import ConfigError
from extproc.kv.indexer import RankState
from extproc.routing.gateway_watch import GatewayWatch
from extproc.routing.rank import Rank
from extproc.routing.ranks import Ranks
from extproc.routing.token_proof.proofs import TokenProofs
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Worker, WorkerSpec
from extproc.workers.worker_warnings import SEVERAL_ADDRESSES_FIX

__all__ = ["AdminServer", "Questions"]

_log = structlog.get_logger()

_ADDRESSES_SHOWN: Final = 20
_ADAPTERS_SHOWN: Final = 100
_PROBES = frozenset({"/healthz", "/readyz"})


class Questions(Struct, frozen=True, kw_only=True):
    """What the pages ask of the service, on every request.

    `models` gives the configured ids, `refused` the workers that are not registered for their
    role, `reloads` None without a file that could change, and `envoys` those that have their
    endpoints from this replica. `discovery` says what cannot be asked now. `is_added` is true for
    the id of a worker that an operator has added. `proofs` has what is known of their tokens.
    """

    is_ready: Callable[[], bool]
    models: Callable[[], Sequence[str]]
    refused: Callable[[], Sequence[WorkerSpec]]
    reloads: Callable[[], ReloadStatus | None]
    envoys: Callable[[], Sequence[Mapping[str, Any]]] = tuple
    discovery: Callable[[], Sequence[Mapping[str, Any]]] = tuple
    is_added: Callable[[str], bool] = lambda _: False
    proofs: TokenProofs | None = None


class Pages(Protocol):
    """Pages of another module."""

    def routes(self) -> list[web.RouteDef]: ...


class AdminServer:
    """The pages."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        metrics: CollectorRegistry,
        workers: WorkerRegistry,
        ranks: Ranks,
        gateway: GatewayWatch,
        questions: Questions,
        more: Sequence[Pages] = (),
    ) -> None:
        self._config = config
        self._workers = workers
        self._questions = questions
        self._ranks = ranks
        self._gateway = gateway
        token = read_admin_token(config)
        self._is_open = token is None
        app = web.Application(
            client_max_size=64 * 1024,
            middlewares=[] if token is None else [require_token(token, without=_PROBES)],
        )
        app.add_routes(
            [
                web.get("/metrics", make_aiohttp_handler(metrics)),
                web.get("/healthz", self._get_healthz),
                web.get("/readyz", self._get_readyz),
                web.get("/workers", self._get_workers),
                web.get("/config", self._get_config),
                *(route for pages in more for route in pages.routes()),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    async def start(self) -> None:
        """Listen; raises ConfigError, which names the key, if the port is in use."""
        await self._runner.setup()
        host, port = self._config.admin_host, self._config.admin_port
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            raise ConfigError(
                [f"server.admin_port: cannot listen on {host}:{port}: {error.strerror}"]
            ) from None
        if self._is_open and self._config.admin_is_exposed:
            _log.warning(
                "admin_port_without_token",
                address=f"{host}:{port}",
                fix="server.admin_token_file, or server.admin_host: 127.0.0.1",
            )

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _get_healthz(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _get_readyz(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self._questions.is_ready() else 503)

    async def _get_workers(self, request: web.Request) -> web.Response:
        usable = self._workers.usable(self._questions.models())
        sources = self._questions.discovery()
        stale = any(source["reason"] is not None for source in sources)
        body = {
            "discovery": sources,
            # The models whose requests the gateway sends elsewhere than decided.
            "ignored_by_gateway": [
                model for model, ignored in self._gateway.verdicts().items() if ignored
            ],
            "envoys": self._questions.envoys(),
            "workers": [
                _describe(worker, worker in usable)
                | {
                    "stale": stale or worker.vanished,
                    "added_by": "admin" if self._questions.is_added(worker.id) else "discovery",
                    "known_to_gateway": self._known_to_gateway(worker),
                    "kv": self._describe_kv(worker),
                    "tokens": self._describe_tokens(worker),
                }
                for worker in self._workers
            ],
            # Their roles do not fit the other workers of their model.
            "refused": [_describe_refused(spec) for spec in self._questions.refused()],
        }
        return web.Response(body=msgspec.json.encode(body), content_type="application/json")

    async def _get_config(self, request: web.Request) -> web.Response:
        body = msgspec.json.encode(self._questions.reloads())
        return web.Response(body=body, content_type="application/json")

    def _known_to_gateway(self, worker: Worker) -> bool:
        """False if the gateway passed the worker over, or has not got its address yet."""
        return self._gateway.knows(worker) and self._workers.gateway_knows(worker)

    def _describe_tokens(self, worker: Worker) -> dict[str, Any]:
        """What is known of its tokens, by model; empty if they are not proven at all."""
        proofs = self._questions.proofs
        return {} if proofs is None else {m: one.shown() for m, one in proofs.of(worker).items()}

    def _describe_kv(self, worker: Worker) -> dict[str, Any]:
        """Empty for a worker whose model does not use KV events."""
        found = self._ranks.of(worker)
        if not found:
            return {}
        events = worker.spec.kv_events
        return {
            "page_size": None if events is None else events.block_size,
            "ranks": [_describe_rank(rank, self._ranks.state(rank)) for rank in found],
        }


def _describe_rank(rank: Rank, state: RankState | None) -> dict[str, Any]:
    shown: dict[str, Any] = {"rank": rank.dp_rank, "in_flight": rank.load.in_flight}
    if state is None:
        return shown | {"trusted": False, "reason": "no_events"}
    return shown | {
        "trusted": state.trusted,
        "reason": state.reason,
        "connected": state.connected,
        "pages": state.pages,
        "pages_by_tier": dict(zip(("device", "host", "below"), state.pages_by_tier, strict=True)),
        "last_event_age_seconds": state.last_event_age_seconds,
        "gaps": state.stream.gaps,
        "restarts": state.stream.restarts,
        "malformed": state.stream.malformed,
    }


def _describe(worker: Worker, usable: bool) -> dict[str, Any]:
    return {
        "url": worker.url,
        "model": worker.model_ids[0] if worker.model_ids else None,
        "mode": worker.role,
        "engine": worker.spec.engine,
        "engine_version": worker.spec.engine_version or None,
        "reasoning_parser": worker.spec.reasoning_parser or None,
        "breaker": worker.breaker.state.name.lower(),
        "in_flight": worker.in_flight,
        "draining": worker.draining,
        "ready": usable and worker.breaker.state is not BreakerState.OPEN,
        "address": worker.address,
        "adapters": sorted(worker.adapters)[:_ADAPTERS_SHOWN],
        "adapter_count": len(worker.adapters),
    } | _describe_unused(worker)


def _describe_unused(worker: Worker) -> dict[str, Any]:
    """The addresses of the worker's name that get no requests, and what to do about it."""
    if not worker.unused_addresses:
        return {}
    shown = list(worker.unused_addresses[:_ADDRESSES_SHOWN])
    return {"unused_addresses": shown, "fix": SEVERAL_ADDRESSES_FIX}


def _describe_refused(spec: WorkerSpec) -> dict[str, Any]:
    return {
        "url": str(spec.url),
        "model": spec.model_ids[0] if spec.model_ids else None,
        "mode": spec.role,
    }
