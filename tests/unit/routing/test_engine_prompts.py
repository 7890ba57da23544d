"""Engines are asked for tokens that only they can make: within bounds, and once for each body."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from structlog.testing import capture_logs

from extproc.engines.engine import engine_named
from extproc.routing import engine_prompts
from extproc.routing.engine_prompts import EngineOnly, EnginePrompts
from extproc.tokenization.encoder import Encoded
from extproc.tokenization.fields import decode_fields
from extproc.worker_url import WorkerUrl
from extproc.workers.engine_calls import EngineAnswer, EngineUnreachableError
from extproc.workers.engine_tokenizer import EngineTokenizer
from tests.builders import make_shared, make_worker
from tests.fakes import FakeClock, settle

A, B = "http://10.0.0.1:8000", "http://10.0.0.2:8000"
CHAT = "/v1/chat/completions"
VLLM = engine_named("vllm")
BODY = b'{"model": "m", "messages": []}'


class Engines:
    """Answers with the ids that the test sets, or as `fails` says; `held` keeps answers back."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.ids = [1, 2, 3]
        self.status = 200
        self.fails = False
        self.held: asyncio.Event | None = None

    async def post(
        self, url: WorkerUrl, path: str, body: bytes, timeout_seconds: float, max_bytes: int
    ) -> EngineAnswer:
        self.asked.append((str(url), path))
        if self.held is not None:
            await self.held.wait()
        if self.fails:
            raise EngineUnreachableError("connection refused")
        return EngineAnswer(self.status, json.dumps({"token_ids": self.ids}).encode())


class Setup:
    def __init__(self, *urls: str) -> None:
        self.workers = [make_worker(url, order=n, engine="vllm") for n, url in enumerate(urls)]
        self.shared = make_shared(self.workers)
        assert isinstance(self.shared.clock, FakeClock)
        self.clock = self.shared.clock
        self.engines = Engines()
        self.prompts = EnginePrompts(
            EngineTokenizer(self.engines),
            self.shared.registry,
            self.clock,
            self.shared.metrics,
        )
        self.prompts.use(["m"])

    async def ask(self, body: bytes = BODY, path: str = CHAT) -> list[int] | None:
        ids = await self.prompts.ids("m", VLLM, path, body, rendered_only=True)
        return None if ids is None else [int(one) for one in ids]

    def outcomes(self, outcome: str) -> float:
        name = "extproc_engine_token_questions_total"
        labels = {"model": "m", "outcome": outcome}
        return self.shared.prometheus.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def opened(*urls: str) -> AsyncIterator[Setup]:
    setup = Setup(*urls)
    yield setup
    setup.prompts.close()
    await settle()


async def test_the_least_loaded_worker_tells_and_an_equal_body_is_not_asked_for_again() -> None:
    async with opened(A, B) as setup:
        setup.workers[0].in_flight = 1
        assert await setup.ask() == [1, 2, 3]
        assert setup.engines.asked == [(B, f"{CHAT}/render")]
        setup.engines.ids = [4]
        assert await setup.ask() == [1, 2, 3]
        assert await setup.ask(BODY + b" ") == [4]
        assert len(setup.engines.asked) == 2
        assert (setup.outcomes("answered"), setup.outcomes("cached")) == (2, 1)
        setup.prompts.use(["m"])
        assert await setup.ask() == [4]


async def test_equal_bodies_at_once_are_one_question() -> None:
    async with opened(A) as setup:
        setup.engines.held = asyncio.Event()
        asking = [asyncio.create_task(setup.ask()) for _ in range(5)]
        await settle()
        setup.engines.held.set()
        assert await asyncio.gather(*asking) == [[1, 2, 3]] * 5
        assert len(setup.engines.asked) == 1


async def test_a_late_answer_is_not_waited_for_and_serves_the_next_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_prompts, "_PATIENCE_SECONDS", 0.001)
    async with opened(A) as setup:
        setup.engines.held = asyncio.Event()
        assert await setup.ask() is None
        assert setup.outcomes("late") == 1
        setup.engines.held.set()
        await settle()
        assert await setup.ask() == [1, 2, 3]
        assert setup.outcomes("cached") == 1


async def test_a_client_that_leaves_does_not_end_the_question_of_another() -> None:
    async with opened(A) as setup:
        setup.engines.held = asyncio.Event()
        first, second = (asyncio.create_task(setup.ask()) for _ in range(2))
        await settle()
        first.cancel()
        await settle()
        setup.engines.held.set()
        assert await second == [1, 2, 3]


async def test_few_questions_are_open_at_a_time() -> None:
    async with opened(A) as setup:
        setup.engines.held = asyncio.Event()
        asking = [asyncio.create_task(setup.ask(BODY + b" " * number)) for number in range(20)]
        await settle()
        assert len(setup.engines.asked) == 16
        assert setup.outcomes("not_asked") == 4
        setup.engines.held.set()
        assert sorted(map(str, await asyncio.gather(*asking))) == ["None"] * 4 + ["[1, 2, 3]"] * 16


async def test_an_engine_that_fails_is_not_asked_for_a_while() -> None:
    async with opened(A) as setup:
        setup.engines.fails = True
        with capture_logs() as logs:
            for number in range(10):
                assert await setup.ask(BODY + b" " * number) is None
        assert len(setup.engines.asked) == 3
        assert [line["event"] for line in logs] == ["engine_tokens_not_told"]
        assert (setup.outcomes("failed"), setup.outcomes("not_asked")) == (3, 7)
        setup.clock.tick(10.0)
        assert await setup.ask() is None
        # Twice as long after each further failure.
        setup.clock.tick(10.0)
        assert await setup.ask() is None
        assert len(setup.engines.asked) == 4
        setup.clock.tick(10.0)
        setup.engines.fails = False
        assert await setup.ask() == [1, 2, 3]


async def test_a_body_that_the_engine_refuses_says_nothing_about_others() -> None:
    async with opened(A) as setup:
        setup.engines.status = 400
        for number in range(5):
            assert await setup.ask(BODY + b" " * number) is None
        setup.engines.status = 200
        assert await setup.ask() == [1, 2, 3]


async def test_an_engine_without_the_endpoint_is_not_asked_for_a_while() -> None:
    async with opened(A) as setup:
        setup.engines.status = 403
        for number in range(5):
            assert await setup.ask(BODY + b" " * number) is None
        assert len(setup.engines.asked) == 3


async def test_large_bodies_are_not_sent_for_their_tokens() -> None:
    async with opened(A) as setup:
        assert await setup.ask(b"x" * (512 * 1024 + 1)) is None
        assert (setup.engines.asked, setup.outcomes("too_large")) == ([], 1)


async def test_workers_that_are_avoided_are_not_asked() -> None:
    async with opened(A) as setup:
        setup.workers[0].breaker.avoid(setup.clock.monotonic(), 60.0)
        assert await setup.ask() is None
        assert setup.engines.asked == []


async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_prompts, "_CACHE_MAX_BYTES", 3 * (200 + 24))
    async with opened(A) as setup:
        for number in range(10):
            await setup.ask(BODY + b" " * number)
        assert len(setup.engines.asked) == 10
        for number in (9, 8, 7):
            await setup.ask(BODY + b" " * number)
        assert len(setup.engines.asked) == 10
        await setup.ask(BODY)
        assert len(setup.engines.asked) == 11


async def test_only_the_models_that_say_so_ask() -> None:
    async with opened(A) as setup:
        assert setup.prompts.asks("m")
        assert not setup.prompts.asks("other")


async def test_tokenize_is_not_asked_for_what_it_does_not_obey() -> None:
    async with opened(A) as setup:
        setup.engines.status = 404
        for number, member in enumerate((b"", b'"reasoning_effort"', b'"truncate_prompt_tokens"')):
            await setup.prompts.ids("m", VLLM, CHAT, BODY + member, rendered_only=False)
            paths = [path for _, path in setup.engines.asked]
            assert paths == [f"{CHAT}/render", "/tokenize"] + [f"{CHAT}/render"] * number
            setup.prompts.use(["m"])


async def test_a_model_without_a_tokenizer_knows_only_ids_that_clients_send() -> None:
    encoder = EngineOnly()

    async def encoded(body: bytes, path: str = "/v1/completions") -> Encoded:
        return await encoder.encode(await encoder.read(VLLM.rules, path, body, None))

    assert (await encoded(b'{"prompt": "x"}')).reason == "no_tokenizer"
    assert (await encoded(b'{"prompt": ["a", "b"]}')).reason == "batch"
    assert (await encoded(b'{"prompt": "' + b"x" * 600_000 + b'"}')).reason == "too_long"
    ids = (await encoded(b'{"prompt": [1, 2]}')).ids
    assert ids is not None
    assert [*ids] == [1, 2]
    fields = decode_fields("/v1/completions", b'{"prompt": "x"}')
    prompt = await encoder.read(VLLM.rules, "/v1/completions", b'{"prompt": "x"}', fields)
    assert prompt.text == "x"
