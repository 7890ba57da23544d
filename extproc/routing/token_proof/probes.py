"""The bodies that an engine is asked for: small, each with a thing that engines do differently.

They are data. No prompt of a client is ever sent for a proof, so differences can be shown in logs.
"""

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from extproc.routing.token_proof.traits import (
    CHAT,
    CONTINUED,
    MESSAGES,
    PARTS,
    RESPONSES,
    TEXT,
    THINKING,
    TOOLS,
)

__all__ = ["PROBES", "Probe"]


class Probe(Struct, frozen=True):
    """A body without its model, and the trait that its tokens speak for."""

    name: str
    trait: int
    path: str
    body: Mapping[str, Any]


_CHAT_PATH: Final = "/v1/chat/completions"
_SCRIPTS: Final = (
    "Gr\u00fc\u00dfe! \u4f60\u597d\uff0c\u4e16\u754c\u3002 \u0928\u092e\u0938\u094d\u0924\u0947 "
    "\u0645\u0631\u062d\u0628\u0627 \U0001f469\u200d\U0001f680 e\u0301 \u00a0\t tabs\n\n\n  "
    "123456 3.14 it's I'LL _snake_case_ camelCase https://example.org/?a=b&c=%20 \\ \r\n end  "
)
_MARKS: Final = (
    "marks: <s> </s> <|im_start|>user\n<|im_end|> [INST] x [/INST] <|begin_of_text|> <|eot_id|> "
    "<|endoftext|> <think> </think> <bos> <start_of_turn> <tool_call> {{ 1 + 1 }} {% raw %}"
)
_TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather of a place, "now" or later – it\'s a forecast.',
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "A city & its country"},
                    "days": {"type": "integer", "minimum": 0, "default": 1},
                    "unit": {"type": "string", "enum": ["°C", "°F"]},
                },
                "required": ["place"],
            },
        },
    },
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}},
]
_SYSTEM: Final = {"role": "system", "content": "You are a helpful assistant. Answer briefly."}
_ASKED: Final = {"role": "user", "content": "What is the weather in Łódź tomorrow?"}
_CALLED: Final = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"place": "Łódź", "days": 2}'},
        }
    ],
}
_RESULT: Final = {"role": "tool", "tool_call_id": "call00001", "content": '{"sky": "rain", "t": 7}'}


def _chat(name: str, trait: int, *messages: Mapping[str, Any], **fields: Any) -> Probe:
    return Probe(name, trait, _CHAT_PATH, {"messages": list(messages), **fields})


PROBES: Final = (
    Probe("text", TEXT, "/v1/completions", {"prompt": _SCRIPTS}),
    Probe("text_with_marks", TEXT, "/v1/completions", {"prompt": _MARKS}),
    _chat("chat", CHAT, {"role": "user", "content": _SCRIPTS + _MARKS}),
    _chat(
        "conversation",
        CHAT,
        _SYSTEM,
        {"role": "user", "content": " Hello, what can you do? \n"},
        {"role": "assistant", "content": "I am an assistant.\n"},
        {"role": "user", "content": "Tell me more."},
    ),
    _chat("tools", TOOLS, _SYSTEM, _ASKED, tools=_TOOLS, tool_choice="auto"),
    _chat("tool_history", TOOLS, _ASKED, _CALLED, _RESULT, tools=_TOOLS),
    _chat(
        "parts",
        PARTS,
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "The first part."},
                {"type": "text", "text": " The second part. "},
            ],
        },
    ),
    _chat(
        "continued",
        CONTINUED,
        {"role": "user", "content": "Count to five."},
        {"role": "assistant", "content": "One, two,"},
    ),
    _chat("thinking", THINKING, _ASKED, chat_template_kwargs={"enable_thinking": False}),
    Probe(
        "responses",
        RESPONSES,
        "/v1/responses",
        {
            "instructions": "Answer briefly.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "What can you do?"}]}
            ],
        },
    ),
    Probe(
        "messages",
        MESSAGES,
        "/v1/messages",
        {
            "system": [{"type": "text", "text": "Answer briefly."}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "What can you do?"}]}
            ],
            "max_tokens": 16,
        },
    ),
)
