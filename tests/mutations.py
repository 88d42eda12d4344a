"""Mutants of a file: its source with one change each.

A mutant negates a condition, replaces an operator, changes a number or a flag, removes a keyword
argument or a call, or swaps two arguments. Error messages, assertions, user output and signature
defaults are not mutated.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.MatMult: ast.Add, ast.Pow: ast.Mult,
}  # fmt: skip
_SHOWN = ("print", "say", "warn", "warning", "info", "update", "set_postfix_str", "ProgressBar")
"""Calls without effect other than output."""
_SKIPPED = ("progress", "desc", "unit", "shown", "help", "total", "repr", "indent", "strict")
"""Keyword arguments that only affect output, and the assertion that zip's lengths are equal."""


@dataclass(frozen=True)
class Mutant:
    """One change to one file: its line, first line of the statement, and text before and after."""

    path: str
    line: int
    first: int
    kind: str
    before: str
    after: str

    @property
    def name(self) -> str:
        """A unique description of the mutant."""
        return f"{self.path}:{self.line} {self.kind}: {self.before} -> {self.after}"


def mutants(path: Path) -> Iterator[tuple[Mutant, str]]:
    """Yields every mutant of a file with its complete source."""
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    encoded = source.encode()
    tree = ast.parse(source)
    firsts = _first_lines(tree)
    for node, kind, new in _changes(tree):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        before = encoded[begin:end].decode()
        after = new if isinstance(new, str) else f"({ast.unparse(new)})"
        shown = (" ".join(before.split())[:120], " ".join(after.split())[:120])
        mutated = (encoded[:begin] + after.encode() + encoded[end:]).decode()
        relative = str(path.relative_to(ROOT))
        first = firsts.get(node.lineno, node.lineno)
        yield Mutant(relative, node.lineno, first, kind, *shown), mutated


def _first_lines(tree: ast.Module) -> dict[int, int]:
    """The first line of the statement that each line belongs to."""
    found: dict[int, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            for line in range(node.lineno, max(end, node.lineno) + 1):
                found[line] = max(found.get(line, 0), node.lineno)
    return found


def _changes(tree: ast.Module) -> Iterator[tuple[ast.expr | ast.stmt, str, ast.expr | str]]:
    """Yields the node to replace, the kind of change, and the replacement."""
    for node in _running(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            ops = [_COMPARE[type(node.ops[0])]()]
            yield node, "comparison", ast.Compare(node.left, ops, node.comparators)
        elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            other = _BINARY[type(node.op)]()
            yield node, "operator", ast.BinOp(node.left, other, node.right)
        elif isinstance(node, ast.BoolOp):
            other_bool = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield node, "and or", ast.BoolOp(other_bool, node.values)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield node, "sign", node.operand
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            if not isinstance(node.test, ast.Compare | ast.UnaryOp):
                yield node.test, "condition", ast.UnaryOp(ast.Not(), node.test)
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, "flag", ast.Constant(not node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield node, "number", ast.Constant(node.value + 1)
        elif isinstance(node, ast.Call):
            yield from _call_changes(node)
        elif isinstance(node, ast.AugAssign) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ):
            yield node, "left out", "pass"


def _call_changes(node: ast.Call) -> Iterator[tuple[ast.expr, str, ast.expr]]:
    for index, keyword in enumerate(node.keywords):
        if keyword.arg and keyword.arg not in _SKIPPED:
            rest = node.keywords[:index] + node.keywords[index + 1 :]
            yield node, f"without {keyword.arg}", ast.Call(node.func, node.args, rest)
    for index in range(len(node.args) - 1):
        pair = node.args[index : index + 2]
        names = {ast.unparse(a) for a in pair if isinstance(a, ast.Name | ast.Attribute)}
        if len(names) == 2:
            swapped = [*node.args[:index], *pair[::-1], *node.args[index + 2 :]]
            yield node, "arguments exchanged", ast.Call(node.func, swapped, node.keywords)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes to mutate: no messages, annotations, decorators or signatures."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(
            node, ast.Call
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            if isinstance(child, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
                continue
            if isinstance(child, ast.JoinedStr | ast.FormattedValue):
                continue
            if isinstance(child, ast.keyword) and child.arg in _SKIPPED:
                continue
            if isinstance(child, ast.Expr | ast.Call) and _is_shown(child):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield from _running(child)


def _is_shown(node: ast.Expr | ast.Call) -> bool:
    call = node.value if isinstance(node, ast.Expr) else node
    if not isinstance(call, ast.Call):
        return True  # a docstring
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    return name in _SHOWN or name == "setting"
