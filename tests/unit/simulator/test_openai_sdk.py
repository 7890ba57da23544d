"""The OpenAI SDK as the judge of the wire format."""

from collections.abc import AsyncIterator

import openai
import pytest

from .clients import SimulatedWorker

MODEL = "simulated-model"


@pytest.fixture
async def client(worker: SimulatedWorker) -> AsyncIterator[openai.AsyncOpenAI]:
    url = worker.simulator.url + "/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


async def test_chat(client: openai.AsyncOpenAI, worker: SimulatedWorker) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x" * 40}], max_tokens=5
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert len((choice.message.content or "").split()) == 5
    assert answer.system_fingerprint == f"simulator-{worker.simulator.port}"
    assert answer.usage is not None
    # user, 40 x, assistant
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (53, 5)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_chat_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 40}]}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    # Role, the default 64 tokens, the finish reason, the usage.
    assert len(chunks) == 1 + 64 + 1 + 1
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 53 + 64


@pytest.mark.parametrize(
    ("prompt", "prompt_tokens", "choices"),
    [("x" * 40, 40, 1), ("", 1, 1), (["x" * 40, "y" * 8], 48, 2), ([5, 6, 7], 3, 1)],
)
async def test_completions(
    client: openai.AsyncOpenAI, prompt: str | list[str], prompt_tokens: int, choices: int
) -> None:
    answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=2)
    assert [choice.index for choice in answer.choices] == list(range(choices))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == prompt_tokens
    assert answer.usage.completion_tokens == 2 * choices


async def test_completions_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(model=MODEL, prompt="a", max_tokens=3, stream=True)
    chunks = [chunk async for chunk in stream]
    assert len([chunk for chunk in chunks if chunk.choices[0].text]) == 3
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]


@pytest.mark.parametrize("encoding", ["float", "base64", None])
async def test_embeddings(client: openai.AsyncOpenAI, encoding: str | None) -> None:
    # None: the SDK asks for base64 on its own and decodes it.
    extra = {} if encoding is None else {"encoding_format": encoding}
    answer = await client.embeddings.create(model=MODEL, input=["a", "b"], extra_body=extra)
    assert [item.index for item in answer.data] == [0, 1]
    if encoding != "base64":
        assert answer.data[0].embedding[0] == 0.5
    assert answer.usage.prompt_tokens == 2


async def test_responses(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(model=MODEL, input="hi", max_output_tokens=4)
    assert answer.status == "incomplete"
    assert len(answer.output_text.split()) == 4
    assert answer.usage is not None
    assert answer.usage.output_tokens == 4


async def test_responses_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(
        model=MODEL, input=[{"role": "user", "content": "hi"}], stream=True
    )
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert sum(event.type == "response.output_text.delta" for event in events) == 64
    last = events[-1]
    assert last.type == "response.completed"
    assert len(last.response.output_text.split()) == 64


async def test_errors_are_understood(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(
            model=MODEL, prompt="a", extra_headers={"x-simulator-fault": "status=429"}
        )
