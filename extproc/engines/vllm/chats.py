"""What all chats have in common as vLLM (0.32) renders them."""

from typing import Any, Final

from msgspec import Struct

from extproc.engines.vllm.messages import has_media, template_messages
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.prompts import (
    NO_TEMPLATE_KWARGS,
    Message,
    TemplateFacts,
    TemplateInput,
    Tool,
)
from extproc.tokenization.reasons import (
    MALFORMED,
    MULTIMODAL,
    NO_TEXT,
    RENDERED_BY_ENGINE,
    UNSUPPORTED,
)

__all__ = ["EFFORTS", "VllmChat", "checked_kwargs"]

EFFORTS: Final = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "max"})
# Models whose chats the engine renders with code of its own, also if they have a template.
_RENDERED_BY_ENGINE: Final = frozenset(
    {
        "deepseek_v32",
        "deepseek_v4",
        "deepseek_v41",
        "gpt_oss",
        "inkling_mm_model",
        "inkling_model",
        "kimi_k3",
    }
)
# The engine sets these itself, whatever the arguments say.
_SET_BY_ENGINE: Final = frozenset({"add_generation_prompt", "continue_final_message"})
# Types of models whose media the engine puts before all text, or with tokens of its own.
_MEDIA_FIRST: Final = frozenset(
    {
        "blip-2",
        "clip",
        "colmodernvbert",
        "molmo",
        "molmo2",
        "openvla",
        "paligemma",
        "siglip",
        "siglip2",
    }
)
# Those that have no placeholder for the engine to put into a message.
_NO_PLACEHOLDER: Final = _MEDIA_FIRST | {
    "NemotronH_Nano_Omni_Reasoning_V3",
    "NemotronH_Nano_VL_V2",
    "NemotronH_Omni_Reasoning_V3",
    "NemotronH_Super_Omni_Reasoning_V3",
    "dots_ocr",
    "llama_nemotron_vl",
    "mistral3",
    "moondream3",
    "nemotron_parse",
    "pixtral",
    "whisper",
}
_NO_VALUES: Final = (None, "auto")


class VllmChat(Struct, frozen=True, kw_only=True, eq=False):
    """The messages and options of a chat.

    `no_tool_wanted`: the client's `tool_choice` forbids calls, which hides the tools only if the
    engine was started so. `effort` is its `reasoning_effort`. `with_special`: the tokenizer adds
    its special tokens to the text of the template.
    """

    messages: list[Message]
    tools: list[Tool] | None = None
    no_tool_wanted: bool = False
    template_kwargs: dict[str, Any] = {}
    effort: str | None = None
    documents: Any = None
    generation_prompt: bool = True
    continue_final: bool = False
    with_special: bool = False

    @property
    def length(self) -> int:
        return len(self.messages)

    @property
    def has_tools(self) -> bool:
        return self.tools is not None

    @property
    def has_media(self) -> bool:
        return has_media(self.messages)

    @property
    def harmony_is_special(self) -> bool:
        return True

    def for_template(
        self, template: TemplateFacts, default_kwargs: dict[str, Any]
    ) -> TemplateInput:
        return self.rendered(self.messages, self.effort, template, default_kwargs)

    def rendered(
        self,
        given: list[Message],
        effort: str | None,
        template: TemplateFacts,
        default_kwargs: dict[str, Any],
    ) -> TemplateInput:
        """What the template gets for these messages and this effort."""
        if template.model_type in _RENDERED_BY_ENGINE:
            raise UnmappableError(RENDERED_BY_ENGINE)
        other_media = None
        if has_media(given):
            if not _media_follow_text(template):
                raise UnmappableError(MULTIMODAL)
            other_media = _for_roles(
                template_messages(given, template.content_format, other_media=True), template
            )
        messages = _for_roles(template_messages(given, template.content_format), template)
        hidden = self.no_tool_wanted and template.hides_unchosen_tools
        return TemplateInput(
            messages=messages,
            tools=None if hidden else self.tools,
            kwargs=self._kwargs(effort, default_kwargs),
            documents=self.documents,
            generation_prompt=self.generation_prompt,
            open_end=self.continue_final,
            with_special=self.with_special,
            other_media=other_media,
        )

    def _kwargs(self, effort: str | None, default_kwargs: dict[str, Any]) -> dict[str, Any]:
        given = self.template_kwargs
        kwargs = {**default_kwargs}
        kwargs.update(
            {
                name: value
                for name, value in given.items()
                if value not in _NO_VALUES and name not in _SET_BY_ENGINE
            }
        )
        if effort is not None:
            kwargs["reasoning_effort"] = effort
            if "enable_thinking" not in given:
                kwargs["enable_thinking"] = effort != "none"
        return kwargs


def checked_kwargs(given: Any) -> dict[str, Any]:
    """The template arguments of a body; raises UnmappableError for others than a template's."""
    if given is None:
        return {}
    if type(given) is not dict:
        raise UnmappableError(MALFORMED)
    if not (NO_TEMPLATE_KWARGS - _SET_BY_ENGINE).isdisjoint(given):
        raise UnmappableError(UNSUPPORTED, "chat_template_kwargs")
    return given


def _media_follow_text(template: TemplateFacts) -> bool:
    """True if the engine puts a medium nowhere before the message that has it.

    In the format "string", it puts its own placeholder at the beginning of the message. Not all of
    its models have one.
    """
    if template.content_format == "openai":
        return template.model_type not in _MEDIA_FIRST
    return bool(template.model_type) and template.model_type not in _NO_PLACEHOLDER


def _for_roles(messages: list[Message], template: TemplateFacts) -> list[Message]:
    """The messages with roles that the template knows; raises UnmappableError without any."""
    if not messages:
        raise UnmappableError(NO_TEXT)
    if not template.names_developer and any(one["role"] == "developer" for one in messages):
        return _with_one_system(messages)
    return messages


def _with_one_system(messages: list[Message]) -> list[Message]:
    """The messages with those of developers as a system's, and all of a system's as the first."""
    texts: list[str] = []
    others: list[Message] = []
    moved = False
    for index, message in enumerate(messages):
        if message["role"] not in ("developer", "system"):
            others.append(message)
            continue
        moved = moved or index > 0
        content = message["content"]
        if type(content) is list:
            content = "\n".join([part["text"] for part in content if "text" in part])
        if content:
            texts.append(content)
    if moved:
        return [{"role": "system", "content": "\n\n".join(texts)}, *others]
    first = {**messages[0], "role": "system"}
    first.pop("tools", None)
    return [first, *others]
