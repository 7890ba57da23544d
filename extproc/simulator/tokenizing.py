"""Answers `/v1/tokenize` as SGLang does: with the tokens of a chat or of a text."""

from typing import Any, Final

import msgspec
from aiohttp import web

from extproc.simulator.bodies import Prompt, decode, readers
from extproc.simulator.chat_template import ChatTemplateError
from extproc.simulator.chats import Chat
from extproc.simulator.errors import ApiError
from extproc.simulator.inference import json_answer
from extproc.simulator.worker import Worker

__all__ = ["Tokenizing"]


class _Body(msgspec.Struct):
    messages: Any = None


_decoder: Final = msgspec.json.Decoder(_Body)


class Tokenizing:
    """The handler of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def routes(self) -> list[web.RouteDef]:
        settings = self._worker.settings
        if settings.is_vllm or settings.no_server_info:
            return []
        return [web.post("/v1/tokenize", self.answer), web.post("/tokenize", self.answer)]

    async def answer(self, request: web.Request) -> web.Response:
        if self._worker.is_starting:
            raise ApiError(503, "the worker is starting")
        body = await request.read()
        is_chat = decode(body, _decoder).messages is not None
        asked = readers["/v1/chat/completions" if is_chat else "/v1/completions"](body)
        lists = [self._ids(prompt, asked.special_tokens) for prompt in asked.prompts]
        return json_answer(
            {
                "tokens": lists if asked.lists_prompts else lists[0],
                "count": [*map(len, lists)] if asked.lists_prompts else len(lists[0]),
                "max_model_len": self._worker.settings.context_length,
            }
        )

    def _ids(self, prompt: Prompt, special_tokens: bool) -> list[Any]:
        tokenizer = self._worker.tokenizer
        if isinstance(prompt, Chat):
            try:
                return list(tokenizer.encode_chat(prompt))
            except ChatTemplateError as error:
                raise ApiError(400, f"the chat template refuses the messages: {error}") from error
        if isinstance(prompt, str):
            return list(tokenizer.encode(prompt, special_tokens=special_tokens))
        raise ApiError(400, "a prompt must be a text")
