"""The vocabulary of the pointwise text: torch in float64 and C++ in float, each against 50 digits."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import mpmath
import pytest
import torch
from torch import Tensor

from fastdiv import language

CSRC = Path(__file__).parents[1] / "csrc"
mpmath.mp.dps = 50

EXACT: dict[str, Callable[[mpmath.mpf], mpmath.mpf]] = {
    "exp": mpmath.exp,
    "log": mpmath.log,
    "phi": lambda d: mpmath.expm1(d) - d,
    "psi": lambda u: u - mpmath.log1p(u),  # with a weight of 1
}


def _spread(low: float, high: float, n: int = 400) -> Tensor:
    """Points all over an interval and at every magnitude around 0."""
    even = torch.linspace(low, high, n, dtype=torch.float64)
    small = torch.logspace(-6, -1, n // 4, dtype=torch.float64)
    return torch.cat([even, small * high, small * low]).float()


DOMAIN = {
    "exp": _spread(-87.0, 0.0),
    "log": torch.cat([torch.logspace(-37, 37, 400), torch.linspace(0.5, 2.0, 401)]),
    "phi": _spread(-0.5, 0.5),
    "psi": _spread(-0.5, 0.65),
}
BOUND = {"exp": 2.0, "log": 2.5, "phi": 4.0, "psi": 4.0}
"""Units in the last place of float that the C++ functions may be off by."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Tensor], Tensor]:
    folder = tmp_path_factory.mktemp("language")
    (folder / "all.cpp").write_text(
        '#include "language.h"\n'
        + "".join(
            f'extern "C" void {name}_v(const float* x, float* o, long n) '
            f"{{ for (long i = 0; i < n; ++i) o[i] = fd::{name}(x[i]{', 1.0f' * (name == 'psi')}); }}\n"
            for name in EXACT
        )
    )
    library = folder / "all.so"
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{CSRC}", str(folder / "all.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))

    def call(name: str, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        getattr(loaded, f"{name}_v")(*pointers, ctypes.c_long(x.numel()))
        return out

    return call


def _exact(name: str, x: Tensor) -> list[mpmath.mpf]:
    return [EXACT[name](mpmath.mpf(v)) for v in x.tolist()]


def _worst_ulps(name: str, x: Tensor, got: Tensor) -> float:
    eps = torch.finfo(got.dtype).eps
    errors = (
        abs(mpmath.mpf(g) - e) / (abs(e) * eps) if e else mpmath.mpf(g != 0)
        for g, e in zip(got.tolist(), _exact(name, x), strict=True)
    )
    return float(max(errors))


def in_torch(name: str, x: Tensor) -> Tensor:
    if name == "psi":
        return language.psi(x, torch.ones_like(x))
    result: Tensor = getattr(language, name)(x)
    return result


@pytest.mark.parametrize("name", EXACT)
def test_cpp_in_float(compiled: Callable[[str, Tensor], Tensor], name: str) -> None:
    x = DOMAIN[name].contiguous()
    assert _worst_ulps(name, x, compiled(name, x)) <= BOUND[name]


@pytest.mark.parametrize("name", EXACT)
def test_torch_in_float64(name: str) -> None:
    x = DOMAIN[name].double()
    assert _worst_ulps(name, x, in_torch(name, x)) <= 8.0


@pytest.mark.parametrize("name", EXACT)
def test_torch_in_float32(name: str) -> None:
    x = DOMAIN[name]
    assert _worst_ulps(name, x, in_torch(name, x)) <= 8.0


def test_psi_of_a_weight() -> None:
    u = DOMAIN["psi"].double()
    for weight in (0.25, 4.0):
        w = torch.full_like(u, weight)
        torch.testing.assert_close(language.psi(u * w, w), weight * in_torch("psi", u), rtol=1e-15, atol=0.0)


def test_exp_at_its_ends(compiled: Callable[[str, Tensor], Tensor]) -> None:
    inf, nan = float("inf"), float("nan")
    got = compiled("exp", torch.tensor([-inf, -1e30, -88.5, -0.0, 0.0, nan, -nan]))
    assert got[:3].tolist() == [0.0, 0.0, 0.0]
    assert got[3:5].tolist() == [1.0, 1.0]
    assert got[5:].isnan().all()


def test_where_takes_a_number_on_one_arm_only() -> None:
    x = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert language.where(x > 0.0, x, 0.0).tolist() == [1.0, 0.0]
    assert language.where(x > 0.0, 0.0, x).dtype == torch.float64
    with pytest.raises(TypeError, match="one arm must be a tensor"):
        language.where(x > 0.0, 1.0, 0.0)
