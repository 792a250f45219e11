"""For tests of numerical operators: float64 references, one tolerance rule, nasty inputs, bitwise comparison.

Everything here also serves kernels and losses of your own:

>>> import fastdiv
>>> x = torch.tensor([[0.0, 1.0, -torch.inf]])
>>> got = fastdiv.entropy(x)
>>> plain = reference(x, outputs=("entropy",), dtype=torch.float32)["entropy"]
>>> exact = reference(x, outputs=("entropy",))["entropy"]
>>> compare(got, plain, exact).ok
True
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiv.sources import LinearLogits, Logits, Source

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

FACTOR = 2.0
"""How many times plain torch's error an operator's error may be."""

ULPS = 4.0
"""What it may be beyond that, in units in the last place of the largest exact value."""

TRUTH = 2.0**-52
"""What float64 itself is off by, where numbers of size 1 went into the formula."""

VOCABULARIES = (1, 2, 3, 31, 32, 33, 127, 128, 129, 1023, 1024, 1025, 4097)
"""Sizes around every block edge."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: `ok` (also its truth value), and a text about the worst element."""

    ok: bool
    text: str

    def __bool__(self) -> bool:
        return self.ok


def compare(
    got: Tensor,
    plain: Tensor,
    exact: Tensor,
    *,
    neighbours: Iterable[tuple[Tensor, Tensor]] = (),
    size: float = 0.0,
    factor: float = FACTOR,
    ulps: float = ULPS,
) -> Comparison:
    """The tolerance rule: max |got - exact| <= factor max |plain - exact| + ulps (ulp(max |exact|) + 2^-52).

    NaN, +inf and -inf must stand exactly where `exact`, rounded to the dtype of `got`, has them.

    Arguments:
        got: the operator's result, any shape and dtype.
        plain: the textbook formula in torch, in the operator's own precision.
        exact: the same formula in float64.
        neighbours: more pairs (plain, exact), from inputs of the same kind.  Plain torch may be exact by luck on one
            small input; the worst of its errors counts.
        size: of the terms that cancel in the result; their ulp counts where it is above that of max |exact|.
        factor, ulps: the rule's two numbers.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: shapes differ.

    >>> compare(torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]).double()).text
    '[1]: got 2.0999999046, exact 2: error 1.00e-01, plain torch has 0.00e+00, allowed 9.54e-07'
    """
    if not got.shape == plain.shape == exact.shape:
        raise ValueError(f"compare: shapes must be equal, got {[list(t.shape) for t in (got, plain, exact)]}")
    got, exact = got.detach(), exact.detach()
    if not got.is_floating_point():
        same = got == exact
        return Comparison(bool(same.all()), "" if same.all() else _difference(got, exact, ~same))
    rounded = exact.to(got.dtype)
    for name, kind in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = kind(got) != kind(rounded)
        if wrong.any():
            return Comparison(False, f"{name} is not where it should be: {_difference(got, exact, wrong)}")
    finite = torch.isfinite(rounded)
    if not finite.any():
        return Comparison(True, "nothing finite to compare")
    info = torch.finfo(got.dtype)
    size = max(size, torch.where(finite, exact, 0.0).abs().max().item())
    ulp = max(info.eps * size, info.smallest_normal * info.eps)
    error = _worst(got, exact)
    own = max(_worst(*pair) for pair in ((plain, exact), *neighbours))
    allowed = factor * own + ulps * (ulp + TRUTH)
    where = _difference(got, exact, (got.double() - exact).abs() == error)
    return Comparison(error <= allowed, f"{where}: error {error:.2e}, plain torch has {own:.2e}, allowed {allowed:.2e}")


def _worst(value: Tensor, exact: Tensor) -> float:
    """The largest error where both are finite."""
    error = (value.detach().double() - exact.detach()).abs()
    return torch.where(torch.isfinite(error), error, 0.0).max().item()


def assert_accurate(got: Tensor, plain: Tensor, exact: Tensor, what: str = "result") -> None:
    """`compare`, as an assertion: AssertionError names `what` and the worst element."""
    found = compare(got, plain, exact)
    if not found:
        raise AssertionError(f"{what} {found.text}")


def _difference(got: Tensor, exact: Tensor, wrong: Tensor) -> str:
    """The first wrong element: its index and both values."""
    index = wrong.nonzero()[0].tolist()
    return f"{index}: got {got[tuple(index)].item():.11g}, exact {exact[tuple(index)].item():.11g}"


def assert_bitwise_equal(got: Tensor, want: Tensor, what: str = "tensors") -> None:
    """Every bit is equal: also the sign of a zero, and NaN where NaN is.

    Raises:
        AssertionError: dtype, shape or an element differs; the message has the first index and both values.

    >>> assert_bitwise_equal(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    Traceback (most recent call last):
        ...
    AssertionError: tensors differ at 1 of 2 elements, first at [0]: 0.0 and -0.0
    """
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        raise AssertionError(f"{what}: {got.dtype} {list(got.shape)} and {want.dtype} {list(want.shape)}")
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    a, b = got.detach().contiguous(), want.detach().contiguous()
    both_nan = a.isnan() & b.isnan()
    wrong = (a.view(bits) != b.view(bits)) & ~both_nan
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        values = f"{a[index].item()!r} and {b[index].item()!r}"
        raise AssertionError(
            f"{what} differ at {int(wrong.sum())} of {a.numel()} elements, first at {list(index)}: {values}"
        )


def _logits(source: Tensor | Source, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Transformed logits in `dtype`; rows that take no part are zeros, and -inf has no gradient."""
    source = Logits(source) if isinstance(source, Tensor) else source
    rows = (source.hidden if isinstance(source, LinearLogits) else source.tensor).to(dtype)
    if keep is not None:
        rows = torch.where(keep[..., None], rows, torch.zeros((), dtype=dtype))
    if isinstance(source, LinearLogits):
        bias = None if source.bias is None else source.bias.to(dtype)
        rows = torch.nn.functional.linear(rows, source.weight.to(dtype), bias)
    x = rows * source.scale
    x = source.softcap * torch.tanh(x / source.softcap) if source.softcap else x
    return torch.where(x == -torch.inf, x.detach(), x)


def _expectation(p: Tensor, f: Tensor) -> Tensor:
    """sum p f over the vocabulary, where p = 0 contributes 0 whatever f is."""
    return (p * torch.where(p > 0, f, 0)).sum(-1)


def _divergence(name: str, lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    p, q = lp.exp(), lq.exp()
    if name == "forward_kl":
        return _expectation(q, lq - torch.where(q > 0, lp, 0))
    if name == "reverse_kl":
        return _expectation(p, lp - torch.where(p > 0, lq, 0))
    if name == "jeffreys":
        return _divergence("forward_kl", lp, lq, beta) + _divergence("reverse_kl", lp, lq, beta)
    if name == "js":
        m = beta * q + (1 - beta) * p
        lm = torch.where(m > 0, m, 1).log()
        return beta * _expectation(q, lq - lm) + (1 - beta) * _expectation(p, lp - lm)
    if name == "tv":
        return (p - q).abs().sum(-1) / 2
    raise ValueError(f"reference: unknown output {name!r}")


def reference(
    student: Tensor | Source,
    labels: Tensor | None = None,
    *,
    teacher: Tensor | Source | None = None,
    outputs: Sequence[str] = ("log_prob", "entropy"),
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Every output of `fastdiv.token_stats` by the textbook formula, in plain differentiable torch.

    Written without the rest of the library, so that the two check each other; takes O(tokens V) memory.  A
    masked vocabulary entry (-inf) gives the limit, never NaN, in values and in gradients.

    Arguments:
        student, labels, teacher, outputs, beta, temperature, mask, ignore_index: as in `fastdiv.token_stats`.
        dtype: of all arithmetic; float64 for the truth, float32 for what plain torch makes of it.

    Returns:
        Output name -> tensor in `dtype` (argmax and rank: int64, is_top1: bool).

    >>> reference(torch.zeros(1, 4), torch.tensor([2]))["log_prob"]
    tensor([-1.3863], dtype=torch.float64)
    """
    lead = student.shape[:-1]
    keep = mask
    ids = labels if labels is None or labels.shape != lead else labels[..., None]
    if ids is not None:
        some = (ids != ignore_index).any(-1)
        keep = some if keep is None else keep & some
    t = temperature.to(dtype)[..., None] if isinstance(temperature, Tensor) else temperature
    x = _logits(student, keep, dtype)
    z = x / t
    lp = z.log_softmax(-1)
    p = lp.exp()
    lp0 = torch.where(p > 0, lp, 0)
    lq = None if teacher is None else (_logits(teacher, keep, dtype) / t).log_softmax(-1)
    top = z.argmax(-1)

    def output(name: str) -> Tensor:
        if name == "entropy":
            return -_expectation(p, lp0)
        if name == "varentropy":
            return _expectation(p, lp0**2) - _expectation(p, lp0) ** 2
        if name == "logsumexp":
            lse = z.logsumexp(-1)
            return torch.where(lse == torch.inf, torch.nan, lse)
        if name == "log_sum_sq_probs":
            return (2 * lp).logsumexp(-1)
        if name == "mean_logit":
            return z.mean(-1)
        if name == "max_log_prob":
            return lp.gather(-1, top[..., None])[..., 0]
        if name == "argmax":
            return top
        if name in ("log_prob", "is_top1", "rank"):
            assert ids is not None and labels is not None
            chosen = torch.where(ids == ignore_index, 0, ids).long()
            if name == "log_prob":
                value = lp.gather(-1, chosen)
            elif name == "is_top1":
                value = chosen == top[..., None]
            else:
                value = (z[..., None, :] > z.gather(-1, chosen)[..., None]).sum(-1)
            return value.masked_fill(ids == ignore_index, 0).reshape(labels.shape)
        assert lq is not None
        return _divergence(name, lp, lq, beta)

    def masked(value: Tensor) -> Tensor:
        if keep is None:
            return value
        return value.masked_fill(~(keep if value.dim() == keep.dim() else keep[..., None]), 0)

    return {name: masked(output(name)) for name in outputs}


def logits(
    *,
    rows: Sequence[int] = (1, 2, 7, 0, 7),
    vocabularies: Sequence[int] = VOCABULARIES,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    broken: bool = True,
    masked: bool = True,
) -> SearchStrategy[Tensor]:
    """Hypothesis strategy of logits [rows, vocabulary] that break naive code.

    Sizes around block edges, scales from 0 (all equal) to 1e4, offsets of 1e4 and 6e4, ties, rows with one
    winner, a row stride that is not the vocabulary, columns that are not adjacent, rows that share memory.

    Arguments:
        rows, vocabularies, dtypes: what to draw from.
        broken: also a row of -inf, one with NaN, one with +inf.
        masked: also -inf entries, at least one finite entry being left in every row.

    >>> from hypothesis import given
    >>> @given(logits(broken=False))
    ... def test_entropy(x):
    ...     assert (fastdiv.entropy(x) >= 0).all()
    """
    from hypothesis import strategies as st

    @st.composite
    def draw_logits(draw: Any) -> Tensor:
        n, v = draw(st.sampled_from(rows)), draw(st.sampled_from(vocabularies))
        dtype = draw(st.sampled_from(dtypes))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        scale = draw(st.sampled_from((1.0, 1.0, 4.0, 30.0, 0.0, 1e-3, 1e4)))
        offset = draw(st.sampled_from((0.0, 0.0, 0.0, -1e4, 6e4)))
        x = torch.randn(n, v, generator=generator, dtype=torch.float64) * scale
        if draw(st.booleans()):
            x = x.round()  # ties
        if n and draw(st.booleans()):
            x[0, v // 2] += 40.0 + 10.0 * scale  # one winner
        x = (x + offset).clamp(-65504, 65504).to(dtype)
        if masked and draw(st.booleans()):
            out = torch.rand(n, v, generator=generator) < 0.5
            out[:, draw(st.integers(0, v - 1))] = False
            x[out] = -torch.inf
        for value in (-torch.inf, torch.nan, torch.inf) if n and broken else ():
            if draw(st.integers(0, 3)) == 3:
                x[-1, slice(None) if value == -torch.inf else v // 3] = value
        layout = draw(st.sampled_from(("dense", "strided rows", "strided columns", "shared rows")))
        if layout == "strided rows":
            x = torch.cat([x, x.new_full((n, 5), 7.0)], 1)[:, :v]
        elif layout == "strided columns":
            x = x.t().contiguous().t()
        elif layout == "shared rows" and n:
            x = x[:1].expand(n, v)
        result: Tensor = x
        return result

    strategy: SearchStrategy[Tensor] = draw_logits()
    return strategy
