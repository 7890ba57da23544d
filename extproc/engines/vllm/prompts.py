"""Reads the prompt from a request's body, by vLLM's rules for its endpoint.

The rules are those of vLLM 0.32. What depends on the engine's memory is "unsupported".
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta, Raw
from numpy.typing import NDArray

from extproc.engines.vllm.anthropic import anthropic_chat
from extproc.engines.vllm.requests import chat_of_request, flag
from extproc.engines.vllm.responses import responses_chat
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.fields import (
    AnthropicBody,
    BodyFields,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    ResponsesBody,
)
from extproc.tokenization.prompts import Chat, KeptSide, Prompt
from extproc.tokenization.reasons import (
    BATCH,
    MALFORMED,
    NO_TEXT,
    UNSUPPORTED,
)

__all__ = ["VllmRules"]

_TokenId: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 32)]
_Prompts: TypeAlias = str | list[_TokenId | str | list[_TokenId]] | None
_prompts_decoder: Final[msgspec.json.Decoder[Any]] = msgspec.json.Decoder(_Prompts)
_NULL: Final = Raw(b"null")
# The engine cuts on the left if the request does not say where; the tokenizer does that then, and
# leaves its special tokens. `truncation_side` names the side that is cut.
_KEPT_SIDES: Final[Mapping[Any, KeptSide]] = {
    None: "text_end",
    "left": "end",
    "right": "start",
}
_SALT_MAX_CHARS: Final = 128
_SALT_FORBIDDEN: Final = frozenset("@/\\\0")


def _chat_prompt(fields: ChatBody, size: int) -> Prompt:
    # A chat with `echo` asks for the logarithms, too.
    computed = fields.prompt_logprobs is not None or bool(fields.echo)
    return _prompt(fields, size, chat=chat_of_request(fields), reads_cache=not computed)


def _responses_prompt(fields: ResponsesBody, size: int) -> Prompt:
    return _prompt(fields, size, chat=responses_chat(fields))


def _anthropic_prompt(fields: AnthropicBody, size: int) -> Prompt:
    return _prompt(fields, size, chat=anthropic_chat(fields))


def _completion_prompt(fields: CompletionBody, size: int) -> Prompt:
    if fields.suffix is not None:
        raise UnmappableError(UNSUPPORTED, "suffix")
    if fields.prompt_embeds != _NULL:
        raise UnmappableError(UNSUPPORTED, "prompt_embeds")
    return _one_of(fields, size, fields.prompt)


def _embedding_prompt(fields: EmbeddingBody, size: int) -> Prompt:
    if fields.messages is not None:
        raise UnmappableError(UNSUPPORTED, "messages")
    return _one_of(fields, size, fields.input)


_READERS: Final[Mapping[str, Callable[[Any, int], Prompt]]] = {
    "/v1/chat/completions": _chat_prompt,
    "/v1/completions": _completion_prompt,
    "/v1/embeddings": _embedding_prompt,
    "/v1/responses": _responses_prompt,
    "/v1/messages": _anthropic_prompt,
}


class VllmRules:
    """vLLM's way from a body to a prompt."""

    def prompt(self, path: str, fields: Any, body_bytes: int) -> Prompt:
        reader = _READERS.get(path)
        if reader is None:
            # The engine has no such endpoint.
            raise UnmappableError(MALFORMED)
        return reader(fields, body_bytes)


def _one_of(fields: CompletionBody | EmbeddingBody, size: int, raw: Raw) -> Prompt:
    """The prompt in a text, in token ids, or in a list with one of these."""
    # For the logarithms of a prompt, the engine computes all of it.
    reads = fields.prompt_logprobs is None and not (fields.echo and fields.logprobs is not None)
    given = _prompts_decoder.decode(raw)
    if isinstance(given, list) and given and type(given[0]) is not int:
        if len(given) > 1:
            raise UnmappableError(BATCH)
        given = given[0]
    if given is None or given == []:
        raise UnmappableError(NO_TEXT)
    if isinstance(given, str):
        special = flag(fields.add_special_tokens, default=True)
        return _prompt(fields, size, text=given, with_special=special, reads_cache=reads)
    # The conversion would turn a text among the ids into a number.
    if set(map(type, given)) != {int}:
        raise UnmappableError(MALFORMED)
    return _prompt(fields, size, ids=np.array(given, np.uint64), reads_cache=reads)


def _prompt(
    fields: BodyFields,
    size: int,
    *,
    chat: Chat | None = None,
    text: str | None = None,
    ids: NDArray[np.uint64] | None = None,
    with_special: bool = True,
    reads_cache: bool = True,
) -> Prompt:
    keep, side = _kept(fields)
    return Prompt(
        chat=chat,
        text=text,
        ids=ids,
        with_special=with_special,
        keep_tokens=keep,
        keep_side=side,
        reads_cache=reads_cache,
        cache_salt=_salt(fields.cache_salt),
        body_bytes=size,
    )


def _kept(fields: BodyFields) -> tuple[int | None, KeptSide]:
    """How many tokens of the prompt are kept, None for all, and which."""
    if not isinstance(fields, ChatBody | CompletionBody | EmbeddingBody):
        return None, "text_end"
    keep, side = fields.truncate_prompt_tokens, fields.truncation_side
    if type(side) not in (str, type(None)) or side not in _KEPT_SIDES:
        raise UnmappableError(MALFORMED)
    if keep is not None and (type(keep) is not int or keep < -1 or keep == 0):
        raise UnmappableError(MALFORMED)
    if keep == -1:
        # That stands for what the engine can take, which is not known here.
        raise UnmappableError(UNSUPPORTED, "truncate_prompt_tokens")
    return keep, _KEPT_SIDES[side]


def _salt(given: Any) -> str | None:
    if given is None:
        return None
    if (
        type(given) is not str
        or not 0 < len(given) <= _SALT_MAX_CHARS
        or not _SALT_FORBIDDEN.isdisjoint(given)
    ):
        raise UnmappableError(MALFORMED)
    return given
