"""Workers are asked for the tokens of probes: when, how often, and what becomes of the answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from extproc.engines.engine import EngineName
from extproc.routing.token_proof.asking import OurTokens
from extproc.routing.token_proof.probes import PROBES
from extproc.routing.token_proof.proofs import TokenProof
from extproc.routing.token_proof.prover import TokenProver
from extproc.tokenization.encoder import Encoded
from extproc.worker_url import WorkerUrl
from extproc.workers.engine_calls import EngineAnswer, EngineTimeoutError
from extproc.workers.engine_tokenizer import EngineTokenizer
from extproc.workers.worker import Worker
from tests.builders import Fleet, make_worker
from tests.fakes import FakeClock

URLS = [f"http://10.0.0.{n}:8000" for n in range(1, 201)]
CHATS = [probe.name for probe in PROBES if probe.path == "/v1/chat/completions"]
TEXTS = ["text", "text_with_marks"]
RENDERED = ["responses", "messages"]


def ids_of(body: Any) -> list[int]:
    """The tokens of a body in these tests: a few of its bytes, the last of which all differ."""
    return [*json.dumps(body, sort_keys=True).encode()[-200:]]


class Engines:
    """A client that answers like engines with the same tokens, except as the test says."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.wrong: dict[str, set[str]] = {}
        self.refused: set[str] = set()
        self.dead: set[str] = set()
        self.status: dict[str, int] = {}
        self.open = self.most_open = 0
        self.held: asyncio.Event | None = None

    async def post(
        self, url: WorkerUrl, path: str, body: bytes, timeout_seconds: float, max_bytes: int
    ) -> EngineAnswer:
        self.asked.append((str(url), path))
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        try:
            if self.held is not None:
                await self.held.wait()
            await asyncio.sleep(0)
            return self._answer(str(url), path, json.loads(body))
        finally:
            self.open -= 1

    def _answer(self, url: str, path: str, body: Any) -> EngineAnswer:
        if url in self.dead:
            raise EngineTimeoutError("no answer in time")
        if path.endswith("/render"):
            return EngineAnswer(403, b"")
        if url in self.status:
            return EngineAnswer(self.status[url], b"")
        ids = ids_of(body)
        model = body.pop("model")
        assert model == "m"
        name = next(probe.name for probe in PROBES if probe.body == body)
        if name in self.refused:
            return EngineAnswer(400, b"")
        if name in self.wrong.get(url, ()):
            ids[100:] = [1, 2]
        return EngineAnswer(200, json.dumps({"tokens": ids}).encode())


class Setup:
    def __init__(self, workers: int = 1, engine: EngineName | None = "sglang") -> None:
        self.fleet = Fleet(
            [make_worker(url, order=n, engine=engine) for n, url in enumerate(URLS[:workers])],
            policy="min_ttft",
        )
        self.clock = self.fleet.clock
        self.proofs = self.fleet.proofs
        self.engines = Engines()
        self.reasons: dict[str, str] = {}
        self.without_tokens: set[str] = set()
        self.prover = TokenProver(
            self.fleet.registry,
            EngineTokenizer(self.engines),
            self.proofs,
            self.clock,
            self.fleet.random,
            self.fleet.metrics,
        )
        self.tokens = self.make_tokens()
        self.prover.use({"m": self.tokens})

    def make_tokens(self) -> OurTokens:
        async def encode(worker: Worker, path: str, body: bytes) -> Encoded:
            if reason := self.reasons.get(worker.url):
                return Encoded(None, reason)
            if path in self.without_tokens:
                return Encoded(None, "no_chat_template")
            return Encoded(np.array(ids_of(json.loads(body)), np.uint64), "")

        def text_of(ids: Sequence[int]) -> str:
            return "".join(map(chr, ids))

        return OurTokens(encode=encode, text_of=text_of, source=object())

    def proof(self, number: int = 0) -> TokenProof:
        return self.proofs.of(self.fleet.workers[number])["m"]

    @property
    def states(self) -> list[str]:
        return [self.proof(number).state for number in range(len(self.fleet.workers))]

    def outcomes(self, outcome: str) -> float:
        return self.fleet.metric("extproc_token_proofs_total", model="m", outcome=outcome)


@asynccontextmanager
async def proving(setup: Setup) -> AsyncIterator[FakeClock]:
    task = asyncio.create_task(setup.prover.run())
    try:
        yield setup.clock
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await setup.fleet.close()


async def test_a_worker_with_the_same_tokens_is_proven() -> None:
    setup = Setup()
    assert setup.states == ["pending"]
    with capture_logs() as logs:
        async with proving(setup) as clock:
            await clock.advance(3.0)
    assert setup.proof().state == "proven"
    assert [*setup.proof().equal] == [*TEXTS, *CHATS]
    assert [*setup.proof().not_compared] == RENDERED
    assert setup.outcomes("proven") == 1
    assert setup.proofs.differing("m") == {}
    assert len(setup.engines.asked) == len(TEXTS + CHATS)
    assert logs == []


async def test_a_difference_is_named_in_the_log_and_marks_the_worker() -> None:
    setup = Setup(2)
    setup.engines.wrong[URLS[1]] = {"tools", "tool_history"}
    with capture_logs() as logs:
        async with proving(setup) as clock:
            await clock.advance(3.0)
    assert setup.states == ["proven", "differs"]
    assert setup.proof(1).reason == "tools"
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("tokens_differ", "warning")
    assert (line["worker"], line["model"], line["reason"]) == (URLS[1], "m", "tools")
    assert "probe tools: token 100 differs" in line["error"]
    assert "--tool-call-parser" in line["fix"]
    (marked,) = setup.proofs.differing("m").items()
    assert marked == (setup.fleet.workers[1], 8)
    shown: Any = setup.proof(1).shown()
    assert (shown["state"], shown["by_load"]) == ("differs", ["tools"])
    assert shown["differences"][0]["position"] == 100


async def test_a_worker_is_proven_again_and_a_difference_can_end() -> None:
    setup = Setup()
    setup.engines.wrong[URLS[0]] = {"chat"}
    async with proving(setup) as clock:
        await clock.advance(3.0)
        assert setup.states == ["differs"]
        setup.engines.wrong.clear()
        with capture_logs() as logs:
            setup.prover.restarted(setup.fleet.workers[0])
            # What was found holds until it is asked again.
            assert setup.proofs.differing("m")
            await clock.advance(3.0)
        assert setup.states == ["proven"]
        assert setup.proofs.differing("m") == {}
        assert [line["event"] for line in logs] == ["tokens_differ_no_more"]
        before = len(setup.engines.asked)
        await clock.advance(600.0)
        assert len(setup.engines.asked) == before
        await clock.advance(600.0)
        assert len(setup.engines.asked) == before + len(TEXTS + CHATS)


async def test_many_workers_that_join_at_once_are_asked_a_few_at_a_time() -> None:
    setup = Setup(200)
    setup.engines.dead = set(URLS[::10])
    async with proving(setup) as clock:
        await clock.advance(60.0)
        assert setup.engines.most_open <= 4
        assert setup.states.count("proven") == 180
        assert setup.states.count("not_proven") == 20
        # A worker that does not answer costs one question.
        dead = [url for url, _ in setup.engines.asked if url in setup.engines.dead]
        assert len(dead) <= 20 * 2


async def test_a_worker_without_an_answer_is_asked_ever_less_often() -> None:
    setup = Setup()
    setup.engines.dead = set(URLS)
    async with proving(setup) as clock:
        await clock.advance(300.0)
        assert setup.proof().reason == "unreachable"
        assert 3 <= len(setup.engines.asked) <= 5
        setup.engines.dead = set()
        await clock.advance(600.0)
        assert setup.states == ["proven"]


@pytest.mark.parametrize(("status", "reason"), [(404, "no_endpoint"), (401, "refused")])
async def test_an_engine_that_does_not_tell_is_not_proven_and_believed(
    status: int, reason: str
) -> None:
    setup = Setup()
    setup.engines.status[URLS[0]] = status
    with capture_logs() as logs:
        async with proving(setup) as clock:
            await clock.advance(3.0)
    assert (setup.proof().state, setup.proof().reason) == ("not_proven", reason)
    assert setup.proofs.differing("m") == {}
    assert [(line["event"], line["reason"]) for line in logs] == [("tokens_not_proven", reason)]
    if status == 404:
        assert len(setup.engines.asked) == 1


async def test_what_differs_stays_so_while_the_worker_gives_no_answer() -> None:
    setup = Setup()
    setup.engines.wrong[URLS[0]] = {"parts"}
    async with proving(setup) as clock:
        await clock.advance(3.0)
        setup.engines.dead = set(URLS)
        setup.prover.restarted(setup.fleet.workers[0])
        await clock.advance(3.0)
        assert setup.states == ["differs"]


async def test_a_worker_whose_engine_is_not_known_is_not_asked() -> None:
    setup = Setup(engine=None)
    async with proving(setup) as clock:
        await clock.advance(3.0)
        assert (setup.proof().reason, setup.engines.asked) == ("unknown_engine", [])


async def test_bodies_without_tokens_here_are_not_asked_for() -> None:
    setup = Setup()
    setup.reasons[URLS[0]] = "no_chat_template"
    async with proving(setup) as clock:
        await clock.advance(3.0)
        assert (setup.proof().reason, setup.engines.asked) == ("no_tokens_here", [])


async def test_a_busy_encoder_and_an_avoided_worker_put_the_proof_off() -> None:
    setup = Setup(2)
    setup.reasons[URLS[0]] = "busy"
    avoided = setup.fleet.workers[1]
    avoided.breaker.avoid(setup.clock.monotonic(), 5.0)
    async with proving(setup) as clock:
        await clock.advance(3.0)
        assert (setup.states, setup.engines.asked) == (["pending", "pending"], [])
        del setup.reasons[URLS[0]]
        await clock.advance(10.0)
        assert setup.states == ["proven", "proven"]


async def test_nothing_is_kept_of_a_worker_that_left_while_it_was_asked() -> None:
    setup = Setup()
    setup.engines.held = asyncio.Event()
    worker = setup.fleet.workers[0]
    async with proving(setup) as clock:
        await clock.advance(2.0)
        await setup.prover.left(worker)
        setup.engines.held.set()
        await clock.advance(10.0)
        assert setup.proofs.of(worker) == {}
        assert setup.proofs.counts() == {}
        asked = len(setup.engines.asked)
        await clock.advance(1200.0)
        assert len(setup.engines.asked) == asked


async def test_a_restart_during_a_proof_begins_it_again() -> None:
    setup = Setup()
    setup.engines.held = asyncio.Event()
    async with proving(setup) as clock:
        await clock.advance(2.0)
        setup.prover.restarted(setup.fleet.workers[0])
        setup.engines.held.set()
        await clock.advance(3.0)
        assert setup.states == ["proven"]
        assert len(setup.engines.asked) == 2 * len(TEXTS + CHATS)
        assert setup.outcomes("proven") == 1


async def test_other_tokens_of_a_model_are_proven_again_and_a_removed_model_is_forgotten() -> None:
    setup = Setup()
    async with proving(setup) as clock:
        await clock.advance(3.0)
        asked = len(setup.engines.asked)
        setup.prover.use({"m": setup.tokens})
        await clock.advance(3.0)
        assert len(setup.engines.asked) == asked
        setup.prover.use({"m": setup.make_tokens()})
        assert setup.states == ["pending"]
        await clock.advance(3.0)
        assert len(setup.engines.asked) == 2 * asked
        setup.prover.use({})
        assert setup.proofs.counts() == {}
        await clock.advance(1200.0)
        assert len(setup.engines.asked) == 2 * asked


async def test_a_difference_is_only_shown_where_the_model_says_so() -> None:
    setup = Setup()
    setup.engines.wrong[URLS[0]] = {"chat"}
    setup.proofs.route_by_load(frozenset())
    async with proving(setup) as clock:
        await clock.advance(3.0)
        assert setup.states == ["differs"]
        assert setup.proofs.differing("m") == {}
        setup.proofs.route_by_load(frozenset({"m"}))
        assert setup.proofs.differing("m")
        setup.proofs.route_by_load(frozenset())
        assert setup.proofs.differing("m") == {}


async def test_an_unexpected_error_of_one_worker_does_not_end_the_proofs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup = Setup(2)
    answer = setup.engines._answer

    def fail(url: str, path: str, body: Any) -> EngineAnswer:
        if url == URLS[0]:
            raise RuntimeError("odd")
        return answer(url, path, body)

    monkeypatch.setattr(setup.engines, "_answer", fail)
    with capture_logs() as logs:
        async with proving(setup) as clock:
            await clock.advance(3.0)
            assert setup.states == ["not_proven", "proven"]
    assert "token_proof_failed" in [line["event"] for line in logs]


async def test_a_text_alone_does_not_prove_chats() -> None:
    """As of an engine whose endpoint knows no chats."""
    setup = Setup()
    setup.engines.refused = {*CHATS}
    async with proving(setup) as clock:
        await clock.advance(3.0)
        assert (setup.proof().state, setup.proof().reason) == ("not_proven", "refused")
        assert [*setup.proof().equal] == TEXTS


async def test_a_model_without_a_chat_template_is_proven_by_its_texts() -> None:
    setup = Setup()
    setup.without_tokens = {"/v1/chat/completions"}
    async with proving(setup) as clock:
        await clock.advance(3.0)
        assert (setup.proof().state, [*setup.proof().equal]) == ("proven", TEXTS)
