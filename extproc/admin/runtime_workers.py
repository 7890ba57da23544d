"""Adds and removes workers while the service runs: `POST` and `DELETE` on `/workers`.

The only pages that change something, so they need a token even where the others are open.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
import structlog
from aiohttp import web
from msgspec import Struct

from extproc.admin.access import token_problem
from extproc.config.schema import Config
from extproc.config.worker_urls import checked_worker_url, group_address_problem
from extproc.errors import ServiceError
from extproc.worker_url import WorkerUrl, format_endpoint
from extproc.workers.registry import WorkerRegistry
from extproc.workers.runtime_workers import RuntimeWorkerError, RuntimeWorkers
from extproc.workers.worker import Role

__all__ = ["RuntimeWorkerPages"]

_log = structlog.get_logger()

_SCOPE: Final = (
    "this replica only, until it restarts; do the same at the others, and use discovery for a "
    "lasting change"
)


class _NewWorker(Struct, forbid_unknown_fields=True):
    """The body of a POST. Without a role and a model, the engine is asked."""

    url: str
    role: Role | None = None
    model: str | None = None


class _RefusedError(ServiceError):
    """The answer to a request that changes nothing."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class RuntimeWorkerPages:
    """The pages, for the workers in `runtime`."""

    def __init__(
        self, runtime: RuntimeWorkers, registry: WorkerRegistry, config: Callable[[], Config]
    ) -> None:
        """`config` gives the configuration in use."""
        self._runtime = runtime
        self._registry = registry
        self._config = config

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/workers", self._post), web.delete("/workers", self._delete)]

    async def _post(self, request: web.Request) -> web.Response:
        try:
            return await self._add(request)
        except _RefusedError as error:
            return _answer(error.status, {"error": str(error)})
        except web.RequestPayloadError:
            # The server must not read on after the answer: it would log a traceback, and what
            # follows on this connection cannot be parsed.
            request.content.feed_eof()
            text = "the body cannot be read; send it in the encoding that content-encoding names"
            response = _answer(400, {"error": text})
            response.force_close()
            return response

    async def _delete(self, request: web.Request) -> web.Response:
        try:
            return self._remove(request)
        except _RefusedError as error:
            return _answer(error.status, {"error": str(error)})

    async def _add(self, request: web.Request) -> web.Response:
        config = self._config()
        _check_token(config)
        try:
            body = msgspec.json.decode(await request.read(), type=_NewWorker)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _RefusedError(400, f"expected a JSON object with a url: {error}") from None
        gateway = _gateway(config)
        url = _parse(body.url, config)
        if (problem := group_address_problem(url)) is not None:
            raise _RefusedError(400, f"url: {problem}")
        if url.tls and url.is_ip:
            raise _RefusedError(
                400, "url: Envoy can verify an https worker only by its host name, use that"
            )
        if body.model is not None and body.model not in [one.id for one in config.models]:
            raise _RefusedError(400, "model: not one of the configured models")
        if url.is_ip and (other := self._at(format_endpoint(url.host, url.port), url)):
            raise _RefusedError(409, f"url: {other} has the same address")
        try:
            self._runtime.add(url, body.role, body.model)
        except RuntimeWorkerError as error:
            raise _RefusedError(409, f"url: {error}") from None
        _log.info("runtime_worker_added", worker=str(url), peer=request.remote)
        shown = {"url": str(url), "role": body.role, "model": body.model}
        note = "the worker is asked about itself now; GET /workers shows when it is ready"
        return _answer(201, {"added": shown, "note": note, "scope": _SCOPE, "gateway": gateway})

    def _remove(self, request: web.Request) -> web.Response:
        config = self._config()
        _check_token(config)
        text = request.query.get("url")
        if text is None:
            raise _RefusedError(400, "url: missing, send DELETE /workers?url=URL")
        url = _parse(text, config)
        try:
            self._runtime.remove(url)
        except RuntimeWorkerError as error:
            raise _RefusedError(409 if error.is_known else 404, f"url: {error}") from None
        _log.info("runtime_worker_removed", worker=str(url), peer=request.remote)
        note = "the worker gets no new requests; its streams go on"
        return _answer(200, {"removed": {"url": str(url)}, "note": note, "scope": _SCOPE})

    def _at(self, address: str, url: WorkerUrl) -> str | None:
        """The URL of another worker at this address, which discovery gave by name."""
        worker = self._registry.at_address(address)
        return None if worker is None or worker.url == str(url) else worker.url


def _parse(text: str, config: Config) -> WorkerUrl:
    try:
        return checked_worker_url(text, config)
    except ValueError as error:
        raise _RefusedError(400, f"url: {error}") from None


def _check_token(config: Config) -> None:
    """Refuse where no token is asked for; with one, the request has had it."""
    if (problem := token_problem(config)) is not None:
        raise _RefusedError(403, f"workers can be changed only with a token; {problem}")


def _gateway(config: Config) -> str:
    """How the gateway comes to know a new worker; refused if it does not."""
    envoy = config.envoy
    if envoy.has_ads:
        return "Envoys that have their endpoints from this replica get the worker over ADS"
    if envoy.endpoints_file is not None:
        return f"the worker is written into {envoy.endpoints_file}"
    if envoy.destination == "single":
        return "the gateway must connect to any address that this service names"
    raise _RefusedError(
        409,
        "the gateway would not know the worker and send its requests elsewhere; set "
        "envoy.endpoints: ads or envoy.endpoints_file, and restart",
    )


def _answer(status: int, body: Mapping[str, Any]) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(body), content_type="application/json"
    )
