"""Runs an operator beside the textbook: values and gradients, under `fastdiv.testing`'s tolerance rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastdiv
from fastdiv.testing import FACTOR, ULPS, compare, reference

MODEL_OUTPUTS = (
    "log_prob",
    "entropy",
    "logsumexp",
    "log_sum_sq_probs",
    "varentropy",
    "max_log_prob",
    "mean_logit",
)
"""The differentiable outputs of one model."""

DIVERGENCES = ("forward_kl", "reverse_kl", "jeffreys", "js", "tv")

NARROW = (torch.float32, torch.float16, torch.bfloat16)

# In float64 the textbook is as inexact as what it judges: two float64 results agree to 6e-11 of the largest.
FLOAT64_ULPS = 2.0**18

Run = Callable[..., dict[str, Tensor]]


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """What a backend takes."""
    return (*NARROW, torch.float64) if backend == "reference" else NARROW


def outside_gap(x: Tensor, temperature: float = 1.0, lowest: float = -108.0) -> Tensor:
    """`x` without logits 70 to 108 temperatures below their row's maximum: those are moved to 60 below.

    There probabilities are subnormal in float32: 0 for one backend, a number for another and in float64.
    Which of the two decides between a finite and an infinite KL.  Where another model has probability 0, float64 still
    sees what is 0 in float32, down to 745 below: `lowest` = -inf moves every finite logit.
    """
    if x.numel() == 0:
        return x
    top = torch.where(torch.isfinite(x), x, -torch.inf).amax(-1, keepdim=True).double()
    z = (x.double() - top) / temperature
    moved = torch.where((z > lowest) & (z < -70.0), (top - 60.0 * temperature).to(x.dtype), x)
    if 0 in x.stride():
        return moved
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(moved)


def upstream_for(values: dict[str, Tensor], seed: int, layout: str) -> dict[str, Tensor]:
    """A gradient for every differentiable output: "random", "expanded" (stride 0) or "strided"."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, v in values.items():
        if not v.requires_grad:
            continue
        g = torch.randn(v.shape, generator=generator).to(v.dtype)
        if layout == "expanded":
            g = torch.full((), 0.75, dtype=v.dtype).expand(v.shape)
        elif layout == "ones":
            g = torch.ones_like(v)
        elif layout == "strided":
            g = torch.stack([g, torch.full_like(g, torch.nan)], -1)[..., 0]
        result[name] = g
    return result


def evaluate(
    run: Run,
    tensors: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    seed: int = 0,
    layout: str = "random",
) -> dict[str, Tensor]:
    """The outputs, then "gradient 0", ... of the tensors that require one; `dtype` casts the leaves."""
    leaves = [(t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_(t.requires_grad) for t in tensors]
    out = run(*leaves)
    upstream = upstream_for(out, seed, layout)
    wanted = {f"gradient {i}": leaf for i, leaf in enumerate(leaves) if leaf.requires_grad}
    result = {name: v.detach() for name, v in out.items()}
    if upstream and wanted:
        outputs = [out[name] for name in upstream]
        result |= zip(wanted, torch.autograd.grad(outputs, list(wanted.values()), list(upstream.values())), strict=True)
    return result


def neighbour(t: Tensor, seed: int, spread: float) -> Tensor:
    """An input like `t`: each finite number moved by up to `spread`, or 4 ulp of it if that is more."""
    if not t.is_floating_point():
        return t
    noise = torch.rand(t.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2.0 - 1.0
    size = torch.where(torch.isfinite(t), t, 0.0).double().abs() * (4.0 * torch.finfo(t.dtype).eps)
    return (t.detach() + noise * size.clamp(min=spread)).to(t.dtype).requires_grad_(t.requires_grad)


def check(
    operator: Run,
    textbook: Run,
    *tensors: Tensor,
    seed: int = 0,
    layout: str = "random",
    spread: float = 0.5,
    neighbours: int = 2,
    factor: float = FACTOR,
) -> None:
    """Every output and gradient of `operator(*tensors)` is as exact as the rule asks.

    `textbook(*tensors, dtype=)` is the same in plain torch; with `sizes=True` something whose gradients are as
    large as the terms that cancel.  A tensor that requires a gradient has its own checked.  Plain torch's
    error is taken on `neighbours` more inputs of the same kind, as it may be exact by luck on one.
    """
    truth = torch.float64
    work = truth if any(t.dtype == truth for t in tensors) else torch.float32
    got = evaluate(operator, tensors, None, seed, layout)
    pairs = []
    for inputs in (tensors, *([neighbour(t, r, spread) for t in tensors] for r in range(neighbours))):
        plain = evaluate(partial(textbook, dtype=work), inputs, None, seed, layout)
        pairs.append((plain, evaluate(partial(textbook, dtype=truth), inputs, truth, seed, layout)))
    plain, exact = pairs[0]
    sizes = evaluate(partial(textbook, dtype=truth, sizes=True), tensors, truth, seed, "ones")
    assert got.keys() == exact.keys()
    ulps = FLOAT64_ULPS if work == truth else ULPS
    # Gradients are p (f - sum p f) with f about as large as the output; where one id has all the mass, that is f - f.
    outputs = [v for n, v in exact.items() if "gradient" not in n and n not in ("logsumexp", "mean_logit", "loss")]
    outputs = [v[torch.isfinite(v)].abs().max().item() for v in outputs if torch.isfinite(v).any()]
    scale = max([1.0, *outputs])
    for name, value in got.items():
        dtype = tensors[int(name.split()[1])].dtype if name.startswith("gradient") else plain[name].dtype
        assert value.dtype == dtype, f"{name} has {value.dtype}, expected {dtype}"
        if value.numel():
            more = [(p[name], e[name]) for p, e in pairs[1:]]
            size = scale * sizes[name].nan_to_num(0.0).abs().max().item() if name.startswith("gradient") else 0.0
            found = compare(value, plain[name], exact[name], neighbours=more, size=size, factor=factor, ulps=ulps)
            assert found, f"{name} {found.text}"


def token_stats(
    build: Callable[..., tuple[Any, ...]], *, backend: str, workspace: int | None = None, **options: Any
) -> tuple[Run, Run]:
    """(operator, textbook) of `fastdiv.token_stats`; `build(*tensors)` -> (student,) or (student, teacher)."""

    def operator(*tensors: Tensor) -> dict[str, Tensor]:
        student, *teacher = build(*tensors)
        extra = {"teacher": teacher[0]} if teacher else {}
        return dict(fastdiv.token_stats(student, backend=backend, workspace=workspace, **extra, **options))

    def textbook(*tensors: Tensor, dtype: torch.dtype, sizes: bool = False) -> dict[str, Tensor]:
        student, *teacher = build(*tensors)
        if sizes:  # every gradient is made of terms p f and q f
            same = {k: v for k, v in options.items() if k in ("mask", "temperature")}
            runs = [reference(s, outputs=["logsumexp"], dtype=dtype, **same) for s in (student, *teacher)]
            return {str(i): run["logsumexp"] for i, run in enumerate(runs)}
        return reference(student, teacher=teacher[0] if teacher else None, dtype=dtype, **options)

    return operator, textbook


def head(n: int, v: int, h: int, *, seed: int = 0, bias: bool = True, **options: Any) -> tuple[Tensor, ...]:
    """Tensors of a `LinearLogits`: hidden [n, h], weight [v, h], perhaps bias [v]; logits of size 2."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator)
    weight = torch.randn(v, h, generator=generator) * (2.0 / h**0.5)
    tensors = (hidden, weight, torch.randn(v, generator=generator))[: 3 if bias else 2]
    return tuple(t.to(options.get("dtype", torch.float32)).requires_grad_() for t in tensors)
