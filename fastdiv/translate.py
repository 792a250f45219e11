"""Writes `fastdiv.pointwise` as the C++ header pointwise.h, for g++ and nvcc, and `fastdiv.rowwise` as rowwise.h.

    python -m fastdiv.translate csrc

A test keeps the checked-in headers equal to what this writes.
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from types import ModuleType

from fastdiv import pointwise, rowwise
from fastdiv.divergences import DIVERGENCES
from fastdiv.statistics import OUTPUTS

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

_POINTWISE = """\
// Generated from fastdiv/pointwise.py by `python -m fastdiv.translate csrc`; a test keeps the two equal.
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

_ROWWISE = """\
// Generated from fastdiv/rowwise.py by `python -m fastdiv.translate csrc`; a test keeps the two equal.
// clang-format off
#pragma once
#include <cmath>
#include <cstdint>

// Every output of one model, in the order of fastdiv/statistics.py: the place in this list is its number.
#define FD_OUTPUTS(X) {outputs}

namespace fd::rowwise {{

using std::expm1, std::log1p;

enum OutputNumber : int32_t {{
#define FD_NUMBER(name) k_##name,
  FD_OUTPUTS(FD_NUMBER)
#undef FD_NUMBER
}};

{functions}

}}  // namespace fd::rowwise
"""


class _Cpp(ast.NodeVisitor):
    """One expression of the pointwise language as C++ text, its numbers float or double."""

    def __init__(self, kind: str) -> None:
        # In float, which loops over the vocabulary take, both arms are computed: the compiler can share their parts.
        self._suffix, self._where = {"float": ("f", "chosen({}, {}, {})"), "double": ("", "({} ? {} : {})")}[kind]
        self._scalar = kind == "double"  # may compare with infinities and return NaN

    def generic_visit(self, node: ast.AST) -> str:
        line = getattr(node, "lineno", "?")
        raise SyntaxError(f"pointwise, line {line}: {ast.unparse(node)!r} is outside the pointwise language")

    def visit_Name(self, node: ast.Name) -> str:
        return node.id

    def visit_Constant(self, node: ast.Constant) -> str:
        if not isinstance(node.value, float):
            return self.generic_visit(node)
        return f"{node.value!r}{self._suffix}"

    def visit_UnaryOp(self, node: ast.UnaryOp) -> str:
        if not isinstance(node.op, ast.USub):
            return self.generic_visit(node)
        return f"-{self.visit(node.operand)}"

    def visit_BinOp(self, node: ast.BinOp) -> str:
        operator = _OPERATORS.get(type(node.op)) or self.generic_visit(node)
        return f"({self.visit(node.left)} {operator} {self.visit(node.right)})"

    def visit_Compare(self, node: ast.Compare) -> str:
        equal = self._scalar and isinstance(node.ops[0], ast.Eq)
        operator = "==" if equal else _OPERATORS.get(type(node.ops[0])) or self.generic_visit(node)
        return f"{self.visit(node.left)} {operator} {self.visit(node.comparators[0])}"

    def visit_Call(self, node: ast.Call) -> str:
        if not isinstance(node.func, ast.Name):
            return self.generic_visit(node)
        if self._scalar and node.func.id == "float":
            return {"inf": "INFINITY", "nan": "NAN"}[ast.literal_eval(node.args[0])]
        arguments = [self.visit(a) for a in node.args]
        if node.func.id == "where":
            return self._where.format(*arguments)
        return f"{node.func.id}({', '.join(arguments)})"


def _function(node: ast.FunctionDef, kind: str = "float") -> str:
    used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    parameters = ", ".join(f"{kind} {a.arg}" if a.arg in used else kind for a in node.args.args)
    lines = [f"{'FD_INLINE' if kind == 'float' else 'inline'} {kind} {node.name}({parameters}) {{"]
    cpp = _Cpp(kind)
    for statement in node.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            lines.append(f"  const {kind} {statement.targets[0].id} = {cpp.visit(statement.value)};")
        elif isinstance(statement, ast.Return) and statement.value is not None:
            lines.append(f"  return {cpp.visit(statement.value)};")
        else:
            cpp.generic_visit(statement)
    return "\n".join([*lines, "}"])


def _functions(text: ModuleType, kind: str) -> str:
    tree = ast.parse(inspect.getsource(text))
    return "\n\n".join(_function(node, kind) for node in tree.body if isinstance(node, ast.FunctionDef))


def headers() -> dict[str, str]:
    """The headers' texts, by file name."""
    every = " ".join(f"X({name})" for name in DIVERGENCES)
    compared = " ".join(f"X({name})" for name, divergence in DIVERGENCES.items() if divergence.one_pass is None)
    outputs = " ".join(f"X({name})" for name in OUTPUTS)
    return {
        "pointwise.h": _POINTWISE.format(every=every, compared=compared, functions=_functions(pointwise, "float")),
        "rowwise.h": _ROWWISE.format(outputs=outputs, functions=_functions(rowwise, "double")),
    }


if __name__ == "__main__":
    for name, text in headers().items():
        Path(sys.argv[1], name).write_text(text)
