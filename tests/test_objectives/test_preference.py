"""Preference losses: golden values and gradients, the learned and the activation masks, padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiv.objectives import (
    Responses,
    SparseMask,
    TokenWeights,
    dpo,
    mapo,
    mapo_masks,
    sparse_po,
    tdpo1,
    tdpo2,
)

DELTA = [0.2, -0.1], [-0.4, 0.1]
FORWARD_KL = [0.03, 0.05], [0.02, 0.20]
WEIGHTS = [0.5, 0.0], [1.0, 0.25]


def row(values: list[float], garbage: float = 7.0) -> Tensor:
    """One pair's tokens with a padded one behind them."""
    return torch.tensor([[*values, garbage]], dtype=torch.float64, requires_grad=True)


@pytest.fixture
def pair() -> tuple[Responses, Responses]:
    mask = torch.tensor([[True, True, False]])
    sides = []
    for delta, kl in zip(DELTA, FORWARD_KL, strict=True):
        ref = torch.tensor([[-1.0, -2.0, 3.0]], dtype=torch.float64)
        log_prob = (row(delta).detach() + ref).requires_grad_()
        sides.append(Responses(log_prob, ref, mask, row(kl)))
    return sides[0], sides[1]


def gradients(loss: Tensor, *at: Tensor | None) -> list[list[float] | None]:
    """Gradients at the two real tokens; that of the padded token must be exactly 0."""
    found = torch.autograd.grad(loss, at, allow_unused=True)
    assert all(g is None or g[0, 2].item() == 0 for g in found)
    return [None if g is None else g[0, :2].tolist() for g in found]


def close(got: list[list[float] | None], expected: list[list[float] | None]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or a == pytest.approx(b, abs=6e-9)


@pytest.mark.parametrize(
    ("loss_of", "value", "delta_gradient", "chosen_kl", "rejected_kl"),
    [
        (dpo, 0.6733471672, 0.04900013, None, None),
        (tdpo1, 0.6802316782, 0.04935004, -0.04935004, 0.04935004),
        (tdpo2, 0.6767832994, 0.04917507, None, 0.02458754),
    ],
)
def test_golden(
    loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    value: float,
    delta_gradient: float,
    chosen_kl: float | None,
    rejected_kl: float | None,
    pair: tuple[Responses, Responses],
) -> None:
    c, r = pair
    loss, metrics = loss_of(c, r)
    assert loss.item() == pytest.approx(value, abs=1e-10)
    expected = [
        [-delta_gradient] * 2,
        [delta_gradient] * 2,
        None if chosen_kl is None else [chosen_kl] * 2,
        None if rejected_kl is None else [rejected_kl] * 2,
    ]
    got = gradients(loss, c.log_prob, r.log_prob, c.forward_kl, r.forward_kl)
    close([None if g == [0.0, 0.0] else g for g in got], expected)
    assert metrics["accuracy"].item() == 1 and metrics["pairs"].item() == 1
    assert metrics["chosen_reward"].item() == pytest.approx(0.01)
    assert metrics["rejected_reward"].item() == pytest.approx(-0.03)
    assert -torch.nn.functional.logsigmoid(metrics["margin"]).item() == pytest.approx(value, abs=1e-10)


def test_golden_sparse_po(pair: tuple[Responses, Responses]) -> None:
    c, r = pair
    m_c, m_r = (row(w) for w in WEIGHTS)
    loss, metrics = sparse_po(c, r, TokenWeights(m_c, m_c), TokenWeights(m_r, m_r))
    assert loss.item() == pytest.approx(0.6723676644, abs=1e-10)
    policy = [[-0.02447508, 0.0], [0.04895015, 0.01223754]]
    close(gradients(loss, c.log_prob, r.log_prob), policy)
    loss, _ = sparse_po(c, r, TokenWeights(m_c, m_c), TokenWeights(m_r, m_r))
    close(gradients(loss, c.forward_kl, r.forward_kl), policy)
    loss, _ = sparse_po(c, r, TokenWeights(m_c, m_c), TokenWeights(m_r, m_r))
    close(gradients(loss, m_c, m_r), [[-0.01125854, 0.00244751], [-0.01860106, 0.01468505]])
    assert metrics["reward_density"].item() == metrics["kl_density"].item() == 0.75
    loss, _ = sparse_po(c, r, TokenWeights(m_c, m_c), TokenWeights(m_r, m_r), l1_reward=5e-4, l1_kl=5e-4)
    assert loss.item() == pytest.approx(0.6741176644, abs=1e-10)


def test_sparse_po_keeps_its_two_weights_apart(pair: tuple[Responses, Responses]) -> None:
    c, r = pair
    ones, zeros = torch.ones(1, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    full, none = TokenWeights(ones, ones), TokenWeights(ones, zeros)
    torch.testing.assert_close(sparse_po(c, r, full, full)[0], tdpo1(c, r)[0])
    torch.testing.assert_close(sparse_po(c, r, none, none)[0], dpo(c, r)[0])
    priced, _ = sparse_po(c, r, none, none, l1_reward=0.25, l1_kl=100.0)
    torch.testing.assert_close(priced, dpo(c, r)[0] + 0.25 * 4)


def test_mapo_is_sparse_po_with_constant_weights(pair: tuple[Responses, Responses]) -> None:
    c, r = pair
    m_c, m_r = (row(w) for w in WEIGHTS)
    loss, _ = mapo(c, r, m_c, m_r)
    assert loss.item() == pytest.approx(0.6723676644, abs=1e-10)
    assert torch.autograd.grad(loss, [m_c, m_r], allow_unused=True) == (None, None)


def test_golden_mapo_masks() -> None:
    mask = torch.tensor([[True, True, True, False]])
    means = torch.tensor([[1.0, 3.0, 2.0, 9.0]])
    expected = torch.tensor([[0.0, 1.0, 0.5, 0.0]])
    assert torch.equal(mapo_masks({"mlp": [means]}, mask), expected)
    features = means.unsqueeze(-1) + torch.tensor([-1.0, 0.0, 1.0])
    assert torch.equal(mapo_masks({"mlp": [features]}, mask), expected)
    assert torch.equal(mapo_masks({"mlp": [means.masked_fill(~mask, torch.nan)]}, mask), expected)
    affine = mapo_masks({"mlp": [4 * means - 8]}, mask)
    assert torch.equal(affine, expected)


def test_mapo_masks_average_tensors_then_groups() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    up, down = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 0.0, 0.0]])
    got = mapo_masks({"mlp": [up, up, down], "logits": [down]}, mask)
    expected = ((2 * up / 2 + down / 2) / 3 + down / 2) / 2
    torch.testing.assert_close(got, expected)


def test_mapo_masks_without_contrast_weigh_one() -> None:
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    values = torch.tensor([[5.0, 2.0], [3.0, 3.0], [1.0, 2.0]])
    assert mapo_masks({"mlp": [values]}, mask).tolist() == [[1, 0], [1, 1], [0, 0]]


def hidden_states(layers: int = 3) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    return [torch.randn(2, 4, 5, generator=generator) for _ in range(layers)], mask


def test_sparse_mask_is_the_stated_formula() -> None:
    states, mask = hidden_states()
    module = SparseMask(5, 3)
    weights = module(states, mask)
    assert weights.reward is weights.kl
    (net,) = module.masks
    shared = [(h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() for h in states]
    scores = [(x @ head.weight[0] + head.bias).clamp(min=0) for x, head in zip(shared, net.heads, strict=True)]
    expected = torch.where(mask, sum(scores) / 3, 0)  # the mixer starts as the average
    torch.testing.assert_close(weights.reward, expected)
    with torch.no_grad():
        net.mixer.copy_(torch.tensor([1.0, -2.0, 0.5]))
    expected = torch.where(mask, (scores[0] - 2 * scores[1] + 0.5 * scores[2]).clamp(min=0), 0)
    got = module(states, mask).reward
    torch.testing.assert_close(got, expected)
    assert (got == 0)[mask].any() and (got > 0).any()
    names = [name for name, _ in module.named_parameters()]
    assert len(names) == 2 + 2 * 3 + 1  # one norm, three heads, a mixer without bias


def test_independent_masks_have_their_own_parameters() -> None:
    states, mask = hidden_states()
    module = SparseMask(5, 3, mode="independent")
    weights = module(states, mask)
    assert not torch.equal(weights.reward, weights.kl)
    weights.reward.sum().backward()
    touched = {name.split(".")[1] for name, p in module.named_parameters() if p.grad is not None}
    assert touched == {"0"}


def test_sparse_mask_learns_through_the_loss_and_leaves_the_reference_alone() -> None:
    sides = random_sides()
    module = SparseMask(4, 2).double()
    states = [
        [torch.randn(*side.mask.shape, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)] for side in sides
    ]
    weights = [module(hidden, side.mask) for hidden, side in zip(states, sides, strict=True)]
    loss, _ = sparse_po(*sides, *weights, l1_reward=0.1)
    loss.backward()
    assert all(state.grad is None for hidden in states for state in hidden)
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    assert all(side.log_prob.grad.any() and side.forward_kl.grad.any() for side in sides)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_sparse_mask_never_reads_padding(garbage: float) -> None:
    states, mask = hidden_states()
    module = SparseMask(5, 3)
    results = []
    for fill in (0.0, garbage):
        filled = [state.masked_fill(~mask.unsqueeze(-1), fill) for state in states]
        weights = module(filled, mask).reward
        results.append([weights.detach(), *torch.autograd.grad(weights.square().sum(), [*module.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_sparse_mask_dropout_and_dtype() -> None:
    states, mask = hidden_states()
    module = SparseMask(5, 3, dropout=0.5)
    half = [state.bfloat16() for state in states]
    assert module(half, mask).reward.dtype == torch.float32
    torch.manual_seed(0)
    assert not torch.equal(module(states, mask).reward, module(states, mask).reward)
    module.eval()
    assert torch.equal(module(states, mask).reward, module(states, mask).reward)


def random_sides(pairs: int = 8) -> list[Responses]:
    generator = torch.Generator().manual_seed(9)
    sides = []
    for width in (6, 4):  # chosen and rejected are padded to their own lengths
        shape = (pairs, width)
        log_prob, ref = (-torch.rand(shape, dtype=torch.float64, generator=generator) * 3 for _ in range(2))
        kl = torch.rand(shape, dtype=torch.float64, generator=generator)
        mask = torch.rand(shape, generator=generator) < 0.7
        mask[2] = False  # a padding pair
        sides.append(Responses(log_prob.requires_grad_(), ref, mask, kl.requires_grad_()))
    return sides


def weights_for(side: Responses) -> TokenWeights:
    values = torch.linspace(0, 1, side.mask.numel(), dtype=torch.float64).view(side.mask.shape)
    return TokenWeights(values, 1 - values)


LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {
    "dpo": dpo,
    "tdpo1": tdpo1,
    "tdpo2": tdpo2,
    "sparse_po": lambda c, r, w, **options: sparse_po(c, r, *w, l1_reward=0.01, l1_kl=0.02, **options),
    "mapo": lambda c, r, w, **options: mapo(c, r, w[0].reward, w[1].reward, **options),
}


def evaluate(name: str, c: Responses, r: Responses, w: list[TokenWeights], **options: Any) -> Tensor:
    extra = (w,) if name in ("sparse_po", "mapo") else ()
    return LOSSES[name](c, r, *extra, **options)[0]


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_any_cut_of_the_batch_gives_one_result(name: str, parts: int) -> None:
    c, r = random_sides()
    w = [weights_for(c), weights_for(r)]
    leaves = [c.log_prob, r.log_prob]
    whole = evaluate(name, c, r, w)
    expected = torch.autograd.grad(whole, leaves)
    pieces = []
    for rows in torch.randperm(8).chunk(parts):
        cut = [Responses(*(tensor[rows] for tensor in side)) for side in (c, r)]
        cut_w = [TokenWeights(*(tensor[rows] for tensor in side)) for side in w]
        pieces.append(evaluate(name, *cut, cut_w, normalizer=7))  # the padding pair is not counted
    torch.testing.assert_close(torch.stack(pieces).sum(), whole, rtol=1e-12, atol=0)
    for got, want in zip(torch.autograd.grad(torch.stack(pieces).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_masked_tokens_are_never_read(name: str, garbage: float) -> None:
    results = []
    for fill in (0.0, garbage):
        sides, weights = [], []
        for side in random_sides():
            filled = [t.detach().masked_fill(~side.mask, fill) for t in (side[0], side[1], side.forward_kl)]
            sides.append(Responses(filled[0].requires_grad_(), filled[1], side.mask, filled[2].requires_grad_()))
            weights.append(TokenWeights(*(w.masked_fill(~side.mask, fill) for w in weights_for(side))))
        loss = evaluate(name, *sides, weights)
        leaves = [sides[0].log_prob, sides[1].log_prob, sides[0].forward_kl, sides[1].forward_kl]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([loss.detach(), *(g for g in found if g is not None)])
    assert results[0][1].any()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    """tdpo2 stops a gradient on purpose: its chosen divergence is held fixed."""
    c, r = random_sides(3)
    w = [weights_for(c), weights_for(r)]

    def loss(lp_c: Tensor, lp_r: Tensor, kl_r: Tensor) -> Tensor:
        return evaluate(name, c._replace(log_prob=lp_c), r._replace(log_prob=lp_r, forward_kl=kl_r), w)

    assert torch.autograd.gradcheck(loss, (c.log_prob, r.log_prob, r.forward_kl))


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_valid(name: str) -> None:
    sides = [side._replace(mask=torch.zeros_like(side.mask)) for side in random_sides()]
    loss = evaluate(name, *sides, [weights_for(side) for side in sides])
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, [side.log_prob for side in sides]))


@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_is_a_constant(name: str) -> None:
    sides = [side._replace(ref_log_prob=side.ref_log_prob.requires_grad_()) for side in random_sides()]
    loss = evaluate(name, *sides, [weights_for(side) for side in sides])
    references = [side.ref_log_prob for side in sides]
    assert torch.autograd.grad(loss, references, allow_unused=True) == (None, None)


def test_float32_stays_float32_and_metrics_are_constants() -> None:
    sides = [Responses(*(t.detach().float() if t.is_floating_point() else t for t in s)) for s in random_sides()]
    sides[0].log_prob.requires_grad_()
    loss, metrics = tdpo2(*sides)
    assert loss.dtype == torch.float32
    assert not any(value.requires_grad or value.dim() for value in metrics.values())
    as_tuples, _ = tdpo2(tuple(sides[0]), tuple(sides[1]))  # type: ignore[arg-type]
    assert torch.equal(loss, as_tuples)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, r: dpo(c, r, beta=0.0), ValueError, "dpo: beta must be positive, got 0.0"),
        (lambda c, r: tdpo2(c, r, alpha=-1), ValueError, "tdpo2: alpha must not be negative"),
        (
            lambda c, r: tdpo1(c._replace(forward_kl=None), r),
            ValueError,
            "tdpo1: chosen.forward_kl is required",
        ),
        (
            lambda c, r: dpo(c, r._replace(mask=None)),
            TypeError,
            "dpo: rejected.mask must be a bool tensor, or one of 0 and 1, got NoneType",
        ),
        (
            lambda c, r: dpo(c, Responses(*(t[:1] for t in r))),
            ValueError,
            "same number of pairs, got 8 and 1",
        ),
        (lambda c, r: dpo(Responses(*(t[0] for t in c)), r), ValueError, r"must be \[pairs, T\], got \[6\]"),
        (
            lambda c, r: dpo(c._replace(log_prob=c[0].float()), r),
            TypeError,
            "chosen.ref_log_prob must have the dtype",
        ),
        (
            lambda c, r: sparse_po(c, r, weights_for(r), weights_for(r)),
            ValueError,
            "sparse_po: chosen_weights.reward must have the shape of chosen.log_prob",
        ),
        (
            lambda c, r: sparse_po(c, r, weights_for(c), weights_for(r), l1_kl=-1),
            ValueError,
            "l1_kl must not be negative",
        ),
        (
            lambda c, r: SparseMask(4, 2, mode="both"),
            ValueError,
            "SparseMask: unknown mode 'both'; known are common, independent",
        ),
        (lambda c, r: SparseMask(4, 0), ValueError, "layers must be at least 1, got 0"),
        (lambda c, r: SparseMask(4, 2, dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        (lambda c, r: SparseMask(4, 2)([c[0]], c.mask), ValueError, "hidden_states must be 2 layers, got 1"),
        (lambda c, r: SparseMask(4, 1)([c[0]], c.mask), ValueError, r"must be \[8, 6, 4\], got \[8, 6\]"),
        (lambda c, r: SparseMask(4, 1)([c[0]], c[0]), ValueError, "SparseMask: mask must hold nothing but 0 and 1"),
        (lambda c, r: mapo_masks({}, c.mask), ValueError, "at least one group"),
        (
            lambda c, r: mapo_masks({"mlp": [r[0]]}, c.mask),
            ValueError,
            r"activations\['mlp'\] must be \[8, 6\]",
        ),
    ],
)
def test_errors(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*random_sides())


def test_a_policy_that_is_its_reference_prefers_nothing(pair: tuple[Responses, Responses]) -> None:
    """z = 0 is not above 0."""
    c, r = (side._replace(log_prob=side.ref_log_prob, forward_kl=torch.zeros_like(side.mask.double())) for side in pair)
    for loss_of in (dpo, tdpo1, tdpo2):
        loss, metrics = loss_of(c, r)
        assert metrics["accuracy"] == 0 and metrics["margin"] == 0
        assert loss.item() == pytest.approx(0.6931471805599453)


def test_tdpo2_without_its_divergence_is_dpo(pair: tuple[Responses, Responses]) -> None:
    assert torch.equal(tdpo2(*pair, alpha=0.0)[0], dpo(*pair)[0])
