"""Reads the body of `/tokenize`, which is a text or a chat."""

from collections.abc import Sequence
from typing import Any

import msgspec

from extproc.simulator.chat_template import ChatTemplateError
from extproc.simulator.chats import chat
from extproc.simulator.errors import ApiError
from extproc.simulator.tokens import Tokenizer

__all__ = ["TokenizeBody", "tokens_of"]


class TokenizeBody(msgspec.Struct, kw_only=True):
    """`POST /tokenize`: a `prompt`, or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False


def tokens_of(tokenizer: Tokenizer, body: TokenizeBody) -> Sequence[int]:
    """The ids; raises ApiError 400 for a body with neither, and for a chat that is refused."""
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        return tokenizer.encode(body.prompt, special_tokens=special)
    if body.messages is None:
        raise ApiError(400, "either prompt or messages is needed")
    try:
        asked = chat(
            body.messages,
            tools=body.tools,
            template_arguments=body.chat_template_kwargs or {},
            continues=body.continue_final_message,
        )
        return tokenizer.encode_chat(asked)
    except (ChatTemplateError, msgspec.ValidationError) as error:
        raise ApiError(400, f"messages: {error}") from error
