"""The request path in every body mode: which worker is chosen, and exactly which replies."""

import json
from typing import Any

import grpc.aio
import pytest
from google.protobuf.json_format import MessageToDict

from extproc._protos import llm_extproc_pb2 as pb
from extproc.config.envoy import EnvoyConfig
from tests.protocol.exchange import (
    Service,
    destination,
    echoed,
    error,
    eventually,
    kind,
    llm_body,
    request_body,
    request_headers,
    request_trailers,
    serving,
    set_headers,
    stream,
)

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


@pytest.mark.parametrize("path", [*POST_PATHS, "/v1/chat/completions?beta=1"])
async def test_a_buffered_body_is_routed_in_the_reply_to_the_body(path: str) -> None:
    async with serving(Service(["m"], 2)) as service, stream(service) as envoy:
        await envoy.send(request_headers(path))
        first = await envoy.reply()
        assert first == pb.ProcessingResponse(request_headers=pb.HeadersResponse())
        await envoy.send(request_body(llm_body()))
        reply = await envoy.reply()
        assert kind(reply) == "request_body"
        assert destination(reply) == "10.0.0.1:8000"
        assert set_headers(reply) == {
            "x-extproc-cluster": "workers",
            "x-extproc-model": "m",
            "x-gateway-destination-endpoint": "10.0.0.1:8000",
            "x-envoy-max-retries": "0",
            "x-envoy-upstream-rq-timeout-ms": "300000",
        }
        assert not reply.request_body.response.HasField("body_mutation")
        assert MessageToDict(reply.dynamic_metadata)["extproc"] == {
            "model": "m",
            "policy": "round_robin",
            "reason": "next",
            "destination": "10.0.0.1:8000",
        }
        await envoy.no_reply()


async def test_a_streamed_answer_has_no_time_out() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(), request_body(llm_body(stream=True)))
        _, reply = await envoy.replies(2)
        assert "x-envoy-upstream-rq-timeout-ms" not in set_headers(reply)


async def test_a_gateway_that_announces_no_mode_is_taken_as_buffered() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(announce=False), request_body(llm_body()))
        first, second = await envoy.replies(2)
        assert (kind(first), kind(second)) == ("request_headers", "request_body")


async def test_buffered_partial_with_the_whole_body_is_routed() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(mode="BUFFERED_PARTIAL"), request_body(llm_body()))
        assert destination((await envoy.replies(2))[1]) == "10.0.0.1:8000"


async def test_buffered_partial_with_a_cut_body_says_that_the_buffer_is_too_small() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(
            request_headers(mode="BUFFERED_PARTIAL"), request_body(llm_body()[:20], end=False)
        )
        status, code, body = error((await envoy.replies(2))[1])
        assert (status, code) == (413, "payload_too_large")
        assert "buffer" in body["message"]


# Pieces of at most 62 000 bytes: 0 and 62 000 make one, 62 001 two, 125 000 three.
@pytest.mark.parametrize(
    ("size", "pieces"),
    [(200, 1), (61_000, 1), (62_000, 1), (62_001, 2), (63_000, 2), (125_000, 3)],
)
async def test_full_duplex_answers_headers_then_echoes_the_body(size: int, pieces: int) -> None:
    body = llm_body(pad="")
    body = llm_body(pad="x" * (size - len(body)))
    assert len(body) == size
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(mode="FULL_DUPLEX_STREAMED"))
        await envoy.no_reply()
        half = size // 2
        await envoy.send(request_body(body[:half], end=False))
        await envoy.no_reply()
        await envoy.send(request_body(body[half:], end=False), request_body(b""))
        headers, *echo = await envoy.replies(1 + pieces)
        assert kind(headers) == "request_headers"
        assert destination(headers) == "10.0.0.1:8000"
        assert {kind(reply) for reply in echo} == {"request_body"}
        data, ends = echoed(echo)
        assert data == body
        assert ends == [False] * (pieces - 1) + [True]
        await envoy.no_reply()


async def test_full_duplex_body_ended_by_trailers() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(
            request_headers(mode="FULL_DUPLEX_STREAMED"),
            request_body(llm_body(), end=False),
            request_trailers(),
        )
        headers, body, trailers = await envoy.replies(3)
        assert destination(headers) == "10.0.0.1:8000"
        assert echoed([body]) == (llm_body(), [False])
        assert kind(trailers) == "request_trailers"
        await envoy.no_reply()


async def test_streamed_without_waiting_holds_the_headers_back_until_the_body_is_complete() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        body = llm_body()
        await envoy.send(
            request_headers(mode="STREAMED", not_waiting=True), request_body(body[:9], end=False)
        )
        await envoy.no_reply()
        await envoy.send(request_body(body[9:]))
        headers, first, second = await envoy.replies(3)
        assert destination(headers) == "10.0.0.1:8000"
        assert (kind(first), kind(second)) == ("request_body", "request_body")
        await envoy.no_reply()


@pytest.mark.parametrize("mode", ["STREAMED", "NONE"])
async def test_without_a_visible_body_the_only_model_is_routed(mode: str) -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(mode=mode))
        reply = await envoy.reply()
        assert kind(reply) == "request_headers"
        assert destination(reply) == "10.0.0.1:8000"
        # Each piece of the body that comes afterwards gets one reply.
        body = llm_body()
        await envoy.send(request_body(body[:5], end=False), request_body(body[5:]))
        assert [kind(reply) for reply in await envoy.replies(2)] == ["request_body"] * 2
        await envoy.no_reply()


@pytest.mark.parametrize("mode", ["STREAMED", "NONE"])
async def test_without_a_visible_body_several_models_are_refused(mode: str) -> None:
    async with serving(Service(["m", "n"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(mode=mode))
        assert error(await envoy.reply())[:2] == (503, "body_mode_unsupported")


@pytest.mark.parametrize("mode", ["BUFFERED", "FULL_DUPLEX_STREAMED"])
async def test_a_second_end_of_stream_is_ignored(mode: str) -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(mode=mode), request_body(llm_body()))
        await envoy.replies(2)
        await envoy.send(request_body(b""), request_body(llm_body()))
        await envoy.no_reply()
        assert service.in_flight == 1


async def test_request_trailers_after_a_buffered_body_get_a_reply() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(), request_body(llm_body(), end=False), request_trailers())
        kinds = [kind(reply) for reply in await envoy.replies(3)]
        assert kinds == ["request_headers", "request_body", "request_trailers"]


async def test_trailers_without_a_body_are_a_request_without_a_body() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(), request_trailers())
        assert error((await envoy.replies(2))[1])[:2] == (400, "bad_request")


async def test_a_bad_buffered_body_before_trailers_is_not_reported_as_too_large() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(), request_body(b"{", end=False))
        assert error((await envoy.replies(2))[1])[:2] == (400, "bad_request")


async def test_messages_of_unknown_kind_and_a_second_first_message_get_no_reply() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(pb.ProcessingRequest(), request_headers(), request_headers())
        assert kind(await envoy.reply()) == "request_headers"
        await envoy.no_reply()


async def test_observability_mode_is_never_answered() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        message = request_headers()
        message.observability_mode = True
        await envoy.send(message)
        await envoy.no_reply()


async def test_raw_value_wins_over_value_and_value_is_a_fallback() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        message = request_headers()
        for header in message.request_headers.headers.headers:
            if header.key == ":path":
                header.value = "/nowhere"
            if header.key == ":method":
                header.key, header.value, header.raw_value = ":METHOD", "POST", b""
        await envoy.send(message)
        assert kind(await envoy.reply()) == "request_headers"


async def test_a_request_without_an_id_gets_a_new_one_in_header_and_envelope() -> None:
    async with serving(Service(["m"], 1)) as service:
        async with stream(service) as envoy:
            await envoy.send(request_headers(x_request_id=""), request_body(llm_body()))
            made = set_headers((await envoy.replies(2))[1])["x-request-id"]
            assert len(made) == 36
        async with stream(service) as envoy:
            await envoy.send(request_headers(x_request_id="a" * 500), request_body(b"{}"))
            body = error((await envoy.replies(2))[1])[2]
            assert len(body["request_id"]) == 36


@pytest.mark.parametrize("mode", ["BUFFERED", "FULL_DUPLEX_STREAMED"])
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"no healthy upstream", 400, "bad_request"),
        (b'{"prompt":"hello world"}', 400, "bad_request"),
        (b'{"model":7}', 400, "bad_request"),
        (b'{"model":"m","stream":"yes"}', 400, "bad_request"),
        (b'["m"]', 400, "bad_request"),
        (b"", 400, "bad_request"),
        (b'{"model":"m","prompt":"\xff\xfe"}', 400, "bad_request"),
        (b'{"model":"m","x":' + b"[" * 100_000, 400, "bad_request"),
        (llm_body("unknown"), 404, "model_not_found"),
        (llm_body("x" * 1_000_000), 404, "model_not_found"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_bad_bodies_are_answered_in_the_error_envelope(
    mode: str, body: bytes, status: int, code: str
) -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(mode=mode), request_body(body))
        replies = await envoy.replies(2 if mode == "BUFFERED" else 1)
        got_status, got_code, envelope = error(replies[-1])
        assert (got_status, got_code) == (status, code)
        assert envelope["request_id"] == "req-1"
        assert len(json.dumps(envelope)) < 1000
        await envoy.no_reply()
        assert service.in_flight == 0


async def test_generate_without_a_model_goes_to_the_only_one() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers("/generate"), request_body(b'{"text":"hi"}'))
        assert set_headers((await envoy.replies(2))[1])["x-extproc-model"] == "m"


async def test_generate_without_a_model_is_not_found_among_several() -> None:
    async with serving(Service(["m", "n"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers("/generate"), request_body(b'{"text":"hi"}'))
        assert error((await envoy.replies(2))[1])[:2] == (404, "model_not_found")


async def test_an_unknown_model_is_answered_before_the_health_of_workers_counts() -> None:
    async with serving(Service(["m"], 0)) as service:
        async with stream(service) as envoy:
            await envoy.send(request_headers(), request_body(llm_body("other")))
            assert error((await envoy.replies(2))[1])[0] == 404
        async with stream(service) as envoy:
            await envoy.send(request_headers(), request_body(llm_body("m")))
            assert error((await envoy.replies(2))[1])[:2] == (503, "no_healthy_workers")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/unknown", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("HEAD", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions", 400, "bad_request"),
        ("OPTIONS", "/v1/unknown", 404, "not_found"),
    ],
)
async def test_requests_without_a_body_that_cannot_be_served(
    method: str, path: str, status: int, code: str
) -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(path, method=method, end=True))
        reply = await envoy.reply()
        assert error(reply)[:2] == (status, code)
        assert ("allow" in set_headers(reply)) == (status == 405)


async def test_models_are_answered_without_a_worker() -> None:
    async with serving(Service(["m", "n"], 1)) as service:
        for method in ("GET", "HEAD"):
            async with stream(service) as envoy:
                await envoy.send(request_headers("/v1/models", method=method, end=True))
                immediate = (await envoy.reply()).immediate_response
                assert immediate.status.code == 200
                assert json.loads(immediate.body) == {"data": ["m", "n"]}


async def test_options_lists_the_methods() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(method="OPTIONS", end=True))
        reply = await envoy.reply()
        assert reply.immediate_response.status.code == 204
        assert set_headers(reply) == {"allow": "POST, OPTIONS"}


async def test_a_content_length_over_the_limit_is_refused_before_the_body() -> None:
    async with (
        serving(Service(["m"], 1, server={"max_body_bytes": 2048})) as service,
        stream(service) as envoy,
    ):
        await envoy.send(request_headers(content_length="2049"))
        assert error(await envoy.reply())[:2] == (413, "payload_too_large")


@pytest.mark.parametrize("mode", ["BUFFERED", "FULL_DUPLEX_STREAMED"])
async def test_a_body_over_the_limit_is_413_and_one_at_the_limit_is_routed(mode: str) -> None:
    empty = len(llm_body(pad=""))
    async with serving(Service(["m"], 1, server={"max_body_bytes": 2048})) as service:
        async with stream(service) as envoy:
            body = llm_body(pad="x" * (2048 - empty))
            await envoy.send(request_headers(mode=mode), request_body(body))
            replies = await envoy.replies(2)
            assert destination(replies[1 if mode == "BUFFERED" else 0])
        async with stream(service) as envoy:
            body = llm_body(pad="x" * (2049 - empty))
            await envoy.send(request_headers(mode=mode), request_body(body))
            replies = await envoy.replies(2 if mode == "BUFFERED" else 1)
            assert error(replies[-1])[:2] == (413, "payload_too_large")


async def test_names_of_headers_and_cluster_are_configurable() -> None:
    envoy_config = EnvoyConfig(
        cluster="outbound|8000||w", cluster_header="x-pool", model_header="x-model"
    )
    service = Service(["m"], 1, envoy=envoy_config, authorization="Bearer key")
    async with serving(service), stream(service) as envoy:
        await envoy.send(request_headers(), request_body(llm_body()))
        headers = set_headers((await envoy.replies(2))[1])
        assert headers["x-pool"] == "outbound|8000||w"
        assert headers["x-model"] == "m"
        assert headers["authorization"] == "Bearer key"


async def test_an_unknown_pass_is_refused() -> None:
    async with (
        serving(Service(["m"], 1)) as service,
        stream(service, metadata=(("x-extproc-pass", "prefill"),)) as envoy,
    ):
        assert (await envoy.ended()).name == "UNIMPLEMENTED"


async def test_bytes_that_do_not_parse_end_only_their_stream() -> None:
    async with serving(Service(["m"], 1)) as service:
        async with grpc.aio.insecure_channel(service.target) as channel:
            method: Any = channel.stream_stream(
                "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
            )
            call = method()
            await call.write(b"\xff\xff\xff\xff")
            assert (await call.code()).name == "INVALID_ARGUMENT"
        async with stream(service) as envoy:
            await envoy.send(request_headers(), request_body(llm_body()))
            assert destination((await envoy.replies(2))[1])
        await eventually(lambda: service.in_flight == 0)
