"""Asks an engine for the token ids of a request's body.

vLLM (0.32) renders a body as it would for a request at `<path>/render`, if it was started with
`--enable-scale-out`; without it, `/tokenize` renders chats and completions. SGLang (0.5.23) has
`/v1/tokenize` for both. These render and encode, and cost no place in a batch. Nothing of an answer
is trusted: it is limited in size and time, and only ids are taken from it.
"""

from typing import Annotated, Final, Literal, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from extproc.engines.engine import EngineName
from extproc.errors import ServiceError
from extproc.worker_url import WorkerUrl
from extproc.workers.engine_calls import EngineUnreachableError, TokensClient

__all__ = ["EngineTokenizer", "NoTokensReason", "NoTokensToldError"]

# `no_endpoint`: the engine has no such endpoint, or not for this kind of body. `refused`: it
# answered with an error. `unreachable`: no complete answer, in time and size. `unreadable`: an
# answer without token ids.
NoTokensReason: TypeAlias = Literal["no_endpoint", "refused", "unreachable", "unreadable"]

_CHAT: Final = "/v1/chat/completions"
_COMPLETION: Final = "/v1/completions"
_RENDERED: Final = frozenset({_CHAT, _COMPLETION, "/v1/responses", "/v1/messages"})
# An answer names each id once, with a comma and a space, and few other members.
_BYTES_PER_TOKEN: Final = 14
_BYTES_MORE: Final = 64 * 1024
# Without the endpoint, or switched off.
_ABSENT: Final = frozenset({403, 404, 405, 501})
_OK: Final = 200
_OVERLOADED: Final = frozenset({429, 503})

_Id: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 32)]


class _Tokens(Struct):
    """The answer of `/tokenize` or, with the other name, of a render endpoint."""

    tokens: list[_Id] | None = None
    token_ids: list[_Id] | None = None


_decoder: Final = msgspec.json.Decoder(_Tokens | list[_Tokens])
_NOT_DECODABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class NoTokensToldError(ServiceError):
    """The engine has not answered with the ids."""

    def __init__(self, reason: NoTokensReason, text: str) -> None:
        super().__init__(text)
        self.reason: NoTokensReason = reason


class EngineTokenizer:
    """Asks engines, each in its own way; remembers nothing."""

    def __init__(self, client: TokensClient) -> None:
        self._client = client

    async def ask(
        self,
        url: WorkerUrl,
        engine: EngineName,
        path: str,
        body: bytes,
        *,
        timeout_seconds: float,
        tokens_max: int,
        absent: set[str] | None = None,
        rendered_only: bool = False,
    ) -> NDArray[np.uint64]:
        """The ids of the prompt of `body`, sent to `path`, as the engine computes them.

        Each attempt may take `timeout_seconds`; an engine is asked in at most two ways, without the
        paths that are `absent`, to which those are added that it turns out not to have. With
        `rendered_only` it is asked only where it renders as for a request. Raises
        NoTokensToldError, also for more than `tokens_max` ids.
        """
        absent = set() if absent is None else absent
        problem = NoTokensToldError("no_endpoint", f"{engine} has no endpoint for {path}")
        max_bytes = tokens_max * _BYTES_PER_TOKEN + _BYTES_MORE
        for way in _ways(engine, path, rendered_only):
            if way in absent:
                continue
            try:
                answer = await self._client.post(url, way, body, timeout_seconds, max_bytes)
            except EngineUnreachableError as error:
                raise NoTokensToldError("unreachable", f"{way}: {error}") from error
            if answer.status == _OK:
                return _ids(way, answer.body, tokens_max)
            if answer.status in _ABSENT:
                absent.add(way)
            else:
                problem = NoTokensToldError("refused", f"{way} answered {answer.status}")
            if answer.status in _OVERLOADED or answer.status in (401, 407):
                break
        raise problem


def _ways(engine: EngineName, path: str, rendered_only: bool) -> tuple[str, ...]:
    """The paths at which an engine can be asked with the body, the most exact one first."""
    has_other = path in (_CHAT, _COMPLETION)
    if engine == "sglang":
        return ("/v1/tokenize",) if has_other else ()
    ways = (f"{path}/render",) if path in _RENDERED else ()
    return (*ways, "/tokenize") if has_other and not rendered_only else ways


def _ids(way: str, body: bytes, tokens_max: int) -> NDArray[np.uint64]:
    try:
        answer = _decoder.decode(body)
    except _NOT_DECODABLE:
        raise NoTokensToldError("unreadable", f"{way} answered without token ids") from None
    if isinstance(answer, list):
        if len(answer) != 1:
            raise NoTokensToldError("unreadable", f"{way} answered for {len(answer)} prompts")
        answer = answer[0]
    ids = answer.tokens if answer.tokens is not None else answer.token_ids
    if ids is None:
        raise NoTokensToldError("unreadable", f"{way} answered without token ids")
    if len(ids) > tokens_max:
        raise NoTokensToldError("unreadable", f"{way} answered more than {tokens_max} ids")
    return np.fromiter(ids, np.uint64, len(ids))
