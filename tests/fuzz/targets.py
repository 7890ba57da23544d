"""The targets: each takes any bytes, and raises if the code under test breaks a promise.

Errors that the code documents are answers and not faults. A hang and too much memory are found by
the fuzzer, which has limits for both.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer, models

from extproc.engines.engine import DEFAULT_ENGINE
from extproc.engines.sglang.chats import SglangChat
from extproc.errors import RouterError
from extproc.kv import wire_chunks
from extproc.kv.events import AllBlocksCleared, BlockStored, EventBatch, KvEvent, WireError
from extproc.kv.wire import decode_events, decode_load
from extproc.kv.wire_chunks import decode_in_parts
from extproc.routing.json_members import with_members
from extproc.routing.request import ENDPOINT_PATHS, ClientHeaders, find_endpoint, parse_body
from extproc.steering import MEMBER_MAPS, STEERING_MEMBERS
from extproc.tokenization.chat_template import ChatTemplates
from extproc.tokenization.errors import TokenizerError, UnmappableError
from extproc.tokenization.prompts import read_prompt
from extproc.tokenization.tokenizer_files import TokenizerFiles

SGLANG = DEFAULT_ENGINE.rules

__all__ = ["TARGETS"]

_NO_HEADERS: Final = ClientHeaders("", ())
_MEMBERS: Final = b'"bootstrap_host":"10.0.0.1","bootstrap_room":7'


class _Members(msgspec.Struct):
    bootstrap_host: str
    bootstrap_room: int


_ERROR_TEXT_MAX_CHARS: Final = 300
_PROMPT_MAX_BYTES: Final = 1 << 20


def bodies(data: bytes) -> None:
    """The first byte picks the endpoint and whether its prompt is decoded; the rest is the body."""
    if not data:
        return
    paths = [path for path in ENDPOINT_PATHS if path != "/v1/models"]
    path = paths[data[0] // 2 % len(paths)]
    body = data[1:]
    _check_prompt(path, body)
    try:
        request = parse_body(
            find_endpoint("POST", path),
            body,
            lambda: _NO_HEADERS,
            prompt_max_bytes=_PROMPT_MAX_BYTES * (data[0] & 1),
        )
    except RouterError as error:
        _check_refusal(error)
        return
    assert request.model is None or request.model, "an empty model"
    names = msgspec.json.decode(request.body, type=dict[str, msgspec.Raw])
    _check_steering(names)
    changed = with_members(request.body, _MEMBERS)
    assert msgspec.json.decode(changed, type=_Members) == _Members("10.0.0.1", 7)
    sent = _read_by_an_engine(request.body)
    if sent is not None:
        assert sent.get("model") == request.model, "an engine would read another model"
        assert (sent.get("stream") is True) == request.stream, "an engine would not stream"


def _check_refusal(error: RouterError) -> None:
    assert 400 <= error.status < 500, error
    # A text that quotes the body could put a prompt into logs and answers.
    assert len(error.message) < _ERROR_TEXT_MAX_CHARS, error
    assert error.message.isascii(), error


def _check_prompt(path: str, body: bytes) -> None:
    prompt = read_prompt(SGLANG, path, body)
    found = [one for one in (prompt.chat, prompt.text, prompt.ids) if one is not None]
    assert len(found) == (0 if prompt.reason else 1), prompt.reason


def _check_steering(members: Mapping[str, msgspec.Raw]) -> None:
    assert not STEERING_MEMBERS & members.keys(), "a client's member steers the engine"
    for name in MEMBER_MAPS:
        if name not in members:
            continue
        try:
            inner = msgspec.json.decode(members[name], type=dict[str, msgspec.Raw])
        except msgspec.ValidationError:
            continue  # not an object
        assert not STEERING_MEMBERS & inner.keys(), "a client's inner member steers the engine"


def _read_by_an_engine(body: bytes | bytearray) -> dict[str, Any] | None:
    """What Python's parser reads; None for faults that the service leaves to the engine, since its
    own parser skips the values that it does not need.
    """
    try:
        # Numbers are kept as texts, since there is a limit for their length.
        read = json.loads(body.decode(), parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return None
    assert isinstance(read, dict), "not a JSON object, but routed"
    return read


def events(data: bytes) -> None:
    """A batch of KV events or a load report; a batch means the same in parts."""
    with contextlib.suppress(WireError):
        decode_load(data)
    try:
        whole = decode_events(data)
    except WireError:
        whole = None
    try:
        with _small_parts():
            parts = list(decode_in_parts(data))
    except WireError:
        # What cannot be read in parts is asked for again, so nothing of it is believed.
        return
    if whole is None:
        return
    assert whole.removals_lost <= any(part.removals_lost for part in parts), "a removal got lost"
    assert whole.dp_rank == parts[0].dp_rank
    # A piece of an event that cannot be decoded may be decodable.
    assert whole.skipped or _held([whole]) == _held(parts), "the parts mean something else"


@contextlib.contextmanager
def _small_parts() -> Iterator[None]:
    """Cut batches of a few bytes, as only large ones are."""
    before = wire_chunks._PART_BYTES, wire_chunks._UNITS_PER_PIECE
    _set_part_sizes(60, 6)
    try:
        yield
    finally:
        _set_part_sizes(*before)


def _set_part_sizes(part_bytes: int, units: int) -> None:
    vars(wire_chunks).update(_PART_BYTES=part_bytes, _UNITS_PER_PIECE=units)


def _held(batches: list[EventBatch]) -> dict[int, tuple[Any, ...]]:
    """What a cache with these events holds: each block with its tokens."""
    held: dict[int, tuple[Any, ...]] = {}
    for event in (one for batch in batches for one in batch.events):
        _apply(event, held)
    return held


def _apply(event: KvEvent, held: dict[int, tuple[Any, ...]]) -> None:
    if isinstance(event, AllBlocksCleared):
        held.clear()
    elif isinstance(event, BlockStored):
        size = event.block_size
        if len(event.tokens) != size * len(event.block_hashes):
            return
        parent = event.parent_block_hash
        for number, block in enumerate(event.block_hashes):
            tokens = tuple(event.tokens[number * size : (number + 1) * size].tolist())
            held[block] = (parent, tokens, event.bigram, event.medium, event.lora)
            parent = block
    else:
        for block in event.block_hashes:
            held.pop(block, None)


_CHAT: Final = SglangChat(
    messages=[
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the weather in Paris?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "1",
                    "index": 0,
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"city": "Paris"}},
                }
            ],
        },
        {"role": "tool", "content": "18", "tool_call_id": "1"},
        {"role": "user", "content": "And tomorrow?"},
    ],
    tools=[
        {
            "type": "function",
            "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
        }
    ],
)
_TEXT_MAX_CHARS: Final = 100_000
_SPECIAL_TOKENS: Final = {"bos_token": "<s>", "eos_token": "</s>"}
_NO_TOKENIZER: Final = Tokenizer(models.WordLevel({}, unk_token=""))


def templates(data: bytes) -> None:
    """A chat template of a hostile model folder: compiled, then rendered."""
    source = data.decode(errors="replace")
    files = TokenizerFiles(
        _NO_TOKENIZER, _SPECIAL_TOKENS, {"default": source}, {"default": Path("/m/x.jinja")}
    )
    try:
        rendered = ChatTemplates(files).render(_CHAT, _TEXT_MAX_CHARS)
    except (TokenizerError, UnmappableError):
        return
    assert len(rendered.text) <= _TEXT_MAX_CHARS


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "bodies": bodies,
    "events": events,
    "templates": templates,
}
