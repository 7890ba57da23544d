"""Which requests a pair of workers can serve, and what the prefill is sent."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import RouterError
from extproc.routing.json_members import with_members
from extproc.routing.pd.splitting import (
    asks_for_copies,
    check_for_sglang,
    needs_one_worker,
    prefill_members,
)
from extproc.routing.request import ClientHeaders, Request, find_endpoint, parse_body

HAND_OVER = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
MESSAGES = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 900}


def no_headers() -> ClientHeaders:
    return ClientHeaders("", ())


def request(path: str, **body: Any) -> Request:
    raw = json.dumps({"model": "m"} | body).encode()
    return parse_body(find_endpoint("POST", path), raw, no_headers, prompt_max_bytes=0)


def prefill_body(path: str, **body: Any) -> dict[str, Any]:
    """What the prefill worker gets."""
    asked = request(path, **body)
    found: dict[str, Any] = json.loads(with_members(asked.body, prefill_members(asked)))
    return found


def test_the_prefill_makes_one_token_whatever_the_client_wants() -> None:
    theirs = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 500,
        "max_completion_tokens": 500,
        "min_tokens": 20,
    }
    sent = prefill_body("/v1/completions", prompt="x", **theirs)
    assert sent["prompt"] == "x"
    assert (sent["stream"], sent["stream_options"]) == (False, None)
    assert (sent["max_tokens"], sent["max_completion_tokens"], sent["min_tokens"]) == (1, 1, 0)
    assert sent["kv_transfer_params"] == HAND_OVER


def test_a_prefill_of_messages_makes_one_token_and_keeps_the_rest() -> None:
    thinking = {"type": "enabled", "budget_tokens": 800}
    sent = prefill_body("/v1/messages", **MESSAGES, stream=True, thinking=thinking)
    assert sent == {
        "model": "m",
        "messages": MESSAGES["messages"],
        "stream": False,
        "max_tokens": 1,
        "thinking": thinking,
        "kv_transfer_params": HAND_OVER,
    }


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"type": "tool", "name": "f"}, {"type": "any"}),
        ({"type": "any"}, {"type": "any"}),
        ({"type": "auto"}, {"type": "auto"}),
        ({"type": "none"}, {"type": "none"}),
        (None, None),
        ("tool", "tool"),
        ([1], [1]),
    ],
)
def test_a_prefill_of_messages_is_not_held_to_a_named_tool(given: Any, sent: Any) -> None:
    assert prefill_body("/v1/messages", **MESSAGES, tool_choice=given)["tool_choice"] == sent


def test_a_prefill_of_a_response_is_not_stored_and_not_in_the_background() -> None:
    theirs = {"input": "x", "max_output_tokens": 900, "stream": True, "background": True}
    assert prefill_body("/v1/responses", **theirs, store=True) == {
        "model": "m",
        "input": "x",
        "max_output_tokens": 1,
        "stream": False,
        "background": False,
        "store": False,
        "kv_transfer_params": HAND_OVER,
    }


@pytest.mark.parametrize(
    ("fields", "alone"),
    [
        ({}, False),
        ({"previous_response_id": None}, False),
        ({"previous_response_id": "resp_1"}, True),
        ({"tools": [{"type": "function", "name": "f"}]}, False),
        ({"tools": [{"type": "web_search"}, {"type": "custom"}]}, False),
        ({"tools": [{"type": "function", "name": "f"}, {"type": "code_interpreter"}]}, True),
        ({"tools": [{"type": "web_search_preview"}]}, True),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, True),
        ({"tools": [{"type": "container"}]}, True),
        ({"tools": "odd", "previous_response_id": 3}, False),
        ({"n": 2}, False),
    ],
)
def test_a_response_that_one_vllm_must_serve(fields: dict[str, Any], alone: bool) -> None:
    assert needs_one_worker(request("/v1/responses", input="x", **fields)) is alone


def test_a_response_that_follows_another_cannot_be_served_by_a_pair_of_sglang() -> None:
    check_for_sglang(request("/v1/responses", input="x", tools=[{"type": "web_search"}]))
    with pytest.raises(RouterError) as caught:
        check_for_sglang(request("/v1/responses", input="x", previous_response_id="resp_1"))
    assert caught.value.status == 400
    assert "`previous_response_id`" in caught.value.message


def test_messages_have_no_copies() -> None:
    asked = request("/v1/messages", **MESSAGES, n=4)
    assert not needs_one_worker(asked)
    check_for_sglang(asked)


@pytest.mark.parametrize(
    ("body", "copies"),
    [
        (b'{"model":"m"}', False),
        (b'{"model":"m","n":1}', False),
        (b'{"model":"m","n":null}', False),
        (b'{"model":"m","n":true}', False),
        (b'{"model":"m","n":"1"}', False),
        (b'{"model":"m","n":2}', True),
        (b'{"model":"m","n":2.0}', True),
        (b'{"model":"m","n":"2"}', True),
        (b'{"model":"m","n":1,"n":3}', True),
        (b'{"model":"m","\\u006e":3}', True),
        (b'{"model":"m","best_of":2}', True),
        (b'{"model":"m","use_beam_search":true}', True),
        (b'{"model":"m","use_beam_search":false}', False),
        (b'{"model":"m","text":"x","sampling_params":{"n":4}}', True),
        (b'{"model":"m","text":["x"],"sampling_params":[{"n":1},{"n":2}]}', True),
        (b'{"model":"m","sampling_params":"n"}', False),
        (b'{"model":"m","messages":[{"role":"user","content":"\\"n\\":2"}]}', False),
        (b'{"model":"m","tool":{"n":2}}', False),
    ],
)
def test_requests_for_several_answers_are_found(body: bytes, copies: bool) -> None:
    asked = parse_body(find_endpoint("POST", "/generate"), body, no_headers, prompt_max_bytes=0)
    assert asks_for_copies(asked) is copies


@given(st.binary(max_size=30))
def test_no_body_makes_the_search_for_copies_fail(some: bytes) -> None:
    endpoint = find_endpoint("POST", "/v1/completions")
    for body in (b'{"n":' + some + b"}", b'"n"' + some):
        asks_for_copies(Request(endpoint, "m", False, body))
