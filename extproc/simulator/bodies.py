"""Request bodies: only the fields the simulator acts on, of every API it speaks.

No tokenizer: a prompt counts a token for every four characters, at least one, unless the
client sends token ids, which are counted.
"""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec

from extproc.simulator.errors import ApiError

__all__ = ["AbortBody", "InferenceRequest", "Reader", "decode", "readers"]

_CHARACTERS_PER_TOKEN = 4
_MOST_SEQUENCES = 128

T = TypeVar("T")
_Count = Annotated[int, msgspec.Meta(ge=0)]


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker does for a body, whichever API it came through.

    `max_tokens` None means the worker's default. `sequences` is how many outputs (or
    embeddings, scores, ranked documents) are asked for.
    """

    prompt_tokens: int
    max_tokens: int | None = None
    model: str | None = None
    rid: str | None = None
    stream: bool = False
    include_usage: bool = False
    sequences: int = 1
    is_batch: bool = False
    wants_base64: bool = False
    dp_rank: int | None = None


Reader = Callable[[bytes], InferenceRequest]


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The decoded body; raises ApiError 400 for bytes that are not that JSON in UTF-8."""
    try:
        body.decode()  # the JSON decoder does not look into the strings it skips
        return decoder.decode(body)
    except UnicodeDecodeError as error:
        raise ApiError(400, "the body is not valid UTF-8") from error
    except msgspec.DecodeError as error:
        raise ApiError(400, f"the body is not the JSON expected here: {error}") from error


class AbortBody(msgspec.Struct):
    """`POST /abort_request`."""

    rid: str | None = None
    abort_all: bool = False


class _Part(msgspec.Struct):
    text: str | None = None


_Text = str | list[_Part] | None


class _Message(msgspec.Struct):
    content: _Text = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Body(msgspec.Struct, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    rid: str | list[str] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=_MOST_SEQUENCES)] | None = None
    routed_dp_rank: int | None = None
    encoding_format: str | None = None

    def request(
        self,
        prompt_tokens: int,
        max_tokens: int | None,
        *,
        prompts: int = 1,
        is_batch: bool = False,
    ) -> InferenceRequest:
        sequences = prompts * (self.n or 1)
        if not 1 <= sequences <= _MOST_SEQUENCES:
            raise ApiError(400, f"between 1 and {_MOST_SEQUENCES} outputs can be asked for")
        rids = [self.rid] if isinstance(self.rid, str) else self.rid or []
        return InferenceRequest(
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            model=self.model,
            rid=rids[0] if rids else None,
            stream=bool(self.stream),
            include_usage=self.stream_options is not None and self.stream_options.include_usage,
            sequences=sequences,
            is_batch=is_batch,
            wants_base64=self.encoding_format == "base64",
            dp_rank=self.routed_dp_rank,
        )


class _ChatBody(_Body, kw_only=True):
    messages: list[_Message]
    input_ids: list[int] | None = None
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
    messages: list[_Message]
    max_tokens: _Count
    system: _Text = None


class _ResponsesBody(_Body, kw_only=True):
    input: str | list[_Message]
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


def _characters(content: _Text) -> int:
    if content is None:
        return 0
    if isinstance(content, str):
        return len(content)
    return sum(len(part.text or "") for part in content)


def _tokens(characters: int) -> int:
    return max(1, characters // _CHARACTERS_PER_TOKEN)


def _prompts(value: str | list[Any]) -> tuple[int, int]:
    """(prompts, tokens) of a prompt that is a text, token ids, or a list of either."""
    if isinstance(value, str):
        return 1, _tokens(len(value))
    if value and isinstance(value[0], int):
        return 1, len(value)
    tokens = (_tokens(len(item)) if isinstance(item, str) else _size(item) for item in value)
    return len(value), sum(tokens)


def _size(ids: Any) -> int:
    if not isinstance(ids, list):
        raise ApiError(400, "a prompt list must hold texts, token ids or lists of token ids")
    return len(ids)


def _chat(body: _ChatBody) -> InferenceRequest:
    if body.input_ids is None:
        prompt_tokens = _tokens(sum(_characters(item.content) for item in body.messages))
    else:
        prompt_tokens = len(body.input_ids)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return body.request(prompt_tokens, limit)


def _completion(body: _CompletionBody) -> InferenceRequest:
    prompts, tokens = _prompts(body.prompt)
    return body.request(tokens, body.max_tokens, prompts=prompts)


def _generate(body: _GenerateBody) -> InferenceRequest:
    given = body.text if body.input_ids is None else body.input_ids
    if given is None:
        raise ApiError(400, "either text or input_ids is needed")
    prompts, tokens = _prompts(given)
    sampling = body.sampling_params
    first = (sampling[0] if sampling else None) if isinstance(sampling, list) else sampling
    if first is not None:
        body.n = first.n
    return body.request(
        tokens,
        first.max_new_tokens if first is not None else None,
        prompts=prompts,
        is_batch=prompts * (body.n or 1) > 1 or (not isinstance(given, str) and _is_nested(given)),
    )


def _is_nested(given: list[Any]) -> bool:
    return bool(given) and not isinstance(given[0], int)


def _messages(body: _MessagesBody) -> InferenceRequest:
    characters = sum(_characters(item.content) for item in body.messages)
    return body.request(_tokens(characters + _characters(body.system)), body.max_tokens)


def _responses(body: _ResponsesBody) -> InferenceRequest:
    given = body.input
    characters = len(body.instructions or "")
    if isinstance(given, str):
        characters += len(given)
    else:
        characters += sum(_characters(item.content) for item in given)
    return body.request(_tokens(characters), body.max_output_tokens)


def _input(body: _InputBody) -> InferenceRequest:
    prompts, tokens = _prompts(body.input)
    return body.request(tokens, 0, prompts=prompts)


def _rerank(body: _RerankBody) -> InferenceRequest:
    tokens = sum(_tokens(len(body.query) + len(item)) for item in body.documents)
    return body.request(tokens, 0, prompts=len(body.documents))


def _score(body: _ScoreBody) -> InferenceRequest:
    prompts, tokens = _prompts(body.items)
    return body.request(_prompts(body.query)[1] * prompts + tokens, 0, prompts=prompts)


def _reader(kind: type[T], read: Callable[[T], InferenceRequest]) -> Reader:
    decoder = msgspec.json.Decoder(kind)
    return lambda body: read(decode(body, decoder))


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
