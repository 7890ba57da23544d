"""The fields of request bodies that prompts are read from, for all engines.

A body is decoded once, before it is known which engine will get it. So each struct has the fields
that any engine reads, and an engine's rules look at those that it obeys. Only these are decoded:
the parser skips all others without building objects.
"""

from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw

from extproc.steering import SteeringMembers

__all__ = [
    "UNREADABLE",
    "AnthropicBody",
    "BodyFields",
    "ChatBody",
    "CompletionBody",
    "EmbeddingBody",
    "GenerateBody",
    "ResponsesBody",
    "decode_fields",
    "has_prompt",
]

_NULL: Final = Raw(b"null")
# What the decoder raises for a body that is not as documented.
UNREADABLE: Final = (msgspec.MsgspecError, UnicodeError, RecursionError)


class BodyFields(SteeringMembers):
    """The fields that every body can have.

    Besides `model`, `stream` and the members that steer an engine, these select a part of the
    cache or change its content.
    """

    model: Any = UNSET
    stream: Any = None
    cache_salt: Any = None
    lora_path: Any = None
    extra_key: Any = None
    session_params: Any = None


class _TextFields(BodyFields):
    """What vLLM reads of bodies that are rendered to a text."""

    add_special_tokens: Any = None
    truncate_prompt_tokens: Any = None
    truncation_side: Any = None
    prompt_logprobs: Any = None
    echo: Any = None
    logprobs: Any = None


class ChatBody(_TextFields):
    """The fields of /v1/chat/completions that make up the prompt."""

    messages: Any = None
    tools: Raw = _NULL
    tool_choice: Any = None
    chat_template_kwargs: Any = None
    reasoning_effort: Any = None
    reasoning: Any = None
    continue_final_message: Any = None
    task: Any = None
    input_ids: Raw = _NULL
    add_generation_prompt: Any = None
    chat_template: Any = None
    documents: Any = None
    mm_processor_kwargs: Any = None


class ResponsesBody(BodyFields):
    """The fields of /v1/responses that make up the prompt."""

    input: Any = None
    instructions: Any = None
    previous_response_id: Any = None
    tools: Raw = _NULL
    tool_choice: Any = None
    reasoning: Any = None
    chat_template_kwargs: Any = None
    truncation: Any = None
    prompt: Any = None
    previous_input_messages: Any = None


class AnthropicBody(BodyFields):
    """The fields of /v1/messages that make up the prompt."""

    messages: Any = None
    system: Any = None
    tools: Raw = _NULL
    tool_choice: Any = None
    thinking: Any = None
    output_config: Any = None
    chat_template_kwargs: Any = None


class CompletionBody(_TextFields):
    """The fields of /v1/completions that make up the prompt."""

    prompt: Raw = _NULL
    suffix: Any = None
    prompt_embeds: Raw = _NULL


class EmbeddingBody(_TextFields):
    """The fields of /v1/embeddings that make up the prompt."""

    input: Raw = _NULL
    messages: Any = None


class GenerateBody(BodyFields):
    """The fields of /generate that make up the prompt."""

    text: Raw = _NULL
    input_ids: Raw = _NULL
    input_embeds: Raw = _NULL
    image_data: Raw = _NULL
    video_data: Raw = _NULL
    audio_data: Raw = _NULL


_DECODERS: Final[dict[str, msgspec.json.Decoder[Any]]] = {
    "/v1/chat/completions": msgspec.json.Decoder(ChatBody),
    "/v1/completions": msgspec.json.Decoder(CompletionBody),
    "/v1/embeddings": msgspec.json.Decoder(EmbeddingBody),
    "/v1/responses": msgspec.json.Decoder(ResponsesBody),
    "/v1/messages": msgspec.json.Decoder(AnthropicBody),
    "/generate": msgspec.json.Decoder(GenerateBody),
}


def decode_fields(path: str, body: bytes | bytearray) -> BodyFields | None:
    """Decode the fields of `body` that its prompt, model and stream are read from.

    None where a body sent to `path` has no known prompt, or where a field cannot be decoded.
    Values are not checked, so this may accept a body that an engine rejects.
    """
    decoder = _DECODERS.get(path)
    if decoder is None:
        return None
    try:
        fields: BodyFields = decoder.decode(body)
    except UNREADABLE:
        return None
    return fields


def has_prompt(path: str) -> bool:
    """True for a path whose bodies have a prompt."""
    return path in _DECODERS
