"""Log events have the same field names everywhere, so that one query finds them all."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from msgspec import Struct

_PACKAGE: Final = Path(__file__).parents[2] / "extproc"
_LEVELS: Final = {"debug", "info", "warning", "error", "exception", "critical"}

# What a field means wherever it occurs.
_VOCABULARY: Final = {
    "worker": "the URL of a worker",
    "rank": "the data-parallel rank of the worker, a number",
    "model": "the id of one model",
    "adapter": "the name of a LoRA adapter of the model",
    "models": "the ids of several models",
    "role": "the role of a worker: plain, prefill or decode",
    "request_id": "the request",
    "reason": "why something was decided, refused or failed, from a closed set",
    "outcome": "how something ended",
    "error": "the text or class of an exception",
    "fix": "what the operator should change",
}
# Details of single events.
_DETAILS: Final = {
    "address",
    "admin",
    "attempt",
    "changed",
    "cached_tokens",
    "code",
    "completion_tokens",
    "cool_down_secs",
    "count",
    "discovery",
    "engine",
    "failures",
    "file",
    "grpc",
    "kv_events",
    "loaded",
    "name",
    "new",
    "objects",
    "of",
    "old",
    "open_streams",
    "path",
    "peer",
    "policy",
    "port",
    "predicted_tokens",
    "prompt_tokens",
    "read",
    "rid",
    "seconds",
    "served",
    "status",
    "stream",
    "tls",
    "total_tokens",
    "type",
    "unix_socket",
    "unloaded",
    "usable_workers",
    "version",
    "worker_id",
    "workers",
}


class LogCall(Struct, frozen=True):
    """One call of a logger: `fields` are the expressions by field name."""

    place: str
    event: str
    fields: dict[str, str]


def _log_calls() -> Iterator[LogCall]:
    for path in sorted(_PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="_log" | "log"), attr=level),
                    args=[event],
                    keywords=fields,
                ) if level in _LEVELS:
                    pass
                # What a session, which does no logging, returns to be logged.
                case ast.Call(func=ast.Name(id="log_event"), args=[_, event], keywords=fields):
                    pass
                case _:
                    continue
            place = f"{path.relative_to(_PACKAGE)}:{node.lineno}"
            found = {field.arg or "**": ast.unparse(field.value) for field in fields}
            yield LogCall(place, ast.unparse(event), found)


_CALLS: Final = list(_log_calls())


def test_log_calls_are_found() -> None:
    assert len(_CALLS) > 30
    assert any(call.event == "'worker_registered'" for call in _CALLS)


@pytest.mark.parametrize("call", _CALLS, ids=lambda call: f"{call.place} {call.event}")
def test_every_field_has_a_known_name(call: LogCall) -> None:
    assert call.fields.keys() <= _VOCABULARY.keys() | _DETAILS


@pytest.mark.parametrize("call", _CALLS, ids=lambda call: f"{call.place} {call.event}")
def test_worker_is_always_a_url(call: LogCall) -> None:
    assert call.fields.get("worker", "url").rstrip(")").endswith("url")


def test_every_known_name_is_used() -> None:
    used = {name for call in _CALLS for name in call.fields}
    assert _VOCABULARY.keys() | _DETAILS == used
