"""Answers `/v1/tokenize` and `/v1/detokenize` with the tokenizer that routing uses.

So a client counts the same tokens as routing does, and no worker is asked.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from extproc.engines.engine import Engine
from extproc.errors import bad_request, no_tokenizer, service_overloaded
from extproc.routing.request import CHAT_PATH, DETOKENIZE_PATH, Request
from extproc.tokenization.encoder import Encoded, PromptEncoder
from extproc.tokenization.errors import EncoderBusyError, TextTooLongError, UnknownTokenError
from extproc.tokenization.reasons import BUSY

__all__ = ["Answer", "LocalEndpoints", "tokens_of"]

_TOKENS_MAX: Final = 1 << 18
_ID_MAX: Final = (1 << 32) - 1
_PROMPT: Final = "`prompt` (a text) or `messages` (a list)"


class Answer(Struct, frozen=True):
    """A response that this service gives itself: a JSON body with status 200."""

    body: bytes


class _Tokenize(Struct, forbid_unknown_fields=True):
    prompt: str | UnsetType = UNSET
    messages: list[Any] | UnsetType = UNSET
    model: str | None = None


class _Detokenize(Struct, forbid_unknown_fields=True):
    tokens: Annotated[list[Annotated[int, Meta(ge=0, le=_ID_MAX)]], Meta(max_length=_TOKENS_MAX)]
    model: str | None = None
    skip_special_tokens: bool = False


_BodyT = TypeVar("_BodyT", _Tokenize, _Detokenize)
_encoder: Final = msgspec.json.Encoder()


class LocalEndpoints:
    """`encoders` are by model id, for the models that have a tokenizer; `engines_of` a model are
    those of its workers. The first one's rules are used.
    """

    def __init__(
        self,
        encoders: Mapping[str, PromptEncoder],
        engines_of: Callable[[str], Sequence[Engine]],
    ) -> None:
        self._encoders = encoders
        self._engines_of = engines_of

    async def tokens(self, request: Request, model: str) -> dict[Engine, Encoded]:
        """The tokens of a request for each engine of the model's workers.

        Raises RouterError 404 without a tokenizer.
        """
        encoder = self._encoders.get(model)
        if encoder is None:
            raise no_tokenizer(model)
        return {
            engine: await tokens_of(encoder, engine, request) for engine in self._engines_of(model)
        }

    async def answer(self, request: Request, model: str) -> Answer:
        """Raises RouterError: 400 for another body than documented, 404 without a tokenizer."""
        encoder = self._encoders.get(model)
        if encoder is None:
            raise no_tokenizer(model)
        if request.endpoint.path == DETOKENIZE_PATH:
            wanted = _decode(request.body, _Detokenize, "`tokens` (a list of token ids)")
            try:
                text = await encoder.detokenize(
                    wanted.tokens, skip_special_tokens=wanted.skip_special_tokens
                )
            except UnknownTokenError:
                raise bad_request("`tokens` has an id outside the vocabulary") from None
            return Answer(_encoder.encode({"model": model, "text": text}))
        tokenize = _decode(request.body, _Tokenize, _PROMPT)
        if isinstance(tokenize.prompt, UnsetType) is isinstance(tokenize.messages, UnsetType):
            raise bad_request(f"either {_PROMPT} is needed")
        if isinstance(tokenize.prompt, UnsetType):
            ids = await _tokenize_chat(encoder, self._engines_of(model)[0], request.body)
        else:
            ids = await _tokenize_text(encoder, tokenize.prompt)
        return Answer(_encoder.encode({"model": model, "tokens": ids, "count": len(ids)}))


async def tokens_of(encoder: PromptEncoder, engine: Engine, request: Request) -> Encoded:
    """The tokens of a request as an engine would compute them, or the reason without them."""
    fields = request.take_fields()
    path = request.endpoint.path
    return await encoder.encode(await encoder.read(engine.rules, path, request.body, fields))


async def _tokenize_text(encoder: PromptEncoder, text: str) -> list[int]:
    try:
        return await encoder.tokenize(text)
    except TextTooLongError:
        raise bad_request("`prompt` is too long") from None
    except EncoderBusyError:
        raise service_overloaded() from None


async def _tokenize_chat(
    encoder: PromptEncoder, engine: Engine, body: bytes | bytearray
) -> list[int]:
    """The tokens by which such a chat is routed, with its template and the answer's beginning."""
    encoded = await encoder.encode(await encoder.read(engine.rules, CHAT_PATH, body, None))
    if encoded.reason == BUSY:
        raise service_overloaded()
    if encoded.ids is None:
        raise bad_request(f"the tokens of `messages` are not known: {encoded.reason}")
    ids: list[int] = encoded.ids.tolist()
    return ids


def _decode(body: bytes | bytearray, kind: type[_BodyT], needed: str) -> _BodyT:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        allowed = ", ".join(field.name for field in msgspec.structs.fields(kind))
        raise bad_request(f"{needed} is needed, and no fields but {allowed}") from None
