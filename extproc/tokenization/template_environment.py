"""The environment in which chat templates are compiled: that of transformers, in a sandbox.

Errors in a template are raised as they are; `chat_template` turns them into a reason.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext

from extproc.tokenization.template_budget import (
    LARGE_CHARS,
    TemplateLimitError,
    check_content,
    content_chars,
)
from extproc.tokenization.template_filters import METHODS
from extproc.tokenization.template_limits import LimitedEnvironment, TemplateNamespace

__all__ = ["template_environment"]

_DICT_ATTRIBUTES: Final = frozenset(dir(dict))
_STR_METHODS: Final = METHODS[str]
_TOOL_FIELDS: Final = (
    frozenset({"type", "function"}),
    frozenset({"type", "function", "defer_loading"}),
)
# The texts of all tools together; the tools themselves take several times as much.
_TOOL_TEXTS_MAX_CHARS: Final = 1 << 22
_INDENT_MAX: Final = 16
_TIME_FORMAT_MAX_CHARS: Final = 256
_SURROUNDINGS: Final = frozenset({LoopContext, TemplateNamespace})
_PLAIN: Final = frozenset({bool, dict, float, int, list, str})


class _Environment(LimitedEnvironment):
    """The sandbox, with a faster look-up of what chat templates use most.

    Fields of messages are found as attributes without an exception. The sandbox always allows the
    methods of strings and the plain values of loops and namespaces, so it is not asked for them.
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
            if attribute in _STR_METHODS and len(obj) <= LARGE_CHARS:
                return getattr(obj, attribute)
        elif kind in _SURROUNDINGS and not attribute.startswith("_"):
            value = getattr(obj, attribute, None)
            if type(value) in _PLAIN:
                return value
        return super().getattr(obj, attribute)


def template_environment() -> LimitedEnvironment:
    """Jinja's environment with the filters, functions, tags and blanks of transformers."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _ToJson()
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the assistant's text for training.

    Its body is a call block, as in transformers: a variable that is set inside stays inside.
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
    """The filter `tojson` of transformers, with a cache for tools.

    Python takes milliseconds to write the tools of an agent as indented JSON. The same tools are
    the same objects, so an entry is valid while it keeps its object alive.
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
        dump = _json_encoder(ensure_ascii, indent, separators and tuple(separators), sort_keys)
        if type(value) is not dict or value.keys() not in _TOOL_FIELDS:
            _check_json(value, indent, separators)
            return dump(value)
        key = (id(value), ensure_ascii, indent, str(separators), sort_keys)
        kept = self._texts.get(key)
        if kept is not None and kept[0] is value:
            return kept[1]
        _check_json(value, indent, separators)
        text = dump(value)
        self._chars += len(text)
        if self._chars > _TOOL_TEXTS_MAX_CHARS:
            self._texts.clear()
            self._chars = len(text)
        self._texts[key] = (value, text)
        return text


@lru_cache(maxsize=16)
def _json_encoder(
    ensure_ascii: bool,
    indent: int | str | None,
    separators: tuple[str, str] | None,
    sort_keys: bool,
) -> Callable[[Any], str]:
    """What `json.dumps` makes for each call."""
    return json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    ).encode


def _check_json(value: Any, indent: int | str | None, separators: Any) -> None:
    if (
        indent is not None and (indent if isinstance(indent, int) else len(indent)) > _INDENT_MAX
    ) or (separators is not None and content_chars(separators) > _INDENT_MAX):
        raise TemplateLimitError
    if type(value) is not dict:
        # A template can make a long list in small steps. The content of a dict was checked when
        # it was made.
        check_content(value)


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > _TIME_FORMAT_MAX_CHARS:
        raise TemplateLimitError
    # The engine uses its own clock and time zone, which are assumed to be the same as here.
    return datetime.now().strftime(form)
