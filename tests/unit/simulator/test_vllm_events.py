"""KV events of a worker like vLLM, in the form of vLLM 0.32."""

from typing import Any

from .clients import CHAT, Launch, SimulatedWorker, chat
from .kv_clients import Connect, publishing


def vllm(**fields: Any) -> Any:
    return publishing(engine="vllm", model="m", **fields)


async def completion(worker: SimulatedWorker, prompt: list[int], **fields: Any) -> Any:
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, **fields}
    status, answer = await worker.post("/v1/completions", body)
    assert status == 200
    return answer


async def test_a_prompt_is_stored_as_one_chain(launch: Launch, connect: Connect) -> None:
    worker = await launch(vllm())
    client = connect(worker)
    await completion(worker, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    (stored,) = (await client.replay())[-1].events
    hashes = stored.pop("block_hashes")
    assert len(hashes) == 2
    assert all(0 <= number < 1 << 64 for number in hashes)
    assert stored == {
        "type": "BlockStored",
        "parent_block_hash": None,
        "token_ids": [1, 2, 3, 4, 5, 6, 7, 8],
        "block_size": 4,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None, None],
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }


async def test_a_salt_is_in_the_first_block_alone(launch: Launch, connect: Connect) -> None:
    worker = await launch(vllm(lora=["sql"]))
    client = connect(worker)
    await completion(worker, [1, 2, 3, 4, 5, 6, 7, 8, 9], cache_salt="a")
    (stored,) = (await client.replay())[-1].events
    assert stored["extra_keys"] == [["a"], None]
    assert stored["lora_name"] is None
    assert "cache_salt" not in stored


async def test_an_adapter_is_in_every_block(launch: Launch, connect: Connect) -> None:
    worker = await launch(vllm(lora=["sql"]))
    client = connect(worker)
    await completion(worker, [1, 2, 3, 4, 5, 6, 7, 8, 9], model="sql", cache_salt="a")
    (stored,) = (await client.replay())[-1].events
    assert stored["lora_name"] == "sql"
    assert stored["lora_id"] == 1
    assert stored["extra_keys"] == [["sql", "a"], ["sql"]]


async def test_the_topic_is_that_of_the_settings(launch: Launch, connect: Connect) -> None:
    worker = await launch(vllm(kv_topic="kv"))
    client = connect(worker)
    await worker.post(CHAT, chat())
    assert await client.replay()
