"""Rows that have no distribution, and logits that have no probability, wherever in the vocabulary they stand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from cases import DIVERGENCES, MODEL_OUTPUTS
from torch import Tensor

import fastdiv
from fastdiv.testing import reference

INF, NAN = torch.inf, torch.nan
V, SLICE = 1500, 512
"""A chunk of the native kernels has 1024 or 256 entries, a block of Triton's 1024."""


def models(value: float, column: int, broken: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
    """(logits [3, V], broken in row 1; hidden, weight and bias, broken in all rows) of student and teacher."""
    generator = torch.Generator().manual_seed(0)
    logits, heads = [], []
    for name in ("student", "teacher"):
        x, *head = (torch.randn(*s, generator=generator) for s in ((3, V), (3, 4), (V, 4), (V,)))
        if name in broken:
            x[1, column] = head[2][column] = value
        logits.append(x.requires_grad_())
        heads += [t.requires_grad_() for t in head]
    return logits, heads


@pytest.mark.parametrize("broken", [("student",), ("teacher",), ("student", "teacher")], ids="+".join)
@pytest.mark.parametrize("column", [0, 1023, V - 1])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_plus_infinity_give_nan_at_every_place(
    backend: str, value: float, column: int, broken: tuple[str, ...]
) -> None:
    """In values and in gradients, from logits and from slices of a projection; `mean_logit` is the mean of what is
    there, and what does not depend on the broken model does not show it."""
    logits, heads = models(value, column, broken)
    options = {"backend": backend, "workspace": 2 * 3 * SLICE * 4, "labels": torch.tensor([5, column, 7])}
    pair = fastdiv.LinearLogits(*heads[:3]), fastdiv.LinearLogits(*heads[3:])
    one, every = torch.tensor([False, True, False]), torch.ones(3, dtype=torch.bool)
    for (student, teacher), kinds, leaves, rows in (
        (logits, DIVERGENCES, logits, one),
        (pair, DIVERGENCES[:3], heads, every),  # those that merge: full rows need no slices
    ):
        outputs = (*MODEL_OUTPUTS, *kinds)
        stats = fastdiv.token_stats(student, teacher=teacher, outputs=outputs, **options)
        for name in outputs:
            spoilt = name in DIVERGENCES or "student" in broken
            shows = spoilt and not (name == "mean_logit" and value == INF)
            assert torch.equal(stats[name].isnan(), rows & shows), name
            if name not in ("log_prob", "entropy", *DIVERGENCES[:2], "js"):
                continue
            found = torch.autograd.grad(stats[name].sum(), leaves, retain_graph=True, allow_unused=True)
            for at, (leaf, g) in enumerate(zip(leaves, found, strict=True)):
                shows = name in DIVERGENCES or ("student" in broken and at < len(leaves) // 2)
                want = ((one[:, None] if leaves is logits else every[0]) & shows).expand(leaf.shape)
                assert torch.equal(torch.zeros_like(want) if g is None else g.isnan(), want), (name, at)


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_row_without_probability_against_another(backend: str, kind: str, which: str) -> None:
    """All -inf: the divergence is NaN, and so is the gradient of every logit that is not -inf itself."""
    x, y = (torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    if which != "teacher":
        x[1] = -INF
    if which != "student":
        y[1] = -INF
    x.requires_grad_(), y.requires_grad_()
    got = fastdiv.divergence(x, y, kind, backend=backend)
    assert got.isnan().tolist() == [False, True, False]
    for leaf, g in zip((x, y), torch.autograd.grad(got.sum(), (x, y)), strict=True):
        if leaf[1, 0] == -INF:
            assert (g[1] == 0).all()
        else:
            assert g[1].isnan().all()
        assert g[[0, 2]].isfinite().all()


@pytest.mark.parametrize("peak", [(250, 1030), (1030, 250), (0, 2999), (2999, 0), (7, 9)])
def test_what_counts_as_zero_is_the_same_in_every_order(backend: str, peak: tuple[int, int]) -> None:
    """A teacher's probability of e^-200 where the student has none adds nothing, though it stands where no logit was
    higher before: in another chunk, in another slice of a projection, before the peak or after it."""
    at, top = peak
    x, y = torch.zeros(1, 3000), torch.zeros(1, 3000)
    x[0, at], y[0, top] = -INF, 200.0
    x[0, 100:200] = y[0, 100:200] = -INF
    heads = [fastdiv.LinearLogits(torch.zeros(4, 1), torch.zeros(3000, 1), t[0]) for t in (x, y)]
    options = {"backend": backend, "workspace": 4 * 512 * 4 * 2}
    (want,) = reference(x, outputs=("log_prob",), labels=torch.tensor([top]))["log_prob"].neg().tolist()
    for a, b in ((x, y), heads):
        for kind, *pair in (("forward_kl", a, b), ("reverse_kl", b, a)):
            got = fastdiv.divergence(*pair, kind, **options)
            assert got.tolist() == pytest.approx([want] * got.numel(), rel=1e-6), (kind, type(a))
    y[0, at] = 180.0  # e^-20 is a probability
    assert fastdiv.divergence(x, y, "forward_kl", **options) == fastdiv.divergence(y, x, "reverse_kl", **options) == INF
