"""How a disaggregated worker reads the bootstrap fields of a body."""

from typing import Any

import pytest

from extproc.simulator.settings import SimulatorSettings

from .clients import CHAT, Launch, chat
from .pd_clients import COMPLETIONS, GENERATE, sided

FAKE = "2.2.2.2"


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat()),
        (COMPLETIONS, {"prompt": "a"}),
        (GENERATE, {"text": "a"}),
        (GENERATE, {"text": ["a", "b"]}),
        ("/v1/messages", chat(max_tokens=1)),
        ("/v1/responses", {"input": "a"}),
    ],
)
async def test_a_room_is_needed(launch: Launch, mode: str, path: str, body: Any) -> None:
    worker = await launch(sided(mode))
    for more in ({}, {"bootstrap_room": None}):
        status, answer = await worker.post(path, {"bootstrap_host": FAKE, **body, **more})
        assert status == 400
        assert (
            answer["error"]["message"] == "Disaggregated request received without bootstrap room id"
        )
    stats = await worker.stats()
    assert (stats["rooms"], stats["failed"]) == (0, 2)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize(
    "fields",
    [
        {"bootstrap_room": -1},
        {"bootstrap_room": 2**63},
        {"bootstrap_room": 2**64},
        {"bootstrap_room": 1.5},
        {"bootstrap_room": "1"},
        {"bootstrap_room": True},
        {"bootstrap_room": [1]},
        {"bootstrap_host": 5},
        {"bootstrap_host": [FAKE]},
        {"bootstrap_port": "1"},
        {"bootstrap_port": 65_536},
        {"bootstrap_port": -1},
    ],
)
async def test_fields_of_a_wrong_kind(launch: Launch, mode: str, fields: dict[str, Any]) -> None:
    worker = await launch(sided(mode))
    good = {"bootstrap_host": FAKE, "bootstrap_port": None, "bootstrap_room": 1}
    for path, body in ((GENERATE, {"text": "a"}), (CHAT, chat())):
        status, answer = await worker.post(path, body | good | fields)
        assert status == 400, answer
        (name,) = fields
        assert name in answer["error"]["message"]


@pytest.mark.parametrize("rank", [-1, "0", [0]])
async def test_a_wrong_rank_of_the_prefill(launch: Launch, rank: Any) -> None:
    worker = await launch(sided("decode"))
    fields = {"bootstrap_host": FAKE, "bootstrap_room": 1, "disagg_prefill_dp_rank": rank}
    assert (await worker.post(CHAT, chat() | fields))[0] == 400


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"bootstrap_room": 1}, 400),
        ({"bootstrap_room": [1]}, 400),
        ({"bootstrap_room": [1, 2, 3]}, 400),
        ({"bootstrap_room": [1, None]}, 400),
        ({"bootstrap_room": [1, "2"]}, 400),
        ({"bootstrap_room": [1, 2], "bootstrap_host": [FAKE]}, 400),
        ({"bootstrap_room": [1, 2], "bootstrap_port": [1]}, 400),
        ({"bootstrap_room": [1, 2], "bootstrap_port": [1, "2"]}, 400),
        ({"bootstrap_room": [1, 2]}, 200),
        (
            {"bootstrap_room": [1, 2], "bootstrap_host": [FAKE] * 2, "bootstrap_port": [1, None]},
            200,
        ),
    ],
)
@pytest.mark.parametrize("given", [{"text": ["a", "b"]}, {"input_ids": [[1], [2, 3]]}])
async def test_the_fields_of_a_batch(
    launch: Launch, given: dict[str, Any], fields: dict[str, Any], status: int
) -> None:
    worker = await launch(sided("prefill"))
    body = {"bootstrap_host": FAKE, **given, **fields}
    assert (await worker.post(GENERATE, body))[0] == status


@pytest.mark.parametrize("room", [1, [1]])
async def test_a_batch_of_one(launch: Launch, room: Any) -> None:
    worker = await launch(sided("prefill"))
    body = {"text": ["a"], "bootstrap_host": FAKE, "bootstrap_room": room}
    status, answer = await worker.post(GENERATE, body)
    assert (status, len(answer)) == (200, 1)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
async def test_the_fake_host_skips_the_transfer(launch: Launch, mode: str) -> None:
    worker = await launch(sided(mode))
    fields = {"bootstrap_host": FAKE, "bootstrap_room": 0, "max_tokens": 2}
    status, answer = await worker.post(CHAT, chat() | fields)
    tokens = {"prefill": 1, "decode": 2}[mode]
    assert (status, answer["usage"]["completion_tokens"]) == (200, tokens)
    stats = await worker.stats()
    assert stats["pd"] == {"transferred": 0, "timed_out": 0, "aborted": 0}


async def test_a_plain_worker_ignores_bootstrap_fields(launch: Launch) -> None:
    worker = await launch(SimulatorSettings(decode_milliseconds_per_token=0))
    fields = {"bootstrap_host": 5, "bootstrap_port": "x", "bootstrap_room": [1]}
    status, answer = await worker.post(CHAT, chat(max_tokens=2) | fields)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 2)
    (request,) = (await worker.stats())["requests"]
    assert {name: request[name] for name in fields} == fields
    assert request["role"] == "null"


@pytest.mark.parametrize("mode", ["prefill", "decode"])
async def test_paths_without_generation_need_no_room(launch: Launch, mode: str) -> None:
    worker = await launch(sided(mode))
    assert (await worker.get("/v1/models"))[0] == 200
    assert (await worker.post("/v1/embeddings", {"input": "a"}))[0] == 200
    assert (await worker.post("/v1/rerank", {"query": "a", "documents": ["b"]}))[0] == 200
