"""Every mutant of a C++ file, and all that were chosen in one text behind a switch.

tree-sitter parses the file. In the text that is compiled, a changed expression stands beside the
old one, as ``(maskmoe_mutant == 17 ? (new) : (old))``: one build serves all mutants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tests.mutants.mutant import Mutant, apply, mutant

if TYPE_CHECKING:
    from tree_sitter import Node

SWITCH = "maskmoe_mutant"
#: In front of each mutated file; the number is read in a source file of its own.
DECLARATION = f'extern "C" int {SWITCH};\n#line 1\n'
DEFINITION = f"""#include <cstdlib>
extern "C" int {SWITCH};
int {SWITCH} = std::getenv("MASKMOE_MUTANT") ? std::atoi(std::getenv("MASKMOE_MUTANT")) : 0;
"""

_BINARY = {
    "<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=",),
    "!=": ("==",), "+": ("-",), "-": ("+",), "*": ("+",), "/": ("*",), "%": ("/",), "&&": ("||",),
    "||": ("&&",), "&": ("|",), "|": ("&",), "<<": (">>",), ">>": ("<<",),
}  # fmt: skip
_ASSIGNMENT = {"+=": "-=", "-=": "+=", "*=": "/=", "|=": "&=", "&=": "|="}
_CALLS = {"std::min": "std::max", "std::max": "std::min"}
# What the compiler computes, declares or only shows: no run of the program can choose there.
_FIXED = {
    "template_argument_list", "template_parameter_list", "static_assert_declaration", "enumerator",
    "parameter_list", "field_declaration", "array_declarator", "preproc_if", "preproc_ifdef",
    "preproc_def", "preproc_function_def", "preproc_include", "preproc_call",
    "attribute_declaration", "lambda_capture_specifier", "ERROR", "decltype", "sizeof_expression",
    "requires_clause", "type_descriptor", "alignas_qualifier", "noexcept",
}  # fmt: skip
# Functions whose later arguments are the text of an error.
_CHECKS = {"STD_TORCH_CHECK", "STD_TORCH_CHECK_NOT_IMPLEMENTED", "check", "require"}
# What these do is seen in time only.
_WITHOUT_RESULT = {"__builtin_prefetch", "prefer_large_pages"}


def mutants(file: str, text: str) -> list[Mutant]:
    """Every mutant of ``text``, the content of ``file``."""
    import tree_sitter_cpp
    from tree_sitter import Language, Parser

    data = text.encode()
    if len(data) != len(text):  # positions are bytes
        raise ValueError(f"{file} is not plain ASCII")
    root = Parser(Language(tree_sitter_cpp.language())).parse(data).root_node
    return [
        mutant(file, text, (node.start_byte, node.end_byte), new, operator, function)
        for node, function in _walk(root, "")
        for new, operator in _changes(node)
    ]


def switched(text: str, chosen: Iterable[tuple[int, Mutant]]) -> str:
    """``text`` with all chosen mutants, each of which acts while the switch has its number."""
    changes = []
    for number, each in chosen:
        old = text[each.start : each.end]
        if each.operator == "statement removed":
            new = f"{{ if ({SWITCH} != {number}) {{ {old} }} }}"  # no `else` may bind to this `if`
        else:
            new = f"({SWITCH} == {number} ? ({each.new}) : ({old}))"
        changes.append(Mutant(**{**vars(each), "new": new}))
    return DECLARATION + apply(text, changes)


def _walk(node: Node, function: str) -> Iterator[tuple[Node, str]]:
    if node.type in _FIXED or _constexpr(node):
        return
    if node.type == "function_definition":
        function = _name_of(node)
    children = node.children
    if node.type == "expression_statement" and _called(node.children[0]) in _WITHOUT_RESULT:
        return
    yield node, function
    if _called(node) in _CHECKS:
        children = node.child_by_field_name("arguments").named_children[:1]
    elif node.type == "case_statement":
        children = [child for child in children if child != node.child_by_field_name("value")]
    for child in children:
        yield from _walk(child, function)


def _called(node: Node) -> str:
    called = node.child_by_field_name("function") if node.type == "call_expression" else None
    return "" if called is None else called.text.decode()


def _constexpr(node: Node) -> bool:
    """Is it for the compiler: constexpr, or the condition of an ``if constexpr``?"""
    if node.type == "condition_clause" and node.parent is not None:
        return any(child.type == "constexpr" for child in node.parent.children)
    if node.type not in ("declaration", "function_definition"):
        return False
    words = [child.text for child in node.children if child.type == "type_qualifier"]
    return b"constexpr" in words or b"consteval" in words


def _name_of(node: Node) -> str:
    declarator = node.child_by_field_name("declarator")
    while declarator is not None and declarator.type != "function_declarator":
        declarator = declarator.child_by_field_name("declarator") or next(
            (c for c in declarator.children if c.type == "function_declarator"), None
        )
    return "" if declarator is None else declarator.child_by_field_name("declarator").text.decode()


def _changes(node: Node) -> Iterator[tuple[str, str]]:
    text = node.text.decode()
    if node.is_named and _decides(node):
        yield "true", "condition"
        yield "false", "condition"
    if node.type in ("binary_expression", "assignment_expression"):
        left, symbol, right = (
            node.child_by_field_name(name).text.decode() for name in ("left", "operator", "right")
        )
        comparison = symbol in ("<", "<=", ">", ">=", "==", "!=")
        kind = "comparison" if comparison else "boolean" if symbol in ("&&", "||") else "arithmetic"
        table = _BINARY if node.type == "binary_expression" else _ASSIGNMENT
        for new in table.get(symbol, ()) if table is _BINARY else [table.get(symbol)]:
            if new is not None:
                yield f"{left} {new} {right}", kind
        if symbol in ("&&", "||"):
            yield left, "operand dropped"
            yield right, "operand dropped"
    elif node.type == "number_literal" and "x" not in text and "'" not in text:
        yield from ((new, "constant") for new in _numbers(text))
    elif node.type in ("true", "false"):
        yield "false" if node.type == "true" else "true", "constant"
    elif node.type == "conditional_expression":
        yield from (
            (node.child_by_field_name(name).text.decode(), "condition")
            for name in ("consequence", "alternative")
        )
    elif node.type == "unary_expression" and text[0] in "!-~":
        yield node.child_by_field_name("argument").text.decode(), "boolean"
    elif node.type == "call_expression":
        called = node.child_by_field_name("function")
        base = called.text.decode().split("<")[0]
        if base in _CALLS:
            yield _CALLS[base] + text[len(base) :], "name confused"
    elif node.type in ("expression_statement", "continue_statement") and text != ";":
        yield "", "statement removed"


def _decides(node: Node) -> bool:
    """Is it the condition of an ``if``?"""
    clause = node.parent
    return (
        clause is not None
        and clause.type == "condition_clause"
        and clause.parent.type == "if_statement"
        and clause.child_by_field_name("value") == node
    )


def _numbers(text: str) -> list[str]:
    if text.endswith(("f", "F")) or "." in text:
        value = float(text.rstrip("fF"))
        suffix = "f" if text[-1] in "fF" else ""
        new = [1.0] if value == 0 else [value * 1.5, value / 16]
        return [f"{each!r}{suffix}" for each in new]
    if not text.isdigit():
        return []
    value = int(text)
    return [str(value + 1)] if value == 0 else [str(value - 1), str(value + 1)]
