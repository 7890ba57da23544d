"""Bodies of all endpoints give a prompt, or a reason."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.engines.engine import DEFAULT_ENGINE
from extproc.engines.sglang.chats import SglangChat
from extproc.tokenization.prompts import Prompt, read_prompt
from extproc.tokenization.reasons import REASONS

SGLANG = DEFAULT_ENGINE.rules

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
PATHS = [CHAT, COMPLETIONS, "/generate", "/v1/embeddings", "/v1/responses", "/v1/messages"]
USER = {"role": "user", "content": "hi"}


def _read(path: str, **body: Any) -> Prompt:
    return read_prompt(SGLANG, path, json.dumps(body).encode())


def _chat(**body: Any) -> Prompt:
    return _read(CHAT, **{"messages": [USER], **body})


# -- texts and ids


@pytest.mark.parametrize(
    ("path", "field"),
    [(COMPLETIONS, "prompt"), ("/v1/embeddings", "input"), ("/generate", "text")],
)
def test_a_prompt_is_a_text_or_a_list_with_one_text(path: str, field: str) -> None:
    for given_text in ("a b", ["a b"]):
        prompt = _read(path, **{field: given_text})
        assert (prompt.text, prompt.reason) == ("a b", "")


@pytest.mark.parametrize(
    ("path", "field"),
    [(COMPLETIONS, "prompt"), ("/v1/embeddings", "input"), ("/generate", "input_ids")],
)
def test_a_prompt_is_ids_or_a_list_with_one_list_of_ids(path: str, field: str) -> None:
    for ids in ([5, 0, 2**32 - 1], [[5, 0, 2**32 - 1]]):
        prompt = _read(path, **{field: ids})
        assert prompt.reason == ""
        assert prompt.ids is not None
        assert prompt.ids.dtype == "uint64"
        assert prompt.ids.tolist() == [5, 0, 2**32 - 1]


def test_ids_of_a_chat_are_its_tokens() -> None:
    prompt = _chat(input_ids=[1, 2])
    assert prompt.ids is not None
    assert prompt.ids.tolist() == [1, 2]
    assert prompt.chat is None
    assert _chat(input_ids=None).chat is not None


@pytest.mark.parametrize("several", [["a", "b"], [[1], [2]], ["a", [1]]])
def test_several_prompts_are_a_batch(several: Any) -> None:
    assert _read(COMPLETIONS, prompt=several).reason == "batch"


@pytest.mark.parametrize("nothing", ["", [], [""], [[]], None])
def test_an_empty_prompt_has_no_text(nothing: Any) -> None:
    assert _read(COMPLETIONS, prompt=nothing).reason == "no_text"


@pytest.mark.parametrize(
    "odd", [1, 1.5, True, {}, [1, "2"], [1, True], [1, -1], [1, 2**32], [1, 2**70], [1.0], [None]]
)
def test_a_prompt_of_another_type_is_malformed(odd: Any) -> None:
    assert _read(COMPLETIONS, prompt=odd).reason == "malformed"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": "a", "suffix": "b"}, "unsupported"),
        ({"prompt": "a", "extra_key": "k"}, "unsupported"),
        ({"prompt": "a", "session_params": {"id": "s"}}, "unsupported"),
        ({"prompt": "a", "cache_salt": 5}, "unsupported"),
        ({"prompt": "a", "cache_salt": ["a", "b"]}, "unsupported"),
        ({"prompt": "a", "lora_path": {}}, "unsupported"),
    ],
)
def test_completions_that_depend_on_the_engine_are_unsupported(body: Any, reason: str) -> None:
    assert _read(COMPLETIONS, **body).reason == reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"text": "a", "image_data": "x"}, "multimodal"),
        ({"text": "a", "audio_data": ["x"]}, "multimodal"),
        ({"text": "a", "input_ids": [1]}, "malformed"),
        ({"input_embeds": [[0.5]]}, "unsupported"),
        ({}, "no_text"),
        ({"text": ["a", "b"]}, "batch"),
    ],
)
def test_odd_bodies_of_generate_have_a_reason(body: Any, reason: str) -> None:
    assert _read("/generate", **body).reason == reason


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/score", "/v1/classify", "/v1/models", "/", ""])
def test_endpoints_without_a_known_prompt_are_unsupported(path: str) -> None:
    assert _read(path, input="a", prompt="a").reason == "unsupported"


def test_a_query_after_the_path_is_ignored() -> None:
    assert _read(COMPLETIONS + "?x=1", prompt="a").text == "a"


@pytest.mark.parametrize("path", PATHS[:4])
def test_the_cache_namespace_is_read_from_the_body(path: str) -> None:
    body = {"messages": [USER], "prompt": "a", "text": "a", "input": "a"}
    prompt = _read(path, **body, cache_salt="s", lora_path="l")
    assert (prompt.cache_salt, prompt.lora, prompt.reason) == ("s", "l", "")
    prompt = _read(path, **body, cache_salt="", lora_path=None)
    assert (prompt.cache_salt, prompt.lora) == (None, None)
    prompt = _read(path, **body, lora_path=["l"])
    assert prompt.lora == "l"


# -- anything

_BAD_BODIES = [
    b"",
    b" ",
    b"null",
    b"[]",
    b"1",
    b'"x"',
    b"{",
    b'{"messages": [}',
    b'{"messages": NaN}',
    b'{"messages": [{"role": "user", "content": NaN}]}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\udc00\\ud800", "input": "\\ud800", "text": "\\ud800"}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "a\x00b"}',
    b'{"prompt": 1e999}',
    b'{"prompt": ' + b"[" * 100_000,
    b'{"messages": ' + b'{"a":' * 100_000,
    b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"tools": ' + b"[" * 5000 + b"]" * 5000 + b', "messages": []}',
    b'{"chat_template_kwargs": ' + b"[" * 5000 + b"]" * 5000 + b', "messages": []}',
    b'{"prompt": ' + b"9" * 5000 + b"}",
    b'{"input_ids": [' + b"9" * 5000 + b"]}",
    b"\xef\xbb\xbf{}",
    b"\x00" * 1000,
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", _BAD_BODIES, ids=lambda body: repr(body[:24]))
def test_invalid_bodies_have_a_reason(path: str, body: bytes) -> None:
    for given_body in (body, bytearray(body)):
        prompt = read_prompt(SGLANG, path, given_body)
        assert prompt.reason in REASONS
        assert prompt.body_bytes == len(body)


def test_long_strings_are_read_whole() -> None:
    text = "äx" * 500_000
    assert _read(COMPLETIONS, prompt=text).text == text
    prompt = _chat(messages=[{"role": "user", "content": text}])
    assert isinstance(prompt.chat, SglangChat)
    assert prompt.chat.messages == [{"role": "user", "content": text}]


_KEYS = [
    "role", "content", "type", "text", "tool_calls", "function", "name", "arguments", "parameters",
    "id", "input", "output", "call_id", "summary", "tool_use_id", "input_schema", "effort",
]  # fmt: skip
_WORDS = [
    "user", "assistant", "system", "tool", "text", "function", "message", "function_call",
    "function_call_output", "reasoning", "tool_use", "tool_result", "none", "auto", "image", "{}",
]  # fmt: skip
_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(_WORDS),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=5),
    max_leaves=25,
)  # fmt: skip
_FIELDS = [
    "messages", "tools", "tool_choice", "chat_template_kwargs", "reasoning", "reasoning_effort",
    "prompt", "input", "instructions", "system", "text", "input_ids", "cache_salt", "lora_path",
    "continue_final_message", "thinking", "output_config", "suffix", "previous_response_id",
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(_FIELDS), _ANYTHING, max_size=6))
def test_fields_of_any_type_give_a_prompt_or_a_reason(path: str, body: dict[str, Any]) -> None:
    prompt = _read(path, **body)
    found = [one is not None for one in (prompt.chat, prompt.text, prompt.ids)]
    assert sum(found) == (not prompt.reason)
    assert not prompt.reason or prompt.reason in REASONS


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATHS), st.binary(max_size=200))
def test_random_bytes_raise_nothing(path: str, body: bytes) -> None:
    read_prompt(SGLANG, path, body)
    read_prompt(SGLANG, path, b'{"messages": [' + body)
