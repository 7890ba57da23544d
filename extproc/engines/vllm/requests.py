"""Reads bodies of /v1/chat/completions as vLLM (0.32) does."""

from typing import Any, Final

from extproc.engines.vllm.chats import EFFORTS, VllmChat, checked_kwargs
from extproc.engines.vllm.messages import checked_messages
from extproc.engines.vllm.tools import function_tools
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.fields import ChatBody
from extproc.tokenization.prompts import Tool
from extproc.tokenization.reasons import MALFORMED, NO_TEXT, UNSUPPORTED

__all__ = ["chat_of_request", "flag"]

_CHOICES: Final = frozenset({"auto", "required"})


def chat_of_request(body: ChatBody) -> VllmChat:
    """The chat in a body of /v1/chat/completions; raises UnmappableError."""
    # Only an engine that was started so takes a template from a client.
    if body.chat_template is not None:
        raise UnmappableError(UNSUPPORTED, "chat_template")
    if body.mm_processor_kwargs:
        raise UnmappableError(MALFORMED)
    messages = checked_messages(body.messages)
    if not messages:
        raise UnmappableError(NO_TEXT)
    tools = function_tools(bytes(body.tools))
    choice = body.tool_choice
    _check_choice(tools, choice)
    effort = body.reasoning_effort
    if effort is not None and (type(effort) is not str or effort not in EFFORTS):
        raise UnmappableError(MALFORMED)
    continue_final = flag(body.continue_final_message, default=False)
    if continue_final and body.add_generation_prompt:
        raise UnmappableError(MALFORMED)
    documents = body.documents
    if documents is not None and (
        type(documents) is not list or not all(type(one) is dict for one in documents)
    ):
        raise UnmappableError(MALFORMED)
    return VllmChat(
        messages=messages,
        tools=tools or None,
        no_tool_wanted=choice == "none",
        template_kwargs=checked_kwargs(body.chat_template_kwargs),
        effort=effort,
        documents=documents,
        generation_prompt=flag(body.add_generation_prompt, default=True),
        continue_final=continue_final,
        with_special=flag(body.add_special_tokens, default=False),
    )


def flag(given: Any, *, default: bool) -> bool:
    """A boolean member; raises UnmappableError for another type."""
    if given is None:
        return default
    if type(given) is not bool:
        raise UnmappableError(MALFORMED)
    return given


def _check_choice(tools: list[Tool], choice: Any) -> None:
    """Raise UnmappableError for a choice that the engine refuses."""
    if choice is None or choice == "none":
        return
    if not tools:
        raise UnmappableError(MALFORMED)
    if type(choice) is dict:
        function = choice.get("function")
        name = function.get("name") if type(function) is dict else None
        if not any(tool["function"]["name"] == name for tool in tools):
            raise UnmappableError(MALFORMED)
    elif type(choice) is not str or choice not in _CHOICES:
        raise UnmappableError(MALFORMED)
