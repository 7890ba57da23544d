"""Asks a worker about itself: its model, its role, and where it publishes KV events.

SGLang answers `/server_info`. An engine without it (vLLM) is asked for `/v1/models` instead, and
for more in `vllm_answers`.
The worker's own answer counts more than what discovery says. No answer fails a registration: a
worker without a usable answer is registered without a model, and is asked again later.
"""

import re
from typing import Any, Literal

import msgspec
from msgspec import Struct

from extproc.clock import Clock
from extproc.engines.engine import EngineName
from extproc.errors import ServiceError
from extproc.worker_url import WorkerUrl
from extproc.workers.adapters import ModelList, is_name, read_model_list
from extproc.workers.engine_calls import (
    EngineAnswer,
    EngineTimeoutError,
    EngineUnreachableError,
    IntrospectionClient,
)
from extproc.workers.kv_announcement import read_kv_events
from extproc.workers.vllm_answers import is_vllm, vllm_kv_events
from extproc.workers.worker import KvEvents, Role, WorkerSpec

__all__ = ["Introspection", "IntrospectionWarning", "apply_introspection", "introspect"]

_TIMEOUT_SECONDS = 2.0
_FIRST_WAIT_SECONDS = 0.1
_NULL = msgspec.Raw(b"null")
_is_version = re.compile(r"[0-9A-Za-z.+_-]{1,64}").fullmatch
# What the decoder raises for an answer that is not as documented.
_NOT_DECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


IntrospectionWarning = Literal["no_bootstrap_port", "unknown_role"]


class _ServerInfo(Struct):
    """The fields that are read, undecoded: a wrong type in one must not cost the others."""

    served_model_name: msgspec.Raw = _NULL
    disaggregation_mode: msgspec.Raw = _NULL
    disaggregation_bootstrap_port: msgspec.Raw = _NULL
    kv_events: msgspec.Raw = _NULL
    speculative_algorithm: msgspec.Raw = _NULL
    enable_lora: msgspec.Raw = _NULL
    version: msgspec.Raw = _NULL
    reasoning_parser: msgspec.Raw = _NULL
    # Only vLLM has it, in its development mode.
    vllm_config: msgspec.Raw = _NULL


class Introspection(Struct, frozen=True, kw_only=True):
    """A worker's answer about itself.

    `role` is None if the answer does not have it. `problem` says why there is no usable answer, and
    `kv_problem` why its KV events cannot be used; both are empty if all is well. `unanswered` is
    set if the worker refused the connection, or was silent. `engine` is None and `engine_version`
    empty if they are not known; `reasoning_parser` is empty without one. `adapters` are those it
    has loaded, None if it did not say. It may load others while it runs if `lists_adapters` is set.
    `adapters_left_out` is the number of those that were not taken.
    """

    engine: EngineName | None = None
    engine_version: str = ""
    reasoning_parser: str = ""
    model_ids: tuple[str, ...] = ()
    adapters: tuple[str, ...] | None = None
    lists_adapters: bool = False
    adapters_left_out: int = 0
    role: Role | None = None
    bootstrap_port: int | None = None
    kv_events: KvEvents | None = None
    kv_problem: str = ""
    warning: IntrospectionWarning | None = None
    problem: str = ""
    unanswered: bool = False


class _NoAnswerError(ServiceError):
    """Every attempt ended in a network error or a 5xx, the last one as `silent` says.

    `late` is set if the worker did not answer in time.
    """

    def __init__(self, problem: str, *, silent: bool, late: bool) -> None:
        super().__init__(problem)
        self.silent = silent
        self.late = late


async def introspect(
    client: IntrospectionClient,
    url: WorkerUrl,
    clock: Clock,
    attempts: int,
    *,
    ranks_max: int,
    known: WorkerSpec | None = None,
) -> Introspection:
    """Ask a worker about itself; after a network error or a 5xx again, up to `attempts` times.

    The KV events of more than `ranks_max` data-parallel ranks cannot be used. `known` is what is
    known of the worker, so that an engine is asked what it can answer. Without a usable answer,
    `problem` of the result says why.
    """
    asked = _Asked(client, url, clock, attempts, ranks_max, known)
    engine = None if known is None else known.engine
    try:
        if engine == "vllm" and (found := await _from_vllm(asked)) is not None:
            return found
        answer = await asked.get("/server_info")
        if answer.status in (404, 405):
            return await _from_model_list(asked)
    except _NoAnswerError as error:
        # In its development mode, vLLM answers /server_info for the first time after many seconds.
        if engine is None and error.late and (found := await _from_vllm(asked.once())) is not None:
            return found
        return Introspection(problem=str(error), unanswered=error.silent)
    if answer.status != 200:
        return Introspection(problem=f"/server_info answered {answer.status}")
    try:
        answer.body.decode()  # the parser does not look at fields that are not read
        info = msgspec.json.decode(answer.body, type=_ServerInfo)
    except _NOT_DECODABLE:
        return Introspection(problem="/server_info is not a JSON object")
    if info.vllm_config != _NULL:
        try:
            return await _from_model_list(asked)
        except _NoAnswerError as error:
            return Introspection(problem=str(error), unanswered=error.silent)
    found = _with_kv_events(_read(info), info, url, ranks_max)
    return await _with_adapters(found, asked) if _value(info.enable_lora) is True else found


async def _with_adapters(found: Introspection, asked: "_Asked") -> Introspection:
    """Add the adapters that SGLang has loaded."""
    found = msgspec.structs.replace(found, lists_adapters=True)
    try:
        answer = await asked.once().get("/v1/models")
    except _NoAnswerError:
        return found
    listed = read_model_list(answer.body) if answer.status == 200 else None
    return found if listed is None else _listing(found, listed)


def _listing(found: Introspection, listed: ModelList) -> Introspection:
    return msgspec.structs.replace(
        found, adapters=listed.adapters, adapters_left_out=listed.left_out
    )


class _Asked(Struct, frozen=True):
    """A worker that is being asked; see introspect."""

    client: IntrospectionClient
    url: WorkerUrl
    clock: Clock
    attempts: int
    ranks_max: int
    known: WorkerSpec | None

    def once(self) -> "_Asked":
        return msgspec.structs.replace(self, attempts=1)

    async def get(self, path: str) -> EngineAnswer:
        """The first answer below 500; raises _NoAnswerError after the last attempt."""
        wait_seconds, silent, late = _FIRST_WAIT_SECONDS, False, False
        for attempt in range(self.attempts):
            if attempt:
                await self.clock.sleep(wait_seconds)
                wait_seconds *= 2
            try:
                answer = await self.client.get(self.url, path, _TIMEOUT_SECONDS)
            except EngineUnreachableError as error:
                problem, silent = f"{path}: {error}", True
                late = isinstance(error, EngineTimeoutError)
                continue
            if answer.status < 500:
                return answer
            problem, silent, late = f"{path} answered {answer.status}", False, False
        raise _NoAnswerError(problem, silent=silent, late=late)


async def _from_vllm(asked: _Asked) -> Introspection | None:
    """What vLLM says; None if it is not vLLM, or does not answer."""
    try:
        answer = await asked.get("/v1/models")
    except _NoAnswerError:
        return None
    if answer.status != 200 or not is_vllm(answer.body):
        return None
    return await _read_model_list(asked, answer)


async def _from_model_list(asked: _Asked) -> Introspection:
    return await _read_model_list(asked, await asked.get("/v1/models"))


async def _read_model_list(asked: _Asked, answer: EngineAnswer) -> Introspection:
    if answer.status != 200:
        return Introspection(problem=f"no /server_info, and /v1/models answered {answer.status}")
    listed = read_model_list(answer.body)
    if listed is None:
        return Introspection(problem="no /server_info, and /v1/models is not a list of models")
    found = _listing(Introspection(model_ids=listed.models), listed)
    if not is_vllm(answer.body):
        return msgspec.structs.replace(found, lists_adapters=bool(listed.adapters))
    found = msgspec.structs.replace(
        found, engine="vllm", engine_version=await _vllm_version(asked.once()), lists_adapters=True
    )
    known = None if asked.known is None else asked.known.kv_events
    try:
        events = await vllm_kv_events(asked.once().get, asked.url, asked.ranks_max, known)
    except _NoAnswerError:
        return found
    except ValueError as error:
        return msgspec.structs.replace(found, kv_problem=str(error))
    return msgspec.structs.replace(found, kv_events=events)


async def _vllm_version(asked: _Asked) -> str:
    """The version that the engine says; empty if it does not."""
    try:
        answer = await asked.get("/version")
        if answer.status != 200:
            return ""
        return _version(msgspec.json.decode(answer.body, type=_ServerInfo).version)
    except (_NoAnswerError, *_NOT_DECODABLE):
        return ""


def _version(raw: msgspec.Raw) -> str:
    found = _value(raw)
    return found if isinstance(found, str) and _is_version(found) else ""


def _value(raw: msgspec.Raw) -> Any:
    """The value of a field; an object that no field accepts if it cannot be decoded."""
    try:
        return msgspec.json.decode(raw)
    except _NOT_DECODABLE:
        return _NULL


def _read(info: _ServerInfo) -> Introspection:
    name = _value(info.served_model_name)
    model_ids: tuple[str, ...] = (name,) if is_name(name) else ()
    port = _value(info.disaggregation_bootstrap_port)
    has_port = isinstance(port, int) and not isinstance(port, bool) and 0 < port <= 65535
    match _value(info.disaggregation_mode):
        case None:
            return Introspection(model_ids=model_ids)
        case "null":  # the string by which the engine says that it is not disaggregated
            return Introspection(model_ids=model_ids, role="plain")
        case "prefill" if has_port:
            return Introspection(model_ids=model_ids, role="prefill", bootstrap_port=port)
        case "prefill":
            # The engine then listens on its own default port.
            return Introspection(
                model_ids=model_ids,
                role="prefill",
                warning="no_bootstrap_port",
            )
        case "decode":
            return Introspection(model_ids=model_ids, role="decode")
        case _:
            return Introspection(model_ids=model_ids, warning="unknown_role")


def _with_kv_events(
    answer: Introspection, info: _ServerInfo, url: WorkerUrl, ranks_max: int
) -> Introspection:
    if answer.model_ids:
        answer = msgspec.structs.replace(
            answer,
            engine="sglang",
            engine_version=_version(info.version),
            reasoning_parser=_version(info.reasoning_parser),
        )
    algorithm = _value(info.speculative_algorithm)
    try:
        found = read_kv_events(_value(info.kv_events), algorithm, url, ranks_max)
    except ValueError as error:
        return msgspec.structs.replace(answer, kv_problem=str(error))
    return msgspec.structs.replace(answer, kv_events=found) if found else answer


def apply_introspection(spec: WorkerSpec, answer: Introspection) -> WorkerSpec:
    """The spec with the worker's answer; what the answer leaves open stays as it was."""
    if answer.role is None:
        role, bootstrap_port = spec.role, spec.bootstrap_port
    else:
        role = answer.role
        bootstrap_port = answer.bootstrap_port
        if role == "prefill" and bootstrap_port is None:
            bootstrap_port = spec.bootstrap_port
    return msgspec.structs.replace(
        spec,
        role=role,
        model_ids=answer.model_ids or spec.model_ids,
        bootstrap_port=bootstrap_port,
        kv_events=answer.kv_events or spec.kv_events,
        engine=answer.engine or spec.engine,
        # A version belongs to the engine that said it.
        engine_version=spec.engine_version if answer.engine is None else answer.engine_version,
        reasoning_parser=(
            spec.reasoning_parser if answer.engine is None else answer.reasoning_parser
        ),
        adapters=spec.adapters if answer.adapters is None else answer.adapters,
        lists_adapters=answer.lists_adapters or spec.lists_adapters,
    )
