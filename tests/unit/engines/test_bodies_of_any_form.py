"""Whatever a client sends, the rules of every engine give a prompt or a reason."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import json

from extproc.engines.engine import ENGINE_NAMES, EngineName, engine_named
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.prompts import Prompt, TemplateFacts, read_prompt
from extproc.tokenization.reasons import REASONS

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/responses",
    "/generate",
    "/v1/rerank",
)
_KEYS = [
    "role", "content", "type", "text", "tool_calls", "function", "name", "arguments", "parameters",
    "id", "input", "output", "call_id", "summary", "tool_use_id", "input_schema", "effort", "tools",
    "reasoning", "reasoning_content", "thinking", "refusal", "status", "namespace", "uuid", "task",
    "strict", "defer_loading", "description", "format", "image_url", "encrypted_content",
]  # fmt: skip
_WORDS = [
    "user", "assistant", "system", "developer", "tool", "text", "function", "message",
    "function_call", "function_call_output", "custom_tool_call", "custom", "namespace", "reasoning",
    "tool_use", "tool_result", "tool_reference", "none", "auto", "image", "{}", "NaN",
    "in_progress",
    "disabled", "enabled", "adaptive", "low", "input_text", "output_text", "left", "right",
    "x-anthropic-billing-header: x", "",
]  # fmt: skip
_ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 62), 1 << 62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(_WORDS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=5)
    ),
    max_leaves=20,
)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(_WORDS[:6])},
        optional={
            "content": st.sampled_from(["", "a", None])
            | st.lists(
                st.fixed_dictionaries(
                    {"type": st.sampled_from(_WORDS) | _ANYTHING},
                    optional={key: _ANYTHING for key in _KEYS if key != "type"},
                ),
                max_size=3,
            ),
            "tool_calls": _ANYTHING,
            "name": _ANYTHING,
        },
    ),
    max_size=4,
)
_FIELDS = [
    "tools", "tool_choice", "chat_template_kwargs", "reasoning", "reasoning_effort", "prompt",
    "instructions", "system", "text", "input_ids", "cache_salt", "lora_path", "echo", "documents",
    "continue_final_message", "thinking", "output_config", "suffix", "previous_response_id",
    "add_generation_prompt", "add_special_tokens", "truncate_prompt_tokens", "truncation_side",
    "prompt_logprobs", "logprobs", "input", "messages",
]  # fmt: skip
_BODIES = st.dictionaries(st.sampled_from(_FIELDS), _ANYTHING, max_size=5)
_FACTS = st.builds(
    TemplateFacts,
    loops_over_parts=st.booleans(),
    content_format=st.sampled_from(["string", "openai"]),
    names_developer=st.booleans(),
    wants_system_first=st.booleans(),
    hides_unchosen_tools=st.booleans(),
)


def check(prompt: Prompt, facts: TemplateFacts) -> None:
    found = [one is not None for one in (prompt.chat, prompt.text, prompt.ids)]
    assert sum(found) == (not prompt.reason)
    assert not prompt.reason or prompt.reason in REASONS
    if prompt.chat is None:
        return
    try:
        given = prompt.chat.for_template(facts, {"thinking": True})
    except UnmappableError:
        return
    assert given.messages
    for message in given.messages:
        assert type(message["role"]) is str
        assert type(message["content"]) in (str, list)


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@settings(max_examples=250, deadline=None)
@given(st.sampled_from(PATHS), _BODIES, _MESSAGES, st.booleans(), _FACTS)
def test_any_body_gives_a_prompt_or_a_reason(
    engine: EngineName,
    path: str,
    body: dict[str, Any],
    messages: list[Any],
    items: bool,
    facts: TemplateFacts,
) -> None:
    body = {**body, ("input" if items else "messages"): messages} if messages else body
    encoded = json.encode(body)
    first = read_prompt(engine_named(engine).rules, path, encoded)
    check(first, facts)
    # The objects of a body serve several engines, so they are not changed.
    again = read_prompt(engine_named(engine).rules, path, encoded)
    check(again, facts)
