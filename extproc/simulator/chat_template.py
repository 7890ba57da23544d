"""Renders a chat to the text that the model reads, as the engine does (SGLang 0.5.23).

Templates come with models and are run in a sandbox. The environment is the one that model
files are written for, that of Hugging Face transformers: blocks leave no blank lines, tools are
printed as plain JSON, `raise_exception` refuses a chat, special tokens are variables.
"""

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import msgspec
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from extproc.simulator.chats import Chat

__all__ = [
    "ChatTemplate",
    "ChatTemplateError",
    "environment",
    "template_source",
    "template_variables",
]

_FILE = "chat_template.jinja"
_DEFAULT_NAME = "default"
_TOOLS_NAME = "tool_use"
_SPECIAL_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
# Templates of models that see or hear get their parts as they are.
_MEDIA_WORDS = ("image", "audio", "video", "vision")
_MEDIA_PARTS = {
    "image_url": "image",
    "input_image": "image",
    "video_url": "video",
    "audio_url": "audio",
}
_FIELDS_BESIDE_CONTENT = (
    *("tool_call_id", "name", "phase", "reasoning_content", "tool_calls", "tools", "prefix"),
)
_MESSAGE_NAMES = ("message", "msg", "m")


class ChatTemplateError(ValueError):
    """The template refuses the chat, or the model has no template."""


def template_variables(config: dict[str, Any]) -> dict[str, Any]:
    """The special tokens of a model's configuration, as variables of its template."""
    return {
        name: text
        for name in _SPECIAL_TOKENS
        if (text := _token_text(config.get(name))) is not None
    }


def template_source(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The sources of a model's templates by name; its file comes before its configuration."""
    file = folder / _FILE
    given = file.read_text("utf-8") if file.exists() else config.get("chat_template")
    if isinstance(given, list):
        return {item["name"]: item["template"] for item in given}
    return {} if given is None else {_DEFAULT_NAME: given}


class ChatTemplate:
    """The template of a model's folder; its `chat_template.jinja` comes before its config."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.bos_token = _token_text(config.get("bos_token"))
        self._variables = template_variables(config)
        sources = template_source(folder, config)
        self._templates = {name: _Template(source) for name, source in sources.items()}

    def render(self, chat: Chat) -> tuple[str, str]:
        """The text up to the answer, and the part of the answer that the chat already holds.

        Raises ChatTemplateError.
        """
        template = self._templates.get(_DEFAULT_NAME)
        if chat.tools is not None:
            template = self._templates.get(_TOOLS_NAME, template)
        if template is None:
            raise ChatTemplateError("the tokenizer folder has no chat template")
        messages = [template.message(message) for message in chat.messages]
        begun = ""
        if messages and messages[-1].get("role") == "assistant":
            said = messages[-1]["content"]
            if isinstance(said, str):
                messages.pop()
                if chat.continues:
                    begun = said
                else:
                    messages.append({"role": "user", "content": said})
        variables = self._variables | {"messages": messages} | chat.template_arguments
        tools = None if chat.tools is None else [_tool(tool) for tool in chat.tools]
        try:
            return template.render(variables, tools), begun
        except Exception:
            if tools is None:
                raise
        # Some templates expect bare functions.
        return template.render(variables, [tool["function"] for tool in tools]), begun


class _Template:
    def __init__(self, source: str) -> None:
        try:
            tree = environment.parse(source)
            self._compiled = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error}") from error
        self._takes_parts = any(word in source for word in _MEDIA_WORDS) or any(
            _is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For)
        )

    def render(self, variables: dict[str, Any], tools: list[dict[str, Any]] | None) -> str:
        try:
            return self._compiled.render(
                {"add_generation_prompt": True, "documents": None, "tools": tools} | variables
            )
        # A template is a program: when it fails on a chat, the chat is refused.
        except Exception as error:
            raise ChatTemplateError(f"chat template: {error}") from error

    def message(self, given: dict[str, Any]) -> dict[str, Any]:
        """A message as templates expect it: content they can read, and no nulls."""
        message = _known_fields(given)
        role, content = message["role"], message["content"]
        if isinstance(content, list):
            content = self._parts(content)
        if role == "tool" and isinstance(content, list) and all(map(_is_text, content)):
            content = _joined(content)
        message["content"] = content
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [_tool_call(call, role) for call in message["tool_calls"]]
        return message

    def _parts(self, parts: list[Any]) -> list[dict[str, Any]] | str:
        known = [part for part in parts if isinstance(part, dict)]
        if self._takes_parts:
            return [
                {"type": _MEDIA_PARTS[kind]} if (kind := part.get("type")) in _MEDIA_PARTS else part
                for part in known
            ]
        return _joined(filter(_is_text, known))


def _is_text(part: dict[str, Any]) -> bool:
    return part.get("type") == "text"


def _joined(parts: Iterable[dict[str, Any]]) -> str:
    return " ".join(part.get("text", "") for part in parts)


def _is_content(node: jinja2.nodes.Node | None) -> bool:
    """True if the expression is the content of a message, also filtered or sliced."""
    match node:
        case jinja2.nodes.Filter() | jinja2.nodes.Test():
            return _is_content(node.node)
        case jinja2.nodes.Getitem(arg=jinja2.nodes.Slice()):
            return _is_content(node.node)
        case jinja2.nodes.Getitem(
            node=jinja2.nodes.Name(name=name), arg=jinja2.nodes.Const(value="content")
        ):
            return name in _MESSAGE_NAMES
        case jinja2.nodes.Getattr(node=jinja2.nodes.Name(name=name), attr="content"):
            return name in _MESSAGE_NAMES
    return False


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with the fields of the engine's own model of it, and no others."""
    given = tool.get("function")
    if not isinstance(given, dict):
        raise ChatTemplateError("a tool needs a function")
    deferred = tool.get("defer_loading")
    function: dict[str, Any] = {
        name: value
        for name, value in given.items()
        if name in ("name", "description", "parameters")
        or (name in ("strict", "defer_loading") and value is not None)
    }
    for name in ("description", "parameters"):
        function.setdefault(name, None)
    if deferred is not None:
        function.setdefault("defer_loading", deferred)
    return {
        "type": tool.get("type", "function"),
        "function": function,
        "defer_loading": deferred,
    }


def _known_fields(given: dict[str, Any]) -> dict[str, Any]:
    """The fields that the engine's own model of a message keeps, in its order."""
    role, content = given.get("role", ""), given.get("content")
    kept = {"role": role.lower(), "content": "" if content is None else content}
    if role != "user":
        kept |= {
            name: given[name] for name in _FIELDS_BESIDE_CONTENT if given.get(name) is not None
        }
    return kept


def _tool_call(call: Any, role: str) -> dict[str, Any]:
    """A tool call with the fields of the engine's own model of it, nulls included.

    Arguments that were sent as JSON text become the object.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ChatTemplateError("a tool call needs a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and role == "assistant":
        try:
            arguments = msgspec.json.decode(arguments, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ChatTemplateError("arguments of a tool call must be a JSON object") from error
    return {
        "id": call.get("id"),
        "index": call.get("index"),
        "type": "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's text; only training uses it."""

    tags = {"generation"}  # noqa: RUF012  # the base class declares it so

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


environment = ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
)
environment.filters["tojson"] = _json
environment.globals["raise_exception"] = _refuse
environment.globals["strftime_now"] = _now
