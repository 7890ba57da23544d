"""Writes the vectors of vLLM: its own server answers each body, over an engine that only listens.

The whole server of vLLM runs here: routes, checks, rendering and tokenizer. Only the engine below
does not compute: it notes the prompt that it is given, and ends the request. Runs in the
environment that install/vllm.sh makes:

    $(tests/engines/install/vllm.sh)/bin/python -m tests.engines.make_vllm_vectors

With the word "media", only the vectors of bodies with images are made.
"""

# ruff: noqa: T201
import asyncio
import os
import sys
from argparse import Namespace
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import httpx
import vllm
from vllm import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import renderer_from_config
from vllm.renderers.hf import resolve_chat_template_content_format
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.input_processor import InputProcessor

from tests.engines.bodies import Body, all_bodies, media_bodies
from tests.engines.vectors import MODEL_NAMES, MODELS, SEEING_NAMES, write_vectors

# Agents need these; without a parser of reasoning, a budget for it is refused.
_FLAGS: Final = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
_MORE_FLAGS: Final = {"tools": ("--reasoning-parser", "qwen3")}
_MESSAGE_CHARS: Final = 200
_TASKS: Final = ("generate",)


class _ListeningEngine(EngineClient):
    """Notes the prompts it is given; each request ends with its first token."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.heard: list[Any] = []

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> Any:
        request = self.input_processor.process_inputs(
            request_id,
            prompt,
            sampling_params,
            supported_tasks=_TASKS,
            lora_request=options.get("lora_request"),
        )
        self.heard.append(request)
        return self._end(request, request_id)

    async def _end(self, request: Any, request_id: str) -> AsyncGenerator[RequestOutput, None]:
        choices = [
            CompletionOutput(
                index=index,
                text="a",
                token_ids=[70],
                cumulative_logprob=0.0,
                logprobs=None,
                finish_reason="length",
            )
            for index in range(request.sampling_params.n)
        ]
        yield RequestOutput(
            request_id=request_id,
            prompt="",
            prompt_token_ids=list(request.prompt_token_ids or ()),
            prompt_logprobs=None,
            outputs=choices,
            finished=True,
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the server asks for {name}, which this engine does not know")

    is_running = True
    is_stopped = False
    errored = False
    dead_error = RuntimeError("never")

    async def notify_kv_transfer_request_rejected(self, *_: Any, **__: Any) -> None:
        """Nothing is held for a transfer."""

    async def is_tracing_enabled(self) -> bool:
        return False


# Everything else that an engine can be asked is not asked here.
_ListeningEngine.__abstractmethods__ = frozenset()


class _Server:
    """vLLM's server for one model of the vectors."""

    def __init__(self, model: str) -> None:
        folder = str(MODELS / model)
        parser = make_arg_parser(FlexibleArgumentParser())
        self.flags = (*_FLAGS, *_MORE_FLAGS.get(model, ()))
        words = ["--model", folder, "--served-model-name", "m", "--enforce-eager", *self.flags]
        self.args: Namespace = parser.parse_args(words)
        validate_parsed_serve_args(self.args)
        config = AsyncEngineArgs.from_cli_args(self.args).create_engine_config()
        self.engine = _ListeningEngine(config)
        self.app = build_app(self.args, _TASKS)

    async def answers(self, bodies: Sequence[Body]) -> dict[str, Any]:
        await init_app_state(self.engine, self.app.state, self.args, _TASKS)
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as client:
            return {body.name: await self._answer(client, body) for body in bodies}

    async def _answer(self, client: httpx.AsyncClient, body: Body) -> dict[str, Any]:
        self.engine.heard.clear()
        headers = {"content-type": "application/json"}
        response = await client.post(body.path, content=body.data, headers=headers)
        answer: dict[str, Any] = {"digest": body.digest}
        if not self.engine.heard:
            if response.status_code < 400:
                raise RuntimeError(f"{body.name}: answered {response.status_code} without a prompt")
            return answer | {"refused": response.status_code, "message": _message_of(response)}
        heard = self.engine.heard
        answer["prompts"] = [list(request.prompt_token_ids) for request in heard]
        if heard[0].cache_salt:
            answer["cache_salt"] = heard[0].cache_salt
        if heard[0].lora_request:
            answer["lora"] = heard[0].lora_request.lora_name
        if heard[0].sampling_params.skip_reading_prefix_cache:
            answer["reads_cache"] = False
        if heard[0].mm_features:
            answer["media"] = [
                [one.mm_position.offset, one.mm_position.length, one.identifier]
                for one in heard[0].mm_features
            ]
        return answer

    def content_format(self) -> str:
        config = self.engine.model_config
        tokenizer = self.engine.renderer.get_tokenizer()
        return str(
            resolve_chat_template_content_format(None, None, "auto", tokenizer, model_config=config)
        )


def _message_of(response: httpx.Response) -> str:
    try:
        said = response.json()
        text = str(said["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = response.text
    return text[:_MESSAGE_CHARS]


async def main() -> None:
    version = vllm.__version__.partition("+")[0]
    for kind, names, bodies in (
        ("", MODEL_NAMES, all_bodies()),
        ("media", SEEING_NAMES, media_bodies()),
    ):
        if kind not in sys.argv[1:] and sys.argv[1:]:
            continue
        models = {name: await _vectors(name, bodies) for name in names}
        print(write_vectors({"engine": "vllm", "version": version, "models": models}, kind))


async def _vectors(model: str, bodies: Sequence[Body]) -> dict[str, Any]:
    server = _Server(model)
    answers = await server.answers(bodies)
    refused = sum("refused" in answer for answer in answers.values())
    print(f"{model}: {len(answers)} bodies, {refused} refused", file=sys.stderr)
    return {"flags": server.flags, "content_format": server.content_format(), "answers": answers}


if __name__ == "__main__":
    asyncio.run(main())
