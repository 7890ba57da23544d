"""Decodes request bodies of every API: only the fields that the simulator uses.

Prompts are given on as texts, as chats or, when the client sends them so, as token ids;
`tokens` turns a chat into token ids.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from extproc.simulator.chats import Chat, chat
from extproc.simulator.errors import ApiError
from extproc.simulator.vllm_chats import VllmChat, VllmText

__all__ = [
    "AbortBody",
    "AdapterBody",
    "InferenceRequest",
    "Prompt",
    "Reader",
    "RoleBody",
    "decode",
    "member_names",
    "readers",
]

_MOST_SEQUENCES = 128

T = TypeVar("T")
Prompt = str | list[int] | Chat | VllmText | VllmChat
_Count = Annotated[int, msgspec.Meta(ge=0)]


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request, in the same form for every API.

    `special_tokens` are those that a tokenizer adds to a text on its own. `max_tokens` None
    means the worker's default. `lora_name` is the adapter of `lora_path`. `sequences` is how
    many outputs (or embeddings, scores, ranked documents) the client wants. `lists_prompts` is
    true if the prompts came as a list, also of one. `reads_cache` is false where all tokens of the
    prompts are computed, whatever is cached.

    The fields of disaggregation are unchecked, since only a disaggregated worker reads them.
    """

    prompts: list[Prompt]
    special_tokens: bool = False
    cache_salt: str | None = None
    lora_name: str | None = None
    max_tokens: int | None = None
    model: str | None = None
    rid: str | None = None
    stream: bool = False
    include_usage: bool = False
    sequences: int = 1
    is_batch: bool = False
    wants_base64: bool = False
    dp_rank: int | None = None
    lists_prompts: bool = False
    reads_cache: bool = True
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    disagg_prefill_dp_rank: Any = None
    kv_transfer_params: Any = None


Reader = Callable[[bytes], InferenceRequest]


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The decoded body; raises ApiError 400 if the bytes are not the expected JSON in UTF-8."""
    try:
        body.decode()  # the JSON decoder does not look into the strings it skips
        return decoder.decode(body)
    except UnicodeDecodeError as error:
        raise ApiError(400, "the body is not valid UTF-8") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not the JSON expected here: {error}") from error


def member_names(body: bytes) -> list[str]:
    """The names of the members of a JSON object, as often as they occur."""

    def names(pairs: list[tuple[str, Any]]) -> list[str]:
        return [name for name, _ in pairs]

    try:
        found = json.loads(body, object_pairs_hook=names)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not valid JSON") from error
    return found if isinstance(found, list) else []


class AbortBody(msgspec.Struct):
    """`POST /abort_request`."""

    rid: str | None = None
    abort_all: bool = False


class AdapterBody(msgspec.Struct):
    """`POST /load_lora_adapter` and `/unload_lora_adapter`."""

    lora_name: str
    lora_path: str | None = None


class RoleBody(msgspec.Struct):
    """`POST /pd_role_switch`."""

    new_role: Literal["prefill", "decode"]


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Body(msgspec.Struct, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    rid: str | list[str] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=_MOST_SEQUENCES)] | None = None
    routed_dp_rank: int | None = None
    data_parallel_rank: int | None = None  # the older name
    cache_salt: str | None = None
    lora_path: str | list[str | None] | None = None
    encoding_format: str | None = None
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    disagg_prefill_dp_rank: Any = None
    kv_transfer_params: Any = None

    def request(
        self,
        prompts: list[Prompt],
        max_tokens: int | None,
        *,
        special_tokens: bool = False,
        is_batch: bool = False,
        lists_prompts: bool = False,
    ) -> InferenceRequest:
        sequences = len(prompts) * (self.n or 1)
        if not 1 <= sequences <= _MOST_SEQUENCES:
            raise ApiError(400, f"between 1 and {_MOST_SEQUENCES} outputs can be asked for")
        rids = [self.rid] if isinstance(self.rid, str) else self.rid or []
        paths = self.lora_path if isinstance(self.lora_path, list) else [self.lora_path]
        return InferenceRequest(
            prompts=prompts,
            special_tokens=special_tokens,
            cache_salt=self.cache_salt,
            lora_name=paths[0] if paths else None,
            max_tokens=max_tokens,
            model=self.model,
            rid=rids[0] if rids else None,
            stream=bool(self.stream),
            include_usage=self.stream_options is not None and self.stream_options.include_usage,
            sequences=sequences,
            is_batch=is_batch,
            wants_base64=self.encoding_format == "base64",
            dp_rank=self.data_parallel_rank if self.routed_dp_rank is None else self.routed_dp_rank,
            lists_prompts=lists_prompts,
            bootstrap_host=self.bootstrap_host,
            bootstrap_port=self.bootstrap_port,
            bootstrap_room=self.bootstrap_room,
            disagg_prefill_dp_rank=self.disagg_prefill_dp_rank,
            kv_transfer_params=self.kv_transfer_params,
        )


_Object = dict[str, Any]


class _NamedFunction(msgspec.Struct):
    name: str


class _ToolChoice(msgspec.Struct):
    function: _NamedFunction


class _ChatBody(_Body, kw_only=True):
    messages: list[_Object]
    input_ids: list[int] | None = None
    tools: list[_Object] | None = None
    tool_choice: str | _ToolChoice | None = None
    chat_template_kwargs: _Object | None = None
    reasoning_effort: str | float | None = None
    continue_final_message: bool = False
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[str | int | list[int]]
    max_tokens: _Count | None = None


class _SamplingParams(msgspec.Struct):
    max_new_tokens: _Count | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=_MOST_SEQUENCES)] | None = None


class _GenerateBody(_Body, kw_only=True):
    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: _SamplingParams | list[_SamplingParams] | None = None


class _MessagesBody(_Body, kw_only=True):
    messages: list[_Object]
    max_tokens: _Count
    system: str | list[_Object] | None = None


class _ResponsesBody(_Body, kw_only=True):
    input: str | list[_Object]
    instructions: str | None = None
    max_output_tokens: _Count | None = None


class _InputBody(_Body, kw_only=True):  # embeddings, classify
    input: str | list[str | int | list[int]]


class _RerankBody(_Body, kw_only=True):
    query: str
    documents: list[str]


class _ScoreBody(_Body, kw_only=True):
    query: str | list[int]
    items: str | list[str | int | list[int]]


def _prompts(value: str | list[Any]) -> list[Prompt]:
    """The prompts of a text, token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if value and isinstance(value[0], int):
        return [_ids(value)]
    return [item if isinstance(item, str) else _ids(item) for item in value]


def _is_list_of_prompts(value: str | list[Any]) -> bool:
    return isinstance(value, list) and bool(value) and not isinstance(value[0], int)


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        raise ApiError(400, "a prompt list must hold texts, token ids or lists of token ids")
    return value


def _chat(body: _ChatBody) -> InferenceRequest:
    ids = body.input_ids
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return body.request([_template_chat(body) if ids is None else ids], limit)


def _template_chat(body: _ChatBody) -> Chat:
    return chat(
        body.messages,
        tools=_offered_tools(body),
        template_arguments=_template_arguments(body),
        continues=body.continue_final_message,
    )


def _offered_tools(body: _ChatBody) -> list[_Object] | None:
    """The tools that a template shows: no tools, all, or the chosen one."""
    chosen = body.tool_choice
    if chosen == "none" or not body.tools:
        return None
    if not isinstance(chosen, _ToolChoice):
        return body.tools
    name = chosen.function.name
    return [tool for tool in body.tools if _function_name(tool) == name] or None


def _function_name(tool: _Object) -> object:
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else None


def _template_arguments(body: _ChatBody) -> _Object:
    """Template variables from the client; a reasoning effort switches thinking on or off."""
    given = body.chat_template_kwargs or {}
    effort = body.reasoning_effort
    if effort is None:
        return given
    thinks = effort != "none"
    return {"reasoning_effort": effort, "thinking": thinks, "enable_thinking": thinks} | given


def _completion(body: _CompletionBody) -> InferenceRequest:
    return body.request(
        _prompts(body.prompt),
        body.max_tokens,
        special_tokens=True,
        lists_prompts=_is_list_of_prompts(body.prompt),
    )


def _generate(body: _GenerateBody) -> InferenceRequest:
    given = body.text if body.input_ids is None else body.input_ids
    if given is None:
        raise ApiError(400, "either text or input_ids is needed")
    prompts = _prompts(given)
    sampling = body.sampling_params
    first = (sampling[0] if sampling else None) if isinstance(sampling, list) else sampling
    if first is not None:
        body.n = first.n
    is_nested = _is_list_of_prompts(given)
    return body.request(
        prompts,
        first.max_new_tokens if first is not None else None,
        special_tokens=True,
        is_batch=is_nested or len(prompts) * (body.n or 1) > 1,
        lists_prompts=is_nested,
    )


def _messages(body: _MessagesBody) -> InferenceRequest:
    system = [] if body.system is None else [_message("system", body.system)]
    return body.request([chat(system + body.messages)], body.max_tokens)


def _responses(body: _ResponsesBody) -> InferenceRequest:
    instructions = [] if body.instructions is None else [_message("system", body.instructions)]
    given = [_message("user", body.input)] if isinstance(body.input, str) else body.input
    return body.request([chat(instructions + given)], body.max_output_tokens)


def _message(role: str, content: str | list[_Object]) -> _Object:
    return {"role": role, "content": content}


def _input(body: _InputBody) -> InferenceRequest:
    return body.request(_prompts(body.input), 0, special_tokens=True)


def _rerank(body: _RerankBody) -> InferenceRequest:
    prompts: list[Prompt] = [body.query + item for item in body.documents]
    return body.request(prompts, 0, special_tokens=True)


def _score(body: _ScoreBody) -> InferenceRequest:
    prompts = [_scored(body.query, item) for item in _prompts(body.items)]
    return body.request(prompts, 0)


def _scored(query: Prompt, item: Prompt) -> Prompt:
    if isinstance(query, str) and isinstance(item, str):
        return query + item
    if isinstance(query, list) and isinstance(item, list):
        return query + item
    raise ApiError(400, "query and items must both be texts or both be token ids")


def _reader(kind: type[T], read: Callable[[T], InferenceRequest]) -> Reader:
    decoder = msgspec.json.Decoder(kind)

    def reader(body: bytes) -> InferenceRequest:
        decoded = decode(body, decoder)
        try:
            return read(decoded)
        except msgspec.ValidationError as error:
            raise ApiError(400, f"messages: {error}") from error

    return reader


readers: dict[str, Reader] = {
    "/v1/chat/completions": _reader(_ChatBody, _chat),
    "/v1/completions": _reader(_CompletionBody, _completion),
    "/generate": _reader(_GenerateBody, _generate),
    "/v1/messages": _reader(_MessagesBody, _messages),
    "/v1/responses": _reader(_ResponsesBody, _responses),
    "/v1/embeddings": _reader(_InputBody, _input),
    "/v1/classify": _reader(_InputBody, _input),
    "/v1/rerank": _reader(_RerankBody, _rerank),
    "/v1/score": _reader(_ScoreBody, _score),
}
