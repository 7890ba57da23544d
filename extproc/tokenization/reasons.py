"""Why a request has no tokens: a closed set, fit for a metric's label."""

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
    "TEMPLATE_ERROR",
    "TEMPLATE_LIMIT",
    "TOO_LONG",
    "UNSUPPORTED",
]

# Several prompts in one request: they may live on different workers.
BATCH: Final = "batch"
# Nothing that could be encoded, an empty prompt for instance.
NO_TEXT: Final = "no_text"
# Images, audio or video, which the engine expands to tokens that only it knows.
MULTIMODAL: Final = "multimodal"
# The engine will refuse it, too.
MALFORMED: Final = "malformed"
# The engine will serve it, but how it comes to its tokens is not known here.
UNSUPPORTED: Final = "unsupported"
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
    NO_CHAT_TEMPLATE,
    TEMPLATE_ERROR,
    TEMPLATE_LIMIT,
    ENCODE_ERROR,
    TOO_LONG,
    BUSY,
)
