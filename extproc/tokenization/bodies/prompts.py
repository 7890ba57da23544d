"""From the path and the body of a request to what its tokens are made of.

Follows SGLang (0.5.23): what it takes for the prompt, field by field. Only those fields are
decoded. Nothing here knows a tokenizer or a template, so the same prompt serves any model, and
nothing raises for odd content: `Prompt.why` says why there will be no tokens. A wrong guess would
cost more than none, since it sends the request to a worker that does not hold its prefix, so
whatever is not certain is "unsupported".
"""

from collections.abc import Callable
from typing import Annotated, Any, Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta, Raw, Struct
from numpy.typing import NDArray

from extproc.tokenization.bodies.anthropic import AnthropicBody, anthropic_chat
from extproc.tokenization.bodies.openai_chat import BodyFields, ChatBody, ChatPrompt, openai_chat
from extproc.tokenization.bodies.responses import ResponsesBody, responses_chat
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.reasons import BATCH, MALFORMED, MULTIMODAL, NO_TEXT, UNSUPPORTED

__all__ = ["Prompt", "read_prompt"]

_TokenId: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 32)]


class Prompt(Struct, frozen=True, kw_only=True, eq=False):
    """What one request asks the engine to compute.

    At most one of `chat`, `text` (to be encoded with the special tokens that the tokenizer adds)
    and `ids` (uint64) is set; with `why` none is. `cache_salt` and `lora` name the cache
    namespace and are None for the common one; a `model` of the form base:adapter is not taken
    apart. `body_bytes` is the size of the body.
    """

    chat: ChatPrompt | None = None
    text: str | None = None
    ids: NDArray[np.uint64] | None = None
    cache_salt: str | None = None
    lora: str | None = None
    why: str = ""
    body_bytes: int = 0


class _CompletionFields(BodyFields):
    prompt: Raw = Raw(b"null")
    suffix: Any = None


class _EmbeddingFields(BodyFields):
    input: Raw = Raw(b"null")


class _GenerateFields(BodyFields):
    text: Raw = Raw(b"null")
    input_ids: Raw = Raw(b"null")
    input_embeds: Any = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None


_Prompts: TypeAlias = str | list[_TokenId | str | list[_TokenId]] | None
_prompts_decoder: Final[msgspec.json.Decoder[Any]] = msgspec.json.Decoder(_Prompts)
_ids_decoder: Final = msgspec.json.Decoder(list[_TokenId] | None)

_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeError, RecursionError)
_NULL: Final = Raw(b"null")


def read_prompt(path: str, body: bytes | bytearray) -> Prompt:
    """The prompt of a complete body sent to `path`, with or without a query."""
    reader = _READERS.get(path) or _READERS.get(path.partition("?")[0])
    if reader is None:
        return Prompt(why=UNSUPPORTED, body_bytes=len(body))
    try:
        return reader(body)
    except UnmappableError as refused:
        why = refused.why
    except _UNREADABLE:
        why = MALFORMED
    return Prompt(why=why, body_bytes=len(body))


# -- one reader for each kind of body

_chat_decoder: Final = msgspec.json.Decoder(ChatBody)
_responses_decoder: Final = msgspec.json.Decoder(ResponsesBody)
_anthropic_decoder: Final = msgspec.json.Decoder(AnthropicBody)
_completion_decoder: Final = msgspec.json.Decoder(_CompletionFields)
_embedding_decoder: Final = msgspec.json.Decoder(_EmbeddingFields)
_generate_decoder: Final = msgspec.json.Decoder(_GenerateFields)


def _read_chat(body: bytes | bytearray) -> Prompt:
    fields = _chat_decoder.decode(body)
    if fields.input_ids != _NULL:
        ids = _ids_decoder.decode(fields.input_ids)
        if ids is not None:
            return _prompt(fields, len(body), ids=_token_ids(ids))
    return _prompt(fields, len(body), chat=openai_chat(fields))


def _read_responses(body: bytes | bytearray) -> Prompt:
    fields = _responses_decoder.decode(body)
    return _prompt(fields, len(body), chat=responses_chat(fields))


def _read_anthropic(body: bytes | bytearray) -> Prompt:
    fields = _anthropic_decoder.decode(body)
    return _prompt(fields, len(body), chat=anthropic_chat(fields))


def _read_completion(body: bytes | bytearray) -> Prompt:
    fields = _completion_decoder.decode(body)
    # What becomes of a suffix depends on a template that only the engine has.
    if fields.suffix:
        raise UnmappableError(UNSUPPORTED)
    return _one_of(fields, len(body), fields.prompt)


def _read_embedding(body: bytes | bytearray) -> Prompt:
    fields = _embedding_decoder.decode(body)
    return _one_of(fields, len(body), fields.input)


def _read_generate(body: bytes | bytearray) -> Prompt:
    fields = _generate_decoder.decode(body)
    if fields.image_data or fields.video_data or fields.audio_data:
        raise UnmappableError(MULTIMODAL)
    if fields.input_embeds is not None:
        raise UnmappableError(UNSUPPORTED)
    if fields.input_ids == _NULL:
        return _one_of(fields, len(body), fields.text)
    if fields.text != _NULL:
        raise UnmappableError(MALFORMED)
    return _one_of(fields, len(body), fields.input_ids)


_READERS: Final[dict[str, Callable[[bytes | bytearray], Prompt]]] = {
    "/v1/chat/completions": _read_chat,
    "/v1/completions": _read_completion,
    "/v1/embeddings": _read_embedding,
    "/v1/responses": _read_responses,
    "/v1/messages": _read_anthropic,
    "/generate": _read_generate,
}


# -- what they share


def _one_of(fields: BodyFields, size: int, raw: Raw) -> Prompt:
    """A text, token ids, or a list with one of these."""
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
    # The conversion would read a text among the ids as a number.
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
    # The key's holdings can not be told from others in what engines publish, and a session's
    # tokens come before the request's.
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
    """A namespace's name; the empty one is none."""
    if type(given) is list and len(given) == 1:
        given = given[0]
    if given is not None and type(given) is not str:
        raise UnmappableError(UNSUPPORTED)
    return given or None
