"""KV events, replay, load and their faults over real sockets."""

import asyncio
from typing import Any

import msgspec
import pytest

from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings

from .clients import CHAT, Launch, SimulatedWorker, chat
from .kv_clients import (
    CLEARED,
    Batch,
    Connect,
    batch,
    endless_fields,
    generate,
    publishing,
    received,
)


async def test_a_prompt_is_stored_as_one_chain(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing())
    client = connect(worker)
    await worker.post("/generate", generate([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    await worker.post("/generate", generate([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]))
    first, second, third = await client.replay()
    assert first == Batch(0, [CLEARED], 0)
    (stored,) = second.events
    hashes = stored.pop("block_hashes")
    assert len(hashes) == 2
    assert stored == {
        "type": "BlockStored",
        "parent_block_hash": None,
        "token_ids": [1, 2, 3, 4, 5, 6, 7, 8],
        "block_size": 4,
        "lora_id": None,
        "medium": "GPU",
    }
    (grown,) = third.events
    assert (grown["parent_block_hash"], grown["token_ids"]) == (hashes[-1], [9, 10, 11, 12])


async def test_live_events_and_replay_are_equal(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing())
    client = connect(worker)
    socket = await client.subscribed()
    await worker.post("/generate", generate([1, 2, 3, 4, 5]))
    topic, seq, payload = await received(socket)
    assert (topic, len(seq)) == (b"", 8)
    (last,) = await client.replay(int.from_bytes(seq, "big"))
    assert last == batch(seq, payload)
    assert await client.replay(last.seq + 1) == []


async def test_output_is_stored_at_the_end(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing())
    await worker.post("/v1/completions", {"prompt": "abcdef", "max_tokens": 6})
    _, prompt, output = await connect(worker).replay()
    assert bytes(prompt.events[0]["token_ids"]) == b"abcd"
    assert bytes(output.events[0]["token_ids"]) == b"efa toke"  # six of "a token from the …"


async def test_namespaces_are_named(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing(model="m"))
    await worker.post("/generate", generate([1, 2, 3, 4], cache_salt="tenant"))
    await worker.post("/generate", generate([1, 2, 3, 4], lora_path="one"))
    await worker.post("/generate", generate([1, 2, 3, 4], model="m:one"))
    assert (await worker.post("/generate", generate([1], model="m:")))[0] == 404
    _, salted, adapted = await connect(worker).replay()
    assert salted.events[0]["cache_salt"] == "tenant"
    assert adapted.events[0]["lora_name"] == "one"
    assert "cache_salt" not in adapted.events[0]


async def test_the_array_format_of_older_engines(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing(wire_format="array", max_total_num_tokens=4))
    await worker.post("/generate", generate([1, 2, 3, 4]))
    await worker.post("/generate", generate([5, 6, 7, 8], cache_salt="tenant"))
    cleared, stored, replaced = [item.events for item in await connect(worker).replay()]
    assert cleared == [["AllBlocksCleared"]]
    hashes = stored[0][1]
    assert stored == [["BlockStored", hashes, None, [1, 2, 3, 4], 4, None, "GPU"]]
    assert replaced[0] == ["BlockRemoved", hashes, "GPU"]
    assert replaced[1][7:] == [{"cache_salt": "tenant"}]


async def test_evicted_pages_go_to_the_host_and_come_back(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing(max_total_num_tokens=8, host_cache_tokens=8))
    first, other = [1, 2, 3, 4, 5, 6, 7, 8, 9], list(range(20, 28))
    for tokens in (first, other):
        await worker.post("/generate", generate(tokens))
    _, answer = await worker.post("/generate", generate(first))
    assert answer["meta_info"]["cached_tokens"] == 8
    batches = (await connect(worker).replay())[2:]
    kinds = [(item["type"], item["medium"]) for part in batches for item in part.events]
    demoted = [("BlockStored", "CPU_PINNED"), ("BlockRemoved", "GPU")]
    promoted = [("BlockStored", "GPU"), ("BlockRemoved", "CPU_PINNED")]
    assert kinds == [*demoted, ("BlockStored", "GPU"), *demoted, *promoted]


async def test_ranks_publish_on_ports_of_their_own(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing(dp_size=3))
    client = connect(worker)
    await worker.post("/generate", generate([1, 2, 3, 4], routed_dp_rank=2))
    counts = [[(item.rank, item.seq) for item in await client.replay(0, r)] for r in range(3)]
    assert counts == [[(0, 0)], [(1, 0)], [(2, 0), (2, 1)]]
    assert [(await client.load(rank))[5] for rank in range(3)] == [0, 1, 2]


async def test_server_info_names_the_ports(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing(dp_size=2))
    ports = connect(worker).ports
    _, info = await worker.get("/server_info")
    assert info["kv_events"] == {
        "publisher": "zmq",
        "endpoint_host": "127.0.0.1",
        "endpoint_port_base": ports.events,
        "topic": "",
        "block_size": 4,
        "dp_size": 2,
        "replay_endpoint_port_base": ports.replay,
        "load_endpoint_port_base": ports.load,
        "load_topic": "load",
    }


async def test_load_publishing_can_be_switched_off(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing(no_load_events=True))
    _, info = await worker.get("/server_info")
    assert not [name for name in info["kv_events"] if name.startswith("load")]
    await worker.post("/generate", generate([1, 2, 3, 4]))
    assert (await worker.post("/simulator/restart", {}))[0] == 200
    assert connect(worker).ports.load is None
    assert await connect(worker).replay() == [Batch(0, [CLEARED], 0)]


@pytest.mark.parametrize("name", ["EAGLE", "eagle3", "FROZEN_KV_MTP"])
async def test_an_engine_that_speculates_publishes_pairs(
    launch: Launch, connect: Connect, name: str
) -> None:
    worker = await launch(publishing(speculative_algorithm=name, page_size=2))
    _, info = await worker.get("/server_info")
    assert info["speculative_algorithm"] == name
    # Four pairs of prompt, and a fifth with the output: a page of two needs a token after it.
    await worker.post("/generate", generate([1, 2, 3, 4]))
    _, stored = await connect(worker).replay()
    (event,) = stored.events
    assert (event["token_ids"], event["block_size"]) == ([[1, 2], [2, 3]], 2)
    _, answer = await worker.post("/generate", generate([1, 2, 3, 4, 5, 6]))
    assert answer["meta_info"]["cached_tokens"] == 2
    grown = (await connect(worker).replay())[-1].events[0]
    assert grown["token_ids"] == [[3, 4], [4, 5]]
    assert grown["parent_block_hash"] == event["block_hashes"][-1]


async def test_pairs_go_on_into_the_output(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing(speculative_algorithm="EAGLE", page_size=2))
    await worker.post("/v1/completions", {"prompt": "ab", "max_tokens": 3})
    _, output = await connect(worker).replay()
    pairs = [bytes(pair) for pair in output.events[0]["token_ids"]]
    assert pairs == [b"ab", b"ba", b"a ", b" t"]  # the prompt and three of "a token …"


@pytest.mark.parametrize("name", ["NEXTN", "NGRAM", None])
async def test_other_engines_publish_tokens(
    launch: Launch, connect: Connect, name: str | None
) -> None:
    worker = await launch(publishing(speculative_algorithm=name))
    await worker.post("/generate", generate([1, 2, 3, 4]))
    _, stored = await connect(worker).replay()
    assert stored.events[0]["token_ids"] == [1, 2, 3, 4]


async def test_a_wildcard_host_is_published_as_one(launch: Launch) -> None:
    worker = await launch(publishing(host="0.0.0.0", no_replay=True))
    _, info = await worker.get("/server_info")
    assert info["kv_events"]["endpoint_host"] == "*"
    assert "replay_endpoint_port_base" not in info["kv_events"]


async def test_an_ipv6_host_is_served(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing(host="::"))
    assert await connect(worker).replay() == [Batch(0, [CLEARED], 0)]


async def test_a_taken_kv_port_is_an_error(launch: Launch, connect: Connect) -> None:
    ports = connect(await launch(publishing())).ports
    with pytest.raises(OSError, match="KV sockets"):
        await start(publishing(kv_events_port=ports.events))


async def test_usage_tells_what_was_cached(launch: Launch) -> None:
    worker = await launch(publishing())
    body = chat("x" * 40, max_tokens=1)  # 4 + 40 + 9 tokens: 13 pages and one token
    cached = []
    for _ in range(2):
        _, answer = await worker.post(CHAT, body)
        assert answer["usage"]["prompt_tokens"] == 53
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 52]
    _, answer = await worker.post(CHAT, body | {"cache_salt": "other"})
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert [item["cached_tokens"] for item in (await worker.stats())["requests"]] == [0, 52, 0]


async def test_the_next_turn_finds_prompt_and_answer(launch: Launch) -> None:
    worker = await launch(publishing())
    _, answer = await worker.post(CHAT, chat("x" * 40, max_tokens=9))
    said = answer["choices"][0]["message"]
    body = chat("x" * 40)
    body["messages"] += [said, {"role": "user", "content": "more"}]
    _, answer = await worker.post(CHAT, body)
    # The 53 tokens of the prompt and 9 of the answer are 15 whole pages.
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 60


async def test_the_same_number_whatever_the_api(launch: Launch) -> None:
    worker = await launch(publishing())
    await worker.post("/generate", generate([*b"userhelloassistant"]))
    _, messages = await worker.post("/v1/messages", chat("hello", max_tokens=1))
    assert messages["usage"]["cache_read_input_tokens"] == 16
    _, responses = await worker.post("/v1/responses", {"input": "hello"})
    assert responses["usage"]["input_tokens_details"]["cached_tokens"] == 16
    _, given = await worker.post(CHAT, chat("unread", input_ids=[*b"userhello"]))
    assert given["usage"]["prompt_tokens_details"]["cached_tokens"] == 8


async def test_a_tokenizer_file_makes_the_tokens(launch: Launch, tmp_path: Any) -> None:
    vocabulary = {"hello": 7, "world": 8, "[UNK]": 0, "[BOS]": 1}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    bos = {"SpecialToken": {"id": "[BOS]", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    specials = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"[BOS]": {"id": "[BOS]", "ids": [1], "tokens": ["[BOS]"]}},
    }
    path = tmp_path / "tokenizer.json"
    path.write_bytes(
        msgspec.json.encode(
            {
                "version": "1.0",
                "model": model,
                "pre_tokenizer": {"type": "Whitespace"},
                "post_processor": specials,
                "added_tokens": [],
                "normalizer": None,
                "decoder": None,
                "truncation": None,
                "padding": None,
            }
        )
    )
    worker = await launch(publishing(tokenizer_path=str(path)))
    _, answer = await worker.post("/v1/completions", {"prompt": "hello world", "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == 3
    _, answer = await worker.post(CHAT, chat(" hello world ", max_tokens=1))
    assert answer["usage"]["prompt_tokens"] == 4  # user hello world assistant


async def test_a_missing_tokenizer_file_names_the_setting() -> None:
    with pytest.raises(ValueError, match="tokenizer_path"):
        await start(SimulatorSettings(tokenizer_path="/nowhere/tokenizer.json"))


async def test_flushing_clears_unless_requests_run(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing(decode_milliseconds_per_token=3.6e6))
    await worker.post("/generate", generate([1, 2, 3, 4, 5]))
    task = asyncio.ensure_future(worker.post("/generate", generate([1, 2, 3, 4, 5], 9)))
    await worker.until(running=1, tokens_generated=1)
    async with worker.session.post("/flush_cache") as response:
        assert response.status == 400
    task.cancel()
    await worker.until(running=0)
    async with worker.session.post("/flush_cache") as response:
        assert response.status == 200
    assert (await connect(worker).replay())[-1].events == [CLEARED]
    _, answer = await worker.post("/generate", generate([1, 2, 3, 4, 5]))
    assert answer["meta_info"]["cached_tokens"] == 0


async def test_load_is_reported_on_change_and_without(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing(**endless_fields(), max_running_requests=1))
    client = connect(worker)
    assert (await client.load())[:6] == ["LoadStat", 0, 0, 0, 524_288, 0]
    body = generate([1, 2, 3, 4, 5], 9)
    tasks = [asyncio.ensure_future(worker.post("/generate", body)) for _ in range(2)]
    await worker.until(running=1, waiting=1, tokens_generated=1)
    report = await client.load()
    # 5 tokens of prompt and 1 of output run, 5 of prompt wait, 4 of which were not cached yet
    # when it came, or were, depending on whether the first had been prefilled.
    assert report[:6] == ["LoadStat", 1, 1, 6, 524_288, 0]
    assert report[6] in (1, 5)
    assert report[7:10] == [11, 1, 5]
    for task in tasks:
        task.cancel()
    await worker.until(running=0, waiting=0)
    assert (await client.load())[1:4] == [0, 0, 0]


async def test_load_changes_are_published_at_once(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing(**endless_fields()))
    tasks = []

    async def ask() -> None:
        tasks.append(asyncio.ensure_future(worker.post("/generate", generate([1, 2, 3], 9))))

    reports = await connect(worker).loads(2, ask)
    assert 1 in [report[1] for report in reports]
    tasks[0].cancel()
    await worker.until(running=0)


async def test_dropped_batches_leave_a_gap_that_replay_fills(
    launch: Launch, connect: Connect
) -> None:
    worker = await launch(publishing())
    client = connect(worker)
    socket = await client.subscribed()
    last = (await client.replay())[-1].seq
    assert (await worker.post("/simulator/faults", {"kv_drop_batches": 2}))[0] == 200
    for first in (10, 20, 30):
        await worker.post("/generate", generate([first, 2, 3, 4]))
    heard = batch(*(await received(socket))[1:])
    assert heard.seq == last + 3
    assert [item.seq for item in await client.replay(last + 1)] == [last + 1, last + 2, last + 3]


async def test_garbage_on_the_wire(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing())
    socket = await connect(worker).subscribed()
    await worker.post("/simulator/faults", {"kv_garbage_frames": 3})
    two, short, garbled = [await received(socket) for _ in range(3)]
    assert len(two) == 2
    assert (len(short), len(short[1])) == (3, 3)
    assert len(garbled[1]) == 8
    with pytest.raises(msgspec.DecodeError):
        msgspec.msgpack.decode(garbled[2])


async def test_impossible_events_can_be_published(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing())
    faults = {"kv_unknown_removals": 2, "kv_wrong_token_counts": 1}
    await worker.post("/simulator/faults", faults)
    await worker.post("/generate", generate([1, 2, 3, 4]))
    await worker.post("/generate", generate([5, 6, 7, 8]))
    _, removal, wrong, right = await connect(worker).replay()
    assert len(removal.events[0]["block_hashes"]) == 2
    assert wrong.events[0]["token_ids"] == [1, 2, 3]
    assert right.events[0]["token_ids"] == [5, 6, 7, 8]


async def test_other_faults_leave_the_kv_wire_alone(launch: Launch, connect: Connect) -> None:
    worker = await launch(publishing())
    await worker.post("/simulator/faults", {"status": 500})
    async with worker.session.delete("/simulator/faults") as response:
        assert response.status == 200
    assert await connect(worker).replay() == [Batch(0, [CLEARED], 0)]


async def test_replay_keeps_the_last_ten_thousand_batches(connect: Connect) -> None:
    async with await start(publishing()) as simulator:
        worker = SimulatedWorker(simulator, None)  # type: ignore[arg-type]
        publisher = simulator.publisher
        assert publisher is not None
        for _ in range(10_049):
            publisher.cache_changed(0, [])
        replayed = await connect(worker).replay()
    assert [item.seq for item in replayed] == list(range(50, 10_050))
