"""Numbers worked out by hand once, in float64, from the formulas of the papers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv

GOLDEN = json.loads((Path(__file__).parent / "golden/rl_golden.json").read_text())

# Student and teacher logits of five ids; values and student gradients to 6 digits and more.
X, Y = [1.0, 2.0, 0.5, -1.0, 0.0], [0.2, 1.5, 1.3, -0.4, -2.0]
SMALL: dict[str, tuple[float, list[float]]] = {
    "entropy": (1.20648921, [0.076211, -0.355858, 0.109038, 0.066376, 0.104233]),
    "forward_kl": (0.23936847, [0.087120, 0.122692, -0.234884, -0.037828, 0.062900]),
    "reverse_kl": (0.22807761, [0.065807, 0.009975, -0.161089, -0.030338, 0.115645]),
    "jeffreys": (0.46744608, [0.152927, 0.132667, -0.395973, -0.068166, 0.178545]),
    "js 0.1": (0.02103431, [0.007491, 0.009751, -0.019695, -0.003264, 0.005717]),
    "js 0.5": (0.05535767, [0.018545, 0.016418, -0.045042, -0.008027, 0.018106]),
    "js 0.9": (0.02013981, [0.006152, 0.002230, -0.014642, -0.002730, 0.008989]),
    "tv": (0.27271222, [0.031826, 0.086513, -0.106323, -0.023724, 0.011708]),
    "log_sum_sq_probs": (-0.96163582, [-0.189796, 0.532447, -0.168683, -0.051951, -0.122017]),
    "varentropy": (0.64736306, [-0.258465, 0.572158, -0.204763, 0.006277, -0.115208]),
    "logsumexp": (2.5744379396, [0.207124, 0.563021, 0.125627, 0.028031, 0.076197]),
}


def evaluate(name: str, x: Tensor, y: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    kind, *beta = name.split()
    teacher = {"teacher": y} if kind in fastdiv.divergences.DIVERGENCES else {}
    options: dict[str, Any] = {**teacher, **({"beta": float(beta[0])} if beta else {})}
    value = fastdiv.token_stats(x, outputs=(kind,), backend=backend, **options)[kind]
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_five_ids(backend: str, name: str, dtype: torch.dtype) -> None:
    if backend != "reference" and dtype == torch.float64:
        pytest.skip(f"the {backend} backend has no float64")
    x, y = torch.tensor([X], dtype=dtype).requires_grad_(), torch.tensor([Y], dtype=dtype)
    value, gradient = evaluate(name, x, y, backend)
    # What is printed above has 8 and 6 decimals; float32 has 7 digits.
    assert value.item() == pytest.approx(SMALL[name][0], abs=6e-9 if dtype == torch.float64 else 3e-7)
    assert gradient[0].tolist() == pytest.approx(SMALL[name][1], abs=6e-7)


def fixture() -> tuple[Tensor, Tensor, Tensor]:
    b = GOLDEN["fixtureB"]
    x, y = (torch.tensor(b[name], dtype=torch.float64) for name in ("z", "z_ref"))
    return x.requires_grad_(), y, torch.tensor(b["y"])


def test_three_tokens_of_a_policy_and_its_reference() -> None:
    x, y, labels = fixture()
    stats = fastdiv.token_stats(
        x,
        labels,
        teacher=y,
        outputs=("log_prob", "entropy", "log_sum_sq_probs", "reverse_kl", "forward_kl", "js", "tv"),
    )
    for name, got in {
        "B/logp": stats.log_prob,
        "B/ref_logp": fastdiv.log_prob(y, labels),
        "B/entropy": stats.entropy,
        "B/entropy_T0.7": fastdiv.entropy(x, temperature=0.7),
        "B/sum_p2": stats.log_sum_sq_probs.exp(),
        "B/RKL(theta||ref)": stats.reverse_kl,
        "B/FKL(ref||theta)": stats.forward_kl,
        "B/JS(.5)": stats.js,
        "B/TV": stats.tv,
    }.items():
        assert got.tolist() == pytest.approx(GOLDEN[name], rel=1e-9), name
    for name, value in (("B/dH_dz", stats.entropy), ("B/dRKL_dz", stats.reverse_kl), ("B/dJS_dz", stats.js)):
        (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        assert gradient.flatten().tolist() == pytest.approx(torch.tensor(GOLDEN[name]).flatten().tolist(), rel=1e-6), (
            name
        )
