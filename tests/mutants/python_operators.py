"""Every mutant of a Python file: the operators walk ``ast`` and replace text where it lies.

Positions of ``ast`` are exact, so a change is a splice and the rest of the file keeps its bytes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise

from tests.mutants.mutant import Mutant, mutant

_COMPARISONS: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Lt: ("<=", ">"),
    ast.LtE: ("<", ">="),
    ast.Gt: (">=", "<"),
    ast.GtE: (">", "<="),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
}
_ARITHMETIC: dict[type[ast.operator], tuple[str, ...]] = {
    ast.Add: ("-",),
    ast.Sub: ("+",),
    ast.Mult: ("/", "+"),
    ast.Div: ("*",),
    ast.FloorDiv: ("*",),
    ast.Mod: ("//",),
    ast.Pow: ("*",),
    ast.BitAnd: ("|",),
    ast.BitOr: ("&",),
    ast.BitXor: ("|",),
    ast.LShift: (">>",),
    ast.RShift: ("<<",),
}
_SYMBOLS = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%",
    ast.Pow: "**", ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^", ast.LShift: "<<",
    ast.RShift: ">>",
}  # fmt: skip
# Functions and methods that have a counterpart, and names of values that may be confused.
_COUNTERPARTS = {
    "min": "max", "minimum": "maximum", "amin": "amax", "any": "all", "row": "col", "up": "down",
    "floor": "ceil", "rows": "cols", "row_order": "col_order", "zeros": "ones",
    "new_zeros": "new_ones", "present": "routes_grad", "row_sizes": "col_sizes",
    "row_offsets": "col_offsets", "log1p": "log", "expm1": "exp", "nan": "inf", "lt": "le",
    "in_features": "out_features",
}  # fmt: skip
_COUNTERPARTS |= {new: old for old, new in _COUNTERPARTS.items()}
_BUILTINS = {"min", "max", "any", "all"}
# A method without which the receiver is a value of the same kind.
_TRANSPARENT = {"detach", "contiguous", "clone", "abs", "double", "float", "clamp", "masked_fill"}
# What these are given is text for a reader, or says where a warning points to.
_TEXT_CALLS = {"warn", "warn_once", "_warn_once"}
# `strict=True` of zip checks lengths that are equal wherever the code is right.
_CHECKS_ONLY = {"strict", "stacklevel"}
_TEXT_FUNCTIONS = {"__repr__", "__str__", "extra_repr"}


class _Walk:
    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.function = ""
        self.found: list[Mutant] = []
        lines = text.splitlines(keepends=True)
        self._lines = [line.encode() for line in lines]
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line))

    def position(self, line: int, column: int) -> int:
        """Where it lies in the text; ``ast`` counts columns in bytes."""
        return self._starts[line - 1] + len(self._lines[line - 1][:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.position(node.lineno, node.col_offset),
            self.position(node.end_lineno, node.end_col_offset),
        )

    def source(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def add(self, node: ast.AST | tuple[int, int], new: str, operator: str) -> None:
        span = node if isinstance(node, tuple) else self.span(node)
        self.found.append(mutant(self.file, self.text, span, new, operator, self.function))

    def between(self, left: ast.AST, right: ast.AST, symbol: str) -> tuple[int, int]:
        """Where the operator between two operands lies."""
        start, end = self.span(left)[1], self.span(right)[0]
        at = self.text.index(symbol, start, end)
        return at, at + len(symbol)

    def visit(self, node: ast.AST) -> None:
        for operator in (_compare, _arithmetic, _boolean, _constant, _condition, _statement, _call,
                         _slice, _name):  # fmt: skip
            operator(self, node)
        function = self.function
        if isinstance(node, ast.FunctionDef):
            self.function = node.name
        for child in _children(node):
            self.visit(child)
        self.function = function


def mutants(file: str, text: str) -> list[Mutant]:
    """Every mutant of ``text``, the content of ``file``."""
    walk = _Walk(file, text)
    walk.visit(ast.parse(text))
    return walk.found


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Parts of a node that decide what is computed: no text, type hint or decorator."""
    if isinstance(node, (ast.JoinedStr, ast.Raise, ast.arg, ast.Import, ast.ImportFrom)):
        return
    if isinstance(node, ast.FunctionDef):
        if node.name not in _TEXT_FUNCTIONS:
            yield from node.body
        return
    if isinstance(node, ast.ClassDef):
        yield from node.body
        return
    if isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield node.value
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Call) and _called(node) in _TEXT_CALLS:
        return
    if isinstance(node, ast.keyword) and node.arg in _CHECKS_ONLY:
        return
    yield from ast.iter_child_nodes(node)


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _compare(walk: _Walk, node: ast.AST) -> None:
    if not isinstance(node, ast.Compare):
        return
    operands = [node.left, *node.comparators]
    for op, (left, right) in zip(node.ops, pairwise(operands), strict=True):
        start, end = walk.span(left)[1], walk.span(right)[0]
        inside = walk.text[start:end]
        # A closing bracket of the left side, or an opening one of the right, stays.
        old = inside.strip(" \n()")
        at = start + inside.index(old)
        for new in _COMPARISONS[type(op)]:
            walk.add((at, at + len(old)), new, "comparison")


def _arithmetic(walk: _Walk, node: ast.AST) -> None:
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right, suffix = node.left, node.right, ""
    elif isinstance(node, ast.AugAssign) and type(node.op) in _ARITHMETIC:
        left, right, suffix = node.target, node.value, "="
    else:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert)):
            walk.add(node, walk.source(node.operand), "arithmetic")
        return
    at = walk.between(left, right, _SYMBOLS[type(node.op)] + suffix)
    for new in _ARITHMETIC[type(node.op)]:
        walk.add(at, new + suffix, "arithmetic")


def _boolean(walk: _Walk, node: ast.AST) -> None:
    if isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in pairwise(node.values):
            walk.add(walk.between(left, right, old), new, "boolean")
        for k in range(len(node.values)):
            rest = [f"({walk.source(v)})" for n, v in enumerate(node.values) if n != k]
            left = f" {old} ".join(rest)
            walk.add(node, left if len(rest) == 1 else f"({left})", "operand dropped")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        walk.add(node, f"bool({walk.source(node.operand)})", "boolean")


def _constant(walk: _Walk, node: ast.AST) -> None:
    if not isinstance(node, ast.Constant):
        return
    value = node.value
    if isinstance(value, bool):
        walk.add(node, str(not value), "constant")
    elif isinstance(value, int):
        new = (value + 1,) if value == 0 else (value - 1, value + 1)
        if value > 2:
            new = (*new, value * 2)
        for each in new:
            walk.add(node, str(each), "constant")
    elif isinstance(value, float):
        for each in (1.0,) if value == 0 else (value * 1.5, value / 16):
            walk.add(node, repr(each), "constant")


def _condition(walk: _Walk, node: ast.AST) -> None:
    tests: list[ast.expr] = []
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        tests = [node.test]
    elif isinstance(node, ast.comprehension):
        tests = node.ifs
    for test in tests:
        if ast.unparse(test) != "TYPE_CHECKING":
            for new in ("True", "False"):
                walk.add(test, new, "condition")


def _statement(walk: _Walk, node: ast.AST) -> None:
    removed = isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break, ast.Assert))
    if isinstance(node, ast.Expr):
        removed = isinstance(node.value, ast.Call)
    elif isinstance(node, ast.Assign):
        # A plain name that is lost is an error at its first use: no question for a test.
        names = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        target = node.targets[0]
        removed = isinstance(target, ast.Subscript) or getattr(target, "id", "") in names
    if removed:
        walk.add(node, "pass", "statement removed")


def _call(walk: _Walk, node: ast.AST) -> None:
    if not isinstance(node, ast.Call) or _called(node) in _TEXT_CALLS:
        return
    for kept in node.keywords:
        if kept.arg is not None and kept.arg not in _CHECKS_ONLY:
            start, end = walk.span(kept)
            before = walk.text.rfind(",", walk.span(node.func)[1], start)
            if before >= 0:
                walk.add((before, end), "", "argument dropped")
            else:  # the first of all: a comma that follows goes along
                after = re.match(r"\s*,", walk.text[end:])
                walk.add((start, end + (after.end() if after else 0)), "", "argument dropped")
    # Of one kind, else it is an error of types that needs no test.
    if len(node.args) > 1 and type(node.args[0]) is type(node.args[1]):
        first, second = (walk.source(a) for a in node.args[:2])
        if first != second and not isinstance(node.args[0], ast.Starred):
            span = (walk.span(node.args[0])[0], walk.span(node.args[1])[1])
            walk.add(span, f"{second}, {first}", "arguments swapped")
    if isinstance(node.func, ast.Attribute) and node.func.attr in _TRANSPARENT:
        walk.add(node, walk.source(node.func.value), "call removed")


def _slice(walk: _Walk, node: ast.AST) -> None:
    if not isinstance(node, ast.Slice):
        return
    for bound in (node.lower, node.upper):
        if bound is not None:
            walk.add(bound, "", "slice bound dropped")


def _name(walk: _Walk, node: ast.AST) -> None:
    if isinstance(node, ast.Attribute) and node.attr in _COUNTERPARTS:
        end = walk.span(node)[1]
        walk.add((end - len(node.attr), end), _COUNTERPARTS[node.attr], "name confused")
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in _BUILTINS:
        walk.add(node.func, _COUNTERPARTS[node.func.id], "name confused")
