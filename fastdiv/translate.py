"""Prints `fastdiv.pointwise` as the C++ header `csrc/pointwise.h`, for g++ and nvcc.

    python -m fastdiv.translate > csrc/pointwise.h

A test keeps the checked-in header equal to what this prints.
"""

from __future__ import annotations

import ast
import inspect

from fastdiv import pointwise
from fastdiv.divergences import DIVERGENCES

_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Gt: ">",
    ast.Lt: "<",
    ast.GtE: ">=",
    ast.LtE: "<=",
}

_HEADER = """\
// Generated from fastdiv/pointwise.py by `python -m fastdiv.translate`; a test keeps the two equal.
// clang-format off
#pragma once
#include "language.h"

// Every divergence, in the order of fastdiv/divergences.py: the place in this list is its number.
#define FD_DIVERGENCES(X) {every}
// Those that need both normalisers before their terms can be summed.
#define FD_COMPARED(X) {compared}

namespace fd {{

enum DivergenceNumber : int32_t {{
#define FD_NUMBER(name) k_##name,
  FD_DIVERGENCES(FD_NUMBER)
#undef FD_NUMBER
}};

{functions}

}}  // namespace fd
"""


class _Cpp(ast.NodeVisitor):
    """One expression of the pointwise language as C++ text."""

    def generic_visit(self, node: ast.AST) -> str:
        line = getattr(node, "lineno", "?")
        raise SyntaxError(f"pointwise, line {line}: {ast.unparse(node)!r} is outside the pointwise language")

    def visit_Name(self, node: ast.Name) -> str:
        return node.id

    def visit_Constant(self, node: ast.Constant) -> str:
        if not isinstance(node.value, float):
            return self.generic_visit(node)
        return f"{node.value!r}f"

    def visit_UnaryOp(self, node: ast.UnaryOp) -> str:
        if not isinstance(node.op, ast.USub):
            return self.generic_visit(node)
        return f"-{self.visit(node.operand)}"

    def visit_BinOp(self, node: ast.BinOp) -> str:
        operator = _OPERATORS.get(type(node.op)) or self.generic_visit(node)
        return f"({self.visit(node.left)} {operator} {self.visit(node.right)})"

    def visit_Compare(self, node: ast.Compare) -> str:
        operator = _OPERATORS.get(type(node.ops[0])) or self.generic_visit(node)
        return f"{self.visit(node.left)} {operator} {self.visit(node.comparators[0])}"

    def visit_Call(self, node: ast.Call) -> str:
        if not isinstance(node.func, ast.Name):
            return self.generic_visit(node)
        arguments = [self.visit(a) for a in node.args]
        if node.func.id == "where":
            return "({} ? {} : {})".format(*arguments)
        return f"{node.func.id}({', '.join(arguments)})"


def _function(node: ast.FunctionDef) -> str:
    used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    parameters = ", ".join(f"float {a.arg}" if a.arg in used else "float" for a in node.args.args)
    lines = [f"FD_INLINE float {node.name}({parameters}) {{"]
    for statement in node.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            lines.append(f"  const float {statement.targets[0].id} = {_Cpp().visit(statement.value)};")
        elif isinstance(statement, ast.Return) and statement.value is not None:
            lines.append(f"  return {_Cpp().visit(statement.value)};")
        else:
            _Cpp().generic_visit(statement)
    return "\n".join([*lines, "}"])


def header() -> str:
    """The text of `csrc/pointwise.h`."""
    tree = ast.parse(inspect.getsource(pointwise))
    functions = [_function(node) for node in tree.body if isinstance(node, ast.FunctionDef)]
    every = " ".join(f"X({name})" for name in DIVERGENCES)
    compared = " ".join(f"X({name})" for name, divergence in DIVERGENCES.items() if divergence.one_pass is None)
    return _HEADER.format(every=every, compared=compared, functions="\n\n".join(functions))


if __name__ == "__main__":
    print(header(), end="")
