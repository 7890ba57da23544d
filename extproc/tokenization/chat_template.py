"""Renders chats with the model's chat template, as transformers does.

A template is compiled once and rendered for each chat. It comes with the model and is not
trusted: it runs in Jinja's immutable sandbox, and its output, its steps and its values are bounded
(see `template_limits`). Errors in a template become a reason. They can quote the prompt, so their
text is neither logged nor shown.
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
from extproc.tokenization.template_budget import (
    LARGE_CHARS,
    SECONDS_MAX,
    STEPS_MAX,
    VALUE_MAX_LENGTH,
    TemplateLimitError,
    check_content,
    content_chars,
    end_rendering,
    start_rendering,
)
from extproc.tokenization.template_filters import METHODS
from extproc.tokenization.template_limits import LimitedEnvironment, TemplateNamespace
from extproc.tokenization.template_tree import check_source, limited
from extproc.tokenization.tokenizer_files import TokenizerFiles

__all__ = ["ChatTemplates", "RenderedChat", "iterates_over_parts", "template_environment"]

_DEFAULT: Final = "default"
_WITH_TOOLS: Final = "tool_use"
_MEDIA_WORDS: Final = ("image", "audio", "video", "vision")
_MESSAGE_NAMES: Final = frozenset({"message", "msg", "m"})
_DICT_ATTRIBUTES: Final = frozenset(dir(dict))
_STR_METHODS: Final = METHODS[str]
_TOOL_FIELDS: Final = frozenset({"type", "function", "defer_loading"})
# The texts of all tools together; the tools themselves take several times as much.
_TOOL_TEXTS_MAX_CHARS: Final = 1 << 22
_INDENT_MAX: Final = 16
# A rendering with a share of the time has a larger one of the steps: long messages pay with steps
# for operations that take little time.
_STEPS_FOR_TIME: Final = 4.0
_TIME_FORMAT_MAX_CHARS: Final = 256
_SURROUNDINGS: Final = frozenset({LoopContext, TemplateNamespace})
_PLAIN: Final = frozenset({bool, dict, float, int, list, str})
# A template with both words belongs to a family that uses another name for a low effort.
_LOW_EFFORT_WORDS: Final = ("low_effort", "truncate_history_thinking")


class RenderedChat(Struct, frozen=True):
    """The text to encode without special tokens, and the beginning of the answer to continue it."""

    text: str
    continued: str


class ChatTemplates:
    """The compiled templates of one model.

    With `template_name`, this template is always used. Without it, `tool_use` is used for chats
    with tools if it exists, else `default`, as in transformers. `default_kwargs` are those of the
    engine (`--default-chat-template-kwargs`). Raises TokenizerError for a template that does not
    compile and for a name that does not exist.
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
            known = (
                f"only {', '.join(sorted(compiled))}" if compiled else "the model has no templates"
            )
            raise TokenizerError(f"chat template {template_name!r} does not exist, {known}")
        self._default = compiled.get(template_name or _DEFAULT)
        self._with_tools = compiled.get(template_name or _WITH_TOOLS) or self._default
        for name, template in compiled.items():
            self._try(f"{files.template_files[name]} ({name})", template)

    def _try(self, where: str, template: "_Template") -> None:
        """Raise TokenizerError for a template that has no bound even with a short chat."""
        variables = {
            "messages": [{"role": "user", "content": "x"}],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self._special_tokens,
            **self._default_kwargs,
        }
        try:
            template.render(variables, VALUE_MAX_LENGTH, 1.0)
        except _TemplateFailedError:
            # It may need other messages.
            pass
        except UnmappableError:
            raise TokenizerError(
                f"{where}: the chat template takes too many steps, too much time or too long "
                "values, even for a chat of one word"
            ) from None

    def render(self, chat: ChatPrompt, max_chars: int, *, share: float = 1.0) -> RenderedChat:
        """The text of a chat; raises UnmappableError.

        `share`: the part of the time of a rendering that it may take, which also limits its steps.
        """
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
            return RenderedChat(template.render(variables, max_chars, share), continued)
        except _TemplateFailedError:
            if chat.tools is None:
                raise UnmappableError(TEMPLATE_ERROR) from None
        # The engine tries once more, for templates that want functions in place of tools.
        variables["tools"] = [tool["function"] for tool in chat.tools]
        try:
            return RenderedChat(template.render(variables, max_chars, share), continued)
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
    """A template raised an error, whose text is not kept."""


class _Template:
    def __init__(self, environment: LimitedEnvironment, source: str, where: str) -> None:
        try:
            check_source(source)
            tree = environment.parse(source)
            self.keep_parts = iterates_over_parts(source, tree)
            self._template = environment.from_string(limited(tree, environment))
        except Exception as error:
            # Python, too, refuses code that is nested too deep, with several kinds of errors.
            raise TokenizerError(
                f"{where}: the chat template does not compile: {error or type(error).__name__}"
            ) from error
        self.renames_low_effort = all(word in source for word in _LOW_EFFORT_WORDS)

    def render(self, variables: dict[str, Any], max_chars: int, share: float) -> str:
        written: list[str] = []
        room = max_chars
        # Jinja's render() would rewrite errors with the lines of the template, which takes time.
        steps = int(STEPS_MAX * min(1.0, _STEPS_FOR_TIME * share))
        start_rendering(steps, SECONDS_MAX * share)
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
        finally:
            end_rendering()
        if room < 0:
            raise UnmappableError(TOO_LONG)
        return "".join(written)


def iterates_over_parts(source: str, tree: nodes.Template) -> bool:
    """True if a template gets content as a list of parts, and not as their joined text.

    The rule is the engine's: the syntax tree has a loop over `content` of a variable named
    message, msg or m, or the source has a word for media. A trial of the template would be right
    more often than the engine, and would so give other tokens.
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


# -- the environment of templates


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
        if type(value) is not dict or value.keys() != _TOOL_FIELDS:
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
