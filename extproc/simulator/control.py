"""Handles all paths but inference: health, introspection, load, aborts, test controls."""

import asyncio
import time
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from aiohttp import web

from extproc.simulator.bodies import AbortBody, AdapterBody, RoleBody, decode
from extproc.simulator.engine import RankLoad
from extproc.simulator.errors import ApiError, error_body
from extproc.simulator.faults import WorkerFaults
from extproc.simulator.inference import hang, json_answer, listening_port
from extproc.simulator.vllm_control import VllmControl
from extproc.simulator.worker import Worker

__all__ = ["Control"]

# The engine release whose answers these are modelled on.
_ENGINE_VERSION: Final = "0.5.23"

_adapter_decoder = msgspec.json.Decoder(AdapterBody)
_abort_decoder = msgspec.json.Decoder(AbortBody)
_role_decoder = msgspec.json.Decoder(RoleBody)
_faults_decoder = msgspec.json.Decoder(WorkerFaults)


class Control:
    """Handlers that read or control the worker without generating tokens."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def routes(self) -> list[web.RouteDef]:
        routes = [
            web.get("/health", self.health),
            web.get("/v1/models", self.models),
            web.post("/simulator/restart", self.restart),
            web.get("/simulator/stats", self.stats),
            web.get("/simulator/faults", self.get_faults),
            web.post("/simulator/faults", self.set_faults),
            web.delete("/simulator/faults", self.clear_faults),
        ]
        if self._worker.settings.is_vllm:
            return routes + VllmControl(self._worker).routes()
        routes += [
            web.get("/health_generate", self.health_generate),
            web.get("/flush_cache", self.flush_cache),
            web.post("/flush_cache", self.flush_cache),
            web.post("/abort_request", self.abort_request),
            web.post("/pd_role_switch", self.switch_role),
        ]
        if not self._worker.settings.no_server_info:
            routes += [
                web.get("/server_info", self.server_info),
                web.get("/get_server_info", self.server_info),
                web.get("/v1/loads", self.loads),
            ]
        if self._worker.settings.lora and not self._worker.settings.is_vllm:
            routes += [
                web.post("/load_lora_adapter", self.load_adapter),
                web.post("/unload_lora_adapter", self.unload_adapter),
            ]
        return routes

    async def health(self, request: web.Request) -> web.Response:
        return await self._probe("health") or web.Response()

    async def health_generate(self, request: web.Request) -> web.Response:
        """Answers after the time of one token, or at once while the engine runs requests."""
        answer = await self._probe("health")
        if answer is None and self._worker.engine.is_idle:
            await asyncio.sleep(self._worker.engine.seconds_per_token)
        return answer or web.Response()

    async def server_info(self, request: web.Request) -> web.Response:
        answer = await self._probe("server_info")
        if answer is not None:
            return answer
        settings, publisher = self._worker.settings, self._worker.publisher
        return json_answer(
            {
                "model_path": settings.model,
                "tokenizer_path": settings.tokenizer_path or settings.model,
                "served_model_name": settings.model,
                "context_length": settings.context_length,
                "host": settings.host,
                "port": listening_port(request),
                "page_size": settings.page_size,
                "dp_size": settings.dp_size,
                "max_running_requests": settings.max_running_requests,
                "max_total_num_tokens": settings.max_total_num_tokens,
                "disaggregation_mode": self._worker.mode,
                "disaggregation_bootstrap_port": self._worker.bootstrap_port,
                "speculative_algorithm": settings.speculative_algorithm,
                "enable_lora": bool(settings.lora),
                "kv_events": None if publisher is None else publisher.description(),
                "version": _ENGINE_VERSION,
                "startup_time": self._worker.startup_time,
                "internal_states": [
                    {"max_running_requests": settings.max_running_requests}
                    for _ in range(settings.dp_size)
                ],
            }
        )

    async def load_adapter(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), _adapter_decoder)
        self._worker.adapters.load(body.lora_name, body.lora_path or "")
        return self._loaded_adapters()

    async def unload_adapter(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), _adapter_decoder)
        self._worker.adapters.unload(body.lora_name)
        return self._loaded_adapters()

    def _loaded_adapters(self) -> web.Response:
        return json_answer({"success": True, "loaded_adapters": self._worker.adapters.paths})

    async def models(self, request: web.Request) -> web.Response:
        answer = await self._probe("models", fails_while_starting=False)
        if answer is not None:
            return answer
        settings = self._worker.settings
        base = self._card(settings.model, settings.model, context_length=settings.context_length)
        adapters = [
            self._card(name, path, parent=settings.model)
            for name, path in self._worker.adapters.paths.items()
        ]
        return json_answer({"object": "list", "data": [base, *adapters]})

    def _card(
        self, name: str, root: str, *, parent: str | None = None, context_length: int | None = None
    ) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": self._worker.settings.engine,
            "root": root,
            "parent": parent,
            "max_model_len": context_length,
        }

    async def loads(self, request: web.Request) -> web.Response:
        """The `core` section of the engine's load report; `dp_rank` picks one rank."""
        ranks = [
            self._rank_load(rank, load) for rank, load in enumerate(self._worker.engine.loads())
        ]
        wanted = request.query.get("dp_rank")
        if wanted is not None:
            ranks = [rank for rank in ranks if str(rank["dp_rank"]) == wanted]
        running = sum(rank["num_running_reqs"] for rank in ranks)
        waiting = sum(rank["num_waiting_reqs"] for rank in ranks)
        return json_answer(
            {
                "timestamp": datetime.now(UTC).isoformat(),
                "version": _ENGINE_VERSION,
                "dp_rank_count": len(ranks),
                "loads": ranks,
                "aggregate": {
                    "total_running_reqs": running,
                    "total_waiting_reqs": waiting,
                    "total_reqs": running + waiting,
                    "total_used_tokens": sum(rank["num_used_tokens"] for rank in ranks),
                    "total_tokens": sum(rank["num_total_tokens"] for rank in ranks),
                },
            }
        )

    async def flush_cache(self, request: web.Request) -> web.Response:
        """Refused while requests run, as by the engine."""
        if self._worker.engine.flush_cache():
            return web.Response(text="Cache flushed.\n")
        return web.Response(text="Flush cache failed: requests are running.\n", status=400)

    async def restart(self, request: web.Request) -> web.Response:
        try:
            await self._worker.restart()
        except OSError as error:
            raise ApiError(500, str(error)) from error
        return web.Response()

    async def abort_request(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), _abort_decoder)
        if not body.rid and not body.abort_all:
            raise ApiError(400, "rid is needed unless abort_all is true")
        self._worker.engine.abort(None if body.abort_all else body.rid)
        return web.Response()

    async def switch_role(self, request: web.Request) -> web.Response:
        """Switch between prefill and decode, only while no request runs or waits in a room."""
        body = decode(await request.read(), _role_decoder)
        if self._worker.mode == "null":
            raise ApiError(400, "the worker is not disaggregated")
        if not self._worker.engine.is_idle:
            raise ApiError(400, "requests are running")
        try:
            await self._worker.switch_role(body.new_role)
        except OSError as error:
            raise ApiError(500, str(error)) from error
        return json_answer({"success": True, "disaggregation_mode": self._worker.mode})

    async def stats(self, request: web.Request) -> web.Response:
        """Requests that arrived and their outcomes; `max_running` is the most at one time.

        `rooms` counts open rooms; `pd` counts closed ones by outcome. Both count prompts, and a
        batch has several.
        """
        engine, journal, pd = self._worker.engine, self._worker.journal, self._worker.pd
        loads = engine.loads()
        return json_answer(
            {
                "received": journal.received,
                "completed": journal.completed,
                "aborted": journal.aborted,
                "failed": journal.failed,
                "running": sum(load.running for load in loads),
                "waiting": sum(load.waiting for load in loads),
                "max_running": engine.most_running,
                "tokens_generated": engine.tokens_generated,
                "caches": [
                    {"gpu_tokens": gpu, "host_tokens": host} for gpu, host in engine.cached_tokens()
                ],
                "rooms": pd.transfers.rooms,
                "pd": {
                    "transferred": pd.transfers.transferred,
                    "timed_out": pd.transfers.timed_out,
                    "aborted": pd.transfers.aborted,
                },
                "held_blocks_requests": pd.held_requests,
                "requests": list(journal.recent),
            }
        )

    async def get_faults(self, request: web.Request) -> web.Response:
        return json_answer(self._worker.faults.faults)

    async def set_faults(self, request: web.Request) -> web.Response:
        faults = decode(await request.read(), _faults_decoder)
        self._worker.faults.set(faults)
        if self._worker.publisher is not None:
            self._worker.publisher.misbehave(faults)
        return await self.get_faults(request)

    async def clear_faults(self, request: web.Request) -> web.Response:
        self._worker.faults.clear()
        if self._worker.publisher is not None:
            self._worker.publisher.misbehave(self._worker.faults.faults)
        return await self.get_faults(request)

    async def _probe(self, name: str, *, fails_while_starting: bool = True) -> web.Response | None:
        """The answer that a fault or a late start gives for this path; None without one."""
        fault = self._worker.faults.faults.probe(name)
        await hang(fault)
        status = fault.status
        if status is None and fails_while_starting and self._worker.is_starting:
            return json_answer(error_body(503, "the worker is starting"), 503)
        if status is None:
            return None
        return json_answer(error_body(status, f"simulated fault: status {status}"), status)

    def _rank_load(self, rank: int, load: RankLoad) -> dict[str, Any]:
        settings = self._worker.settings
        return {
            "dp_rank": rank,
            "num_running_reqs": load.running,
            "num_waiting_reqs": load.waiting,
            "num_total_reqs": load.running + load.waiting,
            "num_waiting_uncached_tokens": load.waiting_uncached_tokens,
            "num_used_tokens": load.used_tokens,
            "num_total_tokens": load.used_tokens + load.waiting_tokens,
            "max_total_num_tokens": settings.max_total_num_tokens,
            "max_running_requests": settings.max_running_requests,
            "token_usage": load.used_tokens / settings.max_total_num_tokens,
            "utilization": load.running / settings.max_running_requests,
        }
