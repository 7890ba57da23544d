"""Serves the inference paths: from a body to an answer, with faults and aborts.

A streamed answer sends its headers together with its first token, after queue and prefill,
as the real engine does; a router that waits for headers therefore waits for the prefill.
"""

import asyncio
import contextlib
import socket
import struct
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import msgspec
import structlog
from aiohttp import web

from extproc.simulator.answers import Answer, Ticket
from extproc.simulator.bodies import InferenceRequest, Prompt, member_names
from extproc.simulator.cache_events import Namespace
from extproc.simulator.chat_template import ChatTemplateError
from extproc.simulator.engine import FinishReason, Job, QueueFullError
from extproc.simulator.errors import ApiError, error_body
from extproc.simulator.faults import (
    FAULT_HEADER,
    RequestFault,
    parse_header,
)
from extproc.simulator.journal import Entry
from extproc.simulator.legs import Leg
from extproc.simulator.other_answers import answers
from extproc.simulator.split import Output, SplitGeneration
from extproc.simulator.vllm_chats import VllmChatError
from extproc.simulator.worker import Worker

__all__ = ["hang", "json_answer", "listening_port", "serve"]

_RANK_HEADER = "x-data-parallel-rank"
_FLUSH_POLL_SECONDS = 0.001
# SO_LINGER on with zero seconds: closing sends a TCP reset instead of a FIN.
_LINGER_RESET = struct.pack("ii", 1, 0)

_log = structlog.get_logger("extproc.simulator")


def json_answer(data: object, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(data), status=status, content_type="application/json"
    )


def listening_port(request: web.Request) -> int:
    """The local port of the request's connection; 0 if the client has disconnected."""
    name = request.transport.get_extra_info("sockname") if request.transport else None
    return int(name[1]) if name else 0


async def serve(worker: Worker, request: web.Request) -> web.StreamResponse:
    """Handle one inference request and note in the journal how it ended."""
    entry = worker.journal.open(request.path, request.headers)
    try:
        response = await _answer(worker, request, entry)
        worker.journal.close(entry, "completed" if response.status < 400 else "failed")
    except asyncio.CancelledError:
        worker.journal.close(entry, "aborted")
        raise
    except ConnectionError:
        # A write fails a moment before the lost connection cancels this handler.
        worker.journal.close(entry, "aborted")
        await _forever()
    except Exception:
        worker.journal.close(entry, "failed")
        raise
    finally:
        if worker.settings.log_requests:
            _log.info(
                "request",
                path=entry.path,
                model=worker.settings.model,
                request_id=entry.request_id,
                rid=entry.rid,
                stream=entry.stream,
                prompt_tokens=entry.prompt_tokens,
                completion_tokens=entry.completion_tokens,
                outcome=entry.outcome,
            )
    return response


async def hang(fault: RequestFault) -> None:
    """Wait as long as the fault says; an endless wait ends when the client disconnects."""
    if fault.hang is True:
        await _forever()
    elif fault.hang:
        await asyncio.sleep(fault.hang)


async def _answer(worker: Worker, request: web.Request, entry: Entry) -> web.StreamResponse:
    body = await request.read()
    entry.body_bytes = len(body)
    if worker.settings.log_requests:
        entry.members = member_names(body)
    asked = worker.readers[request.path](body)
    _note(worker, asked, entry)
    prompts = [_tokens(worker, prompt, asked) for prompt in asked.prompts]
    ticket = _ticket(worker, request, asked, sum(len(prompt) for prompt in prompts))
    entry.rid = ticket.id
    entry.prompt_tokens = ticket.prompt_tokens
    answer = answers[request.path](ticket)
    entry.stream = asked.stream and answer.streams
    if worker.is_starting:
        raise ApiError(503, "the worker is starting")
    namespace = _namespace(worker, asked)
    fault = _fault(worker, request)
    await hang(fault)
    if fault.die_before_headers:
        await _die(worker, request, entry, fault)
    if fault.answer_status is not None:
        return _fault_answer(fault.answer_status, fault)
    leg = worker.pd.leg(asked) if answer.streams else Leg()
    run = _Run(worker, request, entry, answer, fault, leg)
    rank = _rank(worker, request, asked)
    job = _job(worker, asked, prompts, namespace, ticket.id, rank, fault)
    with _submit(worker, leg, job) as generation:
        return await (run.stream(generation) if entry.stream else run.whole(generation))


def _note(worker: Worker, asked: InferenceRequest, entry: Entry) -> None:
    """Note the fields by which tests compare the two legs of a request."""
    entry.role = worker.mode
    entry.bootstrap_host = asked.bootstrap_host
    entry.bootstrap_port = asked.bootstrap_port
    entry.bootstrap_room = asked.bootstrap_room
    entry.disagg_prefill_dp_rank = asked.disagg_prefill_dp_rank
    entry.kv_transfer_params = asked.kv_transfer_params


def _tokens(worker: Worker, prompt: Prompt, asked: InferenceRequest) -> Sequence[int]:
    try:
        return worker.tokenizer.encode_prompt(prompt, special_tokens=asked.special_tokens)
    except (ChatTemplateError, VllmChatError) as error:
        raise ApiError(400, str(error)) from error


def _namespace(worker: Worker, asked: InferenceRequest) -> Namespace:
    """The cache namespace of the request.

    For SGLang `model:adapter` names an adapter of the model, for vLLM the name of a loaded one.
    """
    if worker.settings.is_vllm:
        return Namespace(asked.cache_salt, worker.adapters.resolve(asked.model))
    model, lora_name = worker.settings.model, asked.lora_name
    if asked.model not in (None, model):
        base, _, lora_name = asked.model.rpartition(":")
        if base != model or not lora_name:
            raise ApiError(404, f"the model {asked.model!r} does not exist")
    if worker.settings.lora:
        worker.adapters.check(lora_name)
    return Namespace(asked.cache_salt, lora_name)


def _ticket(
    worker: Worker, request: web.Request, asked: InferenceRequest, prompt_tokens: int
) -> Ticket:
    return Ticket(
        id=asked.rid or uuid.uuid4().hex,
        created=int(time.time()),
        model=asked.model if worker.settings.is_vllm and asked.model else worker.settings.model,
        fingerprint=f"simulator-{listening_port(request)}",
        prompt_tokens=prompt_tokens,
        sequences=asked.sequences,
        is_batch=asked.is_batch,
        include_usage=asked.include_usage,
        wants_base64=asked.wants_base64,
    )


def _fault(worker: Worker, request: web.Request) -> RequestFault:
    header = request.headers.get(FAULT_HEADER)
    if header is None:
        return worker.faults.take()
    try:
        return parse_header(header)
    except ValueError as error:
        raise ApiError(400, f"{FAULT_HEADER}: {error}") from error


def _fault_answer(status: int, fault: RequestFault) -> web.Response:
    response = json_answer(error_body(status, f"simulated fault: status {status}"), status)
    if fault.retry_after is not None:
        response.headers["Retry-After"] = f"{fault.retry_after:g}"
    return response


def _rank(worker: Worker, request: web.Request, asked: InferenceRequest) -> int | None:
    """The rank that the request names; the header overrides the body, which vLLM ignores."""
    header = request.headers.get(_RANK_HEADER)
    if header is None:
        return None if worker.settings.is_vllm else asked.dp_rank
    try:
        return int(header)
    except ValueError as error:
        raise ApiError(400, f"{_RANK_HEADER}: {header!r} is not an integer") from error


def _job(
    worker: Worker,
    asked: InferenceRequest,
    prompts: Sequence[Sequence[int]],
    namespace: Namespace,
    rid: str,
    rank: int | None,
    fault: RequestFault,
) -> Job:
    max_tokens = asked.max_tokens
    return Job(
        rid=rid,
        prompts=prompts,
        namespace=namespace,
        max_tokens=worker.settings.default_max_tokens if max_tokens is None else max_tokens,
        natural_end=max_tokens is None,
        sequences=asked.sequences,
        seconds_per_token=fault.slow_token,
        rank=rank,
        reads_cache=asked.reads_cache,
    )


@contextlib.contextmanager
def _submit(worker: Worker, leg: Leg, job: Job) -> Iterator[Output]:
    """The request in the engine, until the context ends."""
    try:
        parts = [worker.engine.submit(each) for each in leg.jobs(job)]
    except LookupError as error:
        raise ApiError(400, f"routed_dp_rank: {error}") from error
    except QueueFullError:
        raise ApiError(503, "the request queue is full") from None
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(part)
        yield parts[0] if len(parts) == 1 else SplitGeneration(parts)


class _Run:
    """Runs one request through the engine and writes its answer."""

    def __init__(
        self,
        worker: Worker,
        request: web.Request,
        entry: Entry,
        answer: Answer,
        fault: RequestFault,
        leg: Leg,
    ) -> None:
        self._worker = worker
        self._request = request
        self._entry = entry
        self._answer = answer
        self._fault = fault
        self._leg = leg

    async def whole(self, generation: Output) -> web.Response:
        await self._prefill(generation)
        while True:
            if await self._strike(generation.produced):
                raise ApiError(500, "simulated fault: failed on the way")
            if not await generation.next_token():
                break
            self._entry.completion_tokens = generation.produced * generation.sequences
        reason, besides = self._finish(generation)
        whole = self._answer.whole(generation.produced, reason)
        return json_answer(whole | besides if isinstance(whole, dict) else whole)

    async def stream(self, generation: Output) -> web.StreamResponse:
        await self._prefill(generation)
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
            }
        )
        await response.prepare(self._request)
        await response.write(self._answer.opening())
        while True:
            if await self._strike(generation.produced):
                self._worker.journal.close(self._entry, "failed")
                error = error_body(500, "simulated fault: failed on the way")
                await response.write(self._answer.failure(error))
                break
            if not await generation.next_token():
                reason, _ = self._finish(generation)
                await response.write(self._answer.closing(generation.produced, reason))
                break
            self._entry.completion_tokens = generation.produced * generation.sequences
            await response.write(self._answer.token(generation.produced - 1))
        await response.write_eof()
        return response

    async def _prefill(self, generation: Output) -> None:
        await self._leg.prefill(generation)
        self._answer.cached_tokens = self._entry.cached_tokens = generation.cached_tokens
        self._entry.rank = generation.rank

    def _finish(self, generation: Output) -> tuple[FinishReason, dict[str, Any]]:
        """The finish reason and the further fields of the answer."""
        reason = generation.finish_reason or "abort"
        if reason == "abort":
            self._worker.journal.close(self._entry, "aborted")
        return reason, self._leg.finish(generation)

    async def _strike(self, produced: int) -> bool:
        """Apply the fault at this token; True if the answer must fail here."""
        fault = self._fault
        if produced == fault.die_after_tokens:
            await _die(self._worker, self._request, self._entry, fault)
        if produced == fault.stall_after_tokens:
            await _forever()
        return produced == fault.error_after_tokens


async def _die(worker: Worker, request: web.Request, entry: Entry, fault: RequestFault) -> NoReturn:
    """Send what is in the buffer, break the connection and end this handler."""
    worker.journal.close(entry, "failed")
    transport = request.transport
    if transport is not None:
        # A transport has no event for an empty write buffer.
        while transport.get_write_buffer_size():  # noqa: ASYNC110
            await asyncio.sleep(_FLUSH_POLL_SECONDS)
        if fault.reset:
            _reset_on_close(transport)
        transport.abort()
    await _forever()


def _reset_on_close(transport: asyncio.Transport) -> None:
    connection = transport.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):  # the client has already closed
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)


async def _forever() -> NoReturn:
    """Wait until this handler is cancelled; a lost connection cancels it."""
    while True:
        await asyncio.get_running_loop().create_future()
