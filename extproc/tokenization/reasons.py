"""The reasons for which a request has no tokens.

A closed set, used as values of a metric's label.
"""

from typing import Final

__all__ = [
    "BATCH",
    "BUSY",
    "ENCODE_ERROR",
    "MALFORMED",
    "MULTIMODAL",
    "NO_CHAT_TEMPLATE",
    "NO_TEXT",
    "REASONS",
    "RENDERED_BY_ENGINE",
    "TEMPLATE_ERROR",
    "TEMPLATE_LIMIT",
    "TOO_LONG",
    "UNSUPPORTED",
]

# The request has several prompts, whose prefixes may be held by different workers.
BATCH: Final = "batch"
# There is nothing to encode: the prompt is empty, for instance.
NO_TEXT: Final = "no_text"
# The prompt has images, audio or video. Only the engine knows their tokens.
MULTIMODAL: Final = "multimodal"
# The engine will refuse the request, too.
MALFORMED: Final = "malformed"
# The engine will serve the request, but its way from the body to tokens is not known here.
UNSUPPORTED: Final = "unsupported"
# The engine renders the chats of this model with its own code, without a chat template.
RENDERED_BY_ENGINE: Final = "rendered_by_engine"
NO_CHAT_TEMPLATE: Final = "no_chat_template"
TEMPLATE_ERROR: Final = "template_error"
# The chat template takes too many steps or makes too long a value.
TEMPLATE_LIMIT: Final = "template_limit"
ENCODE_ERROR: Final = "encode_error"
TOO_LONG: Final = "too_long"
# Too many long texts are waiting to be encoded.
BUSY: Final = "busy"

REASONS: Final = (
    BATCH,
    NO_TEXT,
    MULTIMODAL,
    MALFORMED,
    UNSUPPORTED,
    RENDERED_BY_ENGINE,
    NO_CHAT_TEMPLATE,
    TEMPLATE_ERROR,
    TEMPLATE_LIMIT,
    ENCODE_ERROR,
    TOO_LONG,
    BUSY,
)
