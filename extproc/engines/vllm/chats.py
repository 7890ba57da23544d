"""What all chats have in common as vLLM (0.32) renders them."""

from typing import Any, Final

from msgspec import Struct

from extproc.engines.vllm.messages import template_messages
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.prompts import (
    NO_TEMPLATE_KWARGS,
    Message,
    TemplateFacts,
    TemplateInput,
    Tool,
)
from extproc.tokenization.reasons import MALFORMED, NO_TEXT, UNSUPPORTED

__all__ = ["EFFORTS", "VllmChat", "checked_kwargs"]

EFFORTS: Final = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "max"})
# The engine sets these itself, whatever the arguments say.
_SET_BY_ENGINE: Final = frozenset({"add_generation_prompt", "continue_final_message"})
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
        messages = template_messages(given, template.content_format)
        if not messages:
            raise UnmappableError(NO_TEXT)
        if not template.names_developer and any(one["role"] == "developer" for one in messages):
            messages = _with_one_system(messages)
        hidden = self.no_tool_wanted and template.hides_unchosen_tools
        return TemplateInput(
            messages=messages,
            tools=None if hidden else self.tools,
            kwargs=self._kwargs(effort, default_kwargs),
            documents=self.documents,
            generation_prompt=self.generation_prompt,
            open_end=self.continue_final,
            with_special=self.with_special,
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
