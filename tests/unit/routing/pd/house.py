"""What tests of disaggregation stand on: a registry, a router, and a caller that sends nothing."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from msgspec import Struct

from extproc.build import assemble_routing
from extproc.config.models import ModelConfig
from extproc.errors import RouterError
from extproc.kv.events import LoadStat
from extproc.kv.subscriptions.subscription import SubscriberSettings
from extproc.policies.factory import create_kv_policy, create_policy
from extproc.routing.chooser import Chooser, WorkerChooser
from extproc.routing.lease import Lease
from extproc.routing.local_endpoints import LocalEndpoints
from extproc.routing.pd.decode_order import DecodeOrder
from extproc.routing.pd.pair import Pair
from extproc.routing.pd.passes import DecodeQuery
from extproc.routing.placement import Placement
from extproc.routing.rank_chooser import RankChooser
from extproc.routing.ranks import Ranks
from extproc.routing.request import ClientHeaders, Request, find_endpoint, parse_body
from extproc.tokenization.bodies.openai_chat import BodyFields
from extproc.tokenization.bodies.prompts import Prompt, read_prompt
from extproc.tokenization.encoder import Encoded
from extproc.worker_url import WorkerUrl
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.engine_calls import EngineUnreachableError, PrefillCall
from extproc.workers.worker import Role, Worker
from tests.fakes import FakeClock, make_shared, make_worker, pd_settings, routing_settings, settle
from tests.unit.routing.pd.test_pair import FakeCall

PREFILLS = [f"http://10.0.0.{n}:8000" for n in (1, 2, 3)]
DECODES = [f"http://10.0.1.{n}:8000" for n in (1, 2, 3)]
ADDRESSES = [url.removeprefix("http://") for url in DECODES]
BODY = b'{"model":"m","prompt":"x" , "seed":1.50e+3}'
VIA = "via_upstream"
KV = b'{"remote_block_ids":[1, 2],"remote_host":"10.0.0.1"}'
PAGE = 4
CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


class Post(Struct, frozen=True, kw_only=True):
    """One request to an engine, as it was made."""

    url: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    connect_seconds: float
    answer_seconds: float
    keep_bytes: int

    @property
    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class FakeCaller:
    """Connects unless told otherwise; the engines' answers are up to the test.

    `silent` are URLs where connecting takes for ever.
    """

    def __init__(self) -> None:
        self.refuses: dict[str, EngineUnreachableError] = {}
        self.silent: set[str] = set()
        self.posts: list[Post] = []
        self.calls: list[FakeCall] = []

    def refuse(self, *urls: str) -> None:
        for url in urls:
            self.refuses[url] = EngineUnreachableError("connection refused")

    async def post(
        self,
        url: WorkerUrl,
        path: str,
        headers: Iterable[tuple[str, str]],
        body: bytes,
        *,
        connect_seconds: float,
        answer_seconds: float,
        keep_bytes: int,
    ) -> PrefillCall:
        made = Post(
            url=str(url),
            path=path,
            headers=tuple(headers),
            body=bytes(body),
            connect_seconds=connect_seconds,
            answer_seconds=answer_seconds,
            keep_bytes=keep_bytes,
        )
        self.posts.append(made)
        if str(url) in self.silent:
            await asyncio.Event().wait()
        if error := self.refuses.get(str(url)):
            raise error
        call = FakeCall()
        self.calls.append(call)
        return call


class ByteEncoder:
    """A token is a byte of a completion's prompt."""

    async def read(self, path: str, body: bytes | bytearray, fields: BodyFields | None) -> Prompt:
        return read_prompt(path, body)

    async def encode(self, prompt: Prompt) -> Encoded:
        if prompt.text is None:
            return Encoded(None, prompt.why)
        return Encoded(np.frombuffer(prompt.text.encode(), np.uint8).astype(np.uint64), "")


def pd_worker(url: str, role: Role, order: int, *, threshold: int = 3, **spec: Any) -> Worker:
    worker = make_worker(url, order=order, role=role, threshold=threshold)
    worker.spec = msgspec.structs.replace(worker.spec, **spec)
    return worker


class Fleet:
    """A router over workers that prefill and decode apart, none of which is real.

    The policy is round robin: the prefill workers are chosen in their order. All that were made
    must be closed.
    """

    made: ClassVar[list["Fleet"]] = []

    def __init__(
        self,
        prefills: Sequence[str] = tuple(PREFILLS),
        decodes: Sequence[str] = tuple(DECODES),
        *,
        threshold: int = 3,
        port: int | None = 8998,
        min_ttft: bool = False,
        **settings: Any,
    ) -> None:
        self.made.append(self)
        self.clock = FakeClock()
        shared = make_shared(clock=self.clock)
        self.prometheus, self.metrics = shared.prometheus, shared.metrics
        self.registry, self.active_load = shared.registry, shared.tickets
        self.ranks = Ranks(self.clock, max_pages=10_000, settings=SubscriberSettings())
        model = ModelConfig(id="m", policy="min_ttft", tokenizer_path="-")
        placement = Placement(create_kv_policy(model, shared.random), self.ranks.indexer.index)
        self.ranks.serve("m", placement)
        self.prefills = [
            pd_worker(url, "prefill", order, threshold=threshold, bootstrap_port=port)
            for order, url in enumerate(prefills)
        ]
        self.decodes = [
            pd_worker(url, "decode", len(prefills) + order, threshold=threshold)
            for order, url in enumerate(decodes)
        ]
        for worker in (*self.prefills, *self.decodes):
            self.registry.upsert(worker)
            self.ranks.joined(worker)
        self.caller = FakeCaller()
        self.rechecked: list[Worker] = []
        chooser: Chooser = WorkerChooser(create_policy("round_robin", shared.random))
        if min_ttft:
            chooser = RankChooser(
                "m",
                ByteEncoder(),
                placement,
                self.ranks,
                metrics=self.metrics,
                clock=self.clock,
                patience_seconds=0.5,
            )
        routing = assemble_routing(
            routing_settings(pd=pd_settings(**settings)),
            shared,
            self.ranks,
            {"m": chooser},
            LocalEndpoints({}),
            self.caller,
            self.rechecked.append,
        )
        self.pd, self.router = routing.pd, routing.router

    async def close(self) -> None:
        await self.ranks.indexer.close()

    # -- requests

    async def route(self, body: bytes = BODY, **request: Any) -> Pair:
        lease = await self.send(body, **request)
        assert isinstance(lease, Pair)
        return lease

    async def send(
        self,
        body: bytes = BODY,
        *,
        path: str = "/v1/completions",
        stream: bool = False,
        headers: Sequence[tuple[str, str]] = (),
    ) -> Lease | Pair:
        def client_headers() -> ClientHeaders:
            return ClientHeaders(path, tuple(headers))

        endpoint = find_endpoint("POST", path)
        request = Request(endpoint, "m", stream, body, client_headers)
        if body:
            # Most bodies of these tests have no `model`.
            nameless = msgspec.structs.replace(endpoint, model_optional=True)
            parsed = parse_body(nameless, body, client_headers, prompt_max_bytes=len(body))
            request.prompts, request.fields = parsed.prompts, parsed.fields
        return await self.router.route(request)

    async def refused(self, body: bytes = BODY, **request: Any) -> RouterError:
        with pytest.raises(RouterError) as caught:
            await self.send(body, **request)
        return caught.value

    async def waiting(self) -> "asyncio.Task[Lease | Pair]":
        """A request whose prefill was sent and is waited for."""
        task = asyncio.create_task(self.send())
        await settle()
        assert not task.done()
        return task

    def pick(self, pair: Pair, attempt: int = 1) -> Lease:
        order = DecodeOrder.from_header(pair.decision.decode_order)
        return self.pd.pick_decode(DecodeQuery("m", order, attempt))

    def not_picked(self, pair: Pair, attempt: int = 1) -> RouterError:
        with pytest.raises(RouterError) as caught:
            self.pick(pair, attempt)
        return caught.value

    # -- workers

    def trip(self, *workers: Worker) -> None:
        for worker in workers:
            while worker.breaker.state is not OPEN:
                worker.breaker.failure(self.clock.monotonic())

    def reports(self, worker: Worker, requests: int, usage: float = 0.0) -> None:
        """The engine says how much it has to do."""
        (rank,) = self.ranks.of(worker)
        stat = LoadStat(
            num_running_reqs=requests,
            num_waiting_reqs=0,
            num_tokens=int(usage * 1000),
            max_total_num_tokens=1000,
            attn_dp_rank=0,
        )
        rank.load.report(stat, self.clock.monotonic())

    def hold(self, text: str, worker: Worker) -> None:
        """The worker is trusted and holds the whole pages of this text."""
        index, (rank,) = self.ranks.indexer.index, self.ranks.of(worker)
        if rank.pages is None:
            rank.pages = index.add(worker.url, PAGE)
        rank.pages.trusted = True
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.uint64)
        ids = ids[: len(text) // PAGE * PAGE]
        names = [hash(text[: end * PAGE]) for end in range(1, len(ids) // PAGE + 1)]
        index.store(rank.pages, names, None, ids, PAGE, seed=0)

    # -- what is left

    @property
    def load(self) -> tuple[list[int], list[int]]:
        return (
            [worker.in_flight for worker in self.prefills],
            [worker.in_flight for worker in self.decodes],
        )

    def nothing_is_left(self) -> None:
        assert self.load == ([0] * len(self.prefills), [0] * len(self.decodes))
        assert len(self.active_load) == 0
        assert len(self.pd.pairs) == 0
        assert not any(call.is_open for call in self.caller.calls)

    def metric(self, name: str, **labels: str) -> float:
        return self.prometheus.get_sample_value(name, labels) or 0.0

    def failures(self, cause: str) -> float:
        return self.metric("extproc_pd_prefill_failures_total", model="m", reason=cause)

    def outcomes(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for family in self.prometheus.collect():
            for sample in family.samples:
                if sample.name == "extproc_worker_requests_total":
                    told = [sample.labels["outcome"]] * int(sample.value)
                    found.setdefault(sample.labels["worker"], []).extend(told)
        return {url: sorted(told) for url, told in found.items()}


@pytest.fixture(autouse=True)
async def sockets_closed() -> AsyncIterator[None]:
    """Of every fleet that a test has made."""
    yield
    while Fleet.made:
        await Fleet.made.pop().close()
