"""Policy losses: golden numbers, any cut of the batch, garbage in padding, what is selected and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiv.objectives import (
    aggregate,
    clip_cov,
    clip_cov_select,
    kl_cov,
    kl_cov_select,
    policy,
    ppo_clip,
)

Batch = dict[str, Tensor]


def arguments(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return batch["logp"], batch["old"], batch["adv"], batch["mask"]


def check(batch: Batch, loss: Tensor, expected_loss: float, expected_gradient: Any) -> None:
    assert loss.item() == pytest.approx(expected_loss, rel=1e-8)
    (gradient,) = torch.autograd.grad(loss, batch["logp"])
    expected = torch.tensor(expected_gradient, dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("clamp", [None, "verl"])
@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("sym", policy.PPO.loss),
        ("dapo", policy.DAPO.loss),
        ("dual", {**policy.DAPO.loss, "dual_clip": 1.4}),
    ],
)
def test_golden_ppo(
    key: str, options: dict[str, float], clamp: str | None, golden: dict[str, Any], fixture_a: Batch
) -> None:
    loss, metrics = ppo_clip(*arguments(fixture_a), **options, clamp=clamp)
    check(fixture_a, loss, golden[f"ppo/{key}/loss"], golden[f"ppo/{key}/grad_logp"])
    assert metrics["tokens"].item() == 7 and metrics["clamped_fraction"].item() == 0
    high = {"sym": 2 / 7, "dapo": 1 / 7, "dual": 1 / 7}[key]
    assert metrics["clip_fraction_high"].item() == pytest.approx(high)
    assert metrics["clip_fraction_low"].item() == pytest.approx(1 / 7)
    assert metrics["dual_clip_fraction"].item() == pytest.approx(1 / 7 if key == "dual" else 0)


def test_golden_kl_cov(golden: dict[str, Any], fixture_a: Batch) -> None:
    logp, old, adv, mask = arguments(fixture_a)
    selected = kl_cov_select(logp, adv, mask, ratio=0.3)
    assert selected.tolist() == torch.tensor(golden["klcov/selected(ratio=.3)"]).bool().tolist()
    for how in ({"selected": selected}, {"ratio": 0.3}):
        loss, metrics = kl_cov(logp, old, adv, mask, beta=1.0, **how)
        check(fixture_a, loss, golden["klcov/beta1/loss"], golden["klcov/beta1/grad_logp"])
        assert metrics["selected"].item() == 2
        assert metrics["penalty"].item() == pytest.approx(0.4 / 7)


def test_kl_cov_on_policy_has_no_penalty_gradient(golden: dict[str, Any], fixture_a: Batch) -> None:
    logp, _, adv, mask = arguments(fixture_a)
    with_penalty, _ = kl_cov(logp, logp.detach(), adv, mask, beta=1.0, ratio=0.3)
    without, _ = kl_cov(logp, logp.detach(), adv, mask, beta=0.0, ratio=0.3)
    difference = torch.autograd.grad(with_penalty - without, logp)[0]
    expected = golden["klcov/penalty_grad_when_on_policy(ratio==1)"]
    assert torch.equal(difference, torch.tensor(expected, dtype=torch.float64))


def test_golden_clip_cov(golden: dict[str, Any], fixture_a: Batch) -> None:
    bounds = {"covariance_low": 0.1, "covariance_high": 1.0, **policy.DAPO.loss}
    choice = {"ratio": 1.0, "seed": 0, "step": 0, **bounds}
    selected = clip_cov_select(*arguments(fixture_a), **choice)
    assert selected.tolist() == torch.tensor(golden["clipcov/eligible(lb=.1,ub=1)"]).bool().tolist()
    for how in ({"selected": selected, **policy.DAPO.loss}, choice):
        loss, metrics = clip_cov(*arguments(fixture_a), **how)
        check(fixture_a, loss, golden["clipcov/all_eligible/loss"], golden["clipcov/all_eligible/grad_logp"])
        assert metrics["selected"].item() == 2


def test_clip_cov_takes_no_token_the_clip_already_holds(golden: dict[str, Any], fixture_a: Batch) -> None:
    anything = {"covariance_low": -torch.inf, "covariance_high": torch.inf, "ratio": 1.0}
    selected = clip_cov_select(*arguments(fixture_a), **anything, **policy.DAPO.loss, seed=0, step=0)
    held = torch.tensor(golden["clipcov/already_ppo_clipped"]).bool()
    assert torch.equal(selected, fixture_a["mask"] & ~held)


def test_clip_cov_bounds_are_strict(fixture_a: Batch) -> None:
    """The covariance of two tokens with advantages and log-probabilities +-1 is exactly 1."""
    x = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for low, high, any_left in ((1.0, 2.0, False), (0.5, 1.0, False), (0.5, 2.0, True)):
        got = clip_cov_select(x, x, x, ratio=1.0, covariance_low=low, covariance_high=high, seed=0, step=0)
        assert got.any().item() == any_left


def random_batch(rows: int = 8, width: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(5)

    def normal() -> Tensor:
        return torch.randn(rows, width, dtype=torch.float64, generator=generator)

    logp = -normal().abs() * 2
    mask = torch.rand(rows, width, generator=generator) < 0.8
    return {
        "logp": logp.requires_grad_(),
        "old": logp.detach() + 0.4 * normal(),
        "adv": normal()[:, :1].expand(rows, width) * 2,
        "mask": mask,
        "index": torch.arange(rows * width).view(rows, width),
    }


def select_kl_cov(batch: Batch) -> Tensor:
    return kl_cov_select(batch["logp"], batch["adv"], batch["mask"], ratio=0.1, index=batch["index"])


def select_clip_cov(batch: Batch) -> Tensor:
    return clip_cov_select(
        *arguments(batch),
        ratio=0.1,
        covariance_low=0.1,
        covariance_high=9.0,
        seed=3,
        step=4,
        index=batch["index"],
    )


LOSSES: list[tuple[str, Callable[..., tuple[Tensor, dict[str, Tensor]]], Callable[[Batch], Tensor] | None]] = [
    ("ppo_clip", ppo_clip, None),
    ("kl_cov", kl_cov, select_kl_cov),
    ("clip_cov", clip_cov, select_clip_cov),
]


@pytest.mark.parametrize("mode", aggregate.MODES)
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize(("_", "loss_of", "select"), LOSSES)
def test_any_cut_of_the_batch_gives_one_result(
    _: str,
    loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    select: Callable[[Batch], Tensor] | None,
    parts: int,
    mode: str,
) -> None:
    """Micro-batches of shuffled rows: same tokens selected, losses and gradients that sum to the whole."""
    batch = random_batch()
    options = {"aggregation": mode, "length": 12 if mode == "seq_mean_token_sum_norm" else None}
    whole_options = dict(options)
    if select is not None:
        whole_options["selected"] = select(batch)
        assert whole_options["selected"].sum() >= 5
    whole, _metrics = loss_of(*arguments(batch), **whole_options)
    (expected,) = torch.autograd.grad(whole, batch["logp"])

    rows = torch.randperm(8)
    window = {name: value[rows] for name, value in batch.items()}
    if select is not None:
        selected = select({name: value.flatten() for name, value in window.items()}).view(8, 12)
        assert torch.equal(selected, whole_options["selected"][rows])
    normalizer = aggregate.normalizer(batch["mask"], mode)
    losses = []
    for part in torch.arange(8).chunk(parts):
        chosen = {} if select is None else {"selected": selected[part]}
        micro = {name: value[part] for name, value in window.items()}
        losses.append(loss_of(*arguments(micro), normalizer=normalizer, **options, **chosen)[0])
    total = torch.stack(losses).sum()
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(total, batch["logp"])
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("_", "loss_of", "select"), LOSSES)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_masked_tokens_are_never_read(
    _: str,
    loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    select: Callable[[Batch], Tensor] | None,
    garbage: float,
) -> None:
    results = []
    for fill in (0.0, garbage):
        batch = random_batch()
        for name in ("logp", "old", "adv"):
            batch[name] = batch[name].detach().masked_fill(~batch["mask"], fill)
        batch["logp"].requires_grad_()
        chosen = {} if select is None else {"selected": select(batch)}
        loss, metrics = loss_of(*arguments(batch), **chosen)
        (gradient,) = torch.autograd.grad(loss, batch["logp"])
        results.append([loss.detach(), gradient, *chosen.values(), *metrics.values()])
    assert results[0][1].any() and not results[0][1][~random_batch()["mask"]].any()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("_", "loss_of", "select"), LOSSES)
def test_shapes_dtypes_and_empty_batches(
    _: str,
    loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    select: Callable[[Batch], Tensor] | None,
) -> None:
    batch = random_batch()
    for dtype in (torch.float32, torch.float64):
        cast = {n: v.detach().to(dtype) if v.is_floating_point() else v for n, v in batch.items()}
        cast["old"].requires_grad_()
        cast["adv"].requires_grad_()
        cast["logp"].requires_grad_()
        for mask in (cast["mask"], torch.zeros_like(cast["mask"])):
            cast["mask"] = mask
            chosen = {} if select is None else {"selected": select(cast)}
            loss, metrics = loss_of(*arguments(cast), **chosen)
            gradients = torch.autograd.grad(loss, [cast["logp"], cast["old"], cast["adv"]], allow_unused=True)
            assert loss.dtype == gradients[0].dtype == dtype and loss.dim() == 0
            assert gradients[1] is None and gradients[2] is None
            assert all(not value.requires_grad and value.dim() == 0 for value in metrics.values())
            assert mask.any() or (loss.item() == 0 and not gradients[0].any())
    nothing = {name: value[:0] for name, value in batch.items()}
    chosen = {} if select is None else {"selected": select(nothing)}
    assert loss_of(*arguments(nothing), **chosen)[0].item() == 0


@pytest.mark.parametrize(("_", "loss_of", "select"), LOSSES)
def test_token_losses_and_finite_differences(
    _: str,
    loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    select: Callable[[Batch], Tensor] | None,
) -> None:
    batch = random_batch(2, 5)
    chosen = {} if select is None else {"selected": select(batch)}
    _l, old, adv, mask = arguments(batch)
    tokens, _metrics = loss_of(*arguments(batch), **chosen, aggregation="none")
    loss, _metrics = loss_of(*arguments(batch), **chosen)
    torch.testing.assert_close(tokens.sum() / mask.sum(), loss)
    assert torch.autograd.gradcheck(lambda logp: loss_of(logp, old, adv, mask, **chosen)[0], batch["logp"])


def test_without_a_mask_all_tokens_count() -> None:
    logp, old, adv, _ = arguments(random_batch())
    everything = torch.ones_like(logp, dtype=torch.bool)
    assert torch.equal(ppo_clip(logp, old, adv)[0], ppo_clip(logp, old, adv, everything)[0])


def test_clamp_reports_and_cuts() -> None:
    log_prob = torch.tensor([-1.0, -25.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.0, -1.0, -25.0])
    adv = torch.tensor([1.0, 1.0, -1.0])
    loss, metrics = ppo_clip(log_prob, old, adv, clamp="verl")
    assert metrics["clamped_fraction"].item() == pytest.approx(2 / 3)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert (gradient != 0).tolist() == [True, False, False]
    _, metrics = ppo_clip(log_prob, old, adv)
    assert metrics["clamped_fraction"].item() == pytest.approx(2 / 3)


def test_presets_are_the_papers_numbers() -> None:
    assert dict(policy.KL_COV_7B.select) == {"ratio": 2e-3} and dict(policy.KL_COV_7B.loss) == {"beta": 1.0}
    assert dict(policy.KL_COV_32B.select) == {"ratio": 2e-4} and dict(policy.KL_COV_32B.loss) == {"beta": 1.0}
    assert dict(policy.CLIP_COV.select) == {
        "ratio": 2e-4,
        "covariance_low": 1.0,
        "covariance_high": 5.0,
        "clip_low": 1.0,
        "clip_high": 1.0,
    }
    batch = random_batch()
    logp, old, adv, mask = arguments(batch)
    one_call, _ = kl_cov(logp, old, adv, mask, **policy.KL_COV_7B.select, **policy.KL_COV_7B.loss)
    chosen = kl_cov_select(logp, adv, mask, **policy.KL_COV_7B.select)
    assert torch.equal(one_call, kl_cov(logp, old, adv, mask, selected=chosen, **policy.KL_COV_7B.loss)[0])
    preset = policy.CLIP_COV
    one_call, _ = clip_cov(logp, old, adv, mask, seed=1, step=2, **{**preset.select, **preset.loss})
    chosen = clip_cov_select(logp, old, adv, mask, seed=1, step=2, **preset.select)
    assert chosen.sum() == 1
    assert torch.equal(one_call, clip_cov(logp, old, adv, mask, selected=chosen, **preset.loss)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: ppo_clip(*b, clip_low=-0.1), ValueError, "ppo_clip: clip_low must not be negative"),
        (lambda b: ppo_clip(*b, dual_clip=1.0), ValueError, "ppo_clip: dual_clip must be greater than 1"),
        (lambda b: ppo_clip(*b, clamp="x"), ValueError, "ppo_clip: clamp must be 'verl' or None"),
        (lambda b: ppo_clip(b[0].bfloat16(), *b[1:]), TypeError, "log_prob must be float32 or float64"),
        (
            lambda b: ppo_clip(b[0], b[1].float(), *b[2:]),
            TypeError,
            "old_log_prob must have the dtype of log_prob",
        ),
        (lambda b: ppo_clip(b[0], b[1], b[2][:, :1], b[3]), ValueError, "advantages must have the shape"),
        (
            lambda b: ppo_clip(*b[:3], b[3].float() * 2.0),
            ValueError,
            "ppo_clip: mask must hold nothing but 0 and 1, got 2",
        ),
        (lambda b: kl_cov(*b), ValueError, "kl_cov: give selected, or ratio"),
        (lambda b: kl_cov(*b, selected=b[3], ratio=0.1), ValueError, "kl_cov: selected excludes ratio"),
        (lambda b: kl_cov(*b, ratio=0.1, beta=-1), ValueError, "kl_cov: beta must not be negative"),
        (lambda b: kl_cov(*b, ratio=2), ValueError, r"ratio must be in \(0, 1\]"),
        (lambda b: kl_cov(*b, selected=b[3][:1]), ValueError, "kl_cov: selected must have the shape"),
        (lambda b: kl_cov(*b, selected=b[0]), ValueError, "kl_cov: selected must hold nothing but 0 and 1"),
        (lambda b: clip_cov(*b, ratio=0.1), ValueError, "clip_cov: give selected, or ratio, seed and step"),
        (lambda b: clip_cov(*b, selected=b[3], seed=1), ValueError, "clip_cov: selected excludes ratio"),
        (
            lambda b: clip_cov_select(*b, ratio=0.1, covariance_low=5, covariance_high=1, seed=0, step=0),
            ValueError,
            "covariance_low must be below covariance_high, got 5 and 1",
        ),
    ],
)
def test_errors(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(arguments(random_batch()))


def test_clip_bounds_of_zero() -> None:
    """Nothing is gained by a move: the loss is at least -A, and only moves that lose have a gradient."""
    x = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros(4, dtype=torch.float64), torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    for options in ({"clip_low": 0.0, "clip_high": 0.0}, {"clip_low": 0.0}, {"clip_high": 0.0}):
        ppo_clip(x, old, advantages, **options)
    losses, _ = ppo_clip(x, old, advantages, clip_low=0.0, clip_high=0.0, aggregation="none")
    ratio = x.detach().exp()
    assert torch.equal(losses.detach(), torch.stack([-ratio[0] * 0 - 1, -ratio[1], ratio[2], ratio[3] * 0 + 1]))
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(gradient, torch.stack([ratio[0] * 0, -ratio[1], ratio[2], ratio[3] * 0]))
