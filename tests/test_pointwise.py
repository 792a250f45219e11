"""`fastdiv.pointwise` and its C++ reading against 50 digits, and its derivatives against autograd."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import oracle
import pytest
import torch

from fastdiv import pointwise
from fastdiv.divergences import DIVERGENCES

CSRC = Path(__file__).parents[1] / "csrc"


def test_every_function_matches_fifty_digits() -> None:
    assert oracle.faults(pointwise) == []


def test_the_oracle_covers_the_table() -> None:
    assert set(oracle.TERMS) == {f"{name}_{kind}" for name in DIVERGENCES for kind in ("value", "dlp", "dlq")}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_derivatives_are_those_of_the_value(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    lp = (-4 * torch.rand(400, generator=generator, dtype=torch.float64)).requires_grad_()
    gap = torch.cat([torch.linspace(-3, 3, 301), torch.randn(99, generator=generator) * 1e-3]).double() + 1e-9
    lq = (lp.detach() + gap).requires_grad_()
    a = torch.tensor(0.3, dtype=torch.float64)
    divergence = DIVERGENCES[name]
    inputs = (lp - lq, lp.exp(), lq.exp(), a)
    got = torch.autograd.grad(divergence.value(*inputs).sum(), (lp, lq))
    stated = (divergence.dlp(*inputs), divergence.dlq(*inputs))
    for g, s in zip(got, stated, strict=True):
        torch.testing.assert_close(g, s, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("pointwise")
    source = '#include "pointwise.h"\n' + "".join(
        f'extern "C" void {name}(const float* d, const float* p, const float* q, float a, float* o, long n) '
        f"{{ for (long i = 0; i < n; ++i) o[i] = fd::{name}(d[i], p[i], q[i], a); }}\n"
        for name in oracle.TERMS
    )
    (folder / "all.cpp").write_text(source)
    library = folder / "all.so"
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{CSRC}", str(folder / "all.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("name", oracle.TERMS)
@pytest.mark.parametrize("a", oracle.PARAMETERS)
def test_the_cpp_header_matches_fifty_digits(compiled: ctypes.CDLL, name: str, a: float) -> None:
    d, p, q = oracle.points(torch.float32)
    out = torch.empty_like(d)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (d, p, q))
    getattr(compiled, name)(*pointers, ctypes.c_float(a), ctypes.c_void_p(out.data_ptr()), ctypes.c_long(d.numel()))
    wrong = oracle.misses(name, torch.float32, a, out)
    assert not wrong.any(), [(d[i].item(), p[i].item(), q[i].item(), out[i].item()) for i in wrong.nonzero()[:, 0]]
