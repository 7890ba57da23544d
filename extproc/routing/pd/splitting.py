"""Which requests a prefill and a decode worker can serve together, and what the prefill is sent.

Read from SGLang 0.5.23 and vLLM 0.32. Both engines take their members on all paths that generate,
`/v1/messages` and `/v1/responses` too. What they cannot hand over differs. It is separate from the
passes since it looks at bodies only, and from `handoff`, which has the members themselves.
"""

import re
from typing import Any, Final

import msgspec
from msgspec import Struct

from extproc.errors import bad_request
from extproc.routing.pd.handoff import prompts_of_a_batch
from extproc.routing.request import MESSAGES_PATH, RESPONSES_PATH, Request

__all__ = [
    "NEWER_PATHS",
    "asks_for_copies",
    "check_for_sglang",
    "needs_one_worker",
    "prefill_members",
]

# On these, older versions of vLLM ignore `kv_transfer_params`.
NEWER_PATHS: Final = frozenset((MESSAGES_PATH, RESPONSES_PATH))

_HAND_OVER: Final = (
    b'"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,'
    b'"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
# One token, not streamed: only the KV cache of the prefill is needed. These follow the client's own
# members, and of members with one name the last one counts.
_CHAT: Final = (
    b'"stream":false,"stream_options":null,"max_tokens":1,"max_completion_tokens":1,'
    b'"min_tokens":0,' + _HAND_OVER
)
_MESSAGES: Final = b'"stream":false,"max_tokens":1,' + _HAND_OVER
# vLLM answers with 400 if it cannot parse the arguments of a tool that the client has named, and
# after one token it never can. With any tool it does not mind, and the prompt is the same.
_MESSAGES_WITH_A_NAMED_TOOL: Final = b'"tool_choice":{"type":"any"},' + _MESSAGES
_RESPONSES: Final = (
    b'"stream":false,"background":false,"store":false,"max_output_tokens":1,' + _HAND_OVER
)
# vLLM runs these itself, and begins each further turn with the handle of the first one.
_TOOLS_OF_VLLM: Final = frozenset(("code_interpreter", "container", "mcp", "web_search_preview"))


class _Typed(Struct):
    type: Any = None


class _ResponsesFields(Struct):
    previous_response_id: Any = None
    tools: list[_Typed] | None = None


class _MessagesFields(Struct):
    tool_choice: _Typed | None = None


class _Copies(Struct):
    """The members by which one prompt has several answers."""

    n: Any = None
    best_of: Any = None
    use_beam_search: Any = None
    sampling_params: Any = None


# A name may be written with escapes.
_MAY_ASK_FOR_COPIES: Final = re.compile(rb"\"(?:n|best_of|use_beam_search)\"|\\u00")
_copies_decoder: Final = msgspec.json.Decoder(_Copies)
_responses_decoder: Final = msgspec.json.Decoder(_ResponsesFields)
_messages_decoder: Final = msgspec.json.Decoder(_MessagesFields)
_NOT_DECODABLE: Final = (msgspec.DecodeError, RecursionError)


def needs_one_worker(request: Request) -> bool:
    """True if vLLM cannot hand the cache over for this request, so that one worker serves it alone.

    It answers a batch with the blocks of its first prompt only, and keeps those of copies for
    itself. A response that follows another one is known to the worker that made the other one.
    """
    if request.endpoint.path == RESPONSES_PATH:
        fields = _responses_fields(request)
        return fields.previous_response_id is not None or any(
            tool.type in _TOOLS_OF_VLLM for tool in fields.tools or ()
        )
    return asks_for_copies(request) or (prompts_of_a_batch(request) or 1) > 1


def check_for_sglang(request: Request) -> None:
    """Raise RouterError 400 for a request that a pair of SGLang cannot serve.

    A decode worker there cannot prefill. The engine hangs on copies. Of a response the prefill
    worker keeps its own single token, so that a response that follows has two different prompts.
    """
    if asks_for_copies(request):
        raise bad_request(
            "`n` above 1 cannot be served by prefill and decode workers of this engine"
        )
    if request.endpoint.path != RESPONSES_PATH:
        return
    if _responses_fields(request).previous_response_id is not None:
        raise bad_request(
            "`previous_response_id` cannot be served by prefill and decode workers of this engine: "
            "send the whole conversation in `input`"
        )


def prefill_members(request: Request) -> bytes:
    """The members that a body gets in vLLM's prefill: one token, and the cache to hand over."""
    path = request.endpoint.path
    if path == RESPONSES_PATH:
        return _RESPONSES
    if path == MESSAGES_PATH:
        return _MESSAGES_WITH_A_NAMED_TOOL if _names_a_tool(request) else _MESSAGES
    return _CHAT


def _responses_fields(request: Request) -> _ResponsesFields:
    try:
        return _responses_decoder.decode(request.body)
    except _NOT_DECODABLE:
        return _ResponsesFields()  # the engine refuses it


def _names_a_tool(request: Request) -> bool:
    try:
        choice = _messages_decoder.decode(request.body).tool_choice
    except _NOT_DECODABLE:
        return False
    return choice is not None and choice.type == "tool"


def asks_for_copies(request: Request) -> bool:
    """True if the engine would make several answers to one prompt.

    Engines also read numbers that are sent as text. On NEWER_PATHS they have no such members.
    """
    if request.endpoint.path in NEWER_PATHS or not _MAY_ASK_FOR_COPIES.search(request.body):
        return False
    try:
        found = _copies_decoder.decode(request.body)
    except _NOT_DECODABLE:
        return False
    params = found.sampling_params
    nested = [one.get("n") for one in _listed(params) if isinstance(one, dict)]
    return found.use_beam_search is True or any(
        _is_above_one(value) for value in (found.n, found.best_of, *nested)
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_above_one(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() not in ("", "0", "1")
    return isinstance(value, int | float) and value > 1
