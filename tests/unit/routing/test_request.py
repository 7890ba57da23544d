"""Paths and bodies are parsed to a request, or to an error that does not quote them."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.engines.engine import DEFAULT_ENGINE
from extproc.errors import RouterError
from extproc.routing.request import (
    MODELS_PATH,
    ClientHeaders,
    Endpoint,
    Request,
    find_endpoint,
    parse_body,
)
from extproc.tokenization.fields import ChatBody
from extproc.tokenization.prompts import read_prompt

SGLANG = DEFAULT_ENGINE.rules

POST_PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/generate",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/rerank",
    "/v1/score",
    "/v1/classify",
]
CHAT = find_endpoint("POST", "/v1/chat/completions")
GENERATE = find_endpoint("POST", "/generate")
DEEP = 100_000


def no_headers() -> ClientHeaders:
    return ClientHeaders("", ())


def parse_twice(endpoint: Endpoint, body: bytes | bytearray) -> list[Request | RouterError]:
    """The request without the fields of its prompt and with them, or the errors."""
    results: list[Request | RouterError] = []
    for limit in (0, len(body)):
        try:
            results.append(parse_body(endpoint, body, no_headers, prompt_max_bytes=limit))
        except RouterError as error:
            results.append(error)
    return results


def parse(body: Any, endpoint: Any = CHAT) -> Request:
    """The request, which is the same whether the prompt's fields are decoded or not."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    skipped, decoded = parse_twice(endpoint, raw)
    assert isinstance(skipped, Request)
    assert isinstance(decoded, Request)
    assert msgspec.structs.replace(decoded, fields=None) == skipped
    return skipped


def refused(body: Any, endpoint: Any = CHAT) -> str:
    """The message of the 400, which is the same whether the prompt's fields are decoded or not."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    skipped, decoded = parse_twice(endpoint, raw)
    assert isinstance(skipped, RouterError)
    assert isinstance(decoded, RouterError)
    for error in (skipped, decoded):
        assert (error.code, error.status) == ("bad_request", 400)
        assert error.__cause__ is None
    assert skipped.message == decoded.message
    return skipped.message


# -- paths


@pytest.mark.parametrize("path", POST_PATHS)
@pytest.mark.parametrize("suffix", ["", "?", "?a=b", "?a=/v1/models?x"])
def test_a_known_path_is_found_with_and_without_a_query(path: str, suffix: str) -> None:
    assert find_endpoint("POST", path + suffix).path == path


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_list_of_models_takes_get_and_head(method: str) -> None:
    assert find_endpoint(method, "/v1/models?limit=1").path == MODELS_PATH


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "?",
        "*",
        "/v1",
        "/v1/chat",
        "/v1/chat/completions/",
        "//v1/chat/completions",
        "/V1/chat/completions",
        "/v1/chat/completions#x",
        "/v1/chat/completions%3F",
        "/v1/models/m",
        "/server_info",
        "/flush_cache",
        "http://host/v1/models",
    ],
)
def test_another_path_is_not_found(path: str) -> None:
    with pytest.raises(RouterError) as caught:
        find_endpoint("POST", path)
    assert (caught.value.code, caught.value.status) == ("not_found", 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        *((method, "/generate", "POST") for method in ("GET", "PUT", "DELETE", "", "post")),
        *((method, MODELS_PATH, "GET") for method in ("POST", "DELETE", "get")),
    ],
)
def test_another_method_gets_the_allowed_methods(method: str, path: str, allowed: str) -> None:
    with pytest.raises(RouterError) as caught:
        find_endpoint(method, path)
    assert (caught.value.code, caught.value.status) == ("method_not_allowed", 405)
    assert allowed in dict(caught.value.headers)["allow"].split(", ")


# -- model and stream


@pytest.mark.parametrize("path", POST_PATHS)
def test_model_and_stream_are_read_on_every_path(path: str) -> None:
    endpoint = find_endpoint("POST", path)
    body = {"messages": [{"role": "user", "content": "hi"}], "model": "m", "stream": True}
    parsed = parse(body, endpoint)
    assert parsed == Request(endpoint, "m", True, parsed.body, no_headers)
    assert json.loads(parsed.body) == body


@pytest.mark.parametrize("path", POST_PATHS)
@pytest.mark.parametrize("body", [{}, {"model": None}, {"prompt": "x"}])
def test_the_model_may_be_missing_only_where_engines_need_no_model(
    path: str, body: dict[str, Any]
) -> None:
    endpoint = find_endpoint("POST", path)
    if path == "/generate":
        assert parse(body, endpoint).model is None
    else:
        assert "`model`" in refused(body, endpoint)


@pytest.mark.parametrize("endpoint", [CHAT, GENERATE], ids=["chat", "generate"])
@pytest.mark.parametrize("model", ["", 5, 1.5, True, False, {}, {"id": "m"}, [], ["m"]])
def test_a_model_that_is_not_a_name_is_refused(endpoint: Any, model: object) -> None:
    assert "`model`" in refused({"model": model}, endpoint)


@pytest.mark.parametrize(
    ("stream", "expected"), [(True, True), (False, False), (None, False), ("absent", False)]
)
def test_stream_is_false_unless_it_is_true(stream: object, expected: bool) -> None:
    body = {"model": "m"} if stream == "absent" else {"model": "m", "stream": stream}
    assert parse(body).stream is expected


@pytest.mark.parametrize("stream", [0, 1, 1.0, "true", "", [], [True], {}])
def test_a_stream_that_is_not_a_boolean_is_refused(stream: object) -> None:
    assert "`stream`" in refused({"model": "m", "stream": stream})


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", "模型", "a" * 10, "m:lora", " m ", "m\n"])
def test_a_model_name_is_not_changed(model: str) -> None:
    assert parse({"model": model}).model == model


def test_the_last_of_duplicate_keys_counts_as_in_the_engine() -> None:
    body = b'{"model": "a", "stream": true, "model": "b", "stream": false}'
    assert parse(body) == Request(CHAT, "b", False, body, no_headers)
    assert json.loads(body)["model"] == "b"


def test_only_keys_of_the_top_level_count() -> None:
    assert "missing" in refused({"messages": [{"model": "m"}], "extra": {"model": "m"}})


# -- bodies


@pytest.mark.parametrize("body", [b"[]", b"null", b"5", b'"m"', b"true", b'[{"model": "m"}]'])
def test_a_body_that_is_not_an_object_is_refused(body: bytes) -> None:
    assert "object" in refused(body)


@pytest.mark.parametrize(
    "body",
    [
        b" ",
        b"{",
        b'{"model": "m"',
        b'{"model": "m",}',
        b'{"model": "m"} trailing',
        b'{"model": "m"}{"model": "n"}',
        b"{'model': 'm'}",
        b'{"model": "m", "x": NaN}',
        b'{"model": "m", "x": 01}',
        b'{"model": "m", "x": "\x01"}',
        '{"model": "m"}'.encode("utf-16"),
        b'{"model": "\xff"}',
        b'{"model": "m", "x": "\xff"}',
        b'{"model": "m", "\xc3": 1}',
        b'{"model": "\\ud800"}',
        b"model=m&stream=true",
        b"\x00",
    ],
    ids=lambda body: repr(body)[:32],
)
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    assert "JSON" in refused(body)


@pytest.mark.parametrize(
    "value", [b"NaN", b"-NaN", b"Infinity", b"-Infinity", b"[1, NaN]", b'{"a": -Infinity }']
)
def test_a_number_that_json_does_not_have_is_named(value: bytes) -> None:
    for body in (b'{"x": %s, "model": "m"}', b'{"model": "m", "x":%s}', b'{"y":"NaN", "x": %s}'):
        assert refused(body % value).endswith("it has NaN or Infinity")
    assert "NaN" not in refused(b'{"model": "NaN", "x": oops}')


@pytest.mark.parametrize(
    "text",
    [
        b"\\ud800",
        b"\\uD83D",
        b"\\udc00",
        b"\\ud83d\\ud83d",
        b"a\\ud83d b",
        b"\\ud83d\\n",
        b"\xed\xa0\x80",
        b"\xed\xb0\x80",
    ],
)
def test_a_lone_surrogate_is_named(text: bytes) -> None:
    for body in (
        b'{"model": "m", "x": "%s"}',
        b'{"x": ["%s"], "model": "m"}',
        b'{"%s": 1, "model": "m"}',
        b'{"model": "%s"}',
        b'{"model": "m", "messages": [{"role": "user", "content": "%s and more of it"}]}',
    ):
        assert "lone surrogate" in refused(body % text)


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert parse(b'{"model": "m", "x": "\\ud83d\\ude00"}').model == "m"


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_byte_order_mark_is_accepted_and_removed(kind: Any) -> None:
    body = kind(b'\xef\xbb\xbf{"model": "m", "x": "\xc3\xa9"}')
    for request in parse_twice(CHAT, body):
        assert isinstance(request, Request)
        assert (request.model, request.body) == ("m", body[3:])


@pytest.mark.parametrize("body", [b"", bytearray()])
def test_an_empty_body_is_refused(body: bytes) -> None:
    for error in parse_twice(CHAT, body):
        assert isinstance(error, RouterError)
        assert error.code == "bad_request"


@pytest.mark.parametrize(
    "body",
    [
        b'{"x": ' + b"[" * DEEP + b"]" * DEEP + b', "model": "m"}',
        b'{"x": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b', "model": "m"}',
        b'{"model": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"model": ' + b"[" * DEEP,
        b"[" * DEEP,
    ],
    ids=["skipped", "skipped-objects", "model", "model-open", "top"],
)
def test_deep_nesting_is_refused(body: bytes) -> None:
    refused(body)


@pytest.mark.parametrize(
    "number", [b"1e999", b"-1e999", b"9" * 5000, b"0." + b"1" * 5000], ids=lambda n: repr(n[:8])
)
def test_huge_numbers_are_skipped_but_refused_as_model_or_stream(number: bytes) -> None:
    assert parse(b'{"seed": ' + number + b', "model": "m"}').model == "m"
    assert "`model`" in refused(b'{"model": ' + number + b"}")
    assert "`stream`" in refused(b'{"model": "m", "stream": ' + number + b"}")


def test_a_model_of_a_megabyte_is_still_a_name() -> None:
    name = "x" * 1_000_000
    assert parse({"model": name}).model == name


def test_a_body_may_be_a_bytearray() -> None:
    body = bytearray('{"prompt": "größe", "model": "m"}'.encode())
    for request in parse_twice(CHAT, body):
        assert isinstance(request, Request)
        assert request.model == "m"


# -- the fields of the prompt

BODY = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'


def parse_with_limit(body: bytes, limit: int, path: str = "/v1/chat/completions") -> Request:
    return parse_body(find_endpoint("POST", path), body, no_headers, prompt_max_bytes=limit)


def test_the_prompt_is_decoded_with_the_model_up_to_the_limit() -> None:
    fields = parse_with_limit(BODY, len(BODY)).fields
    assert isinstance(fields, ChatBody)
    assert fields.messages == [{"role": "user", "content": "hi"}]


def test_the_prompt_of_a_body_over_the_limit_is_not_decoded() -> None:
    for limit in (0, len(BODY) - 1):
        request = parse_with_limit(BODY, limit)
        assert (request.model, request.fields) == ("m", None)


def test_the_decoded_fields_are_given_once_and_not_kept() -> None:
    request = parse_with_limit(BODY, len(BODY))
    assert request.take_fields() is not None
    assert request.take_fields() is None


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/score", "/v1/classify"])
def test_an_endpoint_without_a_known_prompt_is_parsed_without_its_fields(path: str) -> None:
    request = parse_with_limit(BODY, len(BODY), path)
    assert (request.model, request.fields) == ("m", None)


@pytest.mark.parametrize(
    "messages", [b'[{"content": 1e999}]', b"[-1e999]"], ids=["number", "negative-number"]
)
def test_a_prompt_that_cannot_be_decoded_is_routed_without_its_fields(messages: bytes) -> None:
    body = b'{"messages": ' + messages + b', "model": "m", "stream": true}'
    request = parse_with_limit(body, len(body))
    assert (request.model, request.stream, request.fields) == ("m", True, None)
    assert read_prompt(SGLANG, CHAT.path, body).reason == "malformed"


_SECRET = "s3cretprompt"
_JSONISH = st.text(alphabet='{}[]":,\\truefalsn0123456789.eE-+ \n' + "\u00e9\ud800", max_size=60)


def error_of(endpoint: Endpoint, body: bytes) -> RouterError | None:
    """Our error for the body, if any; another error is a test's failure."""
    skipped, decoded = parse_twice(endpoint, body)
    if isinstance(skipped, RouterError):
        assert isinstance(decoded, RouterError)
        assert (skipped.status, skipped.message) == (decoded.status, decoded.message)
        return skipped
    assert isinstance(decoded, Request)
    assert decoded.model == skipped.model
    assert skipped.model is None or skipped.model
    return None


@given(st.binary(max_size=80) | _JSONISH.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_give_a_request_or_a_router_error(body: bytes) -> None:
    for endpoint in (CHAT, GENERATE):
        error = error_of(endpoint, body)
        assert error is None or error.status == 400


@given(
    prefix=st.binary(max_size=12),
    suffix=st.binary(max_size=12),
    template=st.sampled_from(
        [
            b'{"model": %s}',
            b'{"model": "m", "stream": %s}',
            b'{"messages": %s}',
            b"%s",
            b'{"%s": 1}',
        ]
    ),
    quoted=st.booleans(),
)
def test_an_error_does_not_quote_the_body(
    prefix: bytes, suffix: bytes, template: bytes, quoted: bool
) -> None:
    secret = _SECRET.encode()
    inner = prefix + (b'{"a": "%s"}' % secret if quoted else secret) + suffix
    if error := error_of(CHAT, template % inner):
        texts = [error.message, str(error), repr(error.headers), repr(error.__cause__)]
        assert not any(_SECRET in text for text in texts)
