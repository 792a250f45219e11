"""What happens at the edges: one test for each promise about strange input, and for each error message."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from cases import DIVERGENCES, MODEL_OUTPUTS, check, head, token_stats
from torch import Tensor

import fastdiv
from fastdiv.testing import assert_bitwise_equal, reference

INF, NAN = torch.inf, torch.nan
CHOICES = ("argmax", "is_top1", "rank")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every(x: Tensor, backend: str) -> dict[str, Tensor]:
    """All floating outputs of both models, the teacher being another distribution."""
    y = random(*x.shape, seed=9).clamp(min=-4)
    labels = torch.zeros(x.shape[:-1], dtype=torch.int64)
    return dict(fastdiv.token_stats(x, labels, teacher=y, outputs=(*MODEL_OUTPUTS, *DIVERGENCES), backend=backend))


# Labels


@pytest.mark.parametrize("label", [10, -1, 2**40, -(2**40)])
def test_a_label_outside_the_vocabulary_raises(backend: str, label: int) -> None:
    labels = torch.tensor([1, label, 3])
    pattern = rf"labels: expected values in \[0, 10\) or ignore_index -100, got {label} at token 1"
    with pytest.raises(IndexError, match=pattern):
        fastdiv.log_prob(random(3, 10), labels, backend=backend)
    with pytest.raises(IndexError, match=pattern):
        hidden, weight, _ = head(3, 10, 4)
        fastdiv.linear_loss(fastdiv.LinearLogits(hidden, weight), labels, lambda s, rows: s.log_prob, backend=backend)


def test_a_label_outside_the_vocabulary_among_several(backend: str) -> None:
    with pytest.raises(IndexError, match="got 10 at token 2"):
        fastdiv.log_prob(random(3, 10), torch.tensor([[0, 1], [-100, 2], [3, 10]]), backend=backend)


def test_an_ignored_token_may_have_any_other_label_masked_out(backend: str) -> None:
    labels = torch.tensor([1, 999])
    mask = torch.tensor([True, False])
    assert fastdiv.log_prob(random(2, 10), labels, mask=mask, backend=backend)[1] == 0


def test_all_labels_ignored(backend: str) -> None:
    x = random(3, 10).requires_grad_()
    got = fastdiv.log_prob(x, torch.full((3,), -100), backend=backend)
    got.sum().backward()
    assert x.grad is not None
    assert (got == 0).all() and (x.grad == 0).all() and not got.mean().isnan()


# Infinite logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_vocabulary_contributes_nothing(backend: str, dtype: torch.dtype) -> None:
    """With some logits at -inf, everything is as if these ids did not exist; their gradient is exactly 0."""
    x = random(4, 300).to(dtype)
    out = torch.arange(300) % 3 == 1
    masked = x.masked_fill(out, -INF).requires_grad_()
    short = x[:, ~out].contiguous().requires_grad_()
    outputs = tuple(name for name in MODEL_OUTPUTS if name not in ("log_prob", "mean_logit"))
    long, brief = (fastdiv.token_stats(t, outputs=outputs, backend=backend) for t in (masked, short))
    for stats in (long, brief):
        torch.stack(list(stats.values())).sum().backward()
    assert masked.grad is not None and short.grad is not None
    assert (masked.grad[:, out] == 0).all()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(masked.grad[:, ~out], short.grad, **tolerance)
    for name in outputs:
        torch.testing.assert_close(long[name], brief[name])


def test_limits_of_divergences_where_one_model_has_no_mass(backend: str) -> None:
    x = torch.tensor([[0.0, 0.0, -INF]]).requires_grad_()
    y = torch.tensor([[0.0, -INF, 0.0]])
    got = {kind: fastdiv.divergence(x, y, kind, backend=backend) for kind in DIVERGENCES}
    assert got["forward_kl"] == INF and got["reverse_kl"] == INF and got["jeffreys"] == INF
    assert got["tv"].item() == pytest.approx(0.5, rel=1e-6)
    assert got["js"].item() == pytest.approx(0.5 * torch.log(torch.tensor(2.0)).item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(got["js"].sum() + got["tv"].sum(), x)
    assert torch.isfinite(gradient).all() and gradient[0, 2] == 0
    narrower = torch.tensor([[0.0, -INF, -INF]])
    assert fastdiv.divergence(narrower, x.detach(), "reverse_kl", backend=backend).item() == pytest.approx(0.6931472)
    assert fastdiv.divergence(narrower, x.detach(), "forward_kl", backend=backend) == INF


def test_the_same_mask_in_both_models(backend: str) -> None:
    x, y = random(3, 100), random(3, 100, seed=1)
    out = torch.arange(100) % 2 == 0
    a, b = (t.masked_fill(out, -INF).requires_grad_() for t in (x, y))
    check(*token_stats(lambda a, b: (a, b), backend=backend, outputs=DIVERGENCES), a, b)


def test_label_at_a_masked_entry(backend: str) -> None:
    x = torch.tensor([[1.0, -INF, 0.0]]).requires_grad_()
    got = fastdiv.log_prob(x, torch.tensor([1]), backend=backend)
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert got.item() == -INF
    assert gradient[0, 1] == 0 and torch.isfinite(gradient).all()


def test_probabilities_below_the_smallest_normal_float_count_as_zero(backend: str) -> None:
    """Far below: every backend agrees.  Between exp(-104) and exp(-87.3) they need not, so nothing is tested there."""
    x, y = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -INF]])
    assert fastdiv.divergence(x, y, "reverse_kl", backend=backend) == 0
    assert fastdiv.entropy(x, backend=backend) == 0
    x = torch.tensor([[0.0, -60.0]])
    assert fastdiv.divergence(x, y, "reverse_kl", backend=backend) == INF
    assert fastdiv.entropy(x, backend=backend) > 0


def test_a_row_without_any_finite_logit(backend: str) -> None:
    x = random(3, 40)
    want = every(x, backend)
    x[1] = -INF
    got = every(x, backend)
    for name, value in got.items():
        if name in ("logsumexp", "mean_logit"):
            assert value[1] == -INF
        else:
            assert value[1].isnan(), name
        assert_bitwise_equal(value[[0, 2]], want[name][[0, 2]], name)


@pytest.mark.parametrize("other", [False, True], ids=["student", "both"])
def test_a_vocabulary_that_begins_without_probability(backend: str, other: bool) -> None:
    """Whole blocks of -inf before the first number are as good as blocks of -inf after the last."""
    x, y = random(3, 1500, seed=1), random(3, 1500, seed=2)
    x[:, :1100] = -INF
    if other:
        y[:, :1100] = -INF
    labels = torch.tensor([1100, 1499, 1300])
    outputs = (*MODEL_OUTPUTS[:-1], "argmax", "rank", *DIVERGENCES)
    got = fastdiv.token_stats(x, labels, teacher=y, outputs=outputs, backend=backend)
    turned = fastdiv.token_stats(x.flip(1), 1499 - labels, teacher=y.flip(1), outputs=outputs, backend=backend)
    turned["argmax"] = 1499 - turned.argmax
    for name in outputs:
        assert torch.allclose(got[name], turned[name], rtol=2e-6, atol=1e-6), name


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("column", [0, 17, 2000])
def test_nan_and_plus_infinity_spoil_their_row_only(backend: str, value: float, column: int) -> None:
    x = random(3, 2100)
    want = every(x, backend)
    x[1, column] = value
    got = every(x, backend)
    for name, result in got.items():
        if name == "mean_logit":
            assert result[1] == value or result[1].isnan()
        else:
            assert result[1].isnan(), name
        assert_bitwise_equal(result[[0, 2]], want[name][[0, 2]], name)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("outputs", [*((name,) for name in MODEL_OUTPUTS), *((kind,) for kind in DIVERGENCES)])
def test_gradient_of_a_spoiled_row(backend: str, value: float, outputs: tuple[str, ...]) -> None:
    x, labels = random(3, 40), torch.zeros(3, dtype=torch.int64)
    x[1, 7] = value
    x.requires_grad_()
    teacher = {"teacher": random(3, 40, seed=1)} if outputs[0] in DIVERGENCES else {}
    got = fastdiv.token_stats(x, labels, outputs=outputs, backend=backend, **teacher)[outputs[0]]
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert gradient[1].isnan().any()
    assert torch.isfinite(gradient[[0, 2]]).all()


def test_a_spoiled_teacher_row(backend: str) -> None:
    x, y = random(3, 40), random(3, 40, seed=1)
    y[1, 7] = NAN
    for kind in DIVERGENCES:
        got = fastdiv.divergence(x, y, kind, backend=backend)
        assert got.isnan().tolist() == [False, True, False], kind


# Size of numbers


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 65504.0, 3e38, -3e38])
def test_the_largest_numbers(backend: str, offset: float) -> None:
    """A shift of all logits that rounds nothing away changes no bit, except of logsumexp and mean_logit."""
    step = 2.0 ** max(0, math.frexp(offset)[1] - 20)
    x = torch.tensor([[0.0, -1.0, -2.0, -3.0, -1.0]]) * step
    temperature = step
    labels = torch.tensor([3])
    outputs = ("log_prob", "entropy", "varentropy", "max_log_prob", "log_sum_sq_probs", "argmax", "rank")
    got = fastdiv.token_stats(x + offset, labels, outputs=outputs, temperature=temperature, backend=backend)
    want = fastdiv.token_stats(x, labels, outputs=outputs, temperature=temperature, backend=backend)
    for name in outputs:
        assert_bitwise_equal(got[name], want[name], name)


def test_extremes_of_float16(backend: str) -> None:
    x = torch.tensor([[65504.0, -65504.0, 65504.0, 0.0]], dtype=torch.float16).requires_grad_()
    check(*token_stats(lambda x: (x,), backend=backend, outputs=("entropy", "log_prob"), labels=torch.tensor([1])), x)


def test_one_token_has_all_the_mass(backend: str) -> None:
    x = torch.full((1, 500), -1e4)
    x[0, 77] = 0.0
    x.requires_grad_()
    stats = fastdiv.token_stats(x, torch.tensor([77]), outputs=MODEL_OUTPUTS, backend=backend)
    assert [stats[name].item() for name in MODEL_OUTPUTS[:-1]] == [0.0] * 6
    (gradient,) = torch.autograd.grad(stats.log_prob.sum() + stats.entropy.sum() + stats.varentropy.sum(), x)
    assert (gradient == 0).all()


def test_all_logits_equal(backend: str) -> None:
    for v in (1, 31, 1024, 50257):
        x = torch.full((1, v), 12.5).requires_grad_()
        log_v = torch.tensor(float(v), dtype=torch.float64).log()
        stats = fastdiv.token_stats(x, torch.tensor([v - 1]), outputs=MODEL_OUTPUTS, backend=backend)
        for name, sign in (("log_prob", -1), ("entropy", 1), ("log_sum_sq_probs", -1), ("max_log_prob", -1)):
            assert stats[name].item() == (sign * log_v).float().item(), name
        assert stats.varentropy == 0
        (gradient,) = torch.autograd.grad(stats.entropy.sum(), x)
        assert gradient.abs().max() <= 4 * torch.finfo(torch.float32).eps * (log_v + 1.0) / v


# Sizes


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (0,)])
def test_no_tokens(backend: str, shape: tuple[int, ...]) -> None:
    if shape == (0,):
        with pytest.raises(ValueError, match=r"log_prob: logits has an empty vocabulary, shape \[0\]"):
            fastdiv.log_prob(torch.zeros(0), torch.tensor(0), backend=backend)
        return
    x = torch.zeros(shape, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    stats = fastdiv.token_stats(x, labels, outputs=(*MODEL_OUTPUTS, *CHOICES), backend=backend)
    assert all(v.shape == shape[:-1] for v in stats.values())
    sum(stats[name].sum() for name in MODEL_OUTPUTS).backward()
    assert x.grad is not None and x.grad.shape == shape
    hidden, weight, bias = head(0, 9, 4)
    own = fastdiv.LinearLogits(hidden, weight, bias)
    for loss in (
        fastdiv.entropy(own, backend=backend).sum(),
        fastdiv.linear_loss(own, torch.zeros(0, dtype=torch.int64), lambda s, rows: s.log_prob, backend=backend),
    ):
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
        assert loss == 0 and all((g == 0).all() for g in gradients)


def test_no_labels_per_token(backend: str) -> None:
    """[*, 0]: no token has a label, so all are masked."""
    got = fastdiv.log_prob(random(3, 9), torch.zeros(3, 0, dtype=torch.int64), backend=backend)
    assert got.shape == (3, 0)


def test_an_empty_vocabulary_is_an_error(backend: str) -> None:
    with pytest.raises(ValueError, match=r"entropy: logits has an empty vocabulary, shape \[3, 0\]"):
        fastdiv.entropy(torch.zeros(3, 0), backend=backend)
    with pytest.raises(ValueError, match="empty vocabulary"):
        fastdiv.entropy(fastdiv.LinearLogits(torch.zeros(3, 4), torch.zeros(0, 4)), backend=backend)


@pytest.mark.parametrize("v", [1, 31, 32, 33, 127, 128, 129, 1023, 1024, 1025, 4097, 50257])
def test_vocabularies_around_every_block(backend: str, v: int) -> None:
    x, y = random(2, v), random(2, v, seed=1)
    got = fastdiv.token_stats(x, torch.tensor([0, v - 1]), teacher=y, outputs=(*CHOICES, "js"), backend=backend)
    want = reference(x, torch.tensor([0, v - 1]), teacher=y, outputs=CHOICES)
    assert all(torch.equal(got[name], want[name]) for name in CHOICES)
    assert v == 1 or (got.js > 0).all()


# Strides


def test_any_row_stride_is_read_in_place(backend: str) -> None:
    wide = random(6, 3000)
    views = {
        "cut": wide[:, :1000],
        "every other": wide[::2, 500:1500],
        "backwards in time": wide.view(2, 3, 3000).transpose(0, 1)[:, :, 7:2007],
        "shared": wide[:1, :1000].expand(5, 1000),
        "window": wide.flatten().as_strided((10, 64), (1, 1)),
    }
    for name, view in views.items():
        assert_bitwise_equal(
            fastdiv.entropy(view, backend=backend), fastdiv.entropy(view.contiguous(), backend=backend), name
        )


def test_columns_that_are_not_adjacent_are_copied(backend: str) -> None:
    x = random(40, 6).T
    assert x.stride(-1) != 1
    got = [t.detach().requires_grad_() for t in (x, x.contiguous())]
    for t in got:
        fastdiv.entropy(t, backend=backend).sum().backward()
    assert got[0].grad is not None and got[1].grad is not None
    assert_bitwise_equal(got[0].grad, got[1].grad)


def test_columns_apart_behind_a_size_of_one(backend: str) -> None:
    """[B, 1, V] whose vocabulary is not adjacent, as a slice of a transposed tensor is."""
    x = random(3, 40, 1).transpose(1, 2).transpose(0, 2).contiguous().transpose(0, 2)
    assert x.shape == (3, 1, 40) and x.stride(-1) != 1
    got = [t.detach().requires_grad_() for t in (x, x.contiguous())]
    for t in got:
        fastdiv.entropy(t, backend=backend).sum().backward()
    assert_bitwise_equal(fastdiv.entropy(got[0], backend=backend), fastdiv.entropy(got[1], backend=backend))
    assert_bitwise_equal(got[0].grad, got[1].grad)


def test_expanded_upstream_gradient(backend: str) -> None:
    x = random(5, 40).requires_grad_()
    for reduce in (torch.sum, torch.mean):
        (got,) = torch.autograd.grad(reduce(fastdiv.entropy(x, backend=backend)), x)
        weights = torch.autograd.grad(reduce(ones := torch.zeros(5, requires_grad=True)), ones)[0].contiguous()
        (want,) = torch.autograd.grad(fastdiv.entropy(x, backend=backend), x, weights)
        assert_bitwise_equal(got, want)


def test_expanded_masks_temperatures_and_labels(backend: str) -> None:
    x = random(5, 40).requires_grad_()
    one = {"labels": torch.tensor([3]), "mask": torch.tensor([True]), "temperature": torch.tensor([0.5])}
    results = []
    for spread in (lambda t: t.expand(5), lambda t: t.repeat(5)):
        options = {name: spread(t) for name, t in one.items()}
        got = fastdiv.log_prob(x, options.pop("labels"), backend=backend, **options)
        results.append([got.detach(), *torch.autograd.grad(got.sum(), x)])
    for a, b in zip(*results, strict=True):
        assert_bitwise_equal(a, b)


# Dtypes


@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_any_integer_dtype(backend: str, integer: torch.dtype) -> None:
    x = random(3, 10)
    want = fastdiv.log_prob(x, torch.tensor([1, 2, 9]), backend=backend)
    assert_bitwise_equal(fastdiv.log_prob(x, torch.tensor([1, 2, 9], dtype=integer), backend=backend), want)


def test_each_gradient_has_the_dtype_of_its_input(backend: str) -> None:
    hidden, weight, bias = head(3, 40, 8)
    own = [
        t.detach().to(d).requires_grad_()
        for t, d in ((hidden, torch.bfloat16), (weight, torch.float16), (bias, torch.float32))
    ]
    teacher = random(3, 40).to(torch.float16).requires_grad_()
    got = fastdiv.divergence(fastdiv.LinearLogits(*own), teacher, "js", backend=backend)
    assert got.dtype == torch.float32
    got.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in (*own, teacher))


def test_float64_in_anything_means_float64_in_everything() -> None:
    x, y = random(3, 40), random(3, 40, seed=1).double()
    assert fastdiv.divergence(x, y, "js").dtype == torch.float64
    assert fastdiv.divergence(y, x, "js").dtype == torch.float64


def test_float64_is_refused_by_a_backend_without_it() -> None:
    if fastdiv.info()["backends"]["native"] is not None:  # type: ignore[index]
        pytest.skip("native backend is absent")
    with pytest.raises(ValueError, match="backend 'native' was asked for but it takes float32, float16 and bfloat16"):
        fastdiv.entropy(random(3, 40).double(), backend="native")


def test_autocast_changes_nothing_but_products(backend: str) -> None:
    """From hidden states see test_precision_of_products.py."""
    x, y, labels = random(3, 40).requires_grad_(), random(3, 40, seed=1), torch.arange(3)

    def run() -> list[Tensor]:
        out = fastdiv.token_stats(x, labels, teacher=y, outputs=(*MODEL_OUTPUTS, "js", "rank"), backend=backend)
        weighted = fastdiv.value_and_gradient(x, labels, {"log_prob": 1.0, "entropy": 0.5}, backend=backend)[1]
        return [*out.values(), weighted, *torch.autograd.grad(out.log_prob.sum() + out.js.sum(), x)]

    want = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    for a, b in zip(got, want, strict=True):
        assert_bitwise_equal(a, b)


def test_the_environment_chooses_the_backend_and_the_log_says_so() -> None:
    program = "import torch, fastdiv; fastdiv.entropy(torch.zeros(2, 3))"
    for name in ("reference", "nonsense"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"FASTDIV_BACKEND": name, "FASTDIV_LOG": "1"},
            capture_output=True,
            text=True,
        )
        if name == "reference":
            assert run.returncode == 0 and "fastdiv: entropy on reference: 2 of 2 tokens x 3" in run.stderr
        else:
            assert (
                run.returncode == 1
                and "entropy: unknown backend 'nonsense'; known are native, cuda, triton, reference" in run.stderr
            )
