"""Reads what routing needs from the path and the body of a request.

A body is decoded once. The JSON parser skips all other fields without building objects, and the
body goes to the engine unchanged, unless it has members by which a client would steer the engine.
A parser's own error text never reaches a client, since it can quote the body.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import UNSET, Raw, Struct

from extproc.errors import (
    bad_request,
    body_required,
    method_not_allowed,
    not_found,
)
from extproc.routing.json_faults import json_fault
from extproc.routing.json_members import without_steering
from extproc.routing.subset import Subset
from extproc.steering import SteeringMembers, is_steered
from extproc.tokenization.fields import BodyFields, decode_fields

__all__ = [
    "CHAT_PATH",
    "DETOKENIZE_PATH",
    "ENDPOINT_PATHS",
    "GENERATE_PATH",
    "MESSAGES_PATH",
    "MODELS_PATH",
    "RESPONSES_PATH",
    "TOKENIZE_PATH",
    "ClientHeaders",
    "Endpoint",
    "Request",
    "find_endpoint",
    "parse_body",
]


_NULL: Final = Raw(b"null")
_UTF8_BOM: Final = b"\xef\xbb\xbf"


class Endpoint(Struct, frozen=True, kw_only=True):
    """One API path. `path` is also its label in metrics.

    `answered_locally`: this service answers it itself, without a worker. `generates`: a prefill
    and a decode worker can serve it together, by fields added to its body.
    """

    path: str
    methods: tuple[str, ...] = ("POST",)
    model_optional: bool = False
    answered_locally: bool = False
    generates: bool = False


class ClientHeaders(NamedTuple):
    """The `:path` and the headers of a client's request, for a request made on its behalf."""

    path: str
    headers: tuple[tuple[str, str], ...]
    request_id: str = ""


def _no_client_headers() -> ClientHeaders:
    return ClientHeaders("", ())


def _no_headers(names: frozenset[str]) -> Mapping[str, str]:
    return {}


class Request(Struct):
    """A request that can be routed.

    `model` is None where the body names no model: the only configured one is meant. `body` is
    what an engine may get, and is empty where the gateway does not send it. `client_headers`
    reads the headers when it is called, since that costs more than most decisions. `prompts` is
    the JSON of the field that can hold a batch of prompts, on the endpoints where prefill and
    decode workers serve batches.
    `subset` are the endpoints to which the gateway can send, None where it names no subset.
    `fields` are the decoded fields of the prompt, for `take_fields`. `read_headers` returns those
    of the named headers that the client has sent; it reads them like `client_headers`.
    `lora_path` is the adapter of SGLang's member of that name. `adapter` is the LoRA adapter that
    is meant, by either name; the router finds it.
    """

    endpoint: Endpoint
    model: str | None
    stream: bool
    body: bytes | bytearray = b""
    client_headers: Callable[[], ClientHeaders] = _no_client_headers
    prompts: Raw = _NULL
    fields: BodyFields | None = None
    read_headers: Callable[[frozenset[str]], Mapping[str, str]] = _no_headers
    subset: Subset | None = None
    lora_path: str | None = None
    adapter: str | None = None

    def take_fields(self) -> BodyFields | None:
        """The decoded fields of the prompt; None if they were not decoded or already taken.

        The request does not keep them: the objects are several times as large as the body, and a
        request can wait for minutes while its prefill runs.
        """
        fields, self.fields = self.fields, None
        return fields


class _Head(SteeringMembers):
    """The fields of a body that is not decoded for its prompt.

    `model` and `stream` may be of any type, so that the text of a 400 can name the field. The
    prompts stay bytes, which costs no more than skipping them.
    """

    model: Any = UNSET
    stream: Any = None
    prompt: Raw = _NULL
    text: Raw = _NULL
    input_ids: Raw = _NULL
    lora_path: Any = None


MODELS_PATH: Final = "/v1/models"
TOKENIZE_PATH: Final = "/v1/tokenize"
DETOKENIZE_PATH: Final = "/v1/detokenize"
CHAT_PATH: Final = "/v1/chat/completions"
MESSAGES_PATH: Final = "/v1/messages"
RESPONSES_PATH: Final = "/v1/responses"
_COMPLETIONS_PATH: Final = "/v1/completions"
GENERATE_PATH: Final = "/generate"

_ENDPOINTS: Final = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint(path=CHAT_PATH, generates=True),
        Endpoint(path=_COMPLETIONS_PATH, generates=True),
        Endpoint(path=GENERATE_PATH, model_optional=True, generates=True),
        Endpoint(path="/v1/embeddings"),
        Endpoint(path=RESPONSES_PATH, generates=True),
        Endpoint(path=MESSAGES_PATH, generates=True),
        Endpoint(path="/v1/rerank"),
        Endpoint(path="/v1/score"),
        Endpoint(path="/v1/classify"),
        Endpoint(path=MODELS_PATH, methods=("GET", "HEAD"), answered_locally=True),
        Endpoint(path=TOKENIZE_PATH, model_optional=True, answered_locally=True),
        Endpoint(path=DETOKENIZE_PATH, model_optional=True, answered_locally=True),
    )
}
ENDPOINT_PATHS: Final = tuple(_ENDPOINTS)
_head_decoder: Final = msgspec.json.Decoder(_Head)


def find_endpoint(method: str, path: str) -> Endpoint:
    """The endpoint for a `:method` and a `:path` with or without a query.

    Raises RouterError 404 for another path and 405, with `allow`, for another method.
    """
    endpoint = _ENDPOINTS.get(path) or _ENDPOINTS.get(path.partition("?")[0])
    if endpoint is None:
        raise not_found()
    if method not in endpoint.methods:
        raise method_not_allowed(", ".join((*endpoint.methods, "OPTIONS")))
    return endpoint


def parse_body(
    endpoint: Endpoint,
    body: bytes | bytearray,
    client_headers: Callable[[], ClientHeaders],
    *,
    prompt_max_bytes: int,
) -> Request:
    """Decode the fields of a complete body that routing needs; raises RouterError 400.

    The fields of the prompt are decoded, too, in bodies of up to `prompt_max_bytes`; this is 0
    where no model's policy needs tokens. The request's body is `body` itself unless it must be
    changed: members by which an engine is steered and a byte order mark are removed.
    """
    if not body:
        raise body_required()
    if not body.isascii():
        body = _utf8(body)
    fields = None
    if len(body) <= prompt_max_bytes:
        fields = decode_fields(endpoint.path, body)
    # A body whose prompt cannot be decoded may still be routed.
    head = fields or _decode_head(body)
    model, stream = head.model, head.stream
    if type(model) is not str:
        if model is not UNSET and model is not None:
            raise bad_request("`model` must be a string")
        if not endpoint.model_optional:
            raise bad_request("`model` is missing")
        model = None
    elif not model:
        raise bad_request("`model` must not be empty")
    if stream is not None and type(stream) is not bool:
        raise bad_request("`stream` must be a boolean")
    if is_steered(head):
        body = without_steering(body)
    return Request(
        endpoint,
        model,
        stream is True,
        body,
        client_headers,
        _prompts(endpoint, head),
        fields,
        lora_path=head.lora_path if type(head.lora_path) is str else None,
    )


def _utf8(body: bytes | bytearray) -> bytes | bytearray:
    """The body without a byte order mark; raises RouterError 400 if it is not in UTF-8.

    The parser does not validate strings that it skips. An engine would refuse them, later and with
    a worse message.
    """
    if body.startswith(_UTF8_BOM):
        body = body[len(_UTF8_BOM) :]
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise bad_request(json_fault(body, error)) from None
    return body


def _decode_head(body: bytes | bytearray) -> _Head:
    try:
        return _head_decoder.decode(body)
    except msgspec.ValidationError:
        # Numbers that are too large are not a model or a flag either.
        if body.lstrip(b" \t\r\n").startswith(b"{"):
            raise bad_request("`model` must be a string and `stream` a boolean") from None
        raise body_required() from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_request(json_fault(body, error)) from None


def _prompts(endpoint: Endpoint, head: Any) -> Raw:
    prompts = _NULL
    if endpoint.path == _COMPLETIONS_PATH:
        prompts = head.prompt
    elif endpoint.path == GENERATE_PATH:
        prompts = head.text if bytes(memoryview(head.text)[:1]) == b"[" else head.input_ids
    return prompts
