"""The clients of the demo: they send conversations and record what they see of the answers."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Final

import aiohttp
import msgspec
from msgspec import Struct

from extproc.demo.figures import Outcome
from extproc.demo.prefills import Prefilled, prefilled
from extproc.demo.workload import Conversation, Turn
from extproc.headers import DEBUG_HEADER, REQUEST_ID_HEADER, WORKER_HEADER

__all__ = ["hold_conversations"]

_TIMEOUT_SECONDS: Final = 60.0
# Simulated workers sign their answers, so a client knows which worker served.
_SERVED_BY_HEADER: Final = "x-simulator-port"
_DATA: Final = b"data: "
_DONE: Final = b"[DONE]"


class _CachedTokens(Struct):
    cached_tokens: int = 0


class _Usage(Struct):
    prompt_tokens: int
    prompt_tokens_details: _CachedTokens


class _Delta(Struct):
    content: str = ""


class _Choice(Struct):
    delta: _Delta


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Chunk)


async def hold_conversations(
    url: str,
    model: str,
    planned: Sequence[Conversation],
    note: Callable[[Outcome], None],
    *,
    apart: bool = False,
) -> None:
    """Run all conversations with one model; `note` is called at the end of each answer.

    `apart` is for models with prefill and decode workers: the noted work is then that of the
    prefill worker.

    A turn is sent when it is due and the turn before it has been answered. A conversation ends
    with the first turn that fails.
    """
    start = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:

        async def hold(conversation: Conversation) -> None:
            messages = [{"role": "system", "content": conversation.system}]
            for turn in conversation.turns:
                await asyncio.sleep(max(0.0, start + turn.due_seconds - time.monotonic()))
                messages.append({"role": "user", "content": turn.text})
                outcome, said = await _ask(session, model, messages, turn, apart=apart)
                note(outcome)
                if not outcome.good:
                    return
                messages.append({"role": "assistant", "content": said})

        async with asyncio.TaskGroup() as group:
            for conversation in planned:
                group.create_task(hold(conversation))


async def _ask(
    session: aiohttp.ClientSession,
    model: str,
    messages: list[dict[str, str]],
    turn: Turn,
    *,
    apart: bool,
) -> tuple[Outcome, str]:
    """The outcome of a request, and the text of the answer."""
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": turn.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request_id = uuid.uuid4().hex
    headers = {DEBUG_HEADER: "true", REQUEST_ID_HEADER: request_id} if apart else {}
    sent = time.monotonic()
    worker, status, said = "", 0, ""
    first: float | None = None
    usage: _Usage | None = None
    # A broken request is an outcome; the demo goes on.
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError):
        async with session.post("/v1/chat/completions", json=body, headers=headers) as response:
            worker = response.headers.get(WORKER_HEADER if apart else _SERVED_BY_HEADER, "")
            status = response.status
            async for line in response.content:
                first = first or time.monotonic()
                if status != 200 or not line.startswith(_DATA):
                    continue
                payload = line.removeprefix(_DATA).strip()
                if payload == _DONE:
                    break
                chunk = _decoder.decode(payload)
                usage = chunk.usage or usage
                said += "".join(choice.delta.content for choice in chunk.choices)
    # An answer without usage was cut off.
    ttft_seconds = (first or time.monotonic()) - sent
    work = None
    if usage is not None:
        work = await prefilled(session, worker, request_id) if apart else _work(usage)
    outcome = Outcome(
        worker=worker,
        good=status == 200 and usage is not None,
        ttft_seconds=ttft_seconds,
        prompt_tokens=work.prompt_tokens if work else 0,
        cached_tokens=work.cached_tokens if work else 0,
    )
    return outcome, said


def _work(usage: _Usage) -> Prefilled:
    return Prefilled(usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens)
