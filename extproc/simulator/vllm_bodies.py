"""Decodes the bodies of vLLM's APIs that generate, and converts them to chat completions.

What the engine refuses is refused here only where it decides what is rendered.
"""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from extproc.simulator.bodies import InferenceRequest, Prompt, Reader, decode
from extproc.simulator.bodies import readers as sglang_readers
from extproc.simulator.errors import ApiError
from extproc.simulator.vllm_anthropic import effort_of, messages_of, tools_of
from extproc.simulator.vllm_chats import (
    VllmChat,
    VllmChatError,
    VllmText,
    function_tool,
    typed_calls,
)
from extproc.simulator.vllm_responses import continues, input_messages, response_tools

__all__ = ["TokenizeBody", "prompt_of_tokenize", "vllm_readers"]

_KNOWN_WORDS: Final = (None, "auto")
# What the engine reads as true.
_YES: Final = ("true", "1", "1.0", "yes", "y", "on", "t")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_SHARED_PATHS: Final = ("/v1/embeddings", "/v1/classify", "/v1/rerank", "/v1/score")

_Object = dict[str, Any]
T = TypeVar("T", bound="_Body")


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = False


class _Body(msgspec.Struct, kw_only=True):
    model: str | None = None
    stream: Any = None
    stream_options: _StreamOptions | None = None
    n: int | None = None
    cache_salt: str | None = None
    kv_transfer_params: Any = None
    chat_template_kwargs: _Object | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None

    def request(
        self,
        prompts: list[Prompt],
        max_tokens: int | None,
        *,
        logprobs: int | None = None,
        lists_prompts: bool = False,
    ) -> InferenceRequest:
        """`logprobs` are those that an echo wants for the prompt, too."""
        reads_cache = self.prompt_logprobs is None and not (self.echo and logprobs is not None)
        return InferenceRequest(
            prompts=prompts,
            cache_salt=self.cache_salt or None,
            max_tokens=max_tokens,
            model=self.model,
            stream=str(self.stream).lower() in _YES,
            include_usage=bool(self.stream_options and self.stream_options.include_usage),
            sequences=len(prompts) * max(1, self.n or 1),
            is_batch=len(prompts) > 1,
            lists_prompts=lists_prompts,
            kv_transfer_params=self.kv_transfer_params,
            reads_cache=reads_cache,
        )

    def ids_of_other_leg(self) -> list[int] | None:
        """The prompt's ids if a prefill worker has sent them on; the chat is not rendered then."""
        params = self.kv_transfer_params
        ids = params.get("prompt_token_ids") if isinstance(params, dict) else None
        if ids is None or self.echo:
            return None
        if not isinstance(ids, list) or not ids or not all(type(one) is int for one in ids):
            raise ApiError(400, "kv_transfer_params: prompt_token_ids must be a list of ids")
        return ids


class _ChatBody(_Body, kw_only=True):
    messages: list[_Object]
    tools: list[Any] | None = None
    tool_choice: Any = None
    documents: list[_Object] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    chat_template: str | None = None
    top_logprobs: int | None = 0
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[Any]
    suffix: str | None = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    logprobs: int | None = None
    max_tokens: int | None = 16


class _MessagesBody(_Body, kw_only=True):
    model: str
    messages: list[_Object]
    max_tokens: int
    system: str | list[_Object] | None = None
    tools: list[_Object] | None = None
    thinking: _Object | None = None
    output_config: _Object | None = None


class _Reasoning(msgspec.Struct):
    effort: str | None = None


class _ResponsesBody(_Body, kw_only=True):
    input: str | list[Any]
    instructions: str | None = None
    tools: list[Any] = []
    reasoning: _Reasoning | None = None
    previous_response_id: str | None = None
    truncation: str | None = "disabled"
    max_output_tokens: int | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """`POST /tokenize`: a `prompt`, or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[_Object] | None = None
    tools: list[Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    chat_template_kwargs: _Object | None = None


def prompt_of_tokenize(body: TokenizeBody) -> VllmChat | VllmText:
    """Raises ApiError 400 for a body with neither a text nor a chat."""
    if body.prompt is not None:
        return VllmText(body.prompt, special_tokens=body.add_special_tokens is not False)
    if body.messages is None:
        raise ApiError(400, "either prompt or messages is needed")
    own = {
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
    }
    return VllmChat(
        messages=typed_calls(body.messages),
        tools=None if body.tools is None else [function_tool(tool) for tool in body.tools],
        variables=_merged(body.chat_template_kwargs, own),
        special_tokens=bool(body.add_special_tokens),
    )


def _merged(given: _Object | None, own: _Object) -> _Object:
    """The client's variables, replaced by the body's members that have a value."""
    return (given or {}) | {name: v for name, v in own.items() if v not in _KNOWN_WORDS}


def _with_effort(given: _Object | None, own: _Object, effort: str | None) -> _Object:
    own = own | {"reasoning_effort": effort}
    if effort is not None and "enable_thinking" not in (given or {}):
        own["enable_thinking"] = effort != "none"
    return _merged(given, own)


def _chat(body: _ChatBody) -> InferenceRequest:
    if body.tools == []:
        raise ApiError(400, "tools must not be an empty array")
    if body.chat_template is not None:
        raise ApiError(400, "chat_template: a template cannot be sent")
    own = {
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
        "documents": body.documents,
    }
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    chat = VllmChat(
        messages=typed_calls(body.messages),
        tools=None if body.tools is None else [function_tool(tool) for tool in body.tools],
        variables=_with_effort(body.chat_template_kwargs, own, body.reasoning_effort),
        special_tokens=body.add_special_tokens,
        truncate=body.truncate_prompt_tokens,
        side=body.truncation_side,
        limits_output=bool(limit),
    )
    prompt = body.ids_of_other_leg() or chat
    return body.request([prompt], limit, logprobs=body.top_logprobs)


def _completion(body: _CompletionBody) -> InferenceRequest:
    if body.suffix is not None:
        raise ApiError(400, "suffix is not supported by this model")
    given = body.prompt
    is_list = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    items = [_text_or_ids(item) for item in (given if is_list else [given])]
    prompts: list[Prompt] = [
        VllmText(
            item,
            special_tokens=body.add_special_tokens,
            truncate=body.truncate_prompt_tokens,
            side=body.truncation_side,
            limits_output=bool(body.max_tokens),
        )
        for item in items
    ]
    return body.request(prompts, body.max_tokens, logprobs=body.logprobs, lists_prompts=is_list)


def _text_or_ids(item: Any) -> str | list[int]:
    if isinstance(item, str):
        return item
    if not isinstance(item, list) or not all(isinstance(one, int) for one in item):
        raise ApiError(400, "prompt: texts, token ids or lists of token ids are needed")
    return [int(one) for one in item]


def _messages(body: _MessagesBody) -> InferenceRequest:
    chat = VllmChat(
        messages=typed_calls(messages_of(body.messages, body.system)),
        tools=tools_of(body.tools, body.messages),
        variables=_merged(body.chat_template_kwargs, {}),
        effort=effort_of(body.thinking, body.output_config),
        is_anthropic=True,
    )
    return body.request([body.ids_of_other_leg() or chat], body.max_tokens)


def _responses(body: _ResponsesBody) -> InferenceRequest:
    if body.previous_response_id is not None:
        raise ApiError(404, f"Response with id {body.previous_response_id!r} not found.")
    goes_on = continues(body.input)
    own = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    effort = None if body.reasoning is None else body.reasoning.effort
    chat = VllmChat(
        messages=input_messages(body.instructions, body.input),
        tools=response_tools(body.tools),
        variables=_with_effort(body.chat_template_kwargs, own, effort),
        special_tokens=True,
    )
    return body.request([body.ids_of_other_leg() or chat], body.max_output_tokens)


def _reader(kind: type[T], read: Callable[[T], InferenceRequest]) -> Reader:
    decoder = msgspec.json.Decoder(kind, strict=False)

    def reader(body: bytes) -> InferenceRequest:
        try:
            return read(decode(body.removeprefix(_BYTE_ORDER_MARK), decoder))
        except VllmChatError as error:
            raise ApiError(400, str(error)) from error

    return reader


vllm_readers: dict[str, Reader] = {
    "/v1/chat/completions": _reader(_ChatBody, _chat),
    "/v1/completions": _reader(_CompletionBody, _completion),
    "/v1/messages": _reader(_MessagesBody, _messages),
    "/v1/responses": _reader(_ResponsesBody, _responses),
    **{path: sglang_readers[path] for path in _SHARED_PATHS},
}
