"""Which dtype a product has: autocast's where it asks, and gradients wait for a loss scale in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import head
from torch import Tensor

import fastdiv
from fastdiv.testing import assert_bitwise_equal

LABELS = torch.arange(12) * 5


def autocast(backend: str, dtype: torch.dtype) -> torch.autocast:
    """Where the backend works."""
    there = torch.cuda.is_available() and backend in ("cuda", "triton")
    return torch.autocast("cuda" if there else "cpu", dtype=dtype)


def rounded(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """What autocast multiplies: hidden states and weight in its dtype, taken back to float32."""
    return [t.detach().to(dtype).float() if i < 2 else t.detach() for i, t in enumerate(tensors)]


def results(form: str, tensors: Any, backend: str, **options: Any) -> tuple[Tensor, Any]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    own = fastdiv.LinearLogits(*leaves)
    if form == "log_prob":
        value = fastdiv.log_prob(own, LABELS, backend=backend, **options).sum()
    else:
        value = fastdiv.linear_loss(own, LABELS, lambda s, rows: s.log_prob, backend=backend, **options)
    return value.detach(), lambda: torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("workspace", [None, 20_000])
@pytest.mark.parametrize("form", ["log_prob", "linear_loss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_what_is_multiplied(backend: str, dtype: torch.dtype, form: str, workspace: int) -> None:
    tensors = head(12, 300, 16)
    want, gradients = results(form, rounded(tensors, dtype), backend, workspace=workspace)
    with autocast(backend, dtype):
        got, found = results(form, tensors, backend, workspace=workspace)
        inside, found = found(), results(form, tensors, backend, workspace=workspace)[1]
    outside = found()  # remembered
    assert got.dtype == torch.float32 and [g.dtype for g in inside] == [torch.float32] * 3
    if torch.cuda.is_available() and backend in ("cuda", "triton"):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        return
    assert_bitwise_equal(got, want)
    for a, b, c in zip(inside, outside, gradients(), strict=True):
        assert_bitwise_equal(a, b)
        assert_bitwise_equal(a, c)
    plain, _ = results(form, tensors, backend, workspace=workspace)
    assert not torch.equal(plain, got)


def test_autocast_of_a_16_bit_hidden_state_and_a_float32_weight(backend: str) -> None:
    hidden, weight, _ = head(12, 300, 16)
    with autocast(backend, torch.bfloat16):
        got = fastdiv.log_prob(fastdiv.LinearLogits(hidden.bfloat16(), weight), LABELS, backend=backend)
        teacher = fastdiv.LinearLogits(hidden.bfloat16(), weight.bfloat16())
        zero = fastdiv.divergence(fastdiv.LinearLogits(hidden.bfloat16(), weight), teacher, backend=backend)
        logits = torch.randn(4, 30)
        same = fastdiv.entropy(logits, backend=backend)
    plain = torch.nn.functional.linear(hidden.bfloat16().float(), weight.bfloat16().float())
    torch.testing.assert_close(got, plain.log_softmax(-1).gather(1, LABELS[:, None])[:, 0])
    assert zero.abs().max() < 1e-6
    assert_bitwise_equal(same, fastdiv.entropy(logits, backend=backend))


@pytest.mark.parametrize("form", ["log_prob", "linear_loss"])
def test_a_context_at_the_backward_changes_nothing(backend: str, form: str) -> None:
    tensors = head(12, 300, 16)
    _, first = results(form, tensors, backend, workspace=20_000)
    _, second = results(form, tensors, backend, workspace=20_000)
    with autocast(backend, torch.bfloat16):
        inside = second()
    for a, b in zip(inside, first(), strict=True):
        assert_bitwise_equal(a, b)


def test_float64_is_left_alone() -> None:
    tensors = [t.double() for t in head(12, 300, 16)]
    want, _ = results("log_prob", tensors, "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = results("log_prob", tensors, "reference")
    assert_bitwise_equal(got, want)


# torch.compile itself does what torch warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_autocast_is_compiled() -> None:
    tensors = [t.detach() for t in head(12, 300, 16)]

    def run(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fastdiv.log_prob(fastdiv.LinearLogits(*tensors), LABELS)

    torch._dynamo.reset()
    assert_bitwise_equal(torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), run(*tensors))


@pytest.mark.parametrize("workspace", [None, 40_000])
@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize("teacher", ["none", "logits", "hidden"])
def test_a_loss_scale_comes_in_time(backend: str, teacher: str, place: str, workspace: int | None) -> None:
    """float16, the scale of torch.amp.GradScaler, and a mean over the tokens of a long accumulation step."""
    tokens, scale = 1e6, 65536.0
    own = [t.detach().half().requires_grad_() for t in head(12, 300, 16)]
    other = [t.detach().half().requires_grad_() for t in head(12, 300, 16, seed=3)]
    if teacher != "hidden":
        other = [] if teacher == "none" else [torch.randn(12, 300).half().requires_grad_()]
    inner, outer = (tokens, 1.0) if place == "inside" else (1.0, tokens)

    def loss(own: list[Tensor], other: list[Tensor], backend: str) -> Tensor:
        second = fastdiv.LinearLogits(*other) if teacher == "hidden" else other[0] if other else None
        names = ("log_prob",) if teacher == "none" else ("log_prob", "reverse_kl")
        return fastdiv.linear_loss(
            fastdiv.LinearLogits(*own),
            LABELS,
            lambda s, rows: (s.get("reverse_kl", 0.0) - s.log_prob) / inner,
            teacher=second,
            outputs=names,
            backend=backend,
            workspace=workspace,
        )

    found = torch.autograd.grad(loss(own, other, backend) / outer * scale, (*own, *other))
    exact = [[t.detach().double().requires_grad_() for t in side] for side in (own, other)]
    wanted = torch.autograd.grad(loss(*exact, "reference") / outer * scale, (*exact[0], *exact[1]))
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float16
        assert (got.double() - want).norm() < 1e-3 * want.norm()
