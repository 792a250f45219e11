"""Mutation test: every small change of `fastdiv.pointwise` must be noticed by the oracle, or be listed here as none."""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Iterator
from types import ModuleType

import oracle

from fastdiv import pointwise

_SWAP: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Gt: ast.GtE,
    ast.Lt: ast.GtE,
}

# Changes that change nothing: (function, the node's text).  At d = 0 the near branch decides, so which side of
# `d > 0` it is on is never seen.
EQUIVALENT = {
    ("log_mixture", "d > 0.0"),
    ("p_log_mixture_over_p", "d > 0.0"),
    ("q_log_mixture_over_q", "d < 0.0"),
}


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """The mutants of one node."""
    if isinstance(node, ast.BinOp) and type(node.op) in _SWAP:
        changed = copy.deepcopy(node)
        changed.op = _SWAP[type(node.op)]()  # type: ignore[assignment]
        yield changed
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAP:
        changed_compare = copy.deepcopy(node)
        changed_compare.ops = [_SWAP[type(node.ops[0])]()]  # type: ignore[list-item]
        yield changed_compare
    if isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield ast.Constant(node.value + 1.0)
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "where":
        yield node.args[1]
        yield node.args[2]


def _mutants() -> Iterator[tuple[str, str, ast.Module]]:
    """(function, original text of the node, mutated module)."""
    tree = ast.parse(inspect.getsource(pointwise))
    for function in (n for n in tree.body if isinstance(n, ast.FunctionDef)):
        for node in ast.walk(function):
            for change in _changes(node):

                class Put(ast.NodeTransformer):
                    def visit(self, here: ast.AST, node: ast.AST = node, change: ast.AST = change) -> ast.AST:
                        return change if here is node else self.generic_visit(here)

                mutated = copy.copy(tree)
                mutated.body = [Put().visit(copy_with(n, node)) if n is function else n for n in tree.body]
                yield function.name, ast.unparse(node), mutated


def copy_with(function: ast.AST, keep: ast.AST) -> ast.AST:
    """A deep copy of `function` that still holds the very node `keep`."""
    return copy.deepcopy(function, {id(keep): keep})


def _noticed(tree: ast.Module, function: str) -> bool:
    module = ModuleType("mutant")
    exec(compile(ast.fix_missing_locations(tree), "mutant", "exec"), module.__dict__)
    users = [name for name in oracle.TERMS if name == function or _uses(name, function)]
    try:
        return bool(oracle.faults(module, users))
    except (TypeError, RuntimeError):
        return True


def _uses(name: str, function: str) -> bool:
    tree = ast.parse(inspect.getsource(pointwise))
    bodies = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}

    def calls(of: str) -> set[str]:
        direct = {n.id for n in ast.walk(bodies[of]) if isinstance(n, ast.Name) and n.id in bodies}
        return direct | {x for other in direct for x in calls(other)}

    return function in calls(name)


def test_every_change_of_the_mathematics_is_noticed() -> None:
    assert oracle.faults(pointwise) == [], "the checks fail on the unchanged source"
    total, survivors = 0, []
    for function, text, tree in _mutants():
        total += 1
        if not _noticed(tree, function) and (function, text) not in EQUIVALENT:
            survivors.append(f"{function}: {text}")
    assert total > 100
    assert survivors == []
