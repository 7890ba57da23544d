"""Finds out whether a chat template takes a message's content as a list of parts, as vLLM does.

vLLM (0.32, "auto" of `--chat-template-content-format`) looks at the syntax tree: the format is
"openai" if some loop goes over the content of a message, where a message is the variable of a loop
over `messages` or a name for it, and the content may come into a macro as an argument. A trial of
the template would be right more often than the engine, and would so give other tokens.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from jinja2 import nodes

from extproc.errors import ServiceError
from extproc.tokenization.prompts import ContentFormat

__all__ = ["content_format"]

_CONTENT: Final = "content"


class _NotPlainError(ServiceError):
    """A loop or an assignment has several targets, for which the engine gives up."""


def content_format(tree: nodes.Template) -> ContentFormat:
    """The format that the engine detects for a template."""
    try:
        return "openai" if any(_loops_over_content(tree)) else "string"
    except _NotPlainError:
        return "string"


def _loops_over_content(tree: nodes.Template) -> Iterator[bool]:
    """True for each loop over a content, in the order of the engine."""
    messages = set(_names_of(tree, "messages"))
    variables = {
        _plain(loop.target)
        for loop in tree.find_all(nodes.For)
        if any(_is_access(loop.iter, name) for name in messages)
    }
    in_macros: set[int] = set()
    parameters: dict[int, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        given = set(_parameters_with_content(tree, macro, variables))
        for loop in macro.find_all(nodes.For):
            in_macros.add(id(loop))
            if given:
                parameters[id(loop)] = given
    for loop in tree.find_all(nodes.For):
        source = loop.iter
        name = source.name if isinstance(source, nodes.Name) else ""
        if (
            any(_is_content(source, variable) for variable in variables)
            or (name and name in parameters.get(id(loop), ()))
            or (name == _CONTENT and id(loop) not in in_macros)
        ):
            _plain(loop.target)
            yield True


def _names_of(tree: nodes.Template, name: str) -> Iterator[str]:
    """A variable's name, and the names of those that are set to it or to a part of it."""
    waiting, seen = [name], {name}
    while waiting:
        current = waiting.pop(0)
        yield current
        for assignment in tree.find_all(nodes.Assign):
            if _is_access(assignment.node, current):
                target = _plain(assignment.target)
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)


def _parameters_with_content(
    tree: nodes.Template, macro: nodes.Macro, variables: Iterable[str]
) -> Iterator[str]:
    """The parameters of a macro that get a message's content in some call of it."""
    names = [parameter.name for parameter in macro.args]
    for call in tree.find_all(nodes.Call):
        if not isinstance(call.node, nodes.Name) or call.node.name != macro.name:
            continue
        given = [*zip(names, call.args, strict=False)]
        given += [(one.key, one.value) for one in call.kwargs if one.key in names]
        for name, value in given:
            if any(_is_content(value, variable) for variable in variables):
                yield name


def _is_access(node: nodes.Node | None, name: str) -> bool:
    """The variable itself, also filtered, tested or sliced."""
    inner = _unwrapped(node)
    return isinstance(inner, nodes.Name) and inner.ctx == "load" and inner.name == name


def _is_content(node: nodes.Node | None, name: str) -> bool:
    """`name.content` or `name["content"]`, also filtered, tested or sliced."""
    inner = _unwrapped(node)
    if isinstance(inner, nodes.Getitem):
        named = isinstance(inner.arg, nodes.Const) and inner.arg.value == _CONTENT
    elif isinstance(inner, nodes.Getattr):
        named = inner.attr == _CONTENT
    else:
        return False
    owner = inner.node
    return named and isinstance(owner, nodes.Name) and owner.ctx == "load" and owner.name == name


def _unwrapped(node: nodes.Node | None) -> nodes.Node | None:
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    return node


def _plain(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _NotPlainError
    return target.name
