"""The prompt of a request, as an engine's rules read it from the body.

A prompt depends on no tokenizer and no template, so it is the same for every model. A chat meets
the model's template later: `Chat.for_template` makes what the template is given. Odd content
raises no exception here: `Prompt.reason` says why there are no tokens. A wrong prompt costs more
than no prompt, since it sends the request to a worker that does not hold the prefix.
"""

from typing import Any, Final, Literal, Protocol

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.fields import UNREADABLE, BodyFields, decode_fields, has_prompt
from extproc.tokenization.media import media_in
from extproc.tokenization.reasons import MALFORMED, UNSUPPORTED

__all__ = [
    "NO_TEMPLATE_KWARGS",
    "Chat",
    "ContentFormat",
    "KeptSide",
    "Message",
    "Prompt",
    "PromptRules",
    "TemplateFacts",
    "TemplateInput",
    "Tool",
    "prompt_of",
    "read_prompt",
]

Message = dict[str, Any]
Tool = dict[str, Any]
ContentFormat = Literal["string", "openai"]
KeptSide = Literal["start", "end", "text_end"]

# Parameters of the function of transformers that renders a chat. In template arguments, some make
# an engine fail and the others change what it does.
NO_TEMPLATE_KWARGS: Final = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


class TemplateFacts(Struct, frozen=True, kw_only=True):
    """What engines look for in the source of a chat template.

    `loops_over_parts` is SGLang's rule for templates that get a content as a list of parts, and
    `content_format` vLLM's, or what is configured. `names_developer`: the source has the role
    "developer". `renames_low_effort`: the template is of a family with its own word for it.
    `shows_late_system`: a system's message after others is printed, as SGLang tries it out.
    `thinking_variables` are those of "thinking" and "enable_thinking" that it uses.
    `wants_system_first`: it fails for a system's message after others, and
    `effort_without_thinking` is the effort that turns thinking off, both as vLLM tries it out.
    `hides_unchosen_tools`: vLLM was started so that a `tool_choice` that forbids calls hides the
    tools. `model_type` is that of the model's `config.json`, empty if it is not known.
    """

    loops_over_parts: bool = False
    content_format: ContentFormat = "string"
    names_developer: bool = False
    renames_low_effort: bool = False
    wants_system_first: bool = False
    shows_late_system: bool = True
    thinking_variables: frozenset[str] = frozenset()
    effort_without_thinking: str = "none"
    hides_unchosen_tools: bool = False
    model_type: str = ""


class TemplateInput(Struct, frozen=True, kw_only=True):
    """What a chat template is given, and what becomes of its text.

    `kwargs` are further variables of the template; they count more than those of the same name.
    `functions_too`: if the template fails, it is tried once more with the functions in place of
    the tools. `open_end`: the text is cut after the last message, which the model continues.
    `continued` is encoded after the text, with special tokens. `with_special`: the text itself is
    encoded with them.
    `other_media` is given for a chat with images, audio or video: the messages once more, which
    differ in nothing but these. Then only the text before the first medium is known.
    `text_encoded_twice`: the engine turns the tokens of such a chat into text and encodes that
    once more, with special tokens.
    """

    messages: list[Message]
    tools: list[Tool] | None = None
    kwargs: dict[str, Any] = {}
    documents: Any = None
    generation_prompt: bool = True
    functions_too: bool = False
    open_end: bool = False
    continued: str = ""
    with_special: bool = False
    other_media: list[Message] | None = None
    text_encoded_twice: bool = False


class Chat(Protocol):
    """A chat as one engine reads it."""

    @property
    def length(self) -> int:
        """Number of messages."""
        ...

    @property
    def has_tools(self) -> bool: ...

    @property
    def has_media(self) -> bool:
        """True if some message has an image, audio or video."""
        ...

    @property
    def with_special(self) -> bool:
        """True if the tokenizer adds its special tokens to the rendered text."""
        ...

    @property
    def harmony_is_special(self) -> bool:
        """True if the engine renders it without the template for models with the harmony format."""
        ...

    def for_template(
        self, template: TemplateFacts, default_kwargs: dict[str, Any]
    ) -> TemplateInput:
        """What the template gets; raises UnmappableError.

        `default_kwargs` are template arguments that the engine was started with.
        """
        ...


class Prompt(Struct, frozen=True, kw_only=True, eq=False):
    """The prompt of one request.

    Either one of `chat`, `text` and `ids` (uint64) is set, or `reason` with, where it is known, the
    `member` of the body that it is about. A `text` is encoded with
    the special tokens that the tokenizer adds, unless `with_special` is False. Of the ids, only
    `keep_tokens` are kept if that is set, those of `keep_side`; with "text_end" special tokens
    around the text stay, and the end of the text between them.
    Without `reads_cache`, the engine computes all of the prompt, whatever it holds.
    `cache_salt` and `lora` name the cache namespace; both are None for the common one. The adapter
    in a `model` of the form base:adapter is not among them. `body_bytes` is the size of the body,
    of which `media_bytes` are those of `media` images, audio and videos.
    """

    chat: Chat | None = None
    text: str | None = None
    ids: NDArray[np.uint64] | None = None
    with_special: bool = True
    keep_tokens: int | None = None
    keep_side: KeptSide = "start"
    reads_cache: bool = True
    cache_salt: str | None = None
    lora: str | None = None
    reason: str = ""
    member: str = ""
    body_bytes: int = 0
    media: int = 0
    media_bytes: int = 0


class PromptRules(Protocol):
    """How one engine reads the prompt of a body; see `engines`."""

    def prompt(self, path: str, fields: Any, body_bytes: int) -> Prompt:
        """The prompt in the fields of a body for `path`.

        Raises UnmappableError, and what the JSON decoder raises.
        """
        ...


def prompt_of(rules: PromptRules, path: str, fields: BodyFields, body_bytes: int) -> Prompt:
    """The prompt in the decoded fields of a body of `body_bytes` sent to `path`."""
    try:
        prompt = rules.prompt(path, fields, body_bytes)
    except UnmappableError as refused:
        prompt = Prompt(reason=refused.reason, member=refused.member, body_bytes=body_bytes)
    except UNREADABLE:
        prompt = Prompt(reason=MALFORMED, body_bytes=body_bytes)
    if prompt.reason or (prompt.chat is not None and prompt.chat.has_media):
        media, media_bytes = media_in(fields)
        if media:
            return structs.replace(prompt, media=media, media_bytes=media_bytes)
    return prompt


def read_prompt(rules: PromptRules, path: str, body: bytes | bytearray) -> Prompt:
    """The prompt in a complete body sent to `path`, with or without a query."""
    path = path.partition("?")[0]
    if not has_prompt(path):
        return Prompt(reason=UNSUPPORTED, body_bytes=len(body))
    fields = decode_fields(path, body)
    if fields is None:
        return Prompt(reason=MALFORMED, body_bytes=len(body))
    return prompt_of(rules, path, fields, len(body))
