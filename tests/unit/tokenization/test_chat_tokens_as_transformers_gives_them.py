"""Chats have the same tokens as transformers gives for the same messages."""

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from extproc.clock import SystemClock
from extproc.engines.engine import DEFAULT_ENGINE
from extproc.engines.sglang.chats import SglangChat
from extproc.engines.sglang.messages import for_template
from extproc.tokenization.chat_template import iterates_over_parts
from extproc.tokenization.encoder import Encoded, EncoderSettings, PromptEncoder
from extproc.tokenization.prompts import Prompt, read_prompt
from extproc.tokenization.template_environment import template_environment
from tests.unit.tokenization.small_tokenizers import (
    FAMILIES,
    family_folder,
    model_folder,
    o200k,
    template,
)

SGLANG = DEFAULT_ENGINE.rules

PATH = "/v1/chat/completions"

SYSTEM = {"role": "system", "content": "You are terse.\n  And kind.  "}
USER = {"role": "user", "content": "  Hello, it's me — 12345 times\n\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes? <|im_end|>"}
MORE = {"role": "user", "content": "naïve 你好 👩‍👩‍👧 e\u0301 <|eot_id|>[INST]"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Wetter für "Städte" & <Dörfer>',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "größte zuerst"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"days":[1,2.50],"city":"Zürich"}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"sky": "grün"}'}

CHATS: dict[str, dict[str, Any]] = {
    "one question": {"messages": [USER]},
    "empty": {"messages": [{"role": "user", "content": ""}]},
    "system and turns": {"messages": [SYSTEM, USER, ANSWER, MORE]},
    "many turns": {"messages": [SYSTEM, *[USER, ANSWER] * 9, MORE]},
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            }
        ]
    },
    "one part": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": " one ", "cache": 1}]}]
    },
    "tools": {"messages": [SYSTEM, USER], "tools": [WEATHER, CLOCK]},
    "tools and a call": {"messages": [USER, CALL, RESULT], "tools": [WEATHER]},
    "after a call": {"messages": [USER, CALL, RESULT, ANSWER, MORE], "tools": [WEATHER]},
    "results in parts": {
        "messages": [
            USER,
            CALL,
            {
                **RESULT,
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
        "tools": [WEATHER],
    },
    "no tools wanted": {"messages": [USER], "tools": [WEATHER], "tool_choice": "none"},
    "one tool wanted": {
        "messages": [USER],
        "tools": [WEATHER, CLOCK],
        "tool_choice": {"type": "function", "function": {"name": "clock"}},
    },
    "template arguments": {
        "messages": [USER],
        "chat_template_kwargs": {
            "enable_thinking": False,
            "thinking": True,
            "date_string": "2 Feb 2025",
            "bos_token": "!",
        },
    },
    "effort": {"messages": [USER], "reasoning_effort": "high"},
    "no effort": {"messages": [USER], "reasoning_effort": "none"},
    "effort as a number": {"messages": [USER], "reasoning": {"effort": 0.5}},
    "thoughts": {"messages": [USER, {**ANSWER, "content": "x", "reasoning_content": "so"}, MORE]},
    "last word is the assistant's": {"messages": [USER, ANSWER]},
}


@cache
def _loaded(family: str, base: Path) -> tuple[PromptEncoder, Any]:
    folder = family_folder(family, base / family)
    return (
        PromptEncoder.load(folder, EncoderSettings(), SystemClock()),
        PreTrainedTokenizerFast.from_pretrained(folder),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def _prompt(body: dict[str, Any]) -> Prompt:
    return read_prompt(SGLANG, PATH, json.dumps(body).encode())


def _by_transformers(tokenizer: Any, prompt: Prompt, keep_parts: bool) -> list[int] | None:
    """None where the template refuses the chat."""
    chat = prompt.chat
    assert isinstance(chat, SglangChat)
    messages, _ = for_template(chat.messages, keep_parts, chat.continue_final)
    effort = {} if chat.effort is None else {"reasoning_effort": chat.effort}
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            tools=chat.tools,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **{**effort, **chat.template_kwargs},
        )
    except Exception:
        return None
    return list(ids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chat", CHATS)
async def test_every_chat_with_every_template_has_the_tokens_of_transformers(
    family: str, chat: str, base: Path
) -> None:
    encoder, tokenizer = _loaded(family, base)
    prompt = _prompt(CHATS[chat])
    expected = _by_transformers(tokenizer, prompt, keep_parts=family == "parts")
    for _ in range(2):
        encoded = await encoder.encode(prompt)
        if expected is None:
            assert encoded == Encoded(None, "template_error")
        else:
            assert encoded.reason == ""
            assert encoded.ids is not None
            assert encoded.ids.dtype == "uint64"
            assert encoded.ids.tolist() == expected


def test_few_chats_are_refused_by_templates(base: Path) -> None:
    """Or the test above would compare nothing."""
    refused = []
    for family, chat in itertools.product(FAMILIES, CHATS):
        _, tokenizer = _loaded(family, base)
        if _by_transformers(tokenizer, _prompt(CHATS[chat]), family == "parts") is None:
            refused.append((family, chat))
    # A user's word after a user's, since the engine makes one of the assistant's.
    assert refused == [("mistral", "last word is the assistant's")]


@pytest.mark.parametrize("family", ["qwen", "llama", "deepseek"])
async def test_each_turn_of_a_chat_is_encoded_correctly_from_the_cache(
    family: str, base: Path
) -> None:
    encoder, tokenizer = _loaded(family, base)
    messages = [SYSTEM]
    for turn in range(6):
        messages += [{"role": "user", "content": f"{turn} " * 50 + MORE["content"]}]
        prompt = _prompt({"messages": messages})
        hits = encoder.stats.segment_hits
        encoded = await encoder.encode(prompt)
        assert encoded.ids is not None
        assert encoded.ids.tolist() == _by_transformers(tokenizer, prompt, keep_parts=False)
        assert turn == 0 or encoder.stats.segment_hits > hits
        messages += [{"role": "assistant", "content": f"{turn} it is. " * 30}]


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_beginning_of_an_answer_is_encoded_separately(family: str, base: Path) -> None:
    """Its text is encoded by itself, as any text is, only without the token that begins one."""
    encoder, tokenizer = _loaded(family, base)
    body = {
        "messages": [USER, {"role": "assistant", "content": " Once upon a"}],
        "continue_final_message": True,
    }
    encoded = await encoder.encode(_prompt(body))
    before = _by_transformers(tokenizer, _prompt({"messages": [USER]}), keep_parts=False)
    assert encoded.ids is not None
    assert before is not None
    begun = tokenizer.encode(" Once upon a")
    if begun[0] == tokenizer.bos_token_id:
        begun = begun[1:]
    assert encoded.ids.tolist() == before + begun


async def test_only_a_message_of_the_assistant_is_continued(base: Path) -> None:
    encoder, _ = _loaded("qwen", base)
    plain = await encoder.encode(_prompt({"messages": [USER]}))
    asked = await encoder.encode(_prompt({"messages": [USER], "continue_final_message": True}))
    assert plain.ids is not None
    assert asked.ids is not None
    assert plain.ids.tolist() == asked.ids.tolist()


async def test_a_chat_with_only_a_message_to_continue_is_malformed(base: Path) -> None:
    encoder, _ = _loaded("qwen", base)
    body = {"messages": [ANSWER], "continue_final_message": True}
    assert await encoder.encode(_prompt(body)) == Encoded(None, "malformed")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["Once", "  a\n\nb 123", "<s>[INST]<|im_start|>x", "你好 👍🏽"])
async def test_texts_get_the_special_tokens_that_the_tokenizer_adds(
    family: str, text: str, base: Path
) -> None:
    encoder, tokenizer = _loaded(family, base)
    body = json.dumps({"prompt": text}).encode()
    encoded = await encoder.encode(read_prompt(SGLANG, "/v1/completions", body))
    assert encoded.ids is not None
    assert encoded.ids.tolist() == tokenizer.encode(text)


async def test_templates_get_tools_or_else_their_functions(tmp_path: Path) -> None:
    """A template that fails on a tool's wrapping is tried again without it."""
    bare = "{% for t in tools %}{{ t.parameters.properties.city.type }}{% endfor %}"
    folder = model_folder(tmp_path, o200k(), {"chat_template": bare})
    encoder = PromptEncoder.load(folder, EncoderSettings(), SystemClock())
    encoded = await encoder.encode(_prompt({"messages": [USER], "tools": [WEATHER]}))
    assert encoded.ids is not None
    assert await encoder.detokenize(encoded.ids.tolist(), skip_special_tokens=False) == "string"
    refused = await encoder.encode(_prompt({"messages": [USER], "tools": [CLOCK]}))
    assert refused == Encoded(None, "template_error")


async def test_default_template_arguments_are_those_of_the_engine(tmp_path: Path) -> None:
    source = "{{ a }}|{{ b }}|{{ reasoning_effort }}"
    folder = model_folder(tmp_path, o200k(), {"chat_template": source})
    settings = EncoderSettings(template_kwargs={"a": "1", "b": "2", "reasoning_effort": "low"})
    encoder = PromptEncoder.load(folder, settings, SystemClock())
    for asked, expected in (
        ({}, "1|2|low"),
        ({"chat_template_kwargs": {"b": "3"}}, "1|3|low"),
        ({"reasoning_effort": "high"}, "1|2|low"),
    ):
        encoded = await encoder.encode(_prompt({"messages": [USER], **asked}))
        assert encoded.ids is not None
        text = await encoder.detokenize(encoded.ids.tolist(), skip_special_tokens=False)
        assert text == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (template("parts"), True),
        (template("llama"), False),
        (template("qwen"), False),
        (template("mistral"), False),
        (template("deepseek"), False),
        (template("hermes"), False),
        ("{% for part in message.content %}{% endfor %}", True),
        ("{% for m in messages %}{% for c in m['content'] %}{% endfor %}{% endfor %}", True),
        ("{% for c in msg.content | list %}{% endfor %}", True),
        ("{% for c in message['content'][1:] %}{% endfor %}", True),
        ("{% for c in turn.content %}{% endfor %}", False),
        ("{% for c in message.contents %}{% endfor %}", False),
        ("{% for c in message[name] %}{% endfor %}", False),
        ("{{ message.content }}", False),
        ("{% if 'image' in message %}{% endif %}", True),
        ("{# vision #}", True),
    ],
)
def test_templates_that_loop_over_content_get_parts(source: str, expected: bool) -> None:

    assert iterates_over_parts(source, template_environment().parse(source)) is expected
