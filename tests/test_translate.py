"""The headers that the compiled backends read are what `fastdiv.pointwise` and `fastdiv.rowwise` become in C++."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fastdiv import translate

CSRC = Path(__file__).parents[1] / "csrc"


@pytest.mark.parametrize("name", ["pointwise.h", "rowwise.h"])
def test_the_checked_in_headers_are_current(name: str) -> None:
    assert (CSRC / name).read_text() == translate.headers()[name], "run: python -m fastdiv.translate csrc"


def _print(text: str, kind: str = "float") -> str:
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    return translate._function(function, kind)


def test_a_function_prints_as_cpp() -> None:
    text = 'def f(d, p, q, a):\n    """Words."""\n    x = exp(-d) * 2.0\n    return where(x > p, x / 0.5, q)\n'
    assert _print(text) == (
        "FD_INLINE float f(float d, float p, float q, float) {\n"
        "  const float x = (exp(-d) * 2.0f);\n"
        "  return chosen(x > p, (x / 0.5f), q);\n"
        "}"
    )


def test_a_function_of_doubles_prints_as_cpp() -> None:
    text = 'def f(m, t):\n    return where(m == -float("inf"), float("nan"), 1.0 + t)\n'
    assert _print(text, "double") == (
        "inline double f(double m, double t) {\n  return (m == -INFINITY ? NAN : (1.0 + t));\n}"
    )


@pytest.mark.parametrize(
    "body",
    [
        "return d ** 2.0",
        "return d if p > q else q",
        "return d + 1",
        "return not d",
        "return math.exp(d)",
        "return d == p",
        "return d != p",
        'return float("nan")',
        "d += 1.0",
        "for x in d: pass",
    ],
)
def test_what_is_outside_the_language_is_refused(body: str) -> None:
    with pytest.raises(SyntaxError, match=r"line 2: .* is outside the pointwise language"):
        _print(f"def f(d, p, q, a):\n    {body}\n")
