"""A vocabulary in slices: what a walk over hidden states finds must not depend on where the slices are cut."""

from __future__ import annotations

import pytest
import torch
from cases import DIVERGENCES, MODEL_OUTPUTS
from torch import Tensor

import fastdiv
from fastdiv.testing import reference

INF = torch.inf
COLUMNS = 512  # of the slices that `WORKSPACE` makes of a vocabulary
WORKSPACE = 1
VOCABULARY = 3 * COLUMNS

WHERE = {
    "first": [True, False, False],
    "first two": [True, True, False],
    "middle": [False, True, False],
    "last": [False, False, True],
}
"""Which of three slices have no probability."""


def head(dtype: torch.dtype = torch.float32, seed: int = 0, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias whose products are exact: small integers over 4."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-4, 5, (rows, 4), generator=generator) / 4
    weight = torch.randint(-4, 5, (VOCABULARY, 4), generator=generator) / 4
    bias = torch.randint(-8, 9, (VOCABULARY,), generator=generator) / 4
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


def masked(tensors: tuple[Tensor, Tensor, Tensor], slices: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = tensors
    out = torch.tensor(slices).repeat_interleave(COLUMNS)
    return hidden, weight, bias.masked_fill(out, -INF)


def dtypes(backend: str) -> list[torch.dtype]:
    return [torch.float32, torch.float64] if backend == "reference" else [torch.float32]


def agree(got: fastdiv.TokenStats, want: dict[str, Tensor]) -> None:
    for name, value in want.items():
        exact = got[name].dtype == torch.float64
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 2e-6, "atol": 2e-6}
        torch.testing.assert_close(got[name], value.to(got[name].dtype), **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("where", WHERE)
def test_slices_without_probability(backend: str, where: str) -> None:
    """Of the student alone: no entry of -inf counts as an exponential of 1, wherever its slice is."""
    label = COLUMNS * WHERE[where].index(False) + 7
    labels = torch.tensor([label, label + 1, label + 2])
    outputs = (*(name for name in MODEL_OUTPUTS if name != "mean_logit"), "argmax", "rank")
    for dtype in dtypes(backend):
        tensors = masked(head(dtype), WHERE[where])
        student = fastdiv.LinearLogits(*tensors)
        for chosen in (outputs, outputs[:-1]):  # with full rows, and in slices
            got = fastdiv.token_stats(student, labels, outputs=chosen, backend=backend, workspace=WORKSPACE)
            agree(got, reference(student, labels, outputs=chosen))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("both", [False, True], ids=["teacher", "both"])
def test_slices_without_probability_in_a_pair(backend: str, where: str, both: bool) -> None:
    """The KL that is finite, and both where the same slices are missing in both models."""
    for dtype in dtypes(backend):
        student, teacher = head(dtype), masked(head(dtype, seed=1), WHERE[where])
        student = masked(student, WHERE[where]) if both else student
        pair = fastdiv.LinearLogits(*student), fastdiv.LinearLogits(*teacher)
        outputs = ("forward_kl", "reverse_kl") if both else ("forward_kl",)
        got = fastdiv.token_stats(pair[0], teacher=pair[1], outputs=outputs, backend=backend, workspace=WORKSPACE)
        agree(got, reference(pair[0], teacher=pair[1], outputs=outputs))
        got = fastdiv.token_stats(
            pair[1], teacher=pair[0], outputs=("reverse_kl",), backend=backend, workspace=WORKSPACE
        )
        agree(got, reference(pair[1], teacher=pair[0], outputs=("reverse_kl",)))


def test_gradients_where_the_first_slice_has_no_probability(backend: str) -> None:
    for dtype in dtypes(backend):
        hidden, weight, bias = masked(head(dtype), WHERE["first"])
        labels, gradients = torch.tensor([600, 700, 800]), []
        for run in (fastdiv.token_stats, reference):
            w = weight.detach().requires_grad_()
            options = {"backend": backend, "workspace": WORKSPACE} if run is fastdiv.token_stats else {"dtype": dtype}
            out = run(fastdiv.LinearLogits(hidden, w, bias), labels, outputs=("log_prob",), **options)
            gradients += torch.autograd.grad(out["log_prob"].sum(), w)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_equal_maxima_in_several_slices(backend: str, count: int) -> None:
    """The lowest of them is the argmax, and all but one of them belong to the sums beside the maximum."""
    hidden, weight, bias = head()
    places = [40, COLUMNS + 3, 2 * COLUMNS + 100][-count:]
    weight[places], bias[places] = 0.0, 9.0
    student, labels = fastdiv.LinearLogits(hidden, weight, bias), torch.full((3,), places[-1])
    outputs = (*(name for name in MODEL_OUTPUTS if name != "mean_logit"), "argmax", "is_top1")
    got = fastdiv.token_stats(student, labels, outputs=outputs, backend=backend, workspace=WORKSPACE)
    assert got.argmax.tolist() == [places[0]] * 3
    assert not got.is_top1.any()
    agree(got, reference(student, labels, outputs=outputs))


def test_equal_maxima_of_the_teacher_in_two_slices(backend: str) -> None:
    hidden, weight, bias = head(seed=1)
    places = [40, 2 * COLUMNS + 100]
    weight[places], bias[places] = 0.0, 9.0
    student, teacher = fastdiv.LinearLogits(*head()), fastdiv.LinearLogits(hidden, weight, bias)
    outputs = tuple(name for name in DIVERGENCES if name not in ("js", "tv"))
    got = fastdiv.token_stats(student, teacher=teacher, outputs=outputs, backend=backend, workspace=WORKSPACE)
    agree(got, reference(student, teacher=teacher, outputs=outputs))


@pytest.mark.parametrize("outputs", [("log_prob",), ("log_prob", "rank"), ("entropy", "rank"), ("log_prob", "js")])
def test_a_confident_token_whose_logits_are_formed_twice(backend: str, outputs: tuple[str, ...]) -> None:
    """Forward and backward may form products of other shapes, which round otherwise: 1 - p keeps its digits."""
    n, width, v = 4, 64, 3000
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(v, width, generator=generator) / 4
    labels = torch.randint(0, v, (n,), generator=generator)
    own = weight[labels]
    hidden = torch.randn(n, width, generator=generator) + 35 * own / own.norm(dim=-1, keepdim=True) ** 2
    teacher = fastdiv.LinearLogits(hidden + 0.01, weight) if "js" in outputs else None
    gradients = []
    for work in (torch.float32, torch.float64):
        h = hidden.to(work).requires_grad_()
        student = fastdiv.LinearLogits(h, weight.to(work))
        if work == torch.float64:
            stats = reference(student, labels, teacher=teacher, outputs=outputs)
        else:
            stats = fastdiv.token_stats(student, labels, teacher=teacher, outputs=outputs, backend=backend, workspace=1)
            h.data.mul_(1.0 + 2e-7)  # moves the products as another order of their sums would
        chosen = stats["log_prob" if "log_prob" in outputs else "entropy"]
        gradients += torch.autograd.grad(chosen.sum(), h)
    got, want = gradients
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
