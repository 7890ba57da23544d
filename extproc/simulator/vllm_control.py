"""Handles the paths that only vLLM has: KV event sources, Prometheus metrics, tokens, adapters.

Modelled on vLLM 0.32. Its development mode (`dev_mode`) adds a `/server_info` that is not SGLang's
and a reset of the cache.
"""

from typing import Any, Final

import msgspec
from aiohttp import web

from extproc.simulator.adapters import Adapters
from extproc.simulator.bodies import decode
from extproc.simulator.errors import ApiError
from extproc.simulator.inference import json_answer
from extproc.simulator.vllm_bodies import TokenizeBody, prompt_of_tokenize
from extproc.simulator.vllm_chats import VllmChatError
from extproc.simulator.worker import Worker

__all__ = ["VllmControl"]

_ENGINE_VERSION: Final = "0.32.0"


class _LoadBody(msgspec.Struct):
    lora_name: str
    lora_path: str
    load_inplace: bool = False


class _UnloadBody(msgspec.Struct):
    lora_name: str


_tokenize_decoder = msgspec.json.Decoder(TokenizeBody)
_load_decoder = msgspec.json.Decoder(_LoadBody)
_unload_decoder = msgspec.json.Decoder(_UnloadBody)


class VllmControl:
    """Handlers that read or control a worker like vLLM without generating tokens."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def routes(self) -> list[web.RouteDef]:
        routes = [
            web.get("/version", self.version),
            web.get("/kv_event_sources", self.kv_event_sources),
            web.get("/metrics", self.metrics),
            web.post("/tokenize", self.tokenize),
            web.post("/v1/load_lora_adapter", self.load_adapter),
            web.post("/v1/unload_lora_adapter", self.unload_adapter),
        ]
        if self._worker.settings.dev_mode:
            routes += [
                web.get("/server_info", self.server_info),
                web.post("/reset_prefix_cache", self.reset_prefix_cache),
            ]
        return routes

    async def version(self, request: web.Request) -> web.Response:
        return json_answer({"version": _ENGINE_VERSION})

    async def kv_event_sources(self, request: web.Request) -> web.Response:
        """The publisher of each rank; an empty object without KV events."""
        publisher, settings = self._worker.publisher, self._worker.settings
        if publisher is None or publisher.ports is None:
            return json_answer({})
        ports = publisher.ports
        return json_answer(
            {
                str(rank): {
                    "enable_kv_cache_events": True,
                    "publisher": "zmq",
                    "endpoint": f"tcp://*:{ports.events + rank}",
                    "replay_endpoint": (
                        None if ports.replay is None else f"tcp://*:{ports.replay + rank}"
                    ),
                    "buffer_steps": 10_000,
                    "hwm": 100_000,
                    "max_queue_size": 100_000,
                    "topic": settings.kv_topic,
                }
                for rank in range(settings.dp_size)
            }
        )

    async def metrics(self, request: web.Request) -> web.Response:
        """The gauges of load and the sizes of the cache, as the engine prints them."""
        settings, engine = self._worker.settings, self._worker.engine
        loads = list(enumerate(engine.loads()))
        usages = list(enumerate(engine.kv_usages()))
        config = (
            f'block_size="{settings.page_size}",cache_dtype="auto",enable_prefix_caching="True",'
            f'num_gpu_blocks="{settings.blocks}"'
        )
        model = f'model_name="{settings.model}"'
        lines = [
            *_gauge("vllm:num_requests_running", "Number of requests in model execution batches."),
            *_samples("vllm:num_requests_running", model, [(n, one.running) for n, one in loads]),
            *_gauge("vllm:num_requests_waiting", "Number of requests waiting to be processed."),
            *_samples("vllm:num_requests_waiting", model, [(n, one.waiting) for n, one in loads]),
            *_gauge("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage."),
            *_samples("vllm:kv_cache_usage_perc", model, usages),
            *_gauge("vllm:cache_config_info", "Information of the LLMEngine CacheConfig"),
            *_samples("vllm:cache_config_info", config, [(n, 1) for n, _ in loads]),
        ]
        body = "\n".join(lines) + "\n"
        return web.Response(text=body, content_type="text/plain")

    async def tokenize(self, request: web.Request) -> web.Response:
        """The ids of a text or a chat, as an inference path would compute them."""
        if self._worker.is_starting:
            raise ApiError(503, "the worker is starting")
        body = decode(await request.read(), _tokenize_decoder)
        settings = self._worker.settings
        self._worker.adapters.resolve(body.model)
        try:
            ids = list(self._worker.tokenizer.encode_prompt(prompt_of_tokenize(body)))
        except VllmChatError as error:
            raise ApiError(400, str(error)) from error
        return json_answer(
            {
                "count": len(ids),
                "max_model_len": settings.context_length,
                "tokens": ids,
                "token_strs": None,
            }
        )

    async def load_adapter(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), _load_decoder)
        self._adapters.load(body.lora_name, body.lora_path, in_place=body.load_inplace)
        said = f"Success: LoRA adapter '{body.lora_name}' added successfully."
        return web.Response(text=said)

    async def unload_adapter(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), _unload_decoder)
        self._adapters.unload(body.lora_name)
        said = f"Success: LoRA adapter '{body.lora_name}' removed successfully."
        return web.Response(text=said)

    async def server_info(self, request: web.Request) -> web.Response:
        config = f"model='{self._worker.settings.model}', tokenizer_mode=auto"
        return json_answer({"vllm_config": config, "vllm_env": {}, "system_env": {}})

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:
        """Refused while requests run. Consumers hear of it with the next step of the engine."""
        if not self._worker.engine.flush_cache():
            raise ApiError(500, "the cache cannot be reset while requests run")
        return web.Response()

    @property
    def _adapters(self) -> Adapters:
        return self._worker.adapters


def _gauge(name: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} gauge"


def _samples(name: str, labels: str, values: list[tuple[int, Any]]) -> list[str]:
    return [f'{name}{{engine="{rank}",{labels}}} {float(value)}' for rank, value in values]
