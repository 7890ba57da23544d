"""The sandbox for chat templates, which bounds the time and the memory of a rendering.

Jinja's sandbox bounds a single `range`, but not nested loops, macros that call each other, or
texts that double in each step. Templates may run on the event loop, so their syntax trees are
changed before they are compiled (`template_tree`), and what they can call has a bound
(`template_filters`). Jinja would compute constant expressions while it compiles, without any
bound; here it does not.

Separate from `chat_template`, which knows what chats need.
"""

from collections.abc import Callable, Iterable, Sized
from typing import Any, Final

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Namespace

from extproc.tokenization.template_budget import (
    LARGE_CHARS,
    TemplateLimitError,
    charge,
    check_content,
    check_elements,
    check_length,
    content_chars,
    count_steps,
    counted,
)
from extproc.tokenization.template_filters import (
    INTEGER_MAX_BITS,
    LIMITED_METHODS,
    METHODS,
    STRIP_METHODS,
    check_brace_format,
    check_option,
    check_percent_format,
    limited_filters,
    limited_method,
    text_of,
)
from extproc.tokenization.template_tree import (
    ADDED,
    BUILT,
    COUNTED,
    DATA,
    JOINED,
    OPTION,
    SLICED,
    STEP,
)

__all__ = ["LimitedEnvironment", "TemplateNamespace"]

_ONLY_TEXTS: Final = {str}
_TEXT_METHODS: Final = METHODS[str]
_TEXT_METHODS_BY_NAME: Final = _TEXT_METHODS - STRIP_METHODS


class TemplateNamespace(Namespace):
    """A namespace whose text does not hold its values: these can be other namespaces."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _CodeGenerator(CodeGenerator):
    """Writes values out with a bound, and computes nothing while it compiles."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData | nodes.Const):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
        # Nearly all values are texts, so nothing is called for them.
        self.write("(_o if type(_o := ")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            self.write(") is str else environment.guarded(_o))")
            super()._output_child_post(node, frame, finalize)
        else:
            self.write(") is str else environment.text_of(_o))")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox for templates that `limited` has changed."""

    intercepted_binops = frozenset({"*", "**", "%"})
    code_generator_class = _CodeGenerator

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, **options)
        self.text_of = text_of
        self.filters = {
            **limited_filters(self.filters),
            STEP: _step,
            COUNTED: counted,
            ADDED: _added,
            JOINED: _joined,
            BUILT: _built,
            SLICED: _sliced,
            OPTION: check_option,
            DATA: _data,
        }
        # It makes random words, whose tokens cannot be known.
        del self.globals["lipsum"]
        self.globals |= {"cycler": _cycler, "dict": _dict, "namespace": TemplateNamespace}

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """The text of a macro, a block or a `set` with a body."""
        if not isinstance(pieces, list):
            written, pieces = pieces, []
            room = 0
            for piece in written:
                room += len(piece)
                check_length(room)
                pieces.append(piece)
        length = sum(map(len, pieces))
        if length > LARGE_CHARS:
            charge(length)
        return "".join(pieces)

    @staticmethod
    def guarded(value: Any) -> Any:
        """A value that is about to be turned into text."""
        check_content(value)
        return value

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, str):
            if attribute in _TEXT_METHODS:
                if len(obj) <= LARGE_CHARS:
                    return getattr(obj, attribute)
                return limited_method(obj, attribute)
            if attribute in LIMITED_METHODS:
                return limited_method(obj, attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # Jinja also asks this for `text["ljust"]` and for the filter `attr`.
        if isinstance(obj, str):
            # A long text would not pay then.
            return attr in _TEXT_METHODS_BY_NAME and len(obj) <= LARGE_CHARS
        for kind, methods in METHODS.items():
            if isinstance(obj, kind) and callable(value):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form = value.__self__

        def limited_format(*arguments: Any, **named: Any) -> str:
            check_brace_format(form, *arguments, *named.values())
            return wrapped(*arguments, **named)

        return limited_format

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if type(left) is int:
                return left % right
            if isinstance(left, str):
                check_percent_format(left, right)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            bits = bits * right if operator == "**" else bits + right.bit_length()
            if bits > INTEGER_MAX_BITS:
                raise TemplateLimitError
        elif operator == "*":
            if isinstance(left, Sized) and isinstance(right, int):
                return _repeated(left, right)
            if isinstance(right, Sized) and isinstance(left, int):
                return _repeated(right, left)
        return super().call_binop(context, operator, left, right)


# -- the filters put into the tree, and functions of templates


def _step(value: bool) -> bool:
    count_steps(1)
    return value


def _built(value: Any) -> Any:
    check_content(value)
    return value


def _sliced(value: Any) -> Any:
    if isinstance(value, Sized) and len(value) > LARGE_CHARS:
        charge(len(value))
    return value


def _data(value: Any) -> Any:
    if callable(value):
        raise TemplateLimitError
    return value


def _added(values: list[Any]) -> Any:
    """The sum from left to right, as `+` gives it."""
    if {*map(type, values)} == _ONLY_TEXTS:
        length = sum(map(len, values))
        if length > LARGE_CHARS:
            charge(length)
        return "".join(values)
    total, *others = values
    for value in others:
        if isinstance(total, str):
            charge(len(total) + len(value))
        elif isinstance(total, Sized) and isinstance(value, Sized):
            # What the left side holds has been paid for when it was made.
            check_elements(len(total) + len(value))
            check_content(value)
        total = total + value
    return total


def _joined(values: list[Any]) -> str:
    """The texts of all values in a row, as `~` gives it."""
    texts = [value if type(value) is str else text_of(value) for value in values]
    charge(sum(map(len, texts)))
    return "".join(texts)


def _repeated(value: Any, times: int) -> Any:
    if isinstance(value, str):
        charge(len(value) * times)
        return value * times
    check_elements(len(value) * times)
    charge(content_chars(value) * times)
    repeated = value * times
    check_content(repeated)
    return repeated


def _cycler(*items: Any) -> Cycler:
    check_content(items)
    return Cycler(*items)


def _dict(*given: Any, **named: Any) -> dict[Any, Any]:
    made = dict(*given, **named)
    check_content(made)
    return made
