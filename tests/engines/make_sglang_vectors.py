"""Writes the vectors of SGLang: its own server answers each body, over an engine that only listens.

The routes, checks, rendering and tokenizer of SGLang run here, up to the point at which a tokenized
request would be sent to its scheduler. There the request is noted and ended. Runs in the
environment that install/sglang.sh makes:

    engine=$(tests/engines/install/sglang.sh)
    LD_LIBRARY_PATH=$engine/stub $engine/bin/python -m tests.engines.make_sglang_vectors
"""

# ruff: noqa: T201
import asyncio
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import httpx
import sglang
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.engine import init_tokenizer_manager, resolve_auto_parsers
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import PortArgs, prepare_server_args

from tests.engines.bodies import Body, all_bodies
from tests.engines.vectors import MODEL_NAMES, MODELS, write_vectors

_FLAGS: Final = ("--tool-call-parser", "hermes")
_MORE_FLAGS: Final = {"tools": ("--reasoning-parser", "qwen3")}
_CPU_FLAGS: Final = ("--device", "cpu", "--attention-backend", "torch_native")
_MESSAGE_CHARS: Final = 200
# Its scheduler keeps a few tokens of the context for the answer.
_RESERVED_TOKENS: Final = 6


class _HeardError(ValueError):
    """Ends a request that was noted."""


class _ListeningManager(TokenizerManager):  # type: ignore[misc]
    """Notes the tokenized requests instead of sending them to a scheduler."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.max_req_input_len = self.context_len - _RESERVED_TOKENS
        self.heard: list[Any] = []

    def auto_create_handle_loop(self) -> None:
        """Nothing is sent, so nothing comes back."""

    async def _send_one_request(self, tokenized_obj: Any) -> None:
        self.heard.append(tokenized_obj)
        raise _HeardError

    async def _handle_batch_request(self, obj: Any, *_: Any) -> Any:
        # Also `n` larger than 1 is a batch to SGLang, of one prompt.
        self.heard += [await self._tokenize_one_request(obj[at]) for at in range(obj.batch_size)]
        raise _HeardError
        yield


class _Server:
    """SGLang's server for one model of the vectors. A process can have one of them."""

    def __init__(self, model: str) -> None:
        self.flags = (*_FLAGS, *_MORE_FLAGS.get(model, ()))
        words = ["--model-path", str(MODELS / model), "--served-model-name", "m"]
        args = prepare_server_args([*words, *_CPU_FLAGS, *self.flags])
        args.resolve_once()
        args.check_server_args()
        resolve_auto_parsers(args)
        publish(args, role="tokenizer")
        self.manager, self.templates = init_tokenizer_manager(
            args, PortArgs.init_new(args), _ListeningManager
        )
        state = http_server._GlobalState(
            tokenizer_manager=self.manager, template_manager=self.templates, scheduler_info={}
        )
        http_server.set_global_state(state)
        self.app = http_server.app
        self.app.is_single_tokenizer_mode = True
        self.app.server_args = args
        self.app.warmup_thread_kwargs = {
            "server_args": args,
            "launch_callback": None,
            "execute_warmup_func": lambda *_: None,
        }

    async def answers(self) -> dict[str, Any]:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://sglang")
        async with http_server.lifespan(self.app), client:
            return {body.name: await self._answer(client, body) for body in all_bodies()}

    async def _answer(self, client: httpx.AsyncClient, body: Body) -> dict[str, Any]:
        self.manager.heard.clear()
        headers = {"content-type": "application/json"}
        response = await client.post(body.path, content=body.data, headers=headers)
        later = self.app.state.openai_serving_responses.background_tasks
        await asyncio.gather(*later.values(), return_exceptions=True)
        answer: dict[str, Any] = {"digest": body.digest}
        if not self.manager.heard:
            if response.status_code < 400:
                raise RuntimeError(f"{body.name}: answered {response.status_code} without a prompt")
            return answer | {"refused": response.status_code, "message": _message_of(response)}
        heard = self.manager.heard
        answer["prompts"] = [list(request.input_ids) for request in heard]
        salt = heard[0].cache_salt or heard[0].extra_key
        if salt:
            answer["cache_salt"] = salt
        if heard[0].lora_id:
            answer["lora"] = heard[0].lora_id
        if heard[0].mm_inputs:
            answer["multimodal"] = True
        return answer


def _message_of(response: httpx.Response) -> str:
    try:
        said = response.json()
        error = said.get("error", said)
        text = str(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        text = response.text
    return text[:_MESSAGE_CHARS]


def _write_answers(model: str, to: Connection) -> None:
    server = _Server(model)
    answers = asyncio.run(server.answers())
    content_format = server.templates.jinja_template_content_format
    to.send({"flags": server.flags, "content_format": content_format, "answers": answers})
    to.close()


def _model_answers(model: str) -> dict[str, Any]:
    # A process for each: SGLang's configuration is that of the process.
    processes = multiprocessing.get_context("fork")
    receiving, sending = processes.Pipe(duplex=False)
    process = processes.Process(target=_write_answers, args=(model, sending))
    process.start()
    sending.close()
    answers: dict[str, Any] = receiving.recv()
    process.join()
    return answers


def main() -> None:
    models = {}
    for model in MODEL_NAMES:
        models[model] = _model_answers(model)
        answers = models[model]["answers"]
        refused = sum("refused" in answer for answer in answers.values())
        print(f"{model}: {len(answers)} bodies, {refused} refused", file=sys.stderr)
    print(write_vectors({"engine": "sglang", "version": sglang.__version__, "models": models}))


if __name__ == "__main__":
    main()
