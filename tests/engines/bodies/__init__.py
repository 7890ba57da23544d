"""The bodies that both engines and the service are asked about, by endpoint.

Nothing but the standard library is imported here: the engines' environments read it, too.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.engines.bodies import chat, completions, media, messages, responses, tools

__all__ = ["Body", "all_bodies", "media_bodies"]

_AGENTS: Final = Path(__file__).parent / "agents"
# Files of requests as agents and clients send them, byte for byte.
_AGENT_PATHS: Final = {
    "claude-code": "/v1/messages",
    "claude-thinking": "/v1/messages",
    "codex-responses": "/v1/responses",
    "mcp-odd-type": "/v1/chat/completions",
    "vllm-tools": "/v1/chat/completions",
}


class Body(NamedTuple):
    """A request's body as sent to `path`; `name` is unique."""

    name: str
    path: str
    data: bytes

    @property
    def digest(self) -> str:
        """Tells whether a vector was made for this very body."""
        return hashlib.sha256(self.path.encode() + b"\0" + self.data).hexdigest()[:16]


@cache
def all_bodies() -> tuple[Body, ...]:
    """Every body, in an order that only grows; names are unique."""
    bodies = tuple(_bodies())
    names = [body.name for body in bodies]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise ValueError(f"two bodies have the name {sorted(doubled)}")
    return bodies


@cache
def media_bodies() -> tuple[Body, ...]:
    """The bodies with images; names are unique."""
    return tuple(
        Body(f"media{path.removeprefix('/v1')}/{name}", path, _data(body))
        for path, made in media.BODIES.items()
        for name, body in made.items()
    )


def _bodies() -> Iterator[Body]:
    for name, path in _AGENT_PATHS.items():
        yield Body(f"agents/{name}", path, (_AGENTS / f"{name}.json").read_bytes())
    for folder, path, made in (
        ("chat", "/v1/chat/completions", chat.BODIES),
        ("tools", "/v1/chat/completions", tools.BODIES),
        ("completions", "/v1/completions", completions.BODIES),
        ("responses", "/v1/responses", responses.BODIES),
        ("messages", "/v1/messages", messages.BODIES),
    ):
        for name, body in made.items():
            yield Body(f"{folder}/{name}", path, _data(body))


def _data(body: dict[str, Any] | str) -> bytes:
    """JSON as a client writes it; a string is JSON already, with what Python would not write."""
    if isinstance(body, str):
        return body.encode()
    return json.dumps({"model": "m", **body}, ensure_ascii=False).encode()
