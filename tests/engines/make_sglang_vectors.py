"""Writes the vectors of SGLang: its own server answers each body, and no scheduler computes.

The routes, checks, rendering and tokenizer of SGLang run here. Only what would go to the scheduler
is noted instead, and the request ends. Runs in the environment that install/sglang.sh makes:

    tests/engines/install/sglang.sh --python -m tests.engines.make_sglang_vectors
"""

# ruff: noqa: T201
import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import httpx
import sglang
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import PortArgs, prepare_server_args

from tests.engines.bodies import Body, all_bodies
from tests.engines.vectors import MODEL_NAMES, MODELS, write_vectors

_FLAGS: Final = ("--tool-call-parser", "qwen25")
_MORE_FLAGS: Final = {"tools": ("--reasoning-parser", "qwen3")}


class _ListeningManager(TokenizerManager):  # type: ignore[misc]
    """Notes what it would send to the scheduler; each request ends with its first token."""

    heard: list[Any]

    async def _send_one_request(self, tokenized_obj: Any) -> None:
        self.heard.append(tokenized_obj)

    async def _send_batch_request(self, tokenized_objs: list[Any]) -> None:
        self.heard.extend(tokenized_objs)

    async def _wait_one_response(self, obj: Any, request: Any = None) -> AsyncGenerator[Any, None]:
        self.rid_to_state.pop(obj.rid, None)
        yield {
            "text": "a",
            "output_ids": [70],
            "meta_info": {
                "id": obj.rid,
                "finish_reason": {"type": "length", "length": 1},
                "prompt_tokens": 1,
                "completion_tokens": 1,
                "cached_tokens": 0,
                "weight_version": "default",
            },
        }


class _Server:
    """SGLang's server for one model of the vectors."""

    def __init__(self, model: str) -> None:
        folder = str(MODELS / model)
        self.flags = (*_FLAGS, *_MORE_FLAGS.get(model, ()))
        words = ["--model-path", folder, "--served-model-name", "m", "--device", "cpu"]
        words += ["--skip-server-warmup", "--attention-backend", "torch_native", *self.flags]
        args = prepare_server_args(words)
        publish(args, role="tokenizer")
        ports = PortArgs.init_new(args)
        self.manager, templates = init_tokenizer_manager(args, ports, _ListeningManager)
        self.manager.heard = []
        self.templates = templates
        self.manager.max_req_input_len = 1 << 16
        http_server.set_global_state(
            http_server._GlobalState(
                tokenizer_manager=self.manager, template_manager=templates, scheduler_info={}
            )
        )
        app = self.app = http_server.app
        app.is_single_tokenizer_mode = True
        app.server_args = args

    async def answers(self) -> dict[str, Any]:
        manager, templates, state = self.manager, self.templates, self.app.state
        state.openai_serving_completion = http_server.OpenAIServingCompletion(manager, templates)
        state.openai_serving_chat = manager.serving_chat_class(manager, templates)
        state.anthropic_serving = http_server.AnthropicServing(state.openai_serving_chat)
        from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses

        state.openai_serving_responses = OpenAIServingResponses(manager, templates)
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://sglang") as client:
            return {body.name: await self._answer(client, body) for body in all_bodies()}

    async def _answer(self, client: httpx.AsyncClient, body: Body) -> dict[str, Any]:
        self.manager.heard.clear()
        headers = {"content-type": "application/json"}
        response = await client.post(body.path, content=body.data, headers=headers)
        answer: dict[str, Any] = {"digest": body.digest}
        heard = self.manager.heard
        if not heard:
            if response.status_code < 400:
                print(f"{body.name}: {response.status_code} without a prompt", file=sys.stderr)
            return answer | {"refused": response.status_code, "message": response.text[:200]}
        prompts: list[list[int]] = []
        for one in heard:
            ids = list(one.input_ids)
            # Copies of one prompt are sent after the prompt itself.
            if ids not in prompts:
                prompts.append(ids)
        answer["prompts"] = prompts
        if heard[0].cache_salt:
            answer["cache_salt"] = heard[0].cache_salt
        return answer

    def content_format(self) -> str:
        return str(self.templates.jinja_template_content_format)


async def main() -> None:
    models = {}
    for model in sys.argv[1:] or MODEL_NAMES:
        server = _Server(model)
        answers = await server.answers()
        models[model] = {
            "flags": server.flags,
            "content_format": server.content_format(),
            "answers": answers,
        }
        refused = sum("refused" in answer for answer in answers.values())
        print(f"{model}: {len(answers)} bodies, {refused} refused", file=sys.stderr)
    print(write_vectors({"engine": "sglang", "version": sglang.__version__, "models": models}))


if __name__ == "__main__":
    asyncio.run(main())
