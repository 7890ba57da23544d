"""Reads the prompt from a request's body, by SGLang's rules for its endpoint.

The rules are those of SGLang 0.5.23, field by field. Everything that is not certain is
"unsupported".
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta, Raw
from numpy.typing import NDArray

from extproc.engines.sglang.anthropic import anthropic_chat
from extproc.engines.sglang.chats import SglangChat, openai_chat
from extproc.engines.sglang.responses import responses_chat
from extproc.engines.sglang.thinking import ReasoningParser
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.fields import (
    AnthropicBody,
    BodyFields,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    GenerateBody,
    ResponsesBody,
)
from extproc.tokenization.prompts import Prompt
from extproc.tokenization.reasons import BATCH, MALFORMED, MULTIMODAL, NO_TEXT, UNSUPPORTED

__all__ = ["SglangRules"]

_TokenId: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 32)]


_Prompts: TypeAlias = str | list[_TokenId | str | list[_TokenId]] | None
_prompts_decoder: Final[msgspec.json.Decoder[Any]] = msgspec.json.Decoder(_Prompts)
_ids_decoder: Final = msgspec.json.Decoder(list[_TokenId] | None)

_NULL: Final = Raw(b"null")


def _chat_prompt(fields: ChatBody, size: int) -> Prompt:
    if fields.input_ids != _NULL:
        ids = _ids_decoder.decode(fields.input_ids)
        if ids is not None:
            return _prompt(fields, size, ids=_token_ids(ids))
    return _prompt(fields, size, chat=openai_chat(fields))


def _responses_prompt(fields: ResponsesBody, size: int) -> Prompt:
    return _prompt(fields, size, chat=responses_chat(fields))


def _completion_prompt(fields: CompletionBody, size: int) -> Prompt:
    # How a suffix is used depends on a template that only the engine has.
    if fields.suffix:
        raise UnmappableError(UNSUPPORTED)
    return _one_of(fields, size, fields.prompt)


def _embedding_prompt(fields: EmbeddingBody, size: int) -> Prompt:
    return _one_of(fields, size, fields.input)


def _generate_prompt(fields: GenerateBody, size: int) -> Prompt:
    if any(map(_is_given, (fields.image_data, fields.video_data, fields.audio_data))):
        raise UnmappableError(MULTIMODAL)
    if fields.input_embeds != _NULL:
        raise UnmappableError(UNSUPPORTED)
    if fields.input_ids == _NULL:
        return _one_of(fields, size, fields.text)
    if fields.text != _NULL:
        raise UnmappableError(MALFORMED)
    return _one_of(fields, size, fields.input_ids)


_READERS: Final[Mapping[str, Callable[[Any, int], Prompt]]] = {
    "/v1/chat/completions": _chat_prompt,
    "/v1/completions": _completion_prompt,
    "/v1/embeddings": _embedding_prompt,
    "/v1/responses": _responses_prompt,
    "/generate": _generate_prompt,
}


class SglangRules:
    """SGLang's way from a body to a prompt, with the reasoning parser that it was started with."""

    def __init__(self, parser: ReasoningParser) -> None:
        self._parser = parser

    def prompt(self, path: str, fields: Any, body_bytes: int) -> Prompt:
        if isinstance(fields, AnthropicBody):
            chat = anthropic_chat(fields, self._parser)
            # The engine does not take a salt here.
            return msgspec.structs.replace(_prompt(fields, body_bytes, chat=chat), cache_salt=None)
        return _READERS[path](fields, body_bytes)


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
    chat: SglangChat | None = None,
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
