"""Requests that are large, compressed or old-fashioned get their answer, over every protocol."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import pytest
import zstandard

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running
from tests.e2e.pd_fleet import pd_stack
from tests.e2e.raw_http import completion, port_of, post

MEBIBYTE = 1024 * 1024
LIMIT_BYTES = 4 * MEBIBYTE
FAST = {"prefill_tokens_per_second": 1e9}
LIMITED = {"server": {"max_body_bytes": LIMIT_BYTES}}
CHAT_PATH = "/v1/chat/completions"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def gzip(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip,
    "br": lambda data: brotli.compress(data, quality=5),
    "zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
async def test_a_body_may_have_the_size_that_is_configured(launch: Launch, version: str) -> None:
    running = await launch(1, worker=FAST, settings=LIMITED)
    port, path = port_of(running), "/v1/completions"
    answer = await post(port, path, completion(LIMIT_BYTES), version=version)
    assert answer.status == 200, answer.body
    # The service refuses the first of these, Envoy the second.
    for size in (LIMIT_BYTES + 1, 2 * LIMIT_BYTES):
        answer = await post(port, path, completion(size), version=version)
        assert answer.status == 413
        assert answer.headers["x-router-error-code"] == "payload_too_large"
        assert answer.json()["error"]["code"] == "payload_too_large"
    (request,) = await running.fleet.requests()
    assert request["body_bytes"] == LIMIT_BYTES


async def test_http_1_0_is_answered(launch: Launch) -> None:
    running = await launch(1)
    for headers in ({}, {"host": "api"}):
        for stream in (False, True):
            body = json.dumps(CHAT | {"stream": stream}).encode()
            answer = await post(
                port_of(running), CHAT_PATH, body, version="HTTP/1.0", headers=headers
            )
            assert answer.status == 200
            assert b"[DONE]" in answer.body if stream else answer.json()["choices"]
    assert len(await running.fleet.requests()) == 4


async def test_compressed_bodies_reach_workers_decompressed(launch: Launch) -> None:
    running = await launch(1, worker=FAST)
    words = " ".join(map(str, range(30_000)))
    body = json.dumps({"model": "m", "prompt": words, "max_tokens": 2}).encode()
    for name, compress in ENCODINGS.items():
        headers = {"content-encoding": name, "accept-encoding": "identity"}
        for version in ("HTTP/1.1", "HTTP/2"):
            answer = await post(
                port_of(running),
                "/v1/completions",
                compress(body),
                version=version,
                headers=headers,
            )
            assert answer.status == 200, (name, answer.body)
    requests = await running.fleet.requests()
    assert len(requests) == 2 * len(ENCODINGS)
    for request in requests:
        assert request["body_bytes"] == len(body)
        assert "content-encoding" not in request["headers"]
        assert request["headers"]["accept-encoding"] == "identity"


async def test_both_workers_of_a_pair_get_a_compressed_body_as_json(tmp_path: Path) -> None:
    async with pd_stack(tmp_path) as running:
        body = gzip(json.dumps(CHAT).encode())
        answer = await post(port_of(running), CHAT_PATH, body, headers={"content-encoding": "gzip"})
        assert answer.status == 200, answer.body
        (prefill,) = await running.legs(running.prefills)
        (decode,) = await running.legs(running.decodes)
        assert prefill["bootstrap_room"] == decode["bootstrap_room"] is not None
        assert prefill["body_bytes"] == decode["body_bytes"]
        await running.at_rest()


async def test_an_encoding_that_is_not_decoded_is_named(launch: Launch) -> None:
    running = await launch(1)
    body = gzip(json.dumps(CHAT).encode())
    for name in ("deflate", "snappy, gzip"):
        answer = await post(port_of(running), CHAT_PATH, body, headers={"content-encoding": name})
        assert answer.status == 415
        assert answer.headers["x-router-error-code"] == "unsupported_content_encoding"
        assert name.partition(",")[0] in answer.json()["error"]["message"]
    plain = json.dumps(CHAT).encode()
    headers = {"content-encoding": "identity"}
    assert (await post(port_of(running), CHAT_PATH, plain, headers=headers)).status == 200
    assert len(await running.fleet.requests()) == 1


async def test_a_bomb_is_refused_and_the_gateway_lives(launch: Launch) -> None:
    running = await launch(1, settings=LIMITED)
    bomb = b'{"model":"m","prompt":"' + b"x" * (64 * MEBIBYTE)
    for name, compress in ENCODINGS.items():
        sent = compress(bomb)
        for version in ("HTTP/1.1", "HTTP/2"):
            answer = await post(
                port_of(running),
                "/v1/completions",
                sent,
                version=version,
                headers={"content-encoding": name},
            )
            # Envoy cuts a body at the ratio, or ends it at the limit of its buffer.
            assert answer.status in (400, 413), name
    async with running.chat() as response:
        assert response.status == 200
    assert len(await running.fleet.requests()) == 1


async def test_a_body_that_is_not_what_its_encoding_says_is_refused(launch: Launch) -> None:
    running = await launch(1)
    body = json.dumps(CHAT).encode()
    for name, compress in ENCODINGS.items():
        whole = compress(body)
        for sent in (body, whole[: len(whole) // 2]):
            headers = {"content-encoding": name}
            answer = await post(port_of(running), CHAT_PATH, sent, headers=headers)
            assert answer.status == 400, (name, answer.body)
            assert answer.headers["x-router-error-code"] == "bad_request"
    assert await running.fleet.requests() == []


# -- errors


async def anthropic_error(running: Running, path: str, **fields: Any) -> tuple[int, str, str]:
    """Status, type and code of an error in Anthropic's shape, checked."""
    body = json.dumps({"model": "m", "max_tokens": 1, "messages": [], **fields}).encode()
    answer = await post(port_of(running), path, body)
    error = answer.json()
    assert set(error) == {"type", "error", "request_id"}, error
    assert error["type"] == "error"
    assert error["request_id"] == answer.headers["x-request-id"]
    assert set(error["error"]) == {"type", "code", "message"}
    assert answer.headers["x-router-error-code"] == error["error"]["code"]
    assert ("retry-after" in answer.headers) == (answer.status == 503)
    return answer.status, error["error"]["type"], error["error"]["code"]


async def test_errors_on_messages_have_the_shape_of_anthropics_api(launch: Launch) -> None:
    # Two models, so that Envoy does not fail open.
    running = await launch(1, models=("m", "other"), settings=LIMITED)
    path = "/v1/messages"
    expected: list[tuple[str, dict[str, Any], tuple[int, str, str]]] = [
        (path, {"model": "x"}, (404, "not_found_error", "model_not_found")),
        (f"{path}?beta=true", {"model": 5}, (400, "invalid_request_error", "bad_request")),
        (f"{path}/batches", {}, (404, "not_found_error", "not_found")),
        (path, {"system": "x" * LIMIT_BYTES}, (413, "request_too_large", "payload_too_large")),
        # From Envoy.
        (path, {"system": "x" * 2 * LIMIT_BYTES}, (413, "request_too_large", "payload_too_large")),
    ]
    for where, fields, error in expected:
        assert await anthropic_error(running, where, **fields) == error
    await running.fleet.workers[0].stop()
    assert await anthropic_error(running, path) == (
        503,
        "overloaded_error",
        "upstream_unreachable",
    )
    await running.stack.service.stop()

    async def bypassed() -> bool:
        return (await anthropic_error(running, path))[2] == "router_unavailable"

    await wait_until(bypassed, "Envoy bypasses the service")
    # Other paths keep the envelope of the OpenAI API.
    async with running.chat() as response:
        assert await running.error(response) == (503, "router_unavailable")


@pytest.mark.parametrize("debug", [False, True])
async def test_a_workers_own_503_says_when_to_retry(launch: Launch, debug: bool) -> None:
    running = await launch(1, settings={"observability": {"debug_headers": debug}})
    headers = {"x-extproc-debug": "true"}
    for fault, seconds in (("status=503", "1"), ("retry-after=7", "7")):
        async with running.chat(fault=fault, headers=headers) as response:
            assert response.status == 503
            assert response.headers["retry-after"] == seconds
            assert ("x-extproc-worker" in response.headers) is debug
    async with running.chat(fault="status=500", headers=headers) as response:
        assert "retry-after" not in response.headers
