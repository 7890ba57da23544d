"""Bodies, headers and events as bytes on the wire, in more detail than an SDK checks."""

import asyncio
from typing import Any

import pytest

from extproc.simulator.settings import SimulatorSettings

from .clients import CHAT, Launch, SimulatedWorker, chat, endless, events


async def streamed(worker: SimulatedWorker, path: str, body: dict[str, Any]) -> list[Any]:
    async with worker.session.post(path, json=body | {"stream": True}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        assert response.headers["x-simulator-port"] == str(worker.simulator.port)
        return events(await response.read())


async def test_a_chat_stream_in_full(worker: SimulatedWorker) -> None:
    payloads = await streamed(worker, CHAT, chat(max_tokens=2, rid="r-1"))
    assert payloads[-1] == "[DONE]"
    chunks = payloads[:-1]
    assert {chunk["id"] for chunk in chunks} == {"r-1"}
    assert {chunk["system_fingerprint"] for chunk in chunks} == {
        f"simulator-{worker.simulator.port}"
    }
    assert not any("usage" in chunk for chunk in chunks)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "a "},
        {"content": "token "},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 3 + ["length"]


async def test_headers_of_a_stream_wait_for_the_prefill(launch: Launch) -> None:
    worker = await launch(endless(prefill_tokens_per_second=0.001))
    task = asyncio.ensure_future(worker.session.post(CHAT, json=chat(stream=True)))
    await worker.until(running=1)
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done
    task.cancel()
    await worker.until(aborted=1, running=0)


async def test_several_choices_are_streamed_in_step(worker: SimulatedWorker) -> None:
    payloads = await streamed(worker, CHAT, chat(max_tokens=2, n=2))
    indices = [chunk["choices"][0]["index"] for chunk in payloads[:-1]]
    assert indices == [0, 1] * 4  # role, two tokens, finish reason


async def test_a_request_for_no_tokens_is_only_prefilled(worker: SimulatedWorker) -> None:
    payloads = await streamed(worker, "/v1/completions", {"prompt": "a", "max_tokens": 0})
    assert [chunk["choices"][0]["text"] for chunk in payloads[:-1]] == [""]
    assert (await worker.stats())["tokens_generated"] == 0


async def test_generate(worker: SimulatedWorker) -> None:
    body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2}, "rid": "r"}
    status, answer = await worker.post("/generate", body)
    assert status == 200
    assert answer["text"] == "a token "
    meta = answer["meta_info"]
    assert meta["id"] == "r"
    assert meta["finish_reason"] == {"type": "length", "length": 2}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, 2, 0)


async def test_generate_streams_the_text_so_far(worker: SimulatedWorker) -> None:
    body = {"text": "abcdefgh", "sampling_params": {"max_new_tokens": 2}}
    payloads = await streamed(worker, "/generate", body)
    assert [item["text"] for item in payloads[:-1]] == ["a ", "a token ", "a token "]
    assert payloads[-2]["meta_info"]["finish_reason"]["type"] == "length"
    assert payloads[-2]["meta_info"]["prompt_tokens"] == 8
    assert payloads[-1] == "[DONE]"


async def test_generate_answers_a_batch_with_a_list(worker: SimulatedWorker) -> None:
    body = {"text": ["a", "b"], "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 1}]}
    _, answer = await worker.post("/generate", body)
    assert [item["text"] for item in answer] == ["a ", "a "]
    payloads = await streamed(worker, "/generate", {"input_ids": [[1], [2]]})
    assert {item["index"] for item in payloads[:-1]} == {0, 1}


async def test_messages(worker: SimulatedWorker) -> None:
    body = chat("x" * 40, max_tokens=3, system="y" * 8)
    _, answer = await worker.post("/v1/messages", body)
    assert answer["content"][0]["text"] == "a token from "
    assert answer["stop_reason"] == "max_tokens"
    assert answer["usage"]["input_tokens"] == 67  # system, 8 y, user, 40 x, assistant
    payloads = await streamed(worker, "/v1/messages", body)
    kinds = [item["type"] for item in payloads]
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize(
    ("path", "body", "field", "expected"),
    [
        ("/v1/rerank", {"query": "q", "documents": ["a", "b"]}, None, 2),
        ("/v1/score", {"query": "q", "items": ["a", "b"]}, "scores", 2),
        ("/v1/classify", {"input": "a", "stream": True}, "data", 1),
        ("/v1/embeddings", {"input": [[1, 2], [3]]}, "data", 2),
    ],
)
async def test_apis_without_generation(
    worker: SimulatedWorker, path: str, body: dict[str, Any], field: str | None, expected: int
) -> None:
    status, answer = await worker.post(path, body)
    assert status == 200
    assert len(answer if field is None else answer[field]) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"messages": "hello"}',
        b'{"messages": [], "max_tokens": -1}',
        b'{"messages": [], "n": 0}',
        b'{"messages": [], "routed_dp_rank": 7}',
        b'{"messages": [], "unread": "\xff"}',
        b'{"messages": [{"content": "\xc3\x28"}]}',
    ],
)
async def test_a_bad_body_is_a_400_in_the_envelope(worker: SimulatedWorker, body: bytes) -> None:
    status, answer = await worker.post(CHAT, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["code"] == 400
    assert (await worker.stats())["failed"] == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": []}),
        ("/v1/completions", {"prompt": [[1], 2]}),
        ("/generate", {"sampling_params": {}}),
        ("/generate", {"text": []}),
    ],
)
async def test_an_invalid_prompt_is_a_400(
    worker: SimulatedWorker, path: str, body: dict[str, Any]
) -> None:
    status, _ = await worker.post(path, body)
    assert status == 400


async def test_an_unknown_model_is_a_404(worker: SimulatedWorker) -> None:
    status, answer = await worker.post(CHAT, chat(model="other"))
    assert (status, answer["error"]["code"]) == (404, 404)


async def test_unknown_paths_and_methods_are_answered_in_the_envelope(
    worker: SimulatedWorker,
) -> None:
    status, answer = await worker.get("/nowhere")
    assert (status, answer["error"]["type"]) == (404, "not_found_error")
    status, answer = await worker.get(CHAT)
    assert (status, answer["error"]["code"]) == (405, 405)


async def test_a_large_body_arrives_whole(worker: SimulatedWorker) -> None:
    status, answer = await worker.post(CHAT, chat("x" * 8_000_000, max_tokens=1))
    assert status == 200
    assert answer["usage"]["prompt_tokens"] == 8_000_013  # user and assistant too
    assert (await worker.stats())["requests"][0]["body_bytes"] > 8_000_000


async def test_a_body_over_the_limit_is_a_413(worker: SimulatedWorker) -> None:
    status, answer = await worker.post(CHAT, b" " * (64 * 1024 * 1024 + 1))
    assert (status, answer["error"]["code"]) == (413, 413)


async def test_only_health_is_open_with_an_api_key(launch: Launch) -> None:
    worker = await launch(SimulatorSettings(api_key="sécret", decode_milliseconds_per_token=0))
    for path in ("/health", "/health_generate"):
        assert (await worker.get(path))[0] == 200
    for path in ("/v1/models", "/server_info", "/simulator/stats"):
        status, answer = await worker.get(path)
        assert (status, answer["error"]["type"]) == (401, "authentication_error")
    assert (await worker.post(CHAT, chat(), headers={"authorization": "Bearer no"}))[0] == 401
    assert (await worker.post(CHAT, chat(), headers={"authorization": "Bearer sécret"}))[0] == 200
