"""Reads the prompt from a request's body, by the rules of its endpoint.

The rules are those of SGLang (0.5.23), field by field, and only the fields of the prompt are
decoded. A prompt depends on no tokenizer and no template, so it is the same for every model.
Odd content raises no exception: `Prompt.reason` says why there are no tokens. A wrong prompt
costs more than no prompt, since it sends the request to a worker that does not hold the prefix.
So everything that is not certain is "unsupported".
"""

from collections.abc import Callable
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta, Raw, Struct
from numpy.typing import NDArray

from extproc.tokenization.bodies.anthropic import AnthropicBody, anthropic_chat
from extproc.tokenization.bodies.openai_chat import BodyFields, ChatBody, ChatPrompt, openai_chat
from extproc.tokenization.bodies.responses import ResponsesBody, responses_chat
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.reasons import BATCH, MALFORMED, MULTIMODAL, NO_TEXT, UNSUPPORTED

__all__ = ["Prompt", "decode_fields", "prompt_of", "read_prompt"]

_TokenId: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 32)]


class Prompt(Struct, frozen=True, kw_only=True, eq=False):
    """The prompt of one request.

    Either one of `chat`, `text` and `ids` (uint64) is set, or `reason`. A `text` is encoded with
    the special tokens that the tokenizer adds. `cache_salt` and `lora` name the cache namespace;
    both are None for the common one. The adapter in a `model` of the form base:adapter is not
    among them. `body_bytes` is the size of the body.
    """

    chat: ChatPrompt | None = None
    text: str | None = None
    ids: NDArray[np.uint64] | None = None
    cache_salt: str | None = None
    lora: str | None = None
    reason: str = ""
    body_bytes: int = 0


class _CompletionFields(BodyFields):
    prompt: Raw = Raw(b"null")
    suffix: Any = None


class _EmbeddingFields(BodyFields):
    input: Raw = Raw(b"null")


class _GenerateFields(BodyFields):
    text: Raw = Raw(b"null")
    input_ids: Raw = Raw(b"null")
    input_embeds: Raw = Raw(b"null")
    image_data: Raw = Raw(b"null")
    video_data: Raw = Raw(b"null")
    audio_data: Raw = Raw(b"null")


_Prompts: TypeAlias = str | list[_TokenId | str | list[_TokenId]] | None
_prompts_decoder: Final[msgspec.json.Decoder[Any]] = msgspec.json.Decoder(_Prompts)
_ids_decoder: Final = msgspec.json.Decoder(list[_TokenId] | None)

_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeError, RecursionError)
_NULL: Final = Raw(b"null")


def decode_fields(path: str, body: bytes | bytearray) -> BodyFields | None:
    """Decode the fields of `body` that its prompt, model and stream are read from.

    None where a body sent to `path` has no known prompt, or where a field cannot be decoded.
    Values are not checked, so this may accept a body that `prompt_of` rejects.
    """
    reader = _READERS.get(path)
    if reader is None:
        return None
    try:
        fields: BodyFields = reader.decoder.decode(body)
    except _UNREADABLE:
        return None
    return fields


def prompt_of(path: str, fields: BodyFields, body_bytes: int) -> Prompt:
    """The prompt in the decoded fields of a body of `body_bytes` sent to `path`."""
    try:
        return _READERS[path].prompt(fields, body_bytes)
    except UnmappableError as refused:
        reason = refused.reason
    except _UNREADABLE:
        reason = MALFORMED
    return Prompt(reason=reason, body_bytes=body_bytes)


def read_prompt(path: str, body: bytes | bytearray) -> Prompt:
    """The prompt in a complete body sent to `path`, with or without a query."""
    path = path.partition("?")[0]
    if path not in _READERS:
        return Prompt(reason=UNSUPPORTED, body_bytes=len(body))
    fields = decode_fields(path, body)
    if fields is None:
        return Prompt(reason=MALFORMED, body_bytes=len(body))
    return prompt_of(path, fields, len(body))


# -- one reader for each kind of body


class _Reader(NamedTuple):
    """Decodes one kind of body, and builds the prompt from the decoded fields."""

    decoder: msgspec.json.Decoder[Any]
    prompt: Callable[[Any, int], Prompt]


def _chat_prompt(fields: ChatBody, size: int) -> Prompt:
    if fields.input_ids != _NULL:
        ids = _ids_decoder.decode(fields.input_ids)
        if ids is not None:
            return _prompt(fields, size, ids=_token_ids(ids))
    return _prompt(fields, size, chat=openai_chat(fields))


def _responses_prompt(fields: ResponsesBody, size: int) -> Prompt:
    return _prompt(fields, size, chat=responses_chat(fields))


def _anthropic_prompt(fields: AnthropicBody, size: int) -> Prompt:
    return _prompt(fields, size, chat=anthropic_chat(fields))


def _completion_prompt(fields: _CompletionFields, size: int) -> Prompt:
    # How a suffix is used depends on a template that only the engine has.
    if fields.suffix:
        raise UnmappableError(UNSUPPORTED)
    return _one_of(fields, size, fields.prompt)


def _embedding_prompt(fields: _EmbeddingFields, size: int) -> Prompt:
    return _one_of(fields, size, fields.input)


def _generate_prompt(fields: _GenerateFields, size: int) -> Prompt:
    if any(map(_is_given, (fields.image_data, fields.video_data, fields.audio_data))):
        raise UnmappableError(MULTIMODAL)
    if fields.input_embeds != _NULL:
        raise UnmappableError(UNSUPPORTED)
    if fields.input_ids == _NULL:
        return _one_of(fields, size, fields.text)
    if fields.text != _NULL:
        raise UnmappableError(MALFORMED)
    return _one_of(fields, size, fields.input_ids)


_READERS: Final = {
    "/v1/chat/completions": _Reader(msgspec.json.Decoder(ChatBody), _chat_prompt),
    "/v1/completions": _Reader(msgspec.json.Decoder(_CompletionFields), _completion_prompt),
    "/v1/embeddings": _Reader(msgspec.json.Decoder(_EmbeddingFields), _embedding_prompt),
    "/v1/responses": _Reader(msgspec.json.Decoder(ResponsesBody), _responses_prompt),
    "/v1/messages": _Reader(msgspec.json.Decoder(AnthropicBody), _anthropic_prompt),
    "/generate": _Reader(msgspec.json.Decoder(_GenerateFields), _generate_prompt),
}


# -- what they share


def _is_given(raw: Raw) -> bool:
    """True for a value that the engine does not take for empty."""
    return raw != _NULL and bool(msgspec.json.decode(raw))


def _one_of(fields: BodyFields, size: int, raw: Raw) -> Prompt:
    """The prompt in a text, in token ids, or in a list with one of these."""
    given = _prompts_decoder.decode(raw)
    if isinstance(given, list) and given and type(given[0]) is not int:
        if len(given) > 1:
            raise UnmappableError(BATCH)
        given = given[0]
    if not given:
        raise UnmappableError(NO_TEXT)
    if isinstance(given, str):
        return _prompt(fields, size, text=given)
    return _prompt(fields, size, ids=_token_ids(given))


def _token_ids(given: Any) -> NDArray[np.uint64]:
    if not given:
        raise UnmappableError(NO_TEXT)
    # The conversion would turn a text among the ids into a number.
    if set(map(type, given)) != {int}:
        raise UnmappableError(MALFORMED)
    return np.array(given, np.uint64)


def _prompt(
    fields: BodyFields,
    size: int,
    *,
    chat: ChatPrompt | None = None,
    text: str | None = None,
    ids: NDArray[np.uint64] | None = None,
) -> Prompt:
    # The KV events of engines do not name the extra key, and a session puts tokens before those
    # of the request.
    if fields.extra_key or fields.session_params:
        raise UnmappableError(UNSUPPORTED)
    return Prompt(
        chat=chat,
        text=text,
        ids=ids,
        cache_salt=_name(fields.cache_salt),
        lora=_name(fields.lora_path),
        body_bytes=size,
    )


def _name(given: Any) -> str | None:
    """The name of a namespace; None for an empty name."""
    if type(given) is list and len(given) == 1:
        given = given[0]
    if given is not None and type(given) is not str:
        raise UnmappableError(UNSUPPORTED)
    return given or None
