"""`divergence`: every kind, values and both gradients, against the textbook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DIVERGENCES, check, dtypes, outside_gap, token_stats
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiv
from fastdiv.divergences import DIVERGENCES as TABLE
from fastdiv.testing import assert_accurate, assert_bitwise_equal, logits

BETAS = st.sampled_from([0.5, 0.1, 0.9, 1e-3])


@st.composite
def pairs(draw: Any, backend: str, masked: str) -> tuple[Tensor, Tensor]:
    """Student and teacher of one shape; `masked`: "no", "same" (one mask for both) or "each" (its own)."""
    x = draw(logits(dtypes=dtypes(backend), broken=False, masked=masked != "no"))
    other = logits(
        rows=(x.shape[0],), vocabularies=(x.shape[1],), dtypes=dtypes(backend), broken=False, masked=masked == "each"
    )
    y = draw(other)
    if masked == "same":
        y = torch.where(x == -torch.inf, -torch.inf, y)
    lowest = -torch.inf if masked == "each" else -108.0
    return outside_gap(x, lowest=lowest), outside_gap(y, lowest=lowest)


def test_the_table_is_covered() -> None:
    assert set(TABLE) == set(DIVERGENCES)


@settings(max_examples=150)
@given(data=st.data(), beta=BETAS, masked=st.sampled_from(["no", "same", "each"]))
def test_values(backend: str, data: st.DataObject, beta: float, masked: str) -> None:
    x, y = data.draw(pairs(backend, masked))
    check(*token_stats(lambda x, y: (x, y), backend=backend, outputs=DIVERGENCES, beta=beta), x, y)


@settings(max_examples=150)
@given(
    data=st.data(),
    beta=BETAS,
    masked=st.sampled_from(["no", "same"]),
    kind=st.sampled_from(DIVERGENCES),
    frozen=st.sampled_from(["student", "teacher", "none"]),
    layout=st.sampled_from(["random", "expanded", "strided"]),
)
def test_gradients(
    backend: str, data: st.DataObject, beta: float, masked: str, kind: str, frozen: str, layout: str
) -> None:
    x, y = data.draw(pairs(backend, masked))
    x.requires_grad_(frozen != "student"), y.requires_grad_(frozen != "teacher")
    options: dict[str, Any] = {"outputs": (kind,)} | ({"beta": beta} if kind == "js" else {})
    check(*token_stats(lambda x, y: (x, y), backend=backend, **options), x, y, layout=layout)


@settings(max_examples=60)
@given(seed=st.integers(0, 1000), kind=st.sampled_from(DIVERGENCES), masked=st.booleans())
def test_temperature_transform_and_mask(backend: str, seed: int, kind: str, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(6, 500, generator=generator).mul(3).requires_grad_() for _ in range(2))
    options: dict[str, Any] = {"outputs": (kind,), "temperature": torch.rand(6, generator=generator) + 0.5}
    if masked:
        options["mask"] = torch.rand(6, generator=generator) < 0.6

    def build(x: Tensor, y: Tensor) -> tuple[Any, ...]:
        return fastdiv.Logits(x, softcap=20.0), fastdiv.Logits(y, scale=0.5)

    check(*token_stats(build, backend=backend, **options), x, y, neighbours=4)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("v", [5, 33, 1025])
@pytest.mark.parametrize("distance", [0.1, 2.0])
def test_each_kind_of_ordinary_logits(backend: str, kind: str, v: int, distance: float) -> None:
    """Where nothing is extreme, the rule leaves a formula no room."""
    generator = torch.Generator().manual_seed(v)
    x = torch.randn(16, v, generator=generator) * 1.5
    y = x + torch.randn(16, v, generator=generator) * distance
    options: dict[str, Any] = {"outputs": (kind,), "temperature": 1.3} | ({"beta": 0.3} if kind == "js" else {})
    pair = token_stats(lambda x, y: (x, y), backend=backend, **options)
    check(*pair, x.requires_grad_(), y.requires_grad_())


@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(backend: str, student: torch.dtype, teacher: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 400, generator=generator).to(student).requires_grad_()
    y = torch.randn(3, 400, generator=generator).to(teacher).requires_grad_()
    check(*token_stats(lambda x, y: (x, y), backend=backend, outputs=DIVERGENCES), x, y)


@pytest.mark.parametrize("v", [1, 31, 127, 1023, 1025, 50257, 151936])
def test_every_class_of_vocabulary(backend: str, v: int) -> None:
    generator = torch.Generator().manual_seed(v)
    x, y = (torch.randn(2, v, generator=generator).mul(3).requires_grad_() for _ in range(2))
    check(*token_stats(lambda x, y: (x, y), backend=backend, outputs=DIVERGENCES), x, y, neighbours=1)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_a_model_against_itself_is_exactly_zero(backend: str, kind: str, scale: float) -> None:
    x = torch.randn(3, 2049, generator=torch.Generator().manual_seed(0)).mul(scale).requires_grad_()
    y = x.detach().clone().requires_grad_()
    got = fastdiv.divergence(x, y, kind, backend=backend)
    got.sum().backward()
    assert x.grad is not None and y.grad is not None
    assert (got == 0).all() and (x.grad == 0).all() and (y.grad == 0).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_no_divergence_is_negative(backend: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 700, generator=generator) * 5
    y = x + torch.randn(60, 700, generator=generator) * torch.logspace(-8, 1, 60)[:, None]
    assert (fastdiv.divergence(x, y, kind, backend=backend) >= 0).all()


def test_directions(backend: str) -> None:
    """forward_kl(s, t) is KL(t || s): the same number as reverse_kl with the roles exchanged."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 50, generator=generator) * 2 for _ in range(2))
    forward = fastdiv.divergence(x, y, "forward_kl", backend=backend)
    reverse = fastdiv.divergence(y, x, "reverse_kl", backend=backend)
    plain, exact = (
        (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1) for s, t in ((x, y), (x.double(), y.double()))
    )
    assert_accurate(forward, plain, exact)
    assert_accurate(reverse, plain, exact)


def test_default_kind_and_beta(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 50, generator=generator) for _ in range(2))
    assert_bitwise_equal(
        fastdiv.divergence(x, y, backend=backend), fastdiv.divergence(x, y, "reverse_kl", backend=backend)
    )
    half = fastdiv.divergence(x, y, "js", beta=0.5, backend=backend)
    assert_bitwise_equal(fastdiv.divergence(x, y, "js", backend=backend), half)
    assert not torch.equal(half, fastdiv.divergence(x, y, "js", beta=0.1, backend=backend))


def test_together_with_statistics_of_the_student(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 3000, generator=generator).mul(2).requires_grad_() for _ in range(2))
    options: dict[str, Any] = {
        "outputs": ("log_prob", "js", "entropy", "reverse_kl", "varentropy", "tv", "mean_logit", "log_sum_sq_probs"),
        "labels": torch.tensor([0, 2999, -100, 5]),
    }
    check(*token_stats(lambda x, y: (x, y), backend=backend, **options), x, y)
