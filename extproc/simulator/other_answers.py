"""Answers of the other APIs: SGLang's own, Anthropic's, Responses, embeddings and scores."""

import base64
import struct
from typing import Any

from extproc.simulator.answers import Answer, ChatAnswer, CompletionAnswer, event, text_of
from extproc.simulator.answers import token_text as token_text_at
from extproc.simulator.engine import FinishReason

__all__ = ["answers"]

_EMBEDDING = (0.5, -0.25, 0.125, 0.75, -0.5, 0.25, -0.125, -0.75)


class _GenerateAnswer(Answer):
    """`/generate`: every event repeats the whole text so far, as the engine's default does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._text = ""

    def whole(self, produced: int, reason: FinishReason) -> Any:
        items = self.per_sequence(lambda index: self._item(text_of(produced), produced, reason))
        return items if self.ticket.is_batch else items[0]

    def token(self, position: int) -> bytes:
        self._text += token_text_at(position)
        return self._items(self._text, position + 1, None)

    def closing(self, produced: int, reason: FinishReason) -> bytes:
        return self._items(self._text, produced, reason) + b"data: [DONE]\n\n"

    def _items(self, text: str, produced: int, reason: FinishReason | None) -> bytes:
        def item(index: int) -> bytes:
            body = self._item(text, produced, reason)
            return event(body | {"index": index} if self.ticket.is_batch else body)

        return b"".join(self.per_sequence(item))

    def _item(self, text: str, produced: int, reason: FinishReason | None) -> dict[str, Any]:
        finish: dict[str, Any] | None = None
        if reason is not None:
            finish = {"type": reason}
            if reason == "length":
                finish["length"] = produced
        return {
            "text": text,
            "meta_info": {
                "id": self.ticket.id,
                "finish_reason": finish,
                "prompt_tokens": self.ticket.prompt_tokens,
                "completion_tokens": produced,
                "cached_tokens": self.cached_tokens,
                "model": self.ticket.model,
                "system_fingerprint": self.ticket.fingerprint,
            },
        }


class _MessagesAnswer(Answer):
    """`/v1/messages`, the Anthropic API."""

    def whole(self, produced: int, reason: FinishReason) -> Any:
        content = [{"type": "text", "text": text_of(produced)}]
        usage = self._input_usage() | {"output_tokens": produced}
        return self._message(content, _anthropic_reason(reason), usage)

    def opening(self) -> bytes:
        message = self._message([], None, self._input_usage() | {"output_tokens": 0})
        block = {"type": "text", "text": ""}
        return _named({"type": "message_start", "message": message}) + _named(
            {"type": "content_block_start", "index": 0, "content_block": block}
        )

    def token(self, position: int) -> bytes:
        delta = {"type": "text_delta", "text": token_text_at(position)}
        return _named({"type": "content_block_delta", "index": 0, "delta": delta})

    def closing(self, produced: int, reason: FinishReason) -> bytes:
        delta = {"stop_reason": _anthropic_reason(reason), "stop_sequence": None}
        usage = {"output_tokens": produced}
        return (
            _named({"type": "content_block_stop", "index": 0})
            + _named({"type": "message_delta", "delta": delta, "usage": usage})
            + _named({"type": "message_stop"})
        )

    def failure(self, error: Any) -> bytes:
        return _named({"type": "error", **error})

    def _input_usage(self) -> dict[str, int]:
        return {
            "input_tokens": self.ticket.prompt_tokens,
            "cache_read_input_tokens": self.cached_tokens,
        }

    def _message(self, content: list[Any], reason: str | None, usage: Any) -> dict[str, Any]:
        return {
            "id": self.ticket.id,
            "type": "message",
            "role": "assistant",
            "model": self.ticket.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": None,
            "usage": usage,
            "system_fingerprint": self.ticket.fingerprint,
        }


class _ResponsesAnswer(Answer):
    """`/v1/responses`, one message of one text part."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._sequence_number = 0

    def whole(self, produced: int, reason: FinishReason) -> Any:
        item = self._item(text_of(produced), "completed")
        usage = {
            "input_tokens": self.ticket.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": produced,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.ticket.prompt_tokens + produced,
        }
        incomplete = {"reason": "max_output_tokens"} if reason == "length" else None
        status = "completed" if reason == "stop" else "incomplete"
        return self._response(status, [item]) | {"usage": usage, "incomplete_details": incomplete}

    def opening(self) -> bytes:
        item = self._item("", "in_progress") | {"content": []}
        return (
            self._event("response.created", response=self._response("in_progress", []))
            + self._event("response.output_item.added", output_index=0, item=item)
            + self._event("response.content_part.added", **self._place(), part=_part(""))
        )

    def token(self, position: int) -> bytes:
        text = token_text_at(position)
        return self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def closing(self, produced: int, reason: FinishReason) -> bytes:
        text = text_of(produced)
        whole = self.whole(produced, reason)
        item = self._item(text, "completed")
        return (
            self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
            + self._event("response.content_part.done", **self._place(), part=_part(text))
            + self._event("response.output_item.done", output_index=0, item=item)
            + self._event(f"response.{whole['status']}", response=whole)
        )

    def failure(self, error: Any) -> bytes:
        inner = error["error"]
        return self._event("error", code=str(inner["code"]), message=inner["message"], param=None)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    @property
    def _item_id(self) -> str:
        return f"msg_{self.ticket.id}"

    def _event(self, kind: str, **fields: Any) -> bytes:
        fields = {"type": kind, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return _named(fields)

    def _item(self, text: str, status: str) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part(text)],
        }

    def _response(self, status: str, output: list[Any]) -> dict[str, Any]:
        return {
            "id": self.ticket.id,
            "object": "response",
            "created_at": self.ticket.created,
            "status": status,
            "model": self.ticket.model,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "system_fingerprint": self.ticket.fingerprint,
        }


class _UnaryAnswer(Answer):
    """APIs without generated text; they never stream."""

    streams = False

    def _list(self, data: list[Any]) -> dict[str, Any]:
        return {
            "id": self.ticket.id,
            "object": "list",
            "created": self.ticket.created,
            "model": self.ticket.model,
            "data": data,
            "usage": self.usage(0),
            "system_fingerprint": self.ticket.fingerprint,
        }


class _EmbeddingAnswer(_UnaryAnswer):
    """`/v1/embeddings`: the same small vector for every input."""

    def whole(self, produced: int, reason: FinishReason) -> Any:
        vector: str | tuple[float, ...] = _EMBEDDING
        if self.ticket.wants_base64:
            vector = base64.b64encode(struct.pack(f"<{len(_EMBEDDING)}f", *_EMBEDDING)).decode()
        return self._list(
            self.per_sequence(
                lambda index: {"object": "embedding", "index": index, "embedding": vector}
            )
        )


class _ClassifyAnswer(_UnaryAnswer):
    """`/v1/classify`."""

    def whole(self, produced: int, reason: FinishReason) -> Any:
        return self._list(
            self.per_sequence(
                lambda index: {
                    "index": index,
                    "label": "LABEL_0",
                    "probs": [0.75, 0.25],
                    "num_classes": 2,
                }
            )
        )


class _RerankAnswer(_UnaryAnswer):
    """`/v1/rerank`: a bare list, best first; the order of the documents is kept."""

    def whole(self, produced: int, reason: FinishReason) -> Any:
        meta = {"id": self.ticket.id, "system_fingerprint": self.ticket.fingerprint}
        return self.per_sequence(
            lambda index: {"index": index, "score": 1.0 / (index + 1), "meta_info": meta}
        )


class _ScoreAnswer(_UnaryAnswer):
    """`/v1/score`."""

    def whole(self, produced: int, reason: FinishReason) -> Any:
        return {
            "object": "scoring",
            "model": self.ticket.model,
            "scores": self.per_sequence(lambda index: [0.75, 0.25]),
            "usage": self.usage(0),
            "system_fingerprint": self.ticket.fingerprint,
        }


def _named(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _anthropic_reason(reason: FinishReason) -> str:
    return "max_tokens" if reason == "length" else "end_turn"


answers: dict[str, type[Answer]] = {
    "/v1/chat/completions": ChatAnswer,
    "/v1/completions": CompletionAnswer,
    "/generate": _GenerateAnswer,
    "/v1/messages": _MessagesAnswer,
    "/v1/responses": _ResponsesAnswer,
    "/v1/embeddings": _EmbeddingAnswer,
    "/v1/classify": _ClassifyAnswer,
    "/v1/rerank": _RerankAnswer,
    "/v1/score": _ScoreAnswer,
}
