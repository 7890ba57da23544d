"""Builds the input of a chat template from the decoded fields of a chat body.

Follows the OpenAI chat API as SGLang (0.5.23) reads it. The other chat APIs are translated to it
first, as the engine does, and share `chat_prompt`.
"""

from typing import Any, Final

from msgspec import Struct

from extproc.engines.sglang.messages import (
    LateSystem,
    chat_messages,
    for_template,
    has_media,
    with_one_system,
    without_media,
)
from extproc.engines.sglang.tools import chosen_tools, function_tools
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.fields import ChatBody
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

__all__ = ["SglangChat", "chat_prompt", "openai_chat", "thinking_kwargs"]

_EFFORTS: Final = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"})
# Types of models whose media the engine puts before all text.
_MEDIA_FIRST: Final = frozenset({"clip", "paligemma", "siglip"})
_EFFORT_MAX: Final = 0.99
_TRUE_WORDS: Final = frozenset({"1", "true", "yes", "y", "on"})


# Models whose chats the engine renders with code of its own, also if they have a template.
_RENDERED_BY_ENGINE: Final = frozenset(
    {"deepseek_v4", "deepseek_v41", "inkling_mm_model", "inkling_model", "kimi_k3"}
)


class SglangChat(Struct, frozen=True, kw_only=True, eq=False):
    """The messages and options of a chat, and whether it comes from /v1/responses.

    `parts`: the content of some message is a list. `effort` is the engine's `reasoning_effort`,
    a word or a number; `template_kwargs` does not have it yet. `late_system`: messages of a system
    after others go to the first one if the template does not show them; "stripped": without their
    blanks, each on a line of its own. `thinking` turns thinking on or off.
    """

    messages: list[Message]
    parts: bool = False
    tools: list[Tool] | None = None
    template_kwargs: dict[str, Any] = {}
    effort: str | float | None = None
    continue_final: bool = False
    responses_api: bool = False
    late_system: LateSystem = "stays"
    thinking: bool | None = None

    @property
    def length(self) -> int:
        return len(self.messages)

    @property
    def has_tools(self) -> bool:
        return self.tools is not None

    @property
    def has_media(self) -> bool:
        return self.parts and has_media(self.messages)

    @property
    def with_special(self) -> bool:
        return False

    @property
    def harmony_is_special(self) -> bool:
        return self.responses_api

    def for_template(
        self, template: TemplateFacts, default_kwargs: dict[str, Any]
    ) -> TemplateInput:
        if template.model_type in _RENDERED_BY_ENGINE:
            raise UnmappableError(RENDERED_BY_ENGINE)
        messages, continued = self._messages(self.messages, template)
        other_media = None
        if self.has_media:
            # A template for texts gets no media, and has no placeholder for them.
            if not template.loops_over_parts or template.model_type in _MEDIA_FIRST:
                raise UnmappableError(MULTIMODAL)
            other_media, _ = self._messages(without_media(self.messages), template)
        return TemplateInput(
            messages=messages,
            tools=self.tools,
            kwargs=self._kwargs(template, default_kwargs),
            functions_too=True,
            continued=continued,
            other_media=other_media,
            text_encoded_twice=True,
        )

    def _messages(self, given: list[Message], template: TemplateFacts) -> tuple[list[Message], str]:
        if self.late_system != "stays" and not template.shows_late_system:
            given = with_one_system(given, stripped=self.late_system == "stripped")
        messages, continued = for_template(given, template.loops_over_parts, self.continue_final)
        if not messages:
            raise UnmappableError(MALFORMED)
        return messages, continued

    def _kwargs(self, template: TemplateFacts, default_kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs, effort = self.template_kwargs, self.effort
        if self.thinking is not None:
            if len(template.thinking_variables) > 1:
                raise UnmappableError(UNSUPPORTED, "thinking")
            kwargs = {**kwargs, **dict.fromkeys(template.thinking_variables, self.thinking)}
        if default_kwargs:
            kwargs = {**default_kwargs, **kwargs}
            if effort is None:
                effort = kwargs.get("reasoning_effort")
        if effort is None:
            return kwargs
        if effort == "low" and template.renames_low_effort:
            raise UnmappableError(UNSUPPORTED)
        return {"reasoning_effort": effort, **kwargs}


def openai_chat(body: ChatBody) -> SglangChat:
    """The chat in a body of /v1/chat/completions; raises UnmappableError."""
    continue_final = body.continue_final_message
    if continue_final is not None and type(continue_final) is not bool:
        raise UnmappableError(MALFORMED)
    if body.task is not None:
        raise UnmappableError(UNSUPPORTED)
    effort, kwargs = body.reasoning_effort, body.chat_template_kwargs
    if effort is not None or body.reasoning is not None or kwargs is not None:
        effort, kwargs = _reasoning(body)
    return chat_prompt(
        body.messages,
        tools=chosen_tools(function_tools(bytes(body.tools)), body.tool_choice),
        template_kwargs=kwargs,
        effort=effort,
        continue_final=continue_final is True,
    )


def chat_prompt(
    messages: Any,
    *,
    tools: list[Tool] | None,
    template_kwargs: dict[str, Any] | None = None,
    effort: str | float | None = None,
    continue_final: bool = False,
    responses_api: bool = False,
    late_system: LateSystem = "stays",
    thinking: bool | None = None,
) -> SglangChat:
    """Check the messages and build the chat; raises UnmappableError."""
    normal, parts = chat_messages(messages)
    if not normal:
        raise UnmappableError(NO_TEXT)
    return SglangChat(
        messages=normal,
        parts=parts,
        tools=tools,
        template_kwargs=template_kwargs or {},
        effort=effort,
        continue_final=continue_final,
        responses_api=responses_api,
        late_system=late_system,
        thinking=thinking,
    )


def thinking_kwargs(kwargs: Any, thinking: bool | None) -> dict[str, Any]:
    """The client's template arguments, with `thinking` under both names in use.

    Raises UnmappableError for arguments that do not go to the template.
    """
    given: dict[str, Any] = {} if kwargs is None else kwargs
    if type(given) is not dict:
        raise UnmappableError(MALFORMED)
    if not NO_TEMPLATE_KWARGS.isdisjoint(given):
        raise UnmappableError(UNSUPPORTED)
    documents = given.get("documents")
    if documents is not None and (
        type(documents) is not list or any(type(one) is not dict for one in documents)
    ):
        raise UnmappableError(MALFORMED)
    if thinking is not None:
        given = {"thinking": thinking, "enable_thinking": thinking, **given}
    return given


def _reasoning(body: ChatBody) -> tuple[str | float | None, dict[str, Any]]:
    """The effort and the template arguments, which clients write in three places."""
    effort, thinking = body.reasoning_effort, None
    reasoning = body.reasoning
    if type(reasoning) is dict:
        asked = reasoning.get("effort")
        if asked is None:
            asked = reasoning.get("reasoning_effort")
        if asked is not None:
            effort = asked
        enabled = reasoning.get("enabled")
        if enabled is None:
            enabled = reasoning.get("enable", False)
        if type(enabled) is str:
            enabled = enabled.strip().lower() in _TRUE_WORDS
        if enabled:
            thinking = True
    effort = _effort(effort)
    if effort is not None:
        thinking = effort != "none"
    kwargs = thinking_kwargs(body.chat_template_kwargs, thinking)
    if "reasoning_effort" in kwargs:
        kwargs = dict(kwargs)
        asked = kwargs.pop("reasoning_effort")
        if asked is not None:
            if type(asked) is not str and type(asked) is not float:
                raise UnmappableError(UNSUPPORTED)
            effort = asked
    return effort, kwargs


def _effort(given: Any) -> str | float | None:
    if given is None:
        return None
    if type(given) is str:
        if given in _EFFORTS:
            return given
        try:
            given = float(given)
        except ValueError:
            raise UnmappableError(MALFORMED) from None
    elif type(given) is int:
        given = float(given)
    if type(given) is not float or not 0.0 <= given <= _EFFORT_MAX:
        raise UnmappableError(MALFORMED)
    return given
