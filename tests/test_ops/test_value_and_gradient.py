"""Statistics and their gradient at once: the same numbers as from `token_stats` and its backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
from fastdiv.testing import assert_bitwise_equal, compare, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SETS = {
    "cross-entropy": ("log_prob",),
    "policy": ("log_prob", "entropy", "logsumexp"),
    "more": ("varentropy", "mean_logit", "max_log_prob"),
    "divergences": ("log_prob", "reverse_kl", "js"),
}


def inputs(v: int, dtype: torch.dtype, seed: int = 0, rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = ((torch.randn(rows, v, generator=generator) * 3.0).to(dtype) for _ in range(2))
    return x, y, torch.randint(v, (rows,), generator=generator)


def weights_for(outputs: tuple[str, ...], rows: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(rows, generator=generator) for name in outputs}


def by_autograd(x: Tensor, weights: dict[str, Tensor], dtype: torch.dtype, **options: object) -> Tensor:
    leaf = x.detach().to(dtype).requires_grad_()
    stats = reference(leaf, outputs=tuple(weights), dtype=dtype, **options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(sum((w * stats[name]).sum() for name, w in weights.items()), leaf)  # type: ignore[call-overload]
    return gradient


@pytest.mark.parametrize("outputs", SETS.values(), ids=SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 33, 700, 3001])
def test_gradients(backend: str, v: int, dtype: torch.dtype, outputs: tuple[str, ...]) -> None:
    x, y, labels = inputs(v, dtype)
    weights = weights_for(outputs)
    teacher = {"teacher": y} if "js" in outputs else {}
    stats, gradient = fastdiv.value_and_gradient(x, labels, weights, temperature=0.8, backend=backend, **teacher)
    options = {"labels": labels, "temperature": 0.8, **{k: t.double() for k, t in teacher.items()}}
    exact = by_autograd(x, weights, torch.float64, **options)
    plain = by_autograd(x.float(), weights, torch.float32, **{**options, **{k: t.float() for k, t in teacher.items()}})
    assert gradient.dtype == dtype and gradient.shape == x.shape
    found = compare(gradient, plain.to(dtype), exact, size=20.0)
    assert found, found.text
    same = fastdiv.token_stats(x, labels, outputs=outputs, temperature=0.8, backend=backend, **teacher)
    for name in outputs:
        assert torch.allclose(stats[name], same[name], rtol=1e-6, atol=1e-6), name
        assert not stats[name].requires_grad


def test_a_number_weighs_every_token(backend: str) -> None:
    x, _, labels = inputs(700, torch.float32)
    _, got = fastdiv.value_and_gradient(x, labels, {"log_prob": -0.25, "entropy": 0.0}, backend=backend)
    leaf = x.requires_grad_()
    (want,) = torch.autograd.grad(torch.nn.functional.cross_entropy(leaf, labels, reduction="sum") * 0.25, leaf)
    assert torch.allclose(got, want, atol=1e-7)


@pytest.mark.parametrize("v", [700, 3001])
def test_several_labels_masks_ignored_and_impossible_ones(
    backend: str, v: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastdiv.engine.Problem, "_check_labels", lambda self: None)
    x, _, _ = inputs(v, torch.float32, rows=6)
    labels = torch.tensor([[0, 1], [5, 5], [-100, 3], [-100, -100], [2, v], [v - 1, 0]])
    mask = torch.tensor([True, True, True, True, True, False])
    options = {"mask": mask, "backend": backend}
    weights = {"log_prob": torch.arange(12.0).view(6, 2), "entropy": torch.arange(6.0)}
    stats, gradient = fastdiv.value_and_gradient(x, labels, weights, **options)
    leaf = x.clone().requires_grad_()
    same = fastdiv.token_stats(leaf, labels, outputs=tuple(weights), **options)
    (want,) = torch.autograd.grad(sum((w * same[name]).sum() for name, w in weights.items()), leaf)
    assert torch.equal(gradient.isnan(), want.isnan()) and gradient[4].isnan().all()
    assert torch.allclose(gradient, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert (gradient[[3, 5]] == 0).all()
    for name in weights:
        assert torch.allclose(stats[name], same[name], rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [33, 700, 3001])
def test_the_gradient_may_take_the_place_of_the_logits(backend: str, v: int, dtype: torch.dtype) -> None:
    x, y, labels = inputs(v, dtype)
    mask = torch.tensor([True, False, True, True, True])
    for outputs in (SETS["policy"], SETS["divergences"]):
        teacher = {"teacher": y} if "js" in outputs else {}
        options = {"mask": mask, "backend": backend, **teacher}
        _, want = fastdiv.value_and_gradient(x, labels, weights_for(outputs), **options)
        place = x.clone()
        _, got = fastdiv.value_and_gradient(place, labels, weights_for(outputs), overwrite=True, **options)
        assert_bitwise_equal(got, want)
        if backend not in ("cuda", "triton") or not torch.cuda.is_available():
            assert got.data_ptr() == place.data_ptr()


@pytest.mark.parametrize("make", [torch.tanh, lambda h: h.exp(), lambda h: torch.log_softmax(h, -1)])
def test_a_graph_that_saved_overwritten_logits_raises(backend: str, make: Callable[[Tensor], Tensor]) -> None:
    h = torch.randn(6, 50, requires_grad=True)
    logits = make(h)
    _, g = fastdiv.value_and_gradient(
        logits.detach(), torch.arange(6), {"log_prob": -1 / 6}, overwrite=True, backend=backend
    )
    if backend not in ("cuda", "triton") or not torch.cuda.is_available():  # there a copy is written
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            logits.backward(g)


def test_logits_may_be_overwritten_where_nobody_saved_them(backend: str) -> None:
    h, labels = torch.randn(6, 50, requires_grad=True), torch.arange(6)
    logits = h * 2.0
    _, g = fastdiv.value_and_gradient(logits.detach(), labels, {"log_prob": -1.0}, overwrite=True, backend=backend)
    logits.backward(g)
    (want,) = torch.autograd.grad(torch.nn.functional.cross_entropy(h * 2.0, labels, reduction="sum"), h)
    assert h.grad is not None and torch.allclose(h.grad, want, atol=1e-6)
    with torch.inference_mode():  # tensors made there have no version
        fastdiv.value_and_gradient(h * 2.0, labels, {"log_prob": -1.0}, overwrite=True, backend=backend)


MEMORY = torch.rand(8, 50) + 0.1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("teacher", {"teacher": MEMORY[:4].view_as(MEMORY[:4])}),
        ("teacher", {"teacher": MEMORY[2:6]}),
        ("temperature", {"temperature": MEMORY[0, :4]}),
        ("weights of 'entropy'", {"weights": {"entropy": MEMORY[3, 10:14]}}),
        ("weights of 'entropy'", {"weights": {"entropy": MEMORY[3, 10].expand(4)}}),
    ],
)
def test_memory_of_overwritten_logits_is_theirs_alone(backend: str, name: str, options: dict[str, Any]) -> None:
    weights = options.get("weights", {"reverse_kl": 1.0} if "teacher" in options else {"entropy": 1.0})
    others = {k: v for k, v in options.items() if k != "weights"}
    call = partial(fastdiv.value_and_gradient, MEMORY[:4], None, weights, backend=backend, **others)
    call()  # without `overwrite` nothing is written
    if backend not in ("cuda", "triton") or not torch.cuda.is_available():  # there they are copies
        with pytest.raises(ValueError, match=f"value_and_gradient: overwrite needs .*got {name} in the same memory"):
            call(overwrite=True)


def test_neighbours_in_memory_are_apart(backend: str) -> None:
    memory = torch.randn(8, 50)
    teacher = memory[4:].clone()
    fastdiv.value_and_gradient(
        memory[:4], None, {"reverse_kl": 1.0}, teacher=memory[4:], overwrite=True, backend=backend
    )
    assert torch.equal(memory[4:], teacher)


def test_overwriting_masked_logits_of_sequences(backend: str) -> None:
    x, _, labels = inputs(33, torch.float32, rows=6)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    options = {"labels": labels.view(2, 3), "weights": {"log_prob": -1.0}, "mask": mask, "backend": backend}
    _, want = fastdiv.value_and_gradient(x.view(2, 3, 33), **options)
    _, got = fastdiv.value_and_gradient(x.clone().view(2, 3, 33), overwrite=True, **options)
    assert_bitwise_equal(got, want)
    assert (got[~mask] == 0).all() and (got[mask] != 0).all()


def test_only_the_logits_that_are_overwritten_must_be_contiguous(backend: str) -> None:
    x, y, _ = inputs(33, torch.float32)
    aside = y.T.contiguous().T
    options = {"labels": None, "weights": {"reverse_kl": 1.0}, "backend": backend}
    with pytest.raises(ValueError, match="overwrite needs contiguous logits"):
        fastdiv.value_and_gradient(aside.clone(), teacher=x, overwrite=True, **options)
    _, want = fastdiv.value_and_gradient(x, teacher=y, **options)
    _, got = fastdiv.value_and_gradient(x.clone(), teacher=aside, overwrite=True, **options)
    assert_bitwise_equal(got, want)


def test_softcap_scale_and_leading_dimensions(backend: str) -> None:
    x, _, labels = inputs(700, torch.float32, rows=6)
    source = fastdiv.Logits(x.view(2, 3, 700), softcap=5.0, scale=0.5)
    weights = {"log_prob": torch.randn(2, 3), "entropy": 0.1}
    _, got = fastdiv.value_and_gradient(source, labels.view(2, 3), weights, backend=backend)
    leaf = source.tensor.clone().requires_grad_()
    stats = fastdiv.token_stats(fastdiv.Logits(leaf, softcap=5.0, scale=0.5), labels.view(2, 3), backend="reference")
    (want,) = torch.autograd.grad((weights["log_prob"] * stats.log_prob + 0.1 * stats.entropy).sum(), leaf)
    assert torch.allclose(got, want, atol=1e-6)


def test_no_tokens(backend: str) -> None:
    stats, gradient = fastdiv.value_and_gradient(
        torch.zeros(0, 9), torch.zeros(0).long(), {"log_prob": 1.0}, backend=backend
    )
    assert stats.log_prob.shape == (0,) and gradient.shape == (0, 9)


def test_float64() -> None:
    x, y, labels = inputs(40, torch.float64)
    weights = weights_for(SETS["divergences"])
    _, got = fastdiv.value_and_gradient(x, labels, weights, teacher=y)
    assert torch.allclose(got, by_autograd(x, weights, torch.float64, labels=labels, teacher=y), rtol=1e-9, atol=1e-12)


X, LABELS = torch.zeros(3, 9), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fastdiv.value_and_gradient(X, LABELS, {}),
            TypeError,
            "must map outputs to weights, got dict {}",
        ),
        (lambda: fastdiv.value_and_gradient(X, LABELS, {"rank": 1.0}), ValueError, "output 'rank' has no gradient"),
        (lambda: fastdiv.value_and_gradient(X, None, {"log_prob": 1.0}), ValueError, "output 'log_prob' needs labels"),
        (
            lambda: fastdiv.value_and_gradient(X, LABELS, {"log_prob": torch.ones(2)}),
            ValueError,
            r"weights of 'log_prob' must be \[3\] on cpu, got float32 \[2\] on cpu",
        ),
        (
            lambda: fastdiv.value_and_gradient(X, LABELS, {"log_prob": LABELS}),
            TypeError,
            r"must be a number or a floating tensor, got int64 \[3\]",
        ),
        (
            lambda: fastdiv.value_and_gradient(fastdiv.LinearLogits(X, torch.zeros(5, 9)), LABELS, {"log_prob": 1.0}),
            TypeError,
            "logits must exist, got LinearLogits; linear_loss is for those",
        ),
        (
            lambda: fastdiv.value_and_gradient(torch.zeros(9, 3).T, LABELS, {"log_prob": 1.0}, overwrite=True),
            ValueError,
            r"overwrite needs contiguous logits, got strides \(1, 3\)",
        ),
    ],
)
def test_errors(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"value_and_gradient: .*{message}"):
        call()  # type: ignore[operator]
