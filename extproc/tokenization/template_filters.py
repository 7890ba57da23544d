"""The filters and the methods of a chat template, each with a bound.

Jinja's filters have no bound on what they read and make. Here each of them belongs to one kind,
and a filter that is in no kind does not exist for templates: a new version of Jinja cannot add one
without a bound.

Separate from `template_limits`, which changes the tree of a template.
"""

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Final

from jinja2.utils import _PassArg

from extproc.tokenization.template_budget import (
    LARGE_CHARS,
    VALUE_MAX_LENGTH,
    Counted,
    TemplateLimitError,
    charge,
    check_content,
    check_length,
    content_chars,
    count_steps,
    counted,
    paid_by_length,
)

__all__ = [
    "INTEGER_MAX_BITS",
    "LIMITED_METHODS",
    "METHODS",
    "STRIP_METHODS",
    "check_brace_format",
    "check_number",
    "check_option",
    "check_percent_format",
    "limited_filters",
    "limited_method",
    "text_of",
]

_Function = Callable[..., Any]

INTEGER_MAX_BITS: Final = 4096
# Widths, numbers of columns, digits behind the point.
_NUMBER_ARGUMENT_MAX: Final = 10_000
_TEXT_ARGUMENT_MAX_CHARS: Final = 1000
# Of filters that take much longer for a character than others.
_SLOW_MAX_CHARS: Final = 1 << 18
_FORMAT_MAX_CHARS: Final = 10_000
_WIDTHS: Final = re.compile(r"\d+")
# A width that is an argument.
_INNER_FIELD: Final = re.compile(r":[^{}]*\{")
_PLAIN: Final = (str, int, float, list, tuple, dict)


def check_number(value: Any) -> Any:
    """Refuse an integer so long that one operation on two of them would take long."""
    if isinstance(value, int) and value.bit_length() > INTEGER_MAX_BITS:
        raise TemplateLimitError
    return value


def check_option(value: Any) -> Any:
    """Refuse an argument that makes a filter slow or its result long: a width, a set of marks."""
    if isinstance(value, int):
        if value > _NUMBER_ARGUMENT_MAX:
            raise TemplateLimitError
    elif isinstance(value, str):
        if len(value) > _TEXT_ARGUMENT_MAX_CHARS:
            raise TemplateLimitError
    elif isinstance(value, tuple | list):
        check_content(value)
    return value


def text_of(value: Any) -> str:
    """The text of any value."""
    if type(value) is str:
        return value
    check_content(value)
    return str(value)


def _check_format(form: str, marker: str, *values: Any) -> None:
    """Refuse a format whose result could be long: by its widths, or by its arguments."""
    if len(form) > _FORMAT_MAX_CHARS:
        raise TemplateLimitError
    fields = form.count(marker)
    room = len(form) + sum(int(width[:9]) for width in _WIDTHS.findall(form))
    longest = 0
    for value in values:
        if isinstance(value, _PLAIN):
            longest = max(longest, content_chars(value))
        elif value is not None:
            # A field can name an attribute of it.
            longest = max(longest, VALUE_MAX_LENGTH // 16)
    check_length(room + fields * longest)
    charge(room + fields * longest)


# -- kinds of filters: what has to be checked before a filter runs, and the value that it gets


def _as_is(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _reads_text(value: Any, *arguments: Any, **named: Any) -> Any:
    """For filters that take time in proportion to a text, and whose result is about as long."""
    value = _soft_text(value)
    charge(len(value))
    for argument in (*arguments, *named.values()):
        check_option(argument)
    return value


def _slow(value: Any, *arguments: Any, **named: Any) -> Any:
    """For filters that take long, and that templates apply to short texts."""
    chars = content_chars(value)
    factor = 1
    for option in (*arguments, *named.values()):
        check_option(option)
        size = len(option) if isinstance(option, str) else option
        factor = max(factor, size if isinstance(size, int) else 1)
    if chars > _SLOW_MAX_CHARS or chars * factor > VALUE_MAX_LENGTH:
        raise TemplateLimitError
    count_steps(1 + (chars * factor >> 4))
    return value


def _lazy(value: Any, *_: Any, **__: Any) -> Any:
    """For generators, which read one value after another."""
    # Jinja asks whether there is anything, and an iterator has no length.
    return counted(value) if hasattr(value, "__len__") else iter(Counted(value))


def _reads_all(value: Any, *arguments: Any, **named: Any) -> Any:
    """For filters that read all values before the first result is there."""
    if arguments or named:
        for option in (*arguments, *named.values()):
            check_option(option)
    return paid_by_length(value)


def _fills(value: Any, number: int, fill_with: Any = None) -> Any:
    """For filters that repeat one value: this may not hold other values."""
    if not (fill_with is None or isinstance(fill_with, str | int | float)):
        raise TemplateLimitError
    charge(number * len(fill_with) if isinstance(fill_with, str) else 0)
    count_steps(max(number, 0))
    return _reads_all(value, number)


def _join(value: Any, d: Any = "", attribute: Any = None) -> Any:
    value = paid_by_length(value)
    values = value if isinstance(value, list | tuple) else list(value)
    check_length(content_chars(values) + len(values) * content_chars(d))
    return values


def _replace(s: Any, old: Any, new: Any, count: Any = None) -> Any:
    check_replace(text_of(s), text_of(old), text_of(new))
    return s


def _indent(s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> Any:
    text = text_of(s)
    size = len(width) if isinstance(width, str) else int(width)
    charge(len(text) + (text.count("\n") + 1) * max(size, 0))
    return s


def _int(value: Any, default: Any = 0, base: int = 10) -> Any:
    return check_option(value) if isinstance(value, str) else value


def _sum(iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    # A sum of lists would be copied for each of them.
    if not isinstance(start, int | float):
        raise TemplateLimitError
    return _reads_all(iterable)


def _format(value: Any, *arguments: Any, **named: Any) -> Any:
    check_percent_format(str(value), *arguments, *named.values())
    return value


def _soft_text(value: Any) -> str:
    # A text that is marked as safe stays so.
    return value if isinstance(value, str) else text_of(value)


def _trim(value: Any, chars: str | None = None) -> str:
    """The filter `trim`, which most templates apply to most messages."""
    if type(value) is str and len(value) <= LARGE_CHARS and chars is None:
        return value.strip()
    return _reads_text(value, chars).strip(chars)  # type: ignore[no-any-return]


# `tojson` is transformers' own. Not here: `random`, whose tokens cannot be known.
_KINDS: Final[Mapping[_Function, tuple[str, ...]]] = {
    _as_is: ("abs", "attr", "count", "d", "default", "first", "float", "last", "length", "safe"),
    _reads_text: ("capitalize", "e", "escape", "lower", "upper"),
    _slow: (
        "center", "filesizeformat", "forceescape", "pprint", "round", "striptags", "title",
        "truncate", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr",
    ),
    _lazy: ("map", "reject", "rejectattr", "select", "selectattr"),
    _reads_all: ("dictsort", "groupby", "items", "list", "max", "min", "reverse", "sort", "unique"),
    _fills: ("batch", "slice"),
    _format: ("format",),
    _indent: ("indent",),
    _int: ("int",),
    _join: ("join",),
    _replace: ("replace",),
    _sum: ("sum",),
}  # fmt: skip


def limited_filters(filters: Mapping[str, _Function]) -> dict[str, _Function]:
    """The filters of Jinja that have a kind, with their bounds."""
    made = {
        name: filters[name] if check is _as_is else _checked(filters[name], check)
        for check, names in _KINDS.items()
        for name in names
        if name in filters
    }
    return {**made, "string": _soft_text, "trim": _trim}


def _checked(function: _Function, check: _Function) -> _Function:
    if _PassArg.from_obj(function) is None:

        @wraps(function)
        def checked(value: Any, *arguments: Any, **named: Any) -> Any:
            return function(check(value, *arguments, **named), *arguments, **named)

        return checked

    # Jinja passes its context or its environment before the value.
    @wraps(function)
    def with_context(context: Any, value: Any, *arguments: Any, **named: Any) -> Any:
        return function(context, check(value, *arguments, **named), *arguments, **named)

    return with_context


# -- methods

# They read a text once, and their arguments matter little.
_TEXT_METHODS: Final = frozenset(
    {
        "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha",
        "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable",
        "isspace", "istitle", "isupper", "lower", "partition", "removeprefix", "removesuffix",
        "startswith", "swapcase", "title", "upper",
    }
)  # fmt: skip
# They look for each mark of an argument at each place, or make a list.
_MARK_METHODS: Final = frozenset(
    {"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "strip"}
)
STRIP_METHODS: Final = frozenset({"lstrip", "rstrip", "strip"})
LIMITED_METHODS: Final = frozenset(
    {"center", "expandtabs", "join", "ljust", "replace", "rjust", "zfill"}
)
# The methods of each type that a template may call. Of other types, the sandbox decides.
METHODS: Final[Mapping[type, frozenset[str]]] = {
    str: _TEXT_METHODS | _MARK_METHODS,
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    int: frozenset(),
    float: frozenset({"is_integer"}),
}
_WIDE_METHODS: Final = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})


def limited_method(text: str, name: str) -> _Function:
    """A method of a text that pays for what it reads and makes."""
    method = getattr(text, name)

    def limited(*arguments: Any, **named: Any) -> Any:
        if name == "join":
            values = list(Counted(*arguments, **named))
            check_length(content_chars(values) + len(values) * len(text))
            return method(values)
        if name == "replace":
            check_replace(text, *arguments, **named)
        elif name in _WIDE_METHODS:
            _check_wide(text, name, *arguments, **named)
        else:
            for argument in (*arguments, *named.values()):
                check_option(argument)
            charge(len(text))
            if name in ("split", "rsplit", "splitlines"):
                count_steps(len(text) >> 6)
        return method(*arguments, **named)

    return limited


def check_replace(text: str, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    old, new = str(old), str(new)
    length = len(text)
    if len(new) > len(old):
        length += text.count(old) * (len(new) - len(old))
    charge(length)


def check_brace_format(form: str, *values: Any) -> None:
    if _INNER_FIELD.search(form):
        raise TemplateLimitError
    _check_format(form, "{", *values)


def check_percent_format(form: str, *values: Any) -> None:
    if "*" in form:
        # The width can be an argument.
        raise TemplateLimitError
    _check_format(form, "%", *values)


def _check_wide(text: str, name: str, *arguments: Any, **named: Any) -> None:
    for argument in (*arguments, *named.values()):
        check_option(argument)
    if name == "expandtabs":
        width = arguments[0] if arguments else named.get("tabsize", 8)
        charge(len(text) + text.count("\t") * (width if isinstance(width, int) else 0))
    else:
        charge(len(text))
