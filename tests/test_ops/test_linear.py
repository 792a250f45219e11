"""Statistics and losses from hidden states: the logits never exist, the numbers are those of logits that do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import DIVERGENCES, MODEL_OUTPUTS, check, head, token_stats
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiv
from fastdiv.testing import assert_accurate, reference

TRANSFORMS: tuple[dict[str, Any], ...] = ({}, {"softcap": 15.0}, {"scale": 0.25}, {"softcap": 5.0, "scale": 2.0})
# One tile for all; several slices of the vocabulary; several chunks of rows too.
WORKSPACES = (None, 40_000, 3_000)


def source(tensors: Sequence[Tensor], **transform: Any) -> fastdiv.LinearLogits:
    bias = tensors[2] if len(tensors) == 3 else None
    return fastdiv.LinearLogits(tensors[0], tensors[1], bias, **transform)


@settings(max_examples=60)
@given(
    n=st.sampled_from([0, 1, 5, 17]),
    v=st.sampled_from([1, 2, 31, 127, 1025, 1500]),
    h=st.sampled_from([1, 16, 40]),
    bias=st.booleans(),
    transform=st.sampled_from(TRANSFORMS),
    workspace=st.sampled_from(WORKSPACES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    outputs=st.sampled_from([("log_prob",), ("log_prob", "entropy"), MODEL_OUTPUTS]),
    layout=st.sampled_from(["random", "expanded", "strided"]),
)
def test_one_model(
    backend: str,
    n: int,
    v: int,
    h: int,
    bias: bool,
    transform: dict[str, Any],
    workspace: int | None,
    dtype: torch.dtype,
    outputs: tuple[str, ...],
    layout: str,
) -> None:
    tensors = head(n, v, h, bias=bias, dtype=dtype)
    labels = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(1))
    labels[1::3] = -100
    pair = token_stats(
        lambda *t: (source(t, **transform),), backend=backend, workspace=workspace, labels=labels, outputs=outputs
    )
    check(*pair, *tensors, layout=layout, spread=0.05, neighbours=4)


@settings(max_examples=40)
@given(
    kind=st.sampled_from([*((kind,) for kind in DIVERGENCES), (*DIVERGENCES, "entropy")]),
    student=st.sampled_from(["logits", "hidden"]),
    teacher=st.sampled_from(["logits", "hidden"]),
    frozen=st.sampled_from(["none", "student", "teacher"]),
    transform=st.sampled_from(TRANSFORMS),
    workspace=st.sampled_from(WORKSPACES),
    v=st.sampled_from([31, 1025, 1500]),
)
def test_two_models(
    backend: str,
    kind: tuple[str, ...],
    student: str,
    teacher: str,
    frozen: str,
    transform: dict[str, Any],
    workspace: int | None,
    v: int,
) -> None:
    n = 9
    sides = []
    for i, side in enumerate((student, teacher)):
        if side == "logits":
            sides.append((torch.randn(n, v, generator=torch.Generator().manual_seed(i)).mul(2).requires_grad_(),))
        else:
            sides.append(head(n, v, 16, seed=i))
    for i, side in enumerate(("student", "teacher")):
        for t in sides[i]:
            t.requires_grad_(frozen != side)
    count = len(sides[0])

    def build(*tensors: Tensor) -> tuple[Any, ...]:
        own, other = tensors[:count], tensors[count:]
        first = source(own, **transform) if student == "hidden" else fastdiv.Logits(own[0], **transform)
        return first, source(other) if teacher == "hidden" else other[0]

    pair = token_stats(build, backend=backend, workspace=workspace, outputs=kind)
    check(*pair, *sides[0], *sides[1], spread=0.05, neighbours=4)


@pytest.mark.parametrize("v", [1, 31, 127, 1023, 1025, 50257, 151936])
def test_every_class_of_vocabulary(backend: str, v: int) -> None:
    tensors = head(3, v, 8, bias=False)
    labels = torch.tensor([0, v // 2, v - 1])
    options: dict[str, Any] = {"labels": labels, "outputs": ("log_prob", "entropy")}
    check(*token_stats(lambda *t: (source(t),), backend=backend, **options), *tensors, spread=0.05, neighbours=1)


def test_mask_and_per_token_temperature(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = head(12, 700, 16)
    options: dict[str, Any] = {
        "labels": torch.randint(0, 700, (3, 4), generator=generator),
        "mask": torch.rand(3, 4, generator=generator) < 0.5,
        "temperature": torch.rand(3, 4, generator=generator) + 0.5,
        "outputs": MODEL_OUTPUTS,
    }

    def build(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Any, ...]:
        return (fastdiv.LinearLogits(hidden.view(3, 4, 16), weight, bias),)

    for workspace in WORKSPACES:
        check(*token_stats(build, backend=backend, workspace=workspace, **options), *tensors, spread=0.05, neighbours=4)


def test_masked_hidden_states_are_never_read(backend: str) -> None:
    hidden, weight, bias = head(6, 50, 8)
    mask = torch.tensor([True, False, True, True, False, True])
    hidden = hidden.detach().clone()
    hidden[~mask] = torch.nan
    hidden.requires_grad_()
    source_ = fastdiv.LinearLogits(hidden, weight, bias)
    fastdiv.entropy(source_, mask=mask, backend=backend).sum().backward()
    assert hidden.grad is not None and weight.grad is not None and bias.grad is not None
    assert (hidden.grad[~mask] == 0).all()
    assert all(torch.isfinite(t.grad).all() for t in (hidden, weight, bias))


def test_nothing_left_after_masking_gives_zeros(backend: str) -> None:
    tensors = head(4, 50, 8)
    mask = torch.zeros(4, dtype=torch.bool)
    got = fastdiv.entropy(source(tensors), mask=mask, backend=backend)
    got.sum().backward()
    assert (got == 0).all()
    assert all(t.grad is not None and (t.grad == 0).all() for t in tensors)


def token_loss_case(kind: str, n: int) -> tuple[Any, Any, dict[str, Any]]:
    """(loss of statistics and rows, wanted outputs, has teacher)."""
    weights = torch.randn(n, generator=torch.Generator().manual_seed(3))

    def loss(stats: Any, rows: Tensor) -> Tensor:
        w = weights.to(stats[next(iter(stats))].dtype)[rows]
        if kind == "nll":
            return -stats["log_prob"] * w
        if kind == "clipped":
            ratio = (stats["log_prob"] + 3.0).exp()
            return torch.minimum(ratio * w, ratio.clamp(0.8, 1.2) * w) + 0.01 * stats["entropy"] ** 2
        if kind == "many labels":
            return (stats["log_prob"] ** 2).sum(-1) * w
        return stats["reverse_kl"] * w + stats["js"]

    outputs = {
        "nll": ("log_prob",),
        "clipped": ("log_prob", "entropy"),
        "many labels": ("log_prob",),
        "distil": ("reverse_kl", "js"),
    }
    return loss, outputs[kind], {}


@pytest.mark.parametrize("kind", ["nll", "clipped", "many labels", "distil"])
@pytest.mark.parametrize("workspace", [None, 15_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_linear_loss(backend: str, kind: str, workspace: int | None, dtype: torch.dtype, masked: bool) -> None:
    n, v, h = 11, 900, 16
    generator = torch.Generator().manual_seed(4)
    tensors = head(n, v, h, dtype=dtype)
    teacher = head(n, v, h, seed=9, dtype=dtype) if kind == "distil" else ()
    labels = torch.randint(0, v, (n, 3) if kind == "many labels" else (n,), generator=generator)
    labels[2] = -100
    mask = torch.rand(n, generator=generator) < 0.6 if masked else None
    token_loss, outputs, _ = token_loss_case(kind, n)
    options: dict[str, Any] = {"outputs": outputs, "mask": mask, "temperature": 0.8}

    def operator(*t: Tensor) -> dict[str, Tensor]:
        other = source(t[3:]) if teacher else None
        own = source(t[:3], softcap=20.0)
        more = {"teacher": other, "backend": backend, "workspace": workspace}
        return {"loss": fastdiv.linear_loss(own, labels, token_loss, **more, **options)}

    def textbook(*t: Tensor, dtype: torch.dtype, sizes: bool = False) -> dict[str, Tensor]:
        other = source(t[3:]) if teacher else None
        own = source(t[:3], softcap=20.0)
        if sizes:
            runs = [reference(s, outputs=["logsumexp"], dtype=dtype) for s in (own, other) if s is not None]
            return {str(i): run["logsumexp"] for i, run in enumerate(runs)}
        keep = (labels.view(n, -1) != -100).any(1) & (torch.ones(n, dtype=torch.bool) if mask is None else mask)
        stats = reference(own, labels, teacher=other, dtype=dtype, **options)
        return {"loss": token_loss(stats, torch.arange(n))[keep].sum()}

    check(operator, textbook, *tensors, *teacher, spread=0.05, neighbours=4)


def test_linear_loss_calls_each_row_once(backend: str) -> None:
    tensors = head(10, 64, 8)
    mask = torch.tensor([True] * 4 + [False] + [True] * 5)
    seen = []

    def token_loss(stats: fastdiv.TokenStats, rows: Tensor) -> Tensor:
        assert rows.dtype == torch.int64 and stats.log_prob.shape == rows.shape
        seen.append(rows)
        return -stats.log_prob

    fastdiv.linear_loss(source(tensors), torch.arange(10), token_loss, mask=mask, backend=backend, workspace=64 * 4 * 3)
    assert [len(rows) for rows in seen] == [3, 3, 3]
    assert torch.cat(seen).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_linear_loss_backward_twice(backend: str) -> None:
    """With retain_graph the gradients come again, and scale with the upstream gradient."""
    tensors = head(5, 64, 8)
    loss = fastdiv.linear_loss(source(tensors), torch.arange(5), lambda s, rows: -s.log_prob, backend=backend)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    second = torch.autograd.grad(3.0 * loss, tensors)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3.0 * a, b)


def test_linear_loss_only_where_needed(backend: str) -> None:
    """A frozen tensor gets None; no_grad leaves no graph."""
    hidden, weight, bias = head(5, 64, 8)
    labels = torch.arange(5)
    frozen = fastdiv.LinearLogits(hidden, weight.detach(), bias.detach())
    fastdiv.linear_loss(frozen, labels, lambda s, rows: -s.log_prob, backend=backend).backward()
    assert hidden.grad is not None and weight.grad is None and bias.grad is None
    with torch.no_grad():
        out = fastdiv.linear_loss(frozen, labels, lambda s, rows: -s.log_prob, backend=backend)
    assert not out.requires_grad


@pytest.mark.parametrize(
    "token_loss",
    [
        lambda s, rows: rows.float(),
        lambda s, rows: -s.log_prob.detach(),
        lambda s, rows: torch.ones(len(rows), requires_grad=True) * 2.0,
        lambda s, rows: s.argmax.float(),
    ],
)
def test_a_token_loss_that_ignores_the_statistics_raises(backend: str, token_loss: Any) -> None:
    tensors = head(5, 64, 8)
    options: dict[str, Any] = {"outputs": ("log_prob", "argmax"), "backend": backend}
    with pytest.raises(RuntimeError, match="linear_loss: token_loss must give a differentiable function"):
        fastdiv.linear_loss(source(tensors), torch.arange(5), token_loss, **options)
    with torch.no_grad():
        assert not fastdiv.linear_loss(source(tensors), torch.arange(5), token_loss, **options).requires_grad


def test_linear_loss_without_a_graph_forms_no_gradient(backend: str) -> None:
    tensors = head(5, 64, 8)
    with torch.no_grad(), torch.autograd.profiler.profile() as profile:
        fastdiv.linear_loss(source(tensors), torch.arange(5), lambda s, rows: -s.log_prob, backend=backend)
    assert sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.function_events) == 1


def test_weight_gradient_is_summed_in_float32(backend: str) -> None:
    """1024 rows in chunks: a bfloat16 running sum would be off by percents, the rounded float32 sum by half an ulp."""
    n, v, h = 1024, 64, 4
    hidden = torch.ones(n, h, dtype=torch.bfloat16)
    weight = torch.zeros(v, h, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(n, dtype=torch.int64)
    for workspace in (None, 4 * v * 31):
        for run in ("log_prob", "linear_loss"):
            own = fastdiv.LinearLogits(hidden, weight)
            if run == "log_prob":
                loss = fastdiv.log_prob(own, labels, backend=backend, workspace=workspace).sum()
            else:
                loss = fastdiv.linear_loss(
                    own, labels, lambda s, rows: s.log_prob, backend=backend, workspace=workspace
                )
            (gradient,) = torch.autograd.grad(loss, weight)
            assert gradient.dtype == torch.bfloat16
            assert (gradient[0] == 1008.0).all() and (gradient[1:] == -16.0).all()


def test_leading_shape_and_indexing(backend: str) -> None:
    hidden, weight, _ = head(12, 40, 8)
    own = fastdiv.LinearLogits(hidden.view(3, 4, 8), weight)
    assert own.shape == (3, 4, 40)
    labels = torch.arange(12).view(3, 4)
    whole = fastdiv.log_prob(own, labels, backend=backend)
    part = fastdiv.log_prob(own[:, :-1], labels[:, :-1], backend=backend)
    assert own[:, :-1].shape == (3, 3, 40)
    exact = reference(own, labels, outputs=["log_prob"])["log_prob"]
    plain = reference(own, labels, outputs=["log_prob"], dtype=torch.float32)["log_prob"]
    assert_accurate(whole, plain, exact)
    assert_accurate(part, plain[:, :-1], exact[:, :-1])
    with pytest.raises(IndexError, match="leading dimensions"):
        own[0, 0, 0]


def test_strided_hidden_states_and_weight(backend: str) -> None:
    hidden, weight, bias = (t.detach() for t in head(6, 40, 8))
    rows = torch.stack([hidden, torch.full_like(hidden, torch.nan)], 1)[:, 0].requires_grad_()
    across = weight.T.contiguous().T.requires_grad_()
    every_other = torch.stack([bias, bias], 1)[:, 0].requires_grad_()
    assert not any(t.is_contiguous() for t in (rows, across, every_other))
    pair = token_stats(lambda *t: (source(t),), backend=backend, outputs=("entropy",))
    check(*pair, rows, across, every_other, spread=0.05, neighbours=4)


def test_materialize_is_differentiable() -> None:
    hidden, weight, bias = head(3, 20, 8, dtype=torch.bfloat16)
    own = fastdiv.LinearLogits(hidden, weight, bias, softcap=10.0, scale=0.5)
    logits = own.materialize()
    assert logits.dtype == torch.float32 and logits.shape == own.shape
    logits.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    raw = 0.5 * (hidden.double() @ weight.double().T + bias.double())
    exact = 10.0 * torch.tanh(raw / 10.0)
    plain = 10.0 * torch.tanh(0.5 * (hidden.float() @ weight.float().T + bias.float()) / 10.0)
    assert_accurate(logits, plain, exact)
