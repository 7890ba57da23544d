"""Answers of the APIs that generate text: whole bodies and server-sent events.

An answer names its worker (`system_fingerprint` holds the port) and makes each piece
of the stream from a position alone, so nothing is kept per token.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import msgspec

from extproc.simulator.engine import FinishReason

__all__ = ["Answer", "ChatAnswer", "CompletionAnswer", "Ticket", "event", "text_of", "token_text"]

T = TypeVar("T")

_WORDS = ("a", "token", "from", "the", "simulated", "worker", "and", "then", "another")
_DONE = b"data: [DONE]\n\n"


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """The identity of one answer: the identity every body and event of one answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str
    prompt_tokens: int
    sequences: int
    is_batch: bool
    include_usage: bool
    wants_base64: bool


def token_text(position: int) -> str:
    """The text of the token at that position of any output."""
    return _WORDS[position % len(_WORDS)] + " "


def text_of(tokens: int) -> str:
    return "".join(token_text(position) for position in range(tokens))


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event with a JSON payload."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


class Answer:
    """The answer to one request; without streaming only `whole` is asked for."""

    streams: ClassVar[bool] = True

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.cached_tokens = 0  # prompt tokens found in the cache; known after the prefill

    def whole(self, produced: int, reason: FinishReason) -> Any:
        """The JSON body after `produced` tokens of every sequence."""
        raise NotImplementedError

    def opening(self) -> bytes:
        """The events sent together with the headers, before the first token."""
        return b""

    def token(self, position: int) -> bytes:
        """The events of the token at that position, for every sequence."""
        raise NotImplementedError

    def closing(self, produced: int, reason: FinishReason) -> bytes:
        """The events that end the stream after `produced` tokens."""
        raise NotImplementedError

    def failure(self, error: Any) -> bytes:
        """The event that ends a stream after a failure."""
        return event(error) + _DONE

    def usage(self, produced: int) -> dict[str, Any]:
        completion_tokens = produced * self.ticket.sequences
        return {
            "prompt_tokens": self.ticket.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.ticket.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def per_sequence(self, make: Callable[[int], T]) -> list[T]:
        return [make(index) for index in range(self.ticket.sequences)]


class _OpenAIAnswer(Answer):
    """The parts that chat and completions share: the frame around the choices."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def _frame(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.ticket.id,
            "object": kind,
            "created": self.ticket.created,
            "model": self.ticket.model,
            "system_fingerprint": self.ticket.fingerprint,
            "choices": choices,
        }

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        frame = self._frame(self.chunk_object, [choice])
        if self.ticket.include_usage:
            frame["usage"] = None
        return event(frame)

    def _end(self, produced: int) -> bytes:
        if not self.ticket.include_usage:
            return _DONE
        frame = self._frame(self.chunk_object, [])
        return event(frame | {"usage": self.usage(produced)}) + _DONE


class ChatAnswer(_OpenAIAnswer):
    """`/v1/chat/completions`."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, produced: int, reason: FinishReason) -> Any:
        message = {"role": "assistant", "content": text_of(produced)}
        choices = self.per_sequence(
            lambda index: {
                "index": index,
                "message": message,
                "logprobs": None,
                "finish_reason": reason,
            }
        )
        return self._frame(self.whole_object, choices) | {"usage": self.usage(produced)}

    def opening(self) -> bytes:
        return self._deltas({"role": "assistant", "content": ""})

    def token(self, position: int) -> bytes:
        return self._deltas({"content": token_text(position)})

    def closing(self, produced: int, reason: FinishReason) -> bytes:
        return self._deltas({}, reason) + self._end(produced)

    def _deltas(self, delta: dict[str, str], reason: FinishReason | None = None) -> bytes:
        chunks = self.per_sequence(
            lambda index: self._chunk(
                {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            )
        )
        return b"".join(chunks)


class CompletionAnswer(_OpenAIAnswer):
    """`/v1/completions`."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def whole(self, produced: int, reason: FinishReason) -> Any:
        text = text_of(produced)
        choices = self.per_sequence(lambda index: self._choice(index, text, reason))
        return self._frame(self.whole_object, choices) | {"usage": self.usage(produced)}

    def token(self, position: int) -> bytes:
        return self._texts(token_text(position), None)

    def closing(self, produced: int, reason: FinishReason) -> bytes:
        return self._texts("", reason) + self._end(produced)

    def _texts(self, text: str, reason: FinishReason | None) -> bytes:
        chunks = self.per_sequence(lambda index: self._chunk(self._choice(index, text, reason)))
        return b"".join(chunks)

    @staticmethod
    def _choice(index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
