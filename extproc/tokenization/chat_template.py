"""Chat templates, run in the sandbox and with the surroundings that transformers gives them.

A template is compiled once and rendered for every chat. It comes with the model and is trusted
as little as the engine trusts it: in Jinja's immutable sandbox, with a bound on what it writes
and on its steps (see `template_limits`). Whatever it raises is a reason, never an exception, and
nothing of the prompt or of the template's own words leaves this module but the rendered text.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace
from msgspec import Struct

from extproc.errors import ServiceError
from extproc.tokenization.bodies.messages import for_template
from extproc.tokenization.bodies.openai_chat import ChatPrompt
from extproc.tokenization.errors import TokenizerError, UnmappableError
from extproc.tokenization.reasons import (
    MALFORMED,
    NO_CHAT_TEMPLATE,
    TEMPLATE_ERROR,
    TEMPLATE_LIMIT,
    TOO_LONG,
    UNSUPPORTED,
)
from extproc.tokenization.template_limits import (
    GROWING_METHODS,
    LimitedEnvironment,
    TemplateLimitError,
    check_arguments,
    limit_steps,
    limited,
)
from extproc.tokenization.tokenizer_files import TokenizerFiles

__all__ = ["ChatTemplates", "RenderedChat", "iterates_over_parts", "template_environment"]

_DEFAULT: Final = "default"
_WITH_TOOLS: Final = "tool_use"
_MEDIA_WORDS: Final = ("image", "audio", "video", "vision")
_MESSAGE_NAMES: Final = frozenset({"message", "msg", "m"})
_DICT_ATTRIBUTES: Final = frozenset(dir(dict))
# All but those that read attributes of their arguments, or can make long texts.
_STR_METHODS: Final = (
    frozenset(name for name in dir(str) if not name.startswith(("_", "format"))) - GROWING_METHODS
)
_TOOL_FIELDS: Final = frozenset({"type", "function", "defer_loading"})
# Of all of them together; the tools themselves take up several times as much.
_TOOL_TEXTS_MAX_CHARS: Final = 1 << 22
_SURROUNDINGS: Final = frozenset({LoopContext, Namespace})
_PLAIN: Final = frozenset({bool, dict, float, int, list, str})
# A family that takes a low effort under another name, if and only if its template has both.
_LOW_EFFORT_WORDS: Final = ("low_effort", "truncate_history_thinking")


class RenderedChat(Struct, frozen=True):
    """The text to encode without special tokens, and the beginning of the answer to continue."""

    text: str
    continued: str


class ChatTemplates:
    """The compiled templates of one model.

    `template_name`: always this one; without, the choice is that of transformers: `tool_use` if
    there are tools and it exists, else `default`. `default_kwargs` are what the engine was
    started with (`--default-chat-template-kwargs`). Raises TokenizerError for a template that
    does not compile and for a name that does not exist.
    """

    def __init__(
        self,
        files: TokenizerFiles,
        *,
        template_name: str | None = None,
        default_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self._special_tokens = files.special_tokens
        self._default_kwargs = default_kwargs or {}
        environment = template_environment()
        compiled = {
            name: _Template(environment, source, f"{files.template_files[name]} ({name})")
            for name, source in files.templates.items()
        }
        if template_name is not None and template_name not in compiled:
            known = ", ".join(sorted(compiled)) or "none at all"
            raise TokenizerError(f"chat template {template_name!r} does not exist, only {known}")
        self._default = compiled.get(template_name or _DEFAULT)
        self._with_tools = compiled.get(template_name or _WITH_TOOLS) or self._default

    def render(self, chat: ChatPrompt, max_chars: int) -> RenderedChat:
        """Raises UnmappableError."""
        template = self._default if chat.tools is None else self._with_tools
        if template is None:
            raise UnmappableError(NO_CHAT_TEMPLATE)
        messages, continued = for_template(chat.messages, template.keep_parts, chat.continue_final)
        if not messages:
            raise UnmappableError(MALFORMED)
        variables = {
            "messages": messages,
            "tools": chat.tools,
            "documents": None,
            "add_generation_prompt": True,
            **self._special_tokens,
            **self._kwargs(chat, template),
        }
        try:
            return RenderedChat(template.render(variables, max_chars), continued)
        except _TemplateFailedError:
            if chat.tools is None:
                raise UnmappableError(TEMPLATE_ERROR) from None
        # The engine's second try is for templates that want tools without their wrapping.
        variables["tools"] = [tool["function"] for tool in chat.tools]
        try:
            return RenderedChat(template.render(variables, max_chars), continued)
        except _TemplateFailedError:
            raise UnmappableError(TEMPLATE_ERROR) from None

    def _kwargs(self, chat: ChatPrompt, template: "_Template") -> dict[str, Any]:
        kwargs, effort = chat.template_kwargs, chat.effort
        if self._default_kwargs:
            kwargs = {**self._default_kwargs, **kwargs}
            if effort is None:
                effort = kwargs.get("reasoning_effort")
        if effort is None:
            return kwargs
        if effort == "low" and template.renames_low_effort:
            raise UnmappableError(UNSUPPORTED)
        return {"reasoning_effort": effort, **kwargs}


class _TemplateFailedError(ServiceError):
    """Whatever a template raised, without its words."""


class _Template:
    def __init__(self, environment: LimitedEnvironment, source: str, where: str) -> None:
        try:
            tree = environment.parse(source)
            self.keep_parts = iterates_over_parts(source, tree)
            self._template = environment.from_string(limited(tree, environment))
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise TokenizerError(f"{where}: the chat template does not compile: {error}") from error
        self.renames_low_effort = all(word in source for word in _LOW_EFFORT_WORDS)

    def render(self, variables: dict[str, Any], max_chars: int) -> str:
        written: list[str] = []
        room = max_chars
        limit_steps(variables)
        # Not render(): its errors are rewritten with the lines of the template, at some cost.
        try:
            context = self._template.new_context(variables)
            for piece in self._template.root_render_func(context):
                written.append(piece)
                room -= len(piece)
                if room < 0:
                    break
        except TemplateLimitError:
            raise UnmappableError(TEMPLATE_LIMIT) from None
        except Exception:
            raise _TemplateFailedError from None
        if room < 0:
            raise UnmappableError(TOO_LONG)
        return "".join(written)


def iterates_over_parts(source: str, tree: nodes.Template) -> bool:
    """Whether a template is given the parts of a content as a list, or else their joined text.

    The rule is the engine's, which judges by the template's syntax tree: a loop over `content`
    of a variable called message, msg or m, or any word of media anywhere. Trying the template
    out would be right more often than the engine is, and different tokens.
    """
    if any(word in source for word in _MEDIA_WORDS):
        return True
    return any(_is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node | None) -> bool:
    """`message.content` or `message["content"]`, also filtered, tested or sliced."""
    if isinstance(node, nodes.Filter | nodes.Test):
        return _is_content(node.node)
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            return _is_content(node.node)
        named = isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    elif isinstance(node, nodes.Getattr):
        named = node.attr == "content"
    else:
        return False
    owner = node.node
    return named and isinstance(owner, nodes.Name) and owner.name in _MESSAGE_NAMES


# -- what templates find around them


class _Environment(LimitedEnvironment):
    """The sandbox with a short way to what chat templates ask for most.

    Fields of messages, as attributes, are found without an exception. What the sandbox allows
    always is had without asking it: the methods of strings, and plain values of loops and
    namespaces.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict:
            if attribute not in _DICT_ATTRIBUTES:
                try:
                    return obj[attribute]
                except KeyError:
                    return self.undefined(obj=obj, name=attribute)
        elif kind is str:
            if attribute in _STR_METHODS:
                return getattr(obj, attribute)
        elif kind in _SURROUNDINGS and not attribute.startswith("_"):
            value = getattr(obj, attribute, None)
            if type(value) in _PLAIN:
                return value
        return super().getattr(obj, attribute)


def template_environment() -> LimitedEnvironment:
    """Filters, functions, tags and the treatment of blanks, all as in transformers."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _ToJson()
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it changes nothing.

    Its body is a call block, as in transformers: what is set inside stays inside.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _ToJson:
    """The filter of transformers, which remembers what it made of tools.

    Indented JSON takes Python milliseconds for the tools of an agent. The same tools come as the
    same objects, so an entry is good for as long as it holds on to its object.
    """

    def __init__(self) -> None:
        self._texts: dict[tuple[object, ...], tuple[Any, str]] = {}
        self._chars = 0

    def __call__(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        check_arguments(value, indent, separators)
        dump = partial(
            json.dumps,
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        if type(value) is not dict or value.keys() != _TOOL_FIELDS:
            return dump()
        key = (id(value), ensure_ascii, indent, str(separators), sort_keys)
        kept = self._texts.get(key)
        if kept is not None and kept[0] is value:
            return kept[1]
        text = dump()
        self._chars += len(text)
        if self._chars > _TOOL_TEXTS_MAX_CHARS:
            self._texts.clear()
            self._chars = len(text)
        self._texts[key] = (value, text)
        return text


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    # The engine's clock and zone decide; they are taken to be the same as here.
    return datetime.now().strftime(form)
