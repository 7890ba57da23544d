"""A fleet of prefill and decode workers: real routing, and a prefill client that sends nothing."""

import asyncio
import json
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import msgspec
import pytest
from msgspec import Struct

from extproc.engines.engine import EngineName
from extproc.errors import RouterError
from extproc.kv.events import LoadStat
from extproc.routing.lease import Lease
from extproc.routing.pd.decode_order import DecodeOrder, DecodeQuery
from extproc.routing.pd.pair import Pair
from extproc.routing.request import ClientHeaders, Request, find_endpoint, parse_body
from extproc.worker_url import WorkerUrl
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.engine_calls import EngineUnreachableError, PrefillCall
from extproc.workers.worker import Role, Worker
from tests.builders import Fleet, make_worker, pd_settings, routing_settings
from tests.fakes import settle
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
    """One request to a prefill worker."""

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


class FakePrefillClient:
    """A prefill client that connects unless the test refuses it; the test gives the answers.

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


def pd_worker(url: str, role: Role, order: int, *, threshold: int = 3, **spec: Any) -> Worker:
    worker = make_worker(url, order=order, role=role, threshold=threshold)
    worker.spec = msgspec.structs.replace(worker.spec, **spec)
    return worker


class PdFleet(Fleet):
    """A router over workers that prefill and decode apart.

    The policy is round robin: the prefill workers are chosen in their order. The sockets of all
    fleets that a test has made are closed at its end.
    """

    made: ClassVar[list["PdFleet"]] = []

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
        self.prefill_client = FakePrefillClient()
        self.prefills = [
            pd_worker(url, "prefill", order, threshold=threshold, bootstrap_port=port)
            for order, url in enumerate(prefills)
        ]
        self.decodes = [
            pd_worker(url, "decode", len(prefills) + order, threshold=threshold)
            for order, url in enumerate(decodes)
        ]
        super().__init__(
            [*self.prefills, *self.decodes],
            policy="min_ttft" if min_ttft else "round_robin",
            settings=routing_settings(pd=pd_settings(**settings)),
            follows_kv=True,
            prefill_client=self.prefill_client,
        )

    # -- requests

    async def pair(self, body: bytes = BODY, **request: Any) -> Pair:
        lease = await self.start(body, **request)
        assert isinstance(lease, Pair)
        return lease

    async def start(
        self,
        body: bytes = BODY,
        *,
        path: str = "/v1/completions",
        stream: bool = False,
        headers: Sequence[tuple[str, str]] = (),
        model: str = "m",
    ) -> Lease | Pair:
        def client_headers() -> ClientHeaders:
            return ClientHeaders(path, tuple(headers))

        endpoint = find_endpoint("POST", path)
        request = Request(endpoint, model, stream, body, client_headers)
        if body:
            # Most bodies of these tests have no `model`.
            nameless = msgspec.structs.replace(endpoint, model_optional=True)
            parsed = parse_body(nameless, body, client_headers, prompt_max_bytes=len(body))
            request.prompts, request.fields = parsed.prompts, parsed.fields
            request.body = parsed.body
        return await self.router.route(request)

    async def refused(self, body: bytes = BODY, **request: Any) -> RouterError:
        with pytest.raises(RouterError) as caught:
            await self.start(body, **request)
        return caught.value

    async def waiting(self, body: bytes = BODY) -> "asyncio.Task[Lease | Pair]":
        """A request whose prefill was sent and is waited for."""
        task = asyncio.create_task(self.start(body))
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

    def load_adapters(self, worker: Worker, *adapters: str, engine: EngineName = "vllm") -> None:
        worker.spec = msgspec.structs.replace(worker.spec, engine=engine)
        spec = msgspec.structs.replace(worker.spec, adapters=adapters)
        self.registry.set_adapters(worker, spec)

    def trip(self, *workers: Worker) -> None:
        for worker in workers:
            while worker.breaker.state is not OPEN:
                worker.breaker.failure(self.clock.monotonic())

    def leave(self, *workers: Worker) -> None:
        for worker in workers:
            self.registry.remove(worker.id)

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

    # -- what is left

    @property
    def load(self) -> tuple[list[int], list[int]]:
        return (
            [worker.in_flight for worker in self.prefills],
            [worker.in_flight for worker in self.decodes],
        )

    def nothing_is_left(self) -> None:
        assert self.load == ([0] * len(self.prefills), [0] * len(self.decodes))
        assert len(self.tickets) == 0
        assert len(self.pd.pairs) == 0
        assert not any(call.is_open for call in self.prefill_client.calls)

    def failures(self, reason: str) -> float:
        return self.metric("extproc_pd_prefill_failures_total", model="m", reason=reason)
