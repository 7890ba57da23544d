"""Sends a prefill: tries prefill workers until one accepts the connection.

It is the only part of routing that sends requests of its own. The leg that it returns waits for
the worker's answer.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from extproc.errors import no_decode_workers, no_prefill_workers, service_overloaded
from extproc.headers import AUTHORIZATION_HEADER, CONTENT_TYPE_HEADER
from extproc.routing.adapters import joined_members, model_member
from extproc.routing.chooser import Chooser, Chosen
from extproc.routing.claim import Claims
from extproc.routing.json_members import with_members
from extproc.routing.pd.handoff import bootstrap_members, prompts_of_a_batch
from extproc.routing.pd.prefill_leg import LegParts, PrefillLeg
from extproc.routing.pd.settings import PdSettings
from extproc.routing.pd.splitting import prefill_members
from extproc.routing.placement import PromptTokens
from extproc.routing.request import ClientHeaders, Request
from extproc.steering import DATA_PARALLEL_RANK_HEADER
from extproc.workers.engine_calls import (
    EngineUnreachableError,
    PrefillCall,
    PrefillClient,
    PrefillClientOverloadedError,
)
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Worker

__all__ = ["PrefillSender", "SentPrefill"]

# Bytes kept of the engine's answer: enough for its error message, or for a handle to its cache.
_KEPT_BYTES: Final = 64 * 1024
_KEPT_OF_KV_ANSWER_BYTES: Final = 1024 * 1024


class SentPrefill(NamedTuple):
    """A prefill that was sent. The decode worker must find the JSON `members` in its body."""

    leg: PrefillLeg
    chosen: Chosen
    members: bytes


class PrefillSender:
    """Sends the prefills of all models."""

    def __init__(
        self,
        settings: PdSettings,
        registry: WorkerRegistry,
        claims: Claims,
        client: PrefillClient,
        leg_parts: LegParts,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._claims = claims
        self._client = client
        self._leg_parts = leg_parts

    async def send(
        self, request: Request, model: str, chooser: Chooser, prompt: PromptTokens, *, waits: bool
    ) -> SentPrefill:
        """Send the request to a prefill worker; raises RouterError.

        `waits`: the caller waits for the worker's answer, since decode needs it.
        """
        client = request.client_headers()
        headers = self._headers(client)
        prompts = None if waits else prompts_of_a_batch(request)
        registry, clock = self._registry, self._leg_parts.clock
        tried: set[Worker] = set()
        while True:
            now = clock.monotonic()
            usable = registry.candidates(model, "prefill", now, request.adapter)
            candidates = [worker for worker in usable if worker not in tried]
            if not candidates:
                raise no_prefill_workers()
            if not registry.candidates(model, "decode", now, request.adapter):
                raise no_decode_workers()
            chosen = chooser.choose(candidates, prompt, now)
            members = prefill_members(request) if waits else _rooms(chosen, prompts)
            claim = self._claims.take(chosen.worker, now, chosen.placed)
            leg = PrefillLeg(self._leg_parts, model, claim, now, request_id=client.request_id)
            try:
                name = model_member(request, model, chosen.worker)
                body = with_members(request.body, joined_members(members, name))
                sent = headers + _rank_headers(chosen)
                leg.call = await self._post(chosen.worker, client.path, sent, body, waits)
            except PrefillClientOverloadedError:
                leg.cancel()
                raise service_overloaded() from None
            except EngineUnreachableError:
                leg.not_connected()
                tried.add(chosen.worker)
            except BaseException:
                leg.cancel()
                raise
            else:
                return SentPrefill(leg, chosen, members)

    async def _post(
        self,
        worker: Worker,
        path: str,
        headers: Sequence[tuple[str, str]],
        body: bytes,
        waits: bool,
    ) -> PrefillCall:
        settings = self._settings
        return await self._client.post(
            worker.spec.url,
            path,
            headers,
            body,
            connect_seconds=settings.connect_seconds,
            answer_seconds=settings.kv_seconds if waits else settings.prefill_seconds,
            keep_bytes=_KEPT_OF_KV_ANSWER_BYTES if waits else _KEPT_BYTES,
        )

    def _headers(self, client: ClientHeaders) -> list[tuple[str, str]]:
        headers = [(CONTENT_TYPE_HEADER, "application/json")]
        authorization = self._settings.authorization
        for name, value in client.headers:
            if name != AUTHORIZATION_HEADER or authorization is None:
                headers.append((name, value))
        if authorization is not None:
            headers.append((AUTHORIZATION_HEADER, authorization))
        return headers


def _rank_headers(chosen: Chosen) -> list[tuple[str, str]]:
    """The rank for an engine that reads it from a header; SGLang has it from the bootstrap room."""
    if chosen.dp_rank is None or not chosen.worker.engine.ranks_in_header:
        return []
    return [(DATA_PARALLEL_RANK_HEADER, str(chosen.dp_rank))]


def _rooms(chosen: Chosen, prompts: int | None) -> bytes:
    """Return the members by which the decode worker finds this prefill worker."""
    spec = chosen.worker.spec
    events = spec.kv_events
    return bootstrap_members(
        spec.url.host,
        spec.bootstrap_port,
        dp_rank=chosen.dp_rank or 0,
        dp_size=events.dp_size if events is not None else 1,
        prompts=prompts,
    )
