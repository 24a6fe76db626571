"""Questions about rows of named values, read safely: an expression is parsed and checked, and never run as code."""

import ast
import difflib
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from intaglio.reports.safe import plain

LONGEST = 2000
ORDERS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
FORM = "write it as verdict == 'failing' and seed in (0, 1)"


def query(expression: str, known: Iterable[str], usual: Sequence[str]) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a row fits, as a function of its values by name: ``verdict == 'failing' and optim.rate > 1e-3``.

    There are comparisons, ``in``, ``and``, ``or``, ``not``, texts, numbers and lists of them, names and dotted names,
    and nothing else; nothing is ever run. What a row does not have fits no order. ``usual`` names are told where one is
    unknown.

    Raises:
        ValueError: anything else, or a name that is not ``known``, with the nearest; when asked, values that have no
            order.
    """
    tree = _parsed(expression)
    _check(tree, set(known), usual)
    return lambda row: bool(_value(tree, row))


def _parsed(expression: str) -> ast.expr:
    if len(expression) > LONGEST:
        raise ValueError(f"--where has {len(expression):,} characters; {LONGEST:,} are enough for a question.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of escapes in texts
            warnings.simplefilter("ignore", DeprecationWarning)
            return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        told = f" ({error.msg})" if isinstance(error, SyntaxError) else ""
        hint = "; equality is ==" if "=" in expression and "==" not in expression else ""
        raise ValueError(f"--where '{plain(expression, 60)}' cannot be read{told}: {FORM}{hint}.") from None


def _check(node: ast.expr, known: set[str], usual: Sequence[str], depth: int = 0) -> None:
    """Refuses everything but names that are known, constants, comparisons, and/or/not.

    Raises:
        ValueError: names what is refused.
    """
    if depth > 60:
        raise ValueError("--where is nested too deeply.")
    inner: list[ast.expr] = []
    if isinstance(node, ast.Name | ast.Attribute):
        name = _dotted(node)
        if name not in known:
            near = difflib.get_close_matches(name, list(known), 1, 0.4)
            hint = f"did you mean {plain(near[0])}? " if near else ""
            raise ValueError(
                f"--where: no run has '{plain(name, 40)}'; {hint}Texts stand in quotes; there are {', '.join(usual)}, "
                "and the settings, as optim.rate."
            )
    elif isinstance(node, ast.BoolOp):
        inner = node.values
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        inner = [node.operand]
        if isinstance(node.op, ast.USub) and not (
            isinstance(node.operand, ast.Constant) and _is_number(node.operand.value)
        ):
            raise ValueError(f"--where: − stands before numbers only; {FORM}.")
    elif isinstance(node, ast.Compare):
        inner = [node.left, *node.comparators]
        if any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            raise ValueError("--where: use == and != in place of is and is not.")
    elif isinstance(node, ast.List | ast.Tuple):
        inner = node.elts
        if any(not isinstance(e, ast.Constant | ast.UnaryOp) for e in inner):
            raise ValueError(f"--where: a list holds texts and numbers; {FORM}.")
    elif not (isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool | None)):
        what = {"Call": "calls", "BinOp": "arithmetic", "Subscript": "brackets behind names", "Lambda": "functions"}
        kind = type(node).__name__
        raise ValueError(f"--where takes no {what.get(kind, kind)}: {FORM}.")
    for part in inner:
        _check(part, known, usual, depth + 1)


def _dotted(node: ast.expr) -> str:
    """``optim.rate`` as the key of a configuration; nothing is looked up on an object."""
    parts = list[str]()
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise ValueError(f"--where: a dot stands between the parts of a setting's name only; {FORM}.")
    return ".".join([node.id, *reversed(parts)])


def _value(node: ast.expr, row: Mapping[str, Any]) -> Any:
    """The value of a checked expression for one run."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BoolOp):
        values = (bool(_value(part, row)) for part in node.values)
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, row)
        return not value if isinstance(node.op, ast.Not) else -value
    if isinstance(node, ast.Compare):
        sides = [_value(part, row) for part in (node.left, *node.comparators)]
        return all(_holds(op, sides[k], sides[k + 1]) for k, op in enumerate(node.ops))
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(part, row) for part in node.elts]
    return row.get(_dotted(node))


def _holds(op: ast.cmpop, left: Any, right: Any) -> bool:
    if isinstance(op, ast.Eq | ast.NotEq):
        return (left == right) is isinstance(op, ast.Eq)
    if isinstance(op, ast.In | ast.NotIn):
        if left is None or right is None:
            return False
        if not isinstance(right, str | list | tuple) or (isinstance(right, str) and not isinstance(left, str)):
            raise ValueError(f"--where: '{plain(left, 30)}' cannot be in '{plain(right, 30)}'; {FORM}.")
        return (left in right) is isinstance(op, ast.In)
    if left is None or right is None:
        return False
    if not ((_is_number(left) and _is_number(right)) or (isinstance(left, str) and isinstance(right, str))):
        raise ValueError(f"--where: '{plain(left, 30)}' and '{plain(right, 30)}' have no order: one is no number.")
    return ORDERS[type(op)](left, right)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
