"""The JSON members by which a prefill and a decode worker find each other."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import RouterError
from extproc.routing.json_members import with_members
from extproc.routing.pd.handoff import (
    bootstrap_members,
    kv_decode_members,
    prompts_of_a_batch,
)
from extproc.routing.request import ClientHeaders, find_endpoint, parse_body

HOST = "10.0.0.1"


def members(
    host: str = HOST,
    port: int | None = 8998,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    prompts: int | None = None,
) -> dict[str, Any]:
    added = bootstrap_members(host, port, dp_rank=dp_rank, dp_size=dp_size, prompts=prompts)
    found: dict[str, Any] = json.loads(b"{%b}" % added)
    assert sorted(found) == ["bootstrap_host", "bootstrap_port", "bootstrap_room"]
    return found


def prompts_in(path: str, **body: Any) -> int | None:
    raw, endpoint = json.dumps({"model": "m"} | body).encode(), find_endpoint("POST", path)
    skipped, decoded = (
        prompts_of_a_batch(parse_body(endpoint, raw, no_headers, prompt_max_bytes=limit))
        for limit in (0, len(raw))
    )
    assert skipped == decoded
    return skipped


def no_headers() -> ClientHeaders:
    return ClientHeaders("", ())


# -- rooms


@given(dp_size=st.integers(1, 1024), data=st.data(), prompts=st.none() | st.integers(1, 5))
def test_a_room_carries_the_rank_and_fits_a_signed_integer(
    dp_size: int, data: st.DataObject, prompts: int | None
) -> None:
    dp_rank = data.draw(st.integers(0, dp_size - 1))
    room = members(dp_rank=dp_rank, dp_size=dp_size, prompts=prompts)["bootstrap_room"]
    for one in [room] if prompts is None else room:
        assert type(one) is int
        assert 0 <= one < 2**63
        assert one % dp_size == dp_rank


@pytest.mark.parametrize("drawn", ["first", "last"])
def test_the_first_and_the_last_room_are_within_bounds(
    monkeypatch: pytest.MonkeyPatch, drawn: str
) -> None:
    def draw(below: int) -> int:
        return 0 if drawn == "first" else below - 1

    monkeypatch.setattr("secrets.randbelow", draw)
    for dp_size in (1, 2, 3, 7, 8, 1000, 1024):
        for dp_rank in {0, 1 % dp_size, dp_size // 2, dp_size - 1}:
            room = members(dp_rank=dp_rank, dp_size=dp_size)["bootstrap_room"]
            assert room % dp_size == dp_rank
            if drawn == "first":
                assert room == dp_rank
            else:
                # One more step would leave the range.
                assert 2**63 - dp_size <= room < 2**63


def test_no_two_requests_meet_in_one_room() -> None:
    rooms = Counter(members(dp_rank=1, dp_size=2)["bootstrap_room"] for _ in range(2000))
    assert len(rooms) == 2000
    # Half of them lie in the upper half: 1000, and 120 are over five standard deviations.
    assert 880 < sum(room >= 2**62 for room in rooms) < 1120


def test_every_prompt_of_a_batch_has_a_room_of_its_own() -> None:
    found = members(port=None, dp_rank=1, dp_size=4, prompts=3)
    assert found["bootstrap_host"] == [HOST] * 3
    assert found["bootstrap_port"] == [None] * 3
    assert len(set(found["bootstrap_room"])) == 3


# -- host and port


@pytest.mark.parametrize("port", [None, 1, 8998, 65535])
def test_a_port_that_is_not_known_is_null(port: int | None) -> None:
    found = members(port=port)
    assert (found["bootstrap_host"], found["bootstrap_port"]) == (HOST, port)


@pytest.mark.parametrize("host", ["2001:db8::1", "prefill-0.prefill.svc", "::1"])
def test_the_host_is_that_of_the_url_without_brackets(host: str) -> None:
    assert members(host)["bootstrap_host"] == host


# -- batches


@pytest.mark.parametrize(
    ("body", "prompts"),
    [
        ({"text": "a"}, None),
        ({"text": ["a"]}, 1),
        ({"text": ["a", "b", "c"]}, 3),
        ({"text": []}, None),
        ({"text": None}, None),
        ({"text": 1}, None),
        ({}, None),
        ({"input_ids": [1, 2, 3]}, None),
        ({"input_ids": [[1, 2], [3]]}, 2),
        ({"input_ids": [[]]}, 1),
        ({"input_ids": []}, None),
        ({"input_ids": "x"}, None),
        ({"text": None, "input_ids": [[1], [2]]}, 2),
        ({"text": ["a", "b"], "input_ids": [[1]]}, 2),
        ({"text": ["a"] * 4096}, 4096),
        # The field of the other path.
        ({"text": "a", "prompt": ["a", "b"]}, None),
    ],
)
def test_only_a_list_of_prompts_is_a_batch(body: dict[str, Any], prompts: int | None) -> None:
    assert prompts_in("/generate", **body) == prompts


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", None),
        (None, None),
        ([], None),
        (["a"], 1),
        (["a", "b"], 2),
        ([1, 2, 3], None),
        ([[1, 2], [3]], 2),
        ([[1, 2, 3]], 1),
        (["a"] * 4096, 4096),
    ],
)
def test_the_prompts_of_a_completion_are_in_another_field(prompt: Any, prompts: int | None) -> None:
    found = prompts_in("/v1/completions", prompt=prompt, text=["x"] * 7, input_ids=[[1]] * 7)
    assert found == prompts


def test_a_chat_is_never_a_batch() -> None:
    body: dict[str, Any] = {"messages": [{}, {}], "prompt": ["a", "b"], "text": ["a", "b"]}
    assert prompts_in("/v1/chat/completions", **body) is None


def test_a_query_in_the_path_makes_no_difference() -> None:
    assert prompts_in("/generate?x=1", text=["a", "b"]) == 2


# -- vLLM


@pytest.mark.parametrize(
    "params",
    [
        b'{"remote_block_ids":[1,2],"remote_port":5600}',
        b'{ "x" : 1.50e+3 , "y":9007199254740993 }',
        b'{"nested":{"}":"]"},"\\u00e9":"\xc3\xa9"}',
        b"{}",
    ],
)
def test_the_handle_to_the_cache_is_passed_on_byte_for_byte(params: bytes) -> None:
    answer = b'{"id":"x","kv_transfer_params": %b ,"choices":[]}' % params
    assert kv_decode_members(answer) == b'"kv_transfer_params":' + params


def test_the_last_of_two_handles_counts_as_for_every_parser() -> None:
    answer = b'{"kv_transfer_params":{"a":1},"kv_transfer_params":{"a":2}}'
    assert kv_decode_members(answer) == b'"kv_transfer_params":{"a":2}'


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{}",
        b'{"kv_transfer_params":null}',
        b'{"kv_transfer_params":"x"}',
        b'{"kv_transfer_params":[{}]}',
        b'{"kv_transfer_params":1}',
        b'{"kv_transfer_params":true}',
        b'{"other":{"kv_transfer_params":{}}}',
        b'{"kv_transfer_params":{"a":1}',  # cut
        b'[{"kv_transfer_params":{}}]',
        b'"kv_transfer_params"',
        b"null",
        b"Internal Server Error",
        b"\xff\xfe",
        b'{"a":' + b"[" * 100_000,
    ],
    ids=lambda answer: repr(answer[:40]),
)
def test_an_answer_without_a_handle_has_nothing_for_decode(answer: bytes) -> None:
    assert kv_decode_members(answer) is None


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_answer_raises(answer: bytes) -> None:
    assert kv_decode_members(answer) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), _JSON), st.dictionaries(st.text(), _JSON))
def test_the_decode_worker_reads_the_handle_that_was_passed_on(
    params: dict[str, Any], body: dict[str, Any]
) -> None:
    found = kv_decode_members(json.dumps({"kv_transfer_params": params}).encode())
    assert found is not None
    merged = json.loads(with_members(json.dumps(body).encode(), found))
    assert merged == body | {"kv_transfer_params": params}


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_too_many_prompts_are_refused(path: str) -> None:
    prompts = ["a"] * 4097
    with pytest.raises(RouterError) as caught:
        prompts_in(path, text=prompts, prompt=prompts)
    assert (caught.value.status, caught.value.code) == (400, "bad_request")


def test_an_answer_that_is_not_utf_8_is_not_passed_on() -> None:
    assert kv_decode_members(b'{"kv_transfer_params":{"a":"\xff"}}') is None
