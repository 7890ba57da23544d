"""From a body to a rank: tokens, namespaces, the rank in the body, the load of ranks."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import zip_longest
from typing import Any

import pytest
import structlog

from extproc.config.models import PolicyName
from extproc.engines.engine import EngineName
from extproc.errors import RouterError
from extproc.routing.engine_prompts import EngineOnly
from extproc.routing.rank_chooser import Encoder
from extproc.routing.token_proof.comparison import Difference
from extproc.routing.token_proof.proofs import TokenProof
from extproc.routing.token_proof.traits import TEXT as TEXT_TRAIT
from extproc.routing.token_proof.traits import TOOLS
from extproc.tokenization.encoder import Encoded
from extproc.tokenization.prompts import Prompt
from extproc.workers.engine_calls import EngineAnswer
from extproc.workers.worker import KvEvents
from tests.builders import PAGE, ByteEncoder, Fleet, make_worker, routing_settings

A, B = "http://10.0.0.1:8000", "http://10.0.0.2:8000"
# One token a character.
TEXT = "0123456789abcdefghij"


class BusyEncoder(ByteEncoder):
    """An encoder whose queue is so long that it never answers."""

    async def encode(self, prompt: Prompt) -> Encoded:
        await asyncio.sleep(60)
        return await super().encode(prompt)


class IdsEncoder(ByteEncoder):
    """An encoder for prompts that are token ids."""

    async def encode(self, prompt: Prompt) -> Encoded:
        return Encoded(prompt.ids, "")


class LimitedEncoder(ByteEncoder):
    """An encoder whose chat template takes too many steps."""

    async def encode(self, prompt: Prompt) -> Encoded:
        return Encoded(None, "template_limit")


async def make_fleet(
    urls: Sequence[str] = (A, B),
    *,
    policy: PolicyName = "cache_aware_zmq",
    dp_size: int = 1,
    destinations_max: int = 3,
    encoder: Encoder | None = None,
    engines: Sequence[EngineName | None] = (),
    adapters: Sequence[str] = (),
) -> Fleet:
    # The ports are closed: the test says which pages a rank holds.
    events = KvEvents(host="127.0.0.1", port=1, block_size=PAGE, dp_size=dp_size)
    workers = [
        make_worker(
            url,
            order=order,
            kv_events=events if dp_size > 1 else None,
            engine=engine,
            adapters=adapters,
        )
        for order, (url, engine) in enumerate(zip_longest(urls, engines))
    ]
    return Fleet(
        workers,
        policy=policy,
        settings=routing_settings(destinations_max=destinations_max),
        encoder=encoder,
    )


MakeFleet = Callable[..., Awaitable[Fleet]]


@pytest.fixture
async def fleet() -> AsyncIterator[MakeFleet]:
    """Makes fleets; their sockets are closed at the end."""
    made: list[Fleet] = []

    async def make(*arguments: Any, **options: Any) -> Fleet:
        made.append(await make_fleet(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        await one.close()


@pytest.mark.parametrize("policy", ["cache_aware_zmq", "min_ttft"])
async def test_a_prompt_goes_to_the_rank_that_holds_it(
    fleet: MakeFleet, policy: PolicyName
) -> None:
    pool = await fleet(policy=policy)
    pool.hold("something else here", 0)
    pool.hold(TEXT[:16], 1)
    lease = await pool.complete(TEXT)
    assert lease.decision.worker_url == B
    assert lease.decision.reason == "hit"
    assert (lease.decision.cached_tokens, lease.decision.total_tokens) == (16, 20)
    assert pool.metric("extproc_prompt_tokens_total", model="m") == 20
    assert pool.metric("extproc_cached_tokens_total", model="m") == 16
    assert pool.metric("extproc_overlap_tokens_count", model="m") == 1
    lease.close()


async def test_a_rank_that_is_not_a_candidate_does_not_hide_others(fleet: MakeFleet) -> None:
    """The breaker of the rank that holds most is open; the other one holds 80 %."""
    pool = await fleet()
    pool.hold(TEXT, 0)
    pool.hold(TEXT[:16], 1)
    for _ in range(3):
        pool.workers[0].breaker.failure(pool.clock.monotonic())
    lease = await pool.complete(TEXT)
    assert (lease.decision.worker_url, lease.decision.reason) == (B, "hit")


@pytest.mark.parametrize(
    ("fields", "hits"),
    [
        ({"cache_salt": "a"}, True),
        ({}, False),
        ({"cache_salt": "b"}, False),
        ({"cache_salt": "a", "lora_path": "x"}, False),
        ({"cache_salt": "a", "model": "m:x"}, False),
    ],
)
async def test_only_the_same_namespace_counts(
    fleet: MakeFleet, fields: dict[str, Any], hits: bool
) -> None:
    pool = await fleet(adapters=["x"])
    pool.hold(TEXT, 0, salt="a")
    lease = await pool.complete(TEXT, **fields)
    assert (lease.decision.reason == "hit") is hits
    assert lease.decision.model == "m"


@pytest.mark.parametrize(
    ("model", "hits"), [("x", True), ("m:x", True), ("m", False), ("y", False)]
)
async def test_an_adapter_has_pages_of_its_own(fleet: MakeFleet, model: str, hits: bool) -> None:
    pool = await fleet(adapters=["x", "y"])
    pool.hold(TEXT, 1, adapter="x")
    lease = await pool.complete(TEXT, model=model)
    assert (lease.decision.reason == "hit") is hits
    assert lease.decision.cached_tokens == (16 if hits else 0)
    assert lease.decision.model == "m"


async def test_an_adapter_needs_a_name(fleet: MakeFleet) -> None:
    pool = await fleet()
    for name in ("m:", ":m", "n:m", "m2"):
        with pytest.raises(RouterError) as caught:
            await pool.complete(TEXT, model=name)
        assert caught.value.code == "model_not_found"


async def test_a_prompt_is_routed_without_tokens_that_are_late(fleet: MakeFleet) -> None:
    pool = await fleet(encoder=BusyEncoder())
    lease = await pool.complete(TEXT, cache_salt="a")
    assert lease.decision.reason == "no_tokens"
    assert pool.metric("extproc_prompts_without_tokens_total", model="m", reason="busy") == 1
    lease.close()


async def test_a_template_over_its_limits_is_named_with_its_model_once_a_minute(
    fleet: MakeFleet,
) -> None:
    pool = await fleet(encoder=LimitedEncoder())
    with structlog.testing.capture_logs() as events:
        for _ in range(3):
            (await pool.complete(TEXT)).close()
    assert events == [{"event": "chat_template_over_limit", "model": "m", "log_level": "warning"}]
    reason = {"model": "m", "reason": "template_limit"}
    assert pool.metric("extproc_prompts_without_tokens_total", **reason) == 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "body_not_visible"),
        (b'{"model": "m", "prompt": ["a", "b"]}', "batch"),
        (b'{"model": "m", "prompt": 5}', "malformed"),
    ],
)
async def test_without_tokens_load_decides_and_the_reason_is_counted(
    fleet: MakeFleet, body: bytes, reason: str
) -> None:
    pool = await fleet()
    pool.hold(TEXT, 0)
    lease = await pool.send(body)
    assert lease.decision.reason == "no_tokens"
    assert lease.decision.total_tokens == 0
    assert pool.metric("extproc_prompts_without_tokens_total", model="m", reason=reason) == 1


async def test_without_events_load_decides(fleet: MakeFleet) -> None:
    pool = await fleet()
    assert (await pool.complete(TEXT)).decision.reason == "no_events"


async def test_without_candidates_the_prompt_is_not_read(fleet: MakeFleet) -> None:
    pool = await fleet(())
    with pytest.raises(RouterError) as caught:
        await pool.send(b"never read")
    assert caught.value.code == "no_healthy_workers"


async def test_the_body_names_the_rank_only_for_engines_with_several(fleet: MakeFleet) -> None:
    pool = await fleet(dp_size=3)
    pool.hold(TEXT, 1, dp_rank=2)
    lease = await pool.complete(TEXT)
    assert lease.decision.body_members == b'"routed_dp_rank":2'
    assert pool.rank(1, 2).load.in_flight == 1
    assert (await pool.send(b"")).decision.body_members == b""
    single = await fleet()
    assert (await single.complete(TEXT)).decision.body_members == b""


async def test_vllm_reads_the_rank_from_a_header(fleet: MakeFleet) -> None:
    pool = await fleet(dp_size=3, engines=("vllm", "vllm"))
    pool.hold(TEXT, 1, dp_rank=2)
    decision = (await pool.complete(TEXT)).decision
    assert (decision.body_members, decision.rank_header) == (b"", 2)
    assert decision.destinations == ("10.0.0.2:8000", "10.0.0.1:8000")


async def test_fallbacks_read_the_rank_from_the_same_place(fleet: MakeFleet) -> None:
    pool = await fleet(dp_size=3, engines=("vllm", "sglang"))
    for chosen, place in ((1, (b'"routed_dp_rank":2', None)), (0, (b"", 2))):
        pool.hold(TEXT + "x" * chosen, chosen, dp_rank=2)
        decision = (await pool.complete(TEXT + "x" * chosen)).decision
        assert (decision.body_members, decision.rank_header) == place
        assert decision.destinations == (pool.workers[chosen].address,)


async def test_fallbacks_have_the_rank_that_the_body_names(fleet: MakeFleet) -> None:
    pool = await fleet(("http://10.0.0.1:1",), dp_size=4)
    small = make_worker("http://10.0.0.2:1", order=1)  # one rank
    pool.registry.upsert(small)
    pool.ranks.joined(small)
    pool.hold(TEXT, 0, dp_rank=3)
    lease = await pool.complete(TEXT)
    assert lease.decision.destinations == ("10.0.0.1:1",)


async def test_the_load_of_a_rank_ends_on_every_way_out(fleet: MakeFleet) -> None:
    pool = await fleet()
    pool.hold(TEXT, 0)
    rank = pool.rank(0)
    done = await pool.complete(TEXT)
    gone = await pool.complete(TEXT)
    assert rank.load.in_flight == 2
    assert rank.load.prefill_tokens_ahead(pool.clock.monotonic()) > 0
    done.responded(200, "10.0.0.1:8000", "via_upstream", streamed=True)
    done.close()
    gone.close()
    gone.close()
    assert rank.load.in_flight == 0
    assert rank.load.prefill_tokens_ahead(pool.clock.monotonic()) == 0
    assert len(pool.tickets) == 0


async def test_the_rank_that_serves_instead_gets_the_load(fleet: MakeFleet) -> None:
    pool = await fleet()
    pool.hold(TEXT, 0)
    lease = await pool.complete(TEXT)
    assert lease.decision.destinations[0] == "10.0.0.1:8000"
    lease.responded(200, "10.0.0.2:8000", "via_upstream", streamed=True)
    assert pool.rank(0).load.in_flight == 0
    assert pool.rank(1).load.in_flight == 1
    lease.close()
    assert pool.rank(1).load.in_flight == 0


async def test_a_request_with_the_same_prefix_follows_the_first(fleet: MakeFleet) -> None:
    pool = await fleet()
    pool.hold("z" * 8, 0)
    pool.hold("z" * 8, 1)
    first = await pool.complete(TEXT)
    assert first.decision.reason == "below_threshold"
    second = await pool.complete(TEXT + "xyz")
    assert second.decision.reason == "predicted"
    assert second.decision.worker_url == first.decision.worker_url
    assert second.decision.cached_tokens == 0  # never reported as overlap


async def test_a_worker_that_left_is_not_chosen_and_keeps_no_prediction(fleet: MakeFleet) -> None:
    pool = await fleet()
    pool.hold("z" * 8, 0)
    pool.hold("z" * 8, 1)
    lease = await pool.complete(TEXT)
    left = 0 if lease.decision.worker_url == A else 1
    rank = pool.rank(left)
    await pool.ranks.left(pool.workers[left])
    assert pool.ranks.of(pool.workers[left]) == ()
    assert rank.pages is None
    pool.registry.remove(pool.workers[left].id)
    assert (await pool.complete(TEXT)).decision.reason == "below_threshold"
    lease.close()  # the claim may outlive its worker
    assert [one.worker.url for one in pool.ranks] == [pool.workers[1 - left].url]


async def test_workers_of_other_models_are_not_followed(fleet: MakeFleet) -> None:
    pool = await fleet(())
    events = KvEvents(host="127.0.0.1", port=1, block_size=PAGE)
    stranger = make_worker(A, model_ids=("other",), kv_events=events)
    pool.ranks.joined(stranger)
    assert pool.ranks.of(stranger) == ()
    assert pool.ranks.indexer.states() == {}
    await pool.ranks.left(stranger)


async def test_a_worker_that_comes_back_is_followed_anew(fleet: MakeFleet) -> None:
    pool = await fleet((), policy="min_ttft")
    events = KvEvents(host="127.0.0.1", port=1, block_size=PAGE, dp_size=2, load_port=5)
    worker = make_worker(A, kv_events=events)
    for _ in range(2):
        pool.ranks.joined(worker)
        assert len(pool.ranks.indexer.states()) == 2
        assert [rank.dp_rank for rank in pool.ranks.of(worker)] == [0, 1]
        await pool.ranks.left(worker)
        assert pool.ranks.indexer.states() == {}


async def test_a_worker_whose_ranks_are_away_for_a_moment_is_chosen_by_load(
    fleet: MakeFleet,
) -> None:
    """It leaves and joins again when its KV events come from elsewhere."""
    pool = await fleet()
    for worker in pool.workers:
        await pool.ranks.left(worker)
    leases = [await pool.complete(TEXT) for _ in range(2)]
    assert [lease.decision.worker_url for lease in leases] == [A, B]
    assert {lease.decision.reason for lease in leases} == {"no_events"}
    for lease in leases:
        lease.close()
    assert [worker.in_flight for worker in pool.workers] == [0, 0]


def differs(probe: str, trait: int) -> TokenProof:
    difference = Difference(probe, trait, 0, 1, 1, "a", "b", first_only=False)
    return TokenProof(state="differs", differences=(difference,), reason="tools")


async def test_a_worker_with_other_tokens_gets_requests_by_load_alone(fleet: MakeFleet) -> None:
    one = await fleet()
    one.hold(TEXT, 0)
    one.hold(TEXT[:12], 1)
    assert (await one.complete(TEXT)).decision.reason == "hit"
    one.proofs.put("m", one.workers[0], differs("text", TEXT_TRAIT))
    lease = await one.complete(TEXT)
    # The other worker's tokens are those of this service: what it holds counts.
    assert lease.decision.worker_url == B
    assert (lease.decision.cached_tokens, lease.decision.total_tokens) == (12, len(TEXT))
    one.proofs.put("m", one.workers[1], differs("text", TEXT_TRAIT))
    decision = (await one.complete(TEXT)).decision
    assert decision.reason == "tokens_differ"
    assert (decision.cached_tokens, decision.total_tokens) == (0, 0)
    name = "extproc_prompts_without_tokens_total"
    assert one.metric(name, model="m", reason="tokens_differ") == 1


async def test_other_tokens_of_tools_do_not_concern_requests_without_tools(
    fleet: MakeFleet,
) -> None:
    one = await fleet()
    one.hold(TEXT, 0)
    one.proofs.put("m", one.workers[0], differs("tools", TOOLS))
    assert (await one.complete(TEXT)).decision.reason == "hit"


async def test_ids_of_the_client_are_the_engines_whatever_differs(fleet: MakeFleet) -> None:
    one = await fleet(encoder=IdsEncoder())
    one.hold(TEXT, 0)
    one.proofs.put("m", one.workers[0], differs("text", TEXT_TRAIT))
    body = json.dumps({"model": "m", "prompt": [*TEXT.encode()]}).encode()
    assert (await one.send(body)).decision.reason == "hit"


class EngineRendered(ByteEncoder):
    """An encoder for a model whose chats only the engine renders."""

    async def encode(self, prompt: Prompt) -> Encoded:
        return Encoded(None, "rendered_by_engine")


async def test_tokens_that_only_the_engine_can_make_are_asked_for_where_the_model_says_so(
    fleet: MakeFleet,
) -> None:
    one = await fleet(encoder=EngineRendered(), engines=("vllm", "vllm"))
    one.hold(TEXT, 1)
    answer = EngineAnswer(200, json.dumps([{"token_ids": [*TEXT.encode()]}]).encode())
    for url in (A, B):
        one.engine_client.script(url, "/v1/completions/render", answer)
    assert (await one.complete("any")).decision.reason == "no_tokens"
    name = "extproc_prompts_without_tokens_total"
    assert one.metric(name, model="m", reason="rendered_by_engine") == 1
    assert one.engine_client.posted == []
    one.engines.use(["m"])
    decision = (await one.complete("any")).decision
    assert (decision.worker_url, decision.reason) == (B, "hit")
    assert decision.total_tokens == len(TEXT)
    for url in (A, B):
        one.engine_client.script(url, "/v1/completions/render", EngineAnswer(403, b""))
    assert (await one.complete("other")).decision.reason == "no_tokens"
    assert one.metric(name, model="m", reason="engine_tokens_late") == 1


async def test_tokens_that_differ_on_all_workers_are_asked_for_instead(fleet: MakeFleet) -> None:
    one = await fleet(engines=("vllm", "vllm"))
    one.hold(TEXT, 1)
    one.engines.use(["m"])
    answer = EngineAnswer(200, json.dumps({"tokens": [*TEXT.encode()]}).encode())
    for number, url in enumerate((A, B)):
        one.proofs.put("m", one.workers[number], differs("text", TEXT_TRAIT))
        one.engine_client.script(url, "/v1/completions/render", EngineAnswer(403, b""))
        one.engine_client.script(url, "/tokenize", answer)
    decision = (await one.complete("any")).decision
    assert (decision.worker_url, decision.reason) == (B, "hit")
    # Where some workers make the tokens of this service, nothing is asked.
    one.proofs.forget("m", one.workers[0])
    asked = len(one.engine_client.posted)
    await one.complete("another")
    assert len(one.engine_client.posted) == asked


async def test_a_model_without_a_tokenizer_has_its_tokens_from_the_engine(
    fleet: MakeFleet,
) -> None:
    one = await fleet(encoder=EngineOnly(), engines=("vllm", "vllm"))
    one.engines.use(["m"])
    one.hold(TEXT, 1)
    answer = EngineAnswer(200, json.dumps({"tokens": [*TEXT.encode()]}).encode())
    for url in (A, B):
        one.engine_client.script(url, "/v1/completions/render", EngineAnswer(403, b""))
        one.engine_client.script(url, "/tokenize", answer)
    decision = (await one.complete("any")).decision
    assert (decision.worker_url, decision.reason) == (B, "hit")


class SeeingEncoder(ByteEncoder):
    """An encoder of prompts with an image after the text; the image is most of the body."""

    async def read(self, *arguments: Any) -> Prompt:
        prompt = await super().read(*arguments)
        return Prompt(text=prompt.text, media=1, media_bytes=prompt.body_bytes - 50)

    async def encode(self, prompt: Prompt) -> Encoded:
        whole = await super().encode(prompt)
        return Encoded(None, "multimodal", beginning=whole.ids)


@pytest.mark.parametrize("policy", ["cache_aware_zmq", "min_ttft"])
async def test_the_text_before_an_image_is_matched(fleet: MakeFleet, policy: PolicyName) -> None:
    pool = await fleet(policy=policy, encoder=SeeingEncoder())
    # Long enough for the threshold of the policy; the image counts for 512 tokens.
    text = "".join(f"{number:08}" for number in range(400))
    pool.hold(text, 1)
    lease = await pool.complete(text, padding="x" * 10_000_000)
    assert (lease.decision.worker_url, lease.decision.reason) == (B, "hit")
    # All of the text, since its last token is not the last of the prompt.
    assert lease.decision.cached_tokens == 3200
    assert lease.decision.total_tokens == 3201
    assert pool.metric("extproc_prompts_known_in_part_total", model="m") == 1
    assert pool.metric("extproc_prompts_without_tokens_total", model="m", reason="multimodal") == 0


async def test_what_follows_the_text_counts_as_new(fleet: MakeFleet) -> None:
    pool = await fleet(encoder=SeeingEncoder())
    pool.hold(TEXT[:16], 1)
    lease = await pool.complete(TEXT[:16])
    # An image of 512 tokens and some bytes of text.
    assert lease.decision.reason == "below_threshold"
    assert 512 <= lease.decision.total_tokens < 560
