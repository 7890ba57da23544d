"""What a request has of that by which engines make other tokens."""

import json
from typing import Any

import pytest

from extproc.routing.token_proof.probes import PROBES
from extproc.routing.token_proof.traits import (
    CHAT,
    CONTINUED,
    MESSAGES,
    PARTS,
    RESPONSES,
    TEXT,
    THINKING,
    TOOLS,
    names_of,
    traits_of,
)

CHAT_PATH = "/v1/chat/completions"
DETAILS = PARTS | TOOLS | CONTINUED | THINKING
USER = {"role": "user", "content": "hi"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}


@pytest.mark.parametrize(
    ("path", "body", "traits"),
    [
        ("/v1/completions", {"prompt": "x"}, TEXT),
        ("/generate", {"text": "x"}, TEXT),
        ("/v1/embeddings", {"input": "x"}, TEXT),
        ("/v1/rerank", {"query": "x"}, 0),
        (CHAT_PATH, {"messages": [USER]}, CHAT),
        (CHAT_PATH, {"messages": [USER], "tools": [], "chat_template_kwargs": None}, CHAT),
        (CHAT_PATH, {"messages": [USER], "tools": [{}]}, CHAT | TOOLS),
        (CHAT_PATH, {"messages": [USER, CALL, USER]}, CHAT | TOOLS),
        (CHAT_PATH, {"messages": [USER, {"role": "tool", "content": "x"}]}, CHAT | TOOLS),
        (CHAT_PATH, {"messages": [{"role": "user", "content": [{}]}]}, CHAT | PARTS),
        (CHAT_PATH, {"messages": [USER, {"role": "assistant"}]}, CHAT | CONTINUED),
        (CHAT_PATH, {"messages": [USER], "reasoning_effort": "low"}, CHAT | THINKING),
        (CHAT_PATH, {"messages": "odd"}, CHAT | DETAILS),
        (CHAT_PATH, {}, CHAT),
        ("/v1/responses", {"input": "x"}, CHAT | RESPONSES),
        (
            "/v1/responses",
            {"input": [{"type": "function_call_output"}]},
            CHAT | RESPONSES | TOOLS,
        ),
        ("/v1/messages", {"messages": [USER], "thinking": {"type": "x"}}, CHAT | MESSAGES | 32),
    ],
)
def test_traits_are_read_from_path_and_body(path: str, body: Any, traits: int) -> None:
    assert traits_of(path, json.dumps(body).encode(), DETAILS) == traits


def test_a_body_is_not_decoded_where_its_path_is_enough() -> None:
    assert traits_of(CHAT_PATH, b"{odd", CHAT | TOOLS) == CHAT
    assert traits_of(CHAT_PATH, b"{odd", TEXT) == CHAT
    assert traits_of(CHAT_PATH, b"{odd", TOOLS) == CHAT | DETAILS


def test_a_large_body_counts_as_one_that_has_everything() -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * (1 << 20)}]}).encode()
    assert traits_of(CHAT_PATH, body, TOOLS) == CHAT | DETAILS


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_a_probe_has_the_trait_that_it_speaks_for(probe: Any) -> None:
    body = json.dumps(probe.body).encode()
    assert traits_of(probe.path, body, DETAILS) & probe.trait


def test_traits_have_names() -> None:
    assert names_of(TEXT | TOOLS | MESSAGES) == ["text", "tools", "messages"]
    assert names_of(0) == []
