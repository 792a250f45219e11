"""FASTDIV_ISA: the native kernels of every instruction set of this machine are tested, and a wrong name is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import DIVERGENCES, MODEL_OUTPUTS, evaluate, outside_gap, token_stats
from torch import Tensor

from fastdiv.testing import compare

_C = pytest.importorskip("fastdiv._C", reason="the native module is not built", exc_type=ImportError)

TESTS = Path(__file__).parent
CORE = ("test_ops", "test_edges.py")
"""What judges every output and gradient, and every promise about strange input."""
OTHERS = [name for name in _C.isas() if name != _C.isa()]
"""The suite itself runs on the one that is chosen."""


@pytest.fixture
def chosen() -> Iterator[None]:
    """Sets back what the test chooses."""
    before = _C.isa()
    yield
    _C.choose_isa(before)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *command]
    return subprocess.run(words, cwd=TESTS.parent, env=os.environ | environment, capture_output=True, text=True)


def test_the_best_one_is_chosen_unless_the_environment_names_another() -> None:
    program = "import fastdiv; print(fastdiv.info()['native_instruction_set'])"
    got = [run("-c", program, FASTDIV_ISA=name).stdout.strip() for name in ("", *OTHERS)]
    assert got == [_C.isas()[-1], *OTHERS]


def test_one_that_is_not_there_is_refused() -> None:
    """On this machine or at all: nothing else computes in its place."""
    message = f"FASTDIV_ISA: this machine and build have {', '.join(_C.isas())}, got 'avx1024'"
    used = run("-c", "import torch, fastdiv; fastdiv.entropy(torch.zeros(2, 3))", FASTDIV_ISA="avx1024")
    assert used.returncode == 1 and used.stderr.endswith(f"ValueError: {message}\n")
    shown = run("-m", "fastdiv.cli", "info", FASTDIV_ISA="avx1024")
    assert shown.returncode == 2 and shown.stderr == f"fastdiv info: error: {message}\n"


@pytest.mark.parametrize("isa", OTHERS)
def test_the_core_of_the_suite(isa: str) -> None:
    result = run("-m", "pytest", "-q", "-x", "-k", "native", *(str(TESTS / name) for name in CORE), FASTDIV_ISA=isa)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_agree(dtype: torch.dtype, chosen: None) -> None:
    """The first one's results stand for exact ones."""
    generator = torch.Generator().manual_seed(0)
    x, y = (outside_gap((torch.randn(9, 3001, generator=generator) * 4).to(dtype)).requires_grad_() for _ in range(2))
    labels = torch.randint(0, 3001, (9,), generator=generator)
    outputs = (*MODEL_OUTPUTS, *DIVERGENCES)
    operator, textbook = token_stats(
        lambda a, b: (a, b), backend="native", labels=labels, outputs=outputs, temperature=0.7
    )

    def plain(*tensors: Tensor) -> dict[str, Tensor]:
        return textbook(*tensors, dtype=torch.float32)

    own = evaluate(plain, (x, y))
    results = {}
    for isa in _C.isas():
        _C.choose_isa(isa)
        results[isa] = evaluate(operator, (x, y))
    first, *others = results
    for isa in others:
        for name, got in results[isa].items():
            found = compare(got, own[name], results[first][name].double())
            assert found, f"{isa} beside {first}: {name} {found.text}"
