"""Bounds the time and the memory of one rendering of a chat template.

Jinja's sandbox bounds a single `range`, but not nested loops, macros that call each other, or
texts that double in each step. Templates may run on the event loop, so the syntax tree of a
template is changed before it is compiled: loops and macros count steps, and operations that can
make long values check the length first. A list that holds another list many times, over many
levels, is not found: its text can still be long.

Separate from `chat_template`, which knows what chats need.
"""

# ruff: noqa: N802 (a NodeTransformer finds its methods by the names of the nodes)
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from functools import reduce, wraps
from itertools import islice
from typing import Any, Final

from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import _PassArg
from jinja2.visitor import NodeTransformer

from extproc.errors import ServiceError

__all__ = [
    "GROWING_METHODS",
    "LimitedEnvironment",
    "TemplateLimitError",
    "check_arguments",
    "limit_steps",
    "limited",
]

_STEPS_MAX: Final = 250_000
# The thread's own time: waiting for the interpreter does not count.
_SECONDS_MAX: Final = 0.25
# A loop counts its steps and looks at the time once for so many, and less often while the steps
# are quick.
_STEPS_AT_ONCE: Final = 8
_QUICK_STEPS_AT_ONCE: Final = 64
_QUICK_STEPS_SECONDS: Final = 0.001
_VALUE_MAX_LENGTH: Final = 1 << 23
_INTEGER_MAX_BITS: Final = 4096
# Widths, numbers of columns, digits behind the point.
_NUMBER_ARGUMENT_MAX: Final = 100_000
_TEXT_ARGUMENT_MAX_CHARS: Final = 1000

# No template can name these: they are not identifiers.
_STEPS: Final = " steps"
_STEP: Final = " step"
_COUNTED: Final = " counted"
_ADDED: Final = " added"
_JOINED: Final = " joined"
_SHORT: Final = " short"

GROWING_METHODS: Final = frozenset(
    {"center", "expandtabs", "join", "ljust", "replace", "rjust", "translate", "zfill"}
)
# Of other types: bytes have the same methods, and integers can be written as bytes.
_HIDDEN_METHODS: Final = GROWING_METHODS | {"to_bytes"}
_WIDE_PERCENT_FORMAT: Final = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{6})")
_WIDE_BRACE_FORMAT: Final = re.compile(r"\{[^{}]*\d{6}|:[^{}]*\{")
_ONLY_TEXTS: Final = {str}


class TemplateLimitError(ServiceError):
    """A template takes too many steps or too much time, or makes too long a value."""


def limit_steps(variables: dict[str, Any]) -> None:
    """Add the counter of steps to the variables of one rendering."""
    variables[_STEPS] = _Steps()


class _Steps:
    """Counts the steps of one rendering and looks at the time."""

    __slots__ = ("_counted_at", "_left", "_look_again_at", "_thread_time_max")

    def __init__(self) -> None:
        self._left = _STEPS_MAX
        self._counted_at = time.monotonic()
        self._look_again_at = self._counted_at + _SECONDS_MAX
        self._thread_time_max = time.thread_time() + _SECONDS_MAX

    def count(self, steps: int) -> bool:
        """True if the last steps were quick; raises TemplateLimitError when the steps or the time
        are used up.
        """
        self._left -= steps
        if self._left < 0:
            raise TemplateLimitError
        now = time.monotonic()
        if now > self._look_again_at:
            seconds_left = self._thread_time_max - time.thread_time()
            if seconds_left < 0:
                raise TemplateLimitError
            self._look_again_at = now + seconds_left
        counted_at, self._counted_at = self._counted_at, now
        return now - counted_at < _QUICK_STEPS_SECONDS


def limited(tree: nodes.Template, environment: "LimitedEnvironment") -> nodes.Template:
    """Change the tree of a template so that its renderings are bounded."""
    _Limiter().visit(tree)
    return tree.set_environment(environment)  # type: ignore[return-value]


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox for templates that `limited` has changed."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters[_STEP] = _step
        self.filters[_COUNTED] = _counted
        self.filters[_ADDED] = _added
        self.filters[_JOINED] = _joined
        self.filters[_SHORT] = _short
        for name, check in _CHECKED_FILTERS.items():
            self.filters[name] = _checked(self.filters[name], check)
        # It makes random words, whose tokens cannot be known.
        del self.globals["lipsum"]

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, str) and attribute in GROWING_METHODS:
            return _limited_method(obj, attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # Jinja also asks this for `text["ljust"]` and for the filter `attr`.
        if attr in _HIDDEN_METHODS and isinstance(obj, str | bytes | int):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDE_BRACE_FORMAT.search(value.__self__):
            raise TemplateLimitError
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if type(left) is int:
                return left % right
            if isinstance(left, str):
                _check_percent_format(left)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            bits = bits * right if operator == "**" else bits + right.bit_length()
            if bits > _INTEGER_MAX_BITS:
                raise TemplateLimitError
        elif operator == "*":
            _check_repeated(left, right)
            _check_repeated(right, left)
        return super().call_binop(context, operator, left, right)


class _Limiter(NodeTransformer):
    """Adds steps to loops and macros, and checks to operations that can make long values."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filter(node.iter, _COUNTED, node)
        if node.recursive:
            # Each call of `loop` has an iterable of its own, which is not counted.
            node.body.insert(0, _step_statement(node))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        node.nodes = [self._written(one) for one in node.nodes]
        return node

    def _written(self, node: nodes.Expr) -> nodes.Expr:
        """The node of an expression whose value is only written to the output.

        A sum is as long as its parts together, so it needs no check. This is the most frequent
        expression in templates.
        """
        if isinstance(node, nodes.Add):
            node.left, node.right = self._written(node.left), self.visit(node.right)
        elif isinstance(node, nodes.CondExpr):
            node.test, node.expr1 = self.visit(node.test), self._written(node.expr1)
            if node.expr2 is not None:
                node.expr2 = self._written(node.expr2)
        elif isinstance(node, nodes.Concat):
            self.generic_visit(node)
        else:
            written: nodes.Expr = self.visit(node)
            return written
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.body.insert(0, _step_statement(node))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        # Jinja writes this call itself, so it stays a call.
        self.generic_visit(node.call)
        node.body = [self.visit(statement) for statement in node.body]
        node.body.insert(0, _step_statement(node))
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Expr:
        self.generic_visit(node)
        # A macro is called by its name; methods are not names.
        return _filter(node, _SHORT, node) if isinstance(node.node, nodes.Name) else node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:
        self.generic_visit(node)
        node.filter = _filter(node.filter, _SHORT, node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED, node)

    def visit_Add(self, node: nodes.Add) -> nodes.Expr:
        operands: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            operands.append(left.right)
            left = left.left
        operands.append(left)
        operands = [self.visit(operand) for operand in reversed(operands)]
        if any(isinstance(one, nodes.Const) and type(one.value) is int for one in operands):
            # Only numbers can be added to a number.
            return reduce(nodes.Add, operands)
        return _filter(nodes.List(operands, lineno=node.lineno), _ADDED, node)


def _filter(value: Any, name: str, at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=at.lineno)


def _step_statement(at: nodes.Node) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filter(nodes.Const(True), _STEP, at), lineno=at.lineno)


# -- the filters put into the tree


@pass_context
def _step(context: Context, value: bool) -> bool:
    context.parent[_STEPS].count(1)
    return value


@pass_context
def _counted(context: Context, values: Any) -> Any:
    steps = context.parent[_STEPS]
    if type(values) is list and len(values) <= _STEPS_AT_ONCE:
        steps.count(len(values))
        return values
    return _Counted(values, steps)


class _Counted:
    """Values whose iteration counts steps."""

    __slots__ = ("_steps", "_values")

    def __init__(self, values: Any, steps: _Steps) -> None:
        self._values = values
        self._steps = steps

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        values = iter(self._values)
        at_once = _STEPS_AT_ONCE
        while some := [*islice(values, at_once)]:
            quick = self._steps.count(len(some))
            at_once = _QUICK_STEPS_AT_ONCE if quick else _STEPS_AT_ONCE
            yield from some


def _short(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _VALUE_MAX_LENGTH:
        raise TemplateLimitError
    return value


def _added(values: list[Any]) -> Any:
    """The sum from left to right, as `+` gives it."""
    if {*map(type, values)} == _ONLY_TEXTS:
        _check_length(sum(map(len, values)))
        return "".join(values)
    total, *others = values
    for value in others:
        if isinstance(total, Sized) and isinstance(value, Sized):
            _check_length(len(total) + len(value))
        total = total + value
    return total


def _joined(values: list[Any]) -> str:
    """The texts of all values in a row, as `~` gives it."""
    texts = [value if type(value) is str else str(value) for value in values]
    _check_length(sum(map(len, texts)))
    return "".join(texts)


# -- checks of operations that make long values


def _check_length(length: int) -> None:
    if length > _VALUE_MAX_LENGTH:
        raise TemplateLimitError


def _check_repeated(value: Any, times: Any) -> None:
    if isinstance(value, Sized) and isinstance(times, int):
        _check_length(len(value) * times)


def _check_percent_format(text: Any, *_: Any) -> None:
    if _WIDE_PERCENT_FORMAT.search(str(text)):
        raise TemplateLimitError


def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    _check_length(len(text) + text.count(old) * len(new))


def _check_join(values: Any, separator: Any = "", *_: Any, **__: Any) -> None:
    lengths = [len(value) if isinstance(value, str) else 0 for value in values]
    _check_length(sum(lengths) + len(lengths) * len(str(separator)))


def check_arguments(_: Any, *arguments: Any, **named: Any) -> None:
    for argument in (*arguments, *named.values()):
        if isinstance(argument, int):
            if argument > _NUMBER_ARGUMENT_MAX:
                raise TemplateLimitError
        elif isinstance(argument, str) and len(argument) > _TEXT_ARGUMENT_MAX_CHARS:
            raise TemplateLimitError


def _checked(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    """A filter that checks its arguments before it runs."""
    first = 0 if _PassArg.from_obj(function) is None else 1

    @wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        value = arguments[first]
        if isinstance(value, Iterator):
            # An iterator can be read only once, and the check reads it.
            value = list(value)
            arguments = (*arguments[:first], value, *arguments[first + 1 :])
        check(*arguments[first:], **named)
        return function(*arguments, **named)

    return checked


def _limited_method(text: str, name: str) -> Callable[..., Any]:
    method = getattr(text, name)

    def limited_method(*arguments: Any, **named: Any) -> Any:
        if name == "join":
            values: list[Any] = list(*arguments, **named)
            _check_join(values, text)
            return method(values)
        if name == "replace":
            _check_replace(text, *arguments, **named)
        elif name == "translate":
            raise TemplateLimitError
        else:
            check_arguments(text, *arguments, **named)
        return method(*arguments, **named)

    return limited_method


_CHECKED_FILTERS: Final[Mapping[str, Callable[..., None]]] = {
    "batch": check_arguments,
    "center": check_arguments,
    "format": _check_percent_format,
    "indent": check_arguments,
    "join": _check_join,
    "replace": _check_replace,
    "round": check_arguments,
    "slice": check_arguments,
    "wordwrap": check_arguments,
}
