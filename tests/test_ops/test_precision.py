"""Where plain float32 loses its digits and these operators must not.

Not the tolerance rule, which asks for no more than plain torch has: here the demand is on the number itself.
"""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch import Tensor

import fastdiv
from fastdiv.testing import reference


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact) / exact).abs().max().item()


def close_pair(v: int, kl: float) -> tuple[Tensor, Tensor]:
    """Logits of two models, so close that their KL is about `kl` nats."""
    generator = torch.Generator().manual_seed(v)
    x = torch.randn(3, v, generator=generator) * 2.5
    return x, x + torch.randn(3, v, generator=generator) * (2.0 * kl) ** 0.5


@pytest.mark.parametrize("v", [1025, 131072])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jeffreys", "js"])
def test_a_kl_of_half_a_millionth(backend: str, v: int, kind: str) -> None:
    """The textbook in float32 is off by more than 100 %: the terms are 1e3 times larger than their sum."""
    x, y = close_pair(v, 5e-7)
    exact = reference(x, teacher=y, outputs=[kind])[kind]
    assert 1e-8 < exact.min() and exact.max() < 2e-6
    assert relative(fastdiv.divergence(x, y, kind, backend=backend), exact) < 1e-3
    if v > 100_000 and kind != "jeffreys":  # the sum of two textbook KLs: their errors cancel
        assert relative(reference(x, teacher=y, outputs=[kind], dtype=torch.float32)[kind], exact) > 0.1


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("workspace", [None, 2_000_000])
def test_a_kl_of_half_a_millionth_from_hidden_states(backend: str, kind: str, workspace: int | None) -> None:
    """Integers make the product exact, so that what is tested is the divergence and not float32's dot product."""
    generator = torch.Generator().manual_seed(0)
    v, h = 131072, 8
    hidden = torch.randint(-8, 9, (3, h), generator=generator).float()
    weight = torch.randint(-8, 9, (v, h), generator=generator).float() / 32.0
    bias = torch.randint(-1, 2, (v,), generator=generator).float() * 2.0**-10
    student = fastdiv.LinearLogits(hidden, weight, bias)
    teacher = fastdiv.LinearLogits(hidden, weight)
    exact = reference(student, teacher=teacher, outputs=[kind])[kind]
    assert 1e-8 < exact.min() and exact.max() < 2e-6
    got = fastdiv.divergence(student, teacher, kind, backend=backend, workspace=workspace)
    assert relative(got, exact) < 1e-3


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jeffreys", "js", "tv"])
def test_gradients_of_a_small_divergence(backend: str, kind: str) -> None:
    x, y = close_pair(4097, 5e-7)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        a, b = (t.to(dtype).requires_grad_() for t in (x, y))
        name = backend if dtype == torch.float32 else "reference"
        gradients.append(torch.autograd.grad(fastdiv.divergence(a, b, kind, backend=name).sum(), (a, b)))
    for got, exact in zip(*gradients, strict=True):
        # Against the norm: at single entries where p is nearly q the gradient itself is a rounding error of p.
        error = (got.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert error.max() < 1e-3


@pytest.mark.parametrize("margin", [10.0, 25.0, 40.0])
def test_a_confident_token(backend: str, margin: float) -> None:
    """One token leads by `margin` nats: 1 - p is far below float32's grain at 1, and must come out all the same."""
    v = 1000
    x = torch.zeros(2, v)
    x[:, 7] = margin
    x += torch.linspace(-1, 1, v) * (torch.arange(v) != 7)
    x[1] += 100.0
    leaf = x.clone().requires_grad_()
    stats = fastdiv.token_stats(
        leaf, torch.tensor([7, 7]), outputs=("log_prob", "entropy", "varentropy"), backend=backend
    )
    (gradient,) = torch.autograd.grad(stats.log_prob.sum(), leaf)
    with mpmath.workdps(50):
        for row in range(2):
            z = [mpmath.mpf(float(value)) for value in x[row]]
            log_sum = mpmath.log(mpmath.fsum(mpmath.exp(value) for value in z))
            lp = [value - log_sum for value in z]
            p = [mpmath.exp(value) for value in lp]
            entropy = -mpmath.fsum(a * b for a, b in zip(p, lp, strict=True))
            second = mpmath.fsum(a * (b + entropy) ** 2 for a, b in zip(p, lp, strict=True))
            for got, exact in (
                (stats.log_prob[row], lp[7]),
                (stats.entropy[row], entropy),
                (stats.varentropy[row], second),
                (gradient[row, 7], -mpmath.expm1(lp[7])),
                (gradient[row, 3], -p[3]),
                (gradient[row, 999], -p[999]),
            ):
                # Row 2 stands at an offset of 100, where the logits themselves have lost digits: x is what was given.
                assert abs(mpmath.mpf(got.item()) / exact - 1) < 1e-5


@pytest.mark.parametrize("offset", [1e5, -1e5])
def test_rows_far_from_zero(backend: str, offset: float) -> None:
    """At 1e5 float32 has steps of 0.008, so logsumexp must be rounded; nothing else need be."""
    x = (torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)) * 4 + offset).requires_grad_()
    near = (x.detach() - offset).requires_grad_()  # exact: both are multiples of the step
    labels = torch.tensor([0, 1, 2])
    outputs = ("log_prob", "entropy", "varentropy", "log_sum_sq_probs", "max_log_prob")
    far, close = (fastdiv.token_stats(t, labels, outputs=outputs, backend=backend) for t in (x, near))
    for name in outputs:
        assert torch.equal(far[name], close[name]), name
    gradients = [
        torch.autograd.grad(s.log_prob.sum() + s.entropy.sum() + s.varentropy.sum(), t)[0]
        for s, t in ((far, x), (close, near))
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jeffreys", "js", "tv"])
@pytest.mark.parametrize("offsets", [(1e4, 0.0), (0.0, -6e4), (1e5, -1e5)])
def test_models_far_from_each_other_in_offset(backend: str, kind: str, offsets: tuple[float, float]) -> None:
    """A constant added to all logits of one model means nothing, and costs nothing."""
    generator = torch.Generator().manual_seed(0)
    far = [(torch.randn(3, 700, generator=generator) * 3 + offset) for offset in offsets]
    near = [x - offset for x, offset in zip(far, offsets, strict=True)]
    results = []
    for pair in (far, near):
        leaves = [t.clone().requires_grad_() for t in pair]
        value = fastdiv.divergence(*leaves, kind, backend=backend)
        results.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jeffreys"])
@pytest.mark.parametrize("scales", [(0.0, 30.0), (30.0, 0.1), (0.5, 2.0)])
@pytest.mark.parametrize("v", [1025, 50257])
def test_a_flat_model_and_a_sharp_one(backend: str, kind: str, scales: tuple[float, float], v: int) -> None:
    """Their normalisers differ by a factor of thousands, which must not come between the terms and their sum."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, v, generator=generator) * scale for scale in scales)
    exact = reference(x, teacher=y, outputs=[kind])[kind]
    assert relative(fastdiv.divergence(x, y, kind, backend=backend), exact) < 1e-6
