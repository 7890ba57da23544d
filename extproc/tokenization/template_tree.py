"""Changes the syntax tree of a chat template so that its renderings are bounded.

Loops, macros and blocks count steps. Operations that can make long values become filters that
check the length first; the filters are in `template_limits`. A tree that would take long to
compile is refused.

Separate from `template_limits`, which has what a changed template calls.
"""

# ruff: noqa: N802 (a NodeTransformer finds its methods by the names of the nodes)
from collections.abc import Iterable
from functools import reduce
from typing import Any, Final

from jinja2 import Environment, nodes
from jinja2.visitor import NodeTransformer

from extproc.tokenization.template_budget import TemplateLimitError
from extproc.tokenization.template_filters import STRIP_METHODS, check_number

__all__ = [
    "ADDED",
    "BUILT",
    "COUNTED",
    "DATA",
    "JOINED",
    "OPTION",
    "SLICED",
    "STEP",
    "check_source",
    "limited",
]

# The largest templates of known models have some 30,000 characters.
_SOURCE_MAX_CHARS: Final = 1 << 18
_NODES_MAX: Final = 16_000
# A body counts a step for so many expressions in a row, and one statement has no more than:
_EXPRESSIONS_PER_STEP: Final = 256
_EXPRESSIONS_MAX: Final = 1000
# A sum of more parts is checked even where it is only written.
_PARTS_UNCHECKED_MAX: Final = 16

# No template can name these: they are not identifiers.
STEP: Final = " step"
COUNTED: Final = " counted"
ADDED: Final = " added"
JOINED: Final = " joined"
BUILT: Final = " built"
SLICED: Final = " sliced"
OPTION: Final = " option"
DATA: Final = " data"


def check_source(source: str) -> None:
    """Refuse a source that would take long to parse."""
    if len(source) > _SOURCE_MAX_CHARS:
        raise TemplateLimitError(f"longer than {_SOURCE_MAX_CHARS} characters")


def limited(tree: nodes.Template, environment: Environment) -> nodes.Template:
    """Change the tree of a template so that its renderings are bounded.

    Raises TemplateLimitError for a tree that would take long to compile.
    """
    if sum(1 for _ in tree.find_all(nodes.Node)) > _NODES_MAX:
        raise TemplateLimitError(f"more than {_NODES_MAX} expressions and statements")
    _Limiter().visit(tree)
    for node in (tree, *tree.find_all(nodes.Stmt)):
        for field in ("body", "else_"):
            if getattr(node, field, None):
                setattr(node, field, _with_steps(getattr(node, field)))
    return tree.set_environment(environment)  # type: ignore[return-value]


class _Limiter(NodeTransformer):
    """Adds steps to loops and macros, and checks to operations that can make long values."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filter(node.iter, COUNTED, node)
        if node.recursive:
            # Each call of `loop` has an iterable of its own, which is not counted.
            node.body.insert(0, _step_statement(node))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        written: list[nodes.Expr] = []
        for one in node.nodes:
            written += map(self._written, _texts_in_a_row(one))
        node.nodes = written
        return node

    def _written(self, node: nodes.Expr) -> nodes.Expr:
        """The node of an expression whose value is only written to the output.

        A sum of a few parts needs no check there. It is the most frequent expression in templates.
        """
        if isinstance(node, nodes.Add) and len(_parts_of_a_sum(node)) <= _PARTS_UNCHECKED_MAX:
            node.left, node.right = self._written(node.left), self.visit(node.right)
        elif isinstance(node, nodes.CondExpr):
            node.test, node.expr1 = self.visit(node.test), self._written(node.expr1)
            if node.expr2 is not None:
                node.expr2 = self._written(node.expr2)
        else:
            written: nodes.Expr = self.visit(node)
            return written
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        named = {name.name for name in node.find_all(nodes.Name)}
        self.generic_visit(node)
        for given in ("varargs", "kwargs"):
            if given in named:
                value = nodes.Name(given, "load", lineno=node.lineno)
                node.body.insert(0, nodes.ExprStmt(_filter(value, BUILT, node)))
        node.body.insert(0, _step_statement(node))
        return node

    def visit_Block(self, node: nodes.Block) -> nodes.Block:
        self.generic_visit(node)
        node.body.insert(0, _step_statement(node))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        # Jinja writes this call itself, so it stays a call.
        self.generic_visit(node.call)
        node.body = [self.visit(statement) for statement in node.body]
        node.body.insert(0, _step_statement(node))
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        # Jinja computes its value while it compiles.
        if not all(isinstance(option.value, nodes.Const) for option in node.options):
            raise TemplateLimitError("`autoescape` with anything but a constant")
        node.body = [self.visit(statement) for statement in node.body]
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Expr:
        callee = node.node
        if isinstance(callee, nodes.Getattr) and callee.attr in STRIP_METHODS:
            callee.node = self.visit(callee.node)
            node.args = [
                one if _is_scalar(one) else _filter(self.visit(one), OPTION, node)
                for one in node.args
            ]
            if node.kwargs or node.dyn_args or node.dyn_kwargs:
                raise TemplateLimitError(f"`{callee.attr}` with unusual arguments")
            return node
        if isinstance(callee, nodes.Getattr):
            callee.node = self.visit(callee.node)
        else:
            node.node = self.visit(callee)
        node.args = [self.visit(one) for one in node.args]
        node.kwargs = [self.visit(one) for one in node.kwargs]
        for field in ("dyn_args", "dyn_kwargs"):
            if getattr(node, field) is not None:
                setattr(node, field, self.visit(getattr(node, field)))
        return node

    def visit_Getattr(self, node: nodes.Getattr) -> nodes.Expr:
        self.generic_visit(node)
        # A method could be called later, with arguments that are not seen here.
        return _filter(node, DATA, node) if node.attr in STRIP_METHODS else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(node, SLICED, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Const(self, node: nodes.Const) -> nodes.Const:
        check_number(node.value)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return node if all(map(_is_scalar, node.items)) else _filter(node, BUILT, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        if node.ctx != "load" or all(map(_is_scalar, node.items)):
            return node
        return _filter(node, BUILT, node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        if all(_is_scalar(pair.key) and _is_scalar(pair.value) for pair in node.items):
            return node
        return _filter(node, BUILT, node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), JOINED, node)

    def visit_Add(self, node: nodes.Add) -> nodes.Expr:
        operands = [self.visit(operand) for operand in _parts_of_a_sum(node)]
        if any(isinstance(one, nodes.Const) and type(one.value) is int for one in operands):
            # Only numbers can be added to a number.
            total: nodes.Expr = reduce(nodes.Add, operands)
            return total
        return _filter(nodes.List(operands, lineno=node.lineno), ADDED, node)


def _texts_in_a_row(node: nodes.Expr) -> list[nodes.Expr]:
    """The parts of `a ~ b`, which can be written one after another."""
    return node.nodes if isinstance(node, nodes.Concat) else [node]


def _parts_of_a_sum(node: nodes.Add) -> list[nodes.Expr]:
    operands: list[nodes.Expr] = []
    left: nodes.Expr = node
    while isinstance(left, nodes.Add):
        operands.append(left.right)
        left = left.left
    operands.append(left)
    return operands[::-1]


def _is_scalar(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Const)


def _filter(value: Any, name: str, at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=at.lineno)


def _step_statement(at: nodes.Node) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filter(nodes.Const(True), STEP, at), lineno=at.lineno)


def _with_steps(statements: list[nodes.Node]) -> list[nodes.Node]:
    """The statements, with a step between each few hundred expressions."""
    counting: list[nodes.Node] = []
    used = 0
    for statement in _short_outputs(statements):
        own = _own_expressions(statement)
        if own > _EXPRESSIONS_MAX:
            raise TemplateLimitError(f"line {statement.lineno}: too many expressions")
        used += own
        if used > _EXPRESSIONS_PER_STEP:
            counting.append(_step_statement(statement))
            used = own
        counting.append(statement)
    return counting


def _short_outputs(statements: list[nodes.Node]) -> Iterable[nodes.Node]:
    """The statements; an output of many expressions, which Jinja makes of a text with many, as
    several.
    """
    for statement in statements:
        if not isinstance(statement, nodes.Output) or len(statement.nodes) <= _PARTS_UNCHECKED_MAX:
            yield statement
            continue
        parts = statement.nodes
        for first in range(0, len(parts), _PARTS_UNCHECKED_MAX):
            some = parts[first : first + _PARTS_UNCHECKED_MAX]
            yield nodes.Output(some, lineno=statement.lineno)


def _own_expressions(statement: nodes.Node) -> int:
    """The expressions of a statement without those of the statements in it."""
    own = 0
    for child in statement.iter_child_nodes(exclude=("body", "else_")):
        if isinstance(child, nodes.If):
            own += _own_expressions(child)
        else:
            own += 1 + sum(1 for _ in child.find_all(nodes.Expr))
    return own
