"""The forms that an argument may have: each gives, bit for bit, what its plain form gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import DIVERGENCES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdiv
from fastdiv.objectives import Responses, aggregate, clip_cov_select, dpo, kl_cov, ppo_clip, sparse_po, tdpo2
from fastdiv.testing import assert_bitwise_equal

B, T, V, K = 3, 4, 33, 5
OUTPUTS = ("log_prob", "entropy", "js", "reverse_kl")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = random(B, T, V), random(B, T, V, seed=1)
LABELS = torch.arange(B * T).view(B, T)
MASK = LABELS % 3 != 1


def same(backend: str, form: dict[str, Any], plain: dict[str, Any], lead: tuple[int, ...] = (B, T)) -> None:
    """Values, and gradients of both models."""
    results = []
    for options in (form, plain):
        x = X.reshape(*lead, V).clone().requires_grad_()
        options = {"labels": LABELS.view(lead), "teacher": Y.reshape(*lead, V), **options}
        stats = fastdiv.token_stats(x, outputs=OUTPUTS, backend=backend, **options)
        (gradient,) = torch.autograd.grad(sum(v.sum() for v in stats.values()), x)
        results.append((*stats.values(), gradient))
    for a, b in zip(*results, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize(
    ("form", "plain"),
    [
        (torch.tensor(0.7), torch.tensor(0.7).expand(B, T)),
        (torch.tensor([0.7]), torch.tensor(0.7).expand(B, T)),
        (torch.tensor([[0.5], [0.7], [2.0]]), torch.tensor([[0.5], [0.7], [2.0]]).repeat(1, T)),
        (torch.tensor([0.5, 0.7, 2.0]), torch.tensor([[0.5], [0.7], [2.0]]).repeat(1, T)),
        (torch.tensor([[0.5, 0.7, 2.0, 3.0]]), torch.tensor([[0.5, 0.7, 2.0, 3.0]]).repeat(B, 1)),
        (torch.arange(1.0, 13.0), torch.arange(1.0, 13.0).view(B, T)),
        (torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64).expand(B, T)),
    ],
)
def test_temperatures(backend: str, form: Tensor, plain: Tensor) -> None:
    same(backend, {"temperature": form}, {"temperature": plain.contiguous()})


def test_a_temperature_per_sequence_where_there_are_as_many_tokens(backend: str) -> None:
    """The first sizes are meant, whatever the last happen to be."""
    form = torch.tensor([0.5, 0.7, 2.0, 3.0])
    x, labels = X[:, :B], LABELS[:, :B]
    got = fastdiv.log_prob(x, labels, temperature=form[:B], backend=backend)
    want = fastdiv.log_prob(x, labels, temperature=form[:B, None].repeat(1, B), backend=backend)
    assert_bitwise_equal(got, want)


@pytest.mark.parametrize("shape", [(T,), (1,), (B, T, 1)])
def test_temperatures_that_fit_no_token(shape: tuple[int, ...]) -> None:
    if shape == (1,):
        return
    with pytest.raises(ValueError, match=rf"log_prob: temperature must have shape \[{B}, {T}\].* got float32 "):
        fastdiv.log_prob(X, LABELS, temperature=torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16])
def test_masks_of_numbers(backend: str, dtype: torch.dtype) -> None:
    same(backend, {"mask": MASK.to(dtype)}, {"mask": MASK})
    same(backend, {"mask": MASK.to(dtype).flatten()}, {"mask": MASK})
    same(backend, {"mask": MASK[:1].to(dtype)}, {"mask": MASK[:1].repeat(B, 1)})


def test_labels_and_teachers_that_are_shared(backend: str) -> None:
    same(backend, {"labels": LABELS[:1]}, {"labels": LABELS[:1].repeat(B, 1)})
    same(backend, {"labels": LABELS[:, :1]}, {"labels": LABELS[:, :1].repeat(1, T)})
    same(backend, {"labels": LABELS.flatten()}, {"labels": LABELS})
    same(backend, {"teacher": Y[:1]}, {"teacher": Y[:1].repeat(B, 1, 1)})
    head = fastdiv.LinearLogits(random(1, T, 8), random(V, 8))
    wide = fastdiv.LinearLogits(head.hidden.repeat(B, 1, 1), head.weight)
    same(backend, {"teacher": head}, {"teacher": wide})


def test_a_shared_teacher_gets_the_gradient_of_all(backend: str) -> None:
    y = Y[:1].clone().requires_grad_()
    (got,) = torch.autograd.grad(fastdiv.divergence(X, y, backend=backend).sum(), y)
    wide = Y[:1].repeat(B, 1, 1).requires_grad_()
    (want,) = torch.autograd.grad(fastdiv.divergence(X, wide, backend=backend).sum(), wide)
    assert torch.allclose(got, want.sum(0, keepdim=True), atol=1e-6)


def test_ids_that_all_tokens_share(backend: str) -> None:
    ids = torch.tensor([3, 0, 32, -100, 7])
    same(backend, {"labels": ids.view(1, 1, K)}, {"labels": ids.repeat(B, T, 1)})
    same(backend, {"labels": ids.view(1, K)}, {"labels": ids.repeat(B * T, 1)}, (B * T,))
    assert fastdiv.checks.labels("log_prob", fastdiv.Logits(X), ids.view(1, 1, K)).stride() == (0, 0, 1)


@pytest.mark.parametrize(
    ("lead", "shape", "message"),
    [
        ((T,), (1, T), rf"labels \[1, {T}\] for logits \[{T}, {V}\] may be an id per token or {T} ids for every token"),
        ((B, T), (1, 1, B * T), "may be an id per token or 12 ids for every token"),
        ((B, T), (K,), r"labels must have shape \[3, 4\], where 1 may stand for any size, or \[3, 4, 'K'\] for"),
        ((B, T), (T,), r"got int64 \[4\]"),
        ((B * T,), (B, T), r"labels \[3, 4\] for logits \[12, 33\] may be an id per token or 4 ids for every"),
        ((B, T), (B, 2, K), r"got int64 \[3, 2, 5\]"),
    ],
)
def test_labels_that_may_mean_two_things(lead: tuple[int, ...], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"log_prob: .*{message}"):
        fastdiv.log_prob(torch.zeros(*lead, V), torch.zeros(shape, dtype=torch.int64))


# A teacher as log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_teacher_of_log_probabilities_has_no_temperature(backend: str, kind: str, temperature: float) -> None:
    log_q = (Y * 2.0).log_softmax(-1).requires_grad_()
    teacher = fastdiv.LogProbabilities(log_q)
    got = fastdiv.divergence(X, teacher, kind, temperature=temperature, backend=backend)
    exact = log_q.detach().double().requires_grad_()
    want = fastdiv.divergence(X.double() / temperature, exact, kind)
    torch.testing.assert_close(got.detach().double(), want.detach(), rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(got.sum(), log_q), torch.autograd.grad(want.sum(), exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_every_operator_takes_a_teacher_of_log_probabilities(backend: str, kind: str) -> None:
    """The same as from logits at a temperature of 1, in values and in gradients, the teacher's too."""
    hidden, weight = random(B, T, 6).requires_grad_(), random(V, 6, seed=1).requires_grad_()
    log_q = (Y * 2.0).log_softmax(-1).requires_grad_()
    leaves, logits = (hidden, weight, log_q), (hidden @ weight.T).detach()
    options, plain = {"outputs": (kind,), "backend": backend}, {"outputs": (kind,), "backend": "reference"}

    def loss(stats: fastdiv.TokenStats, rows: Tensor) -> Tensor:
        return stats[kind] * 0.5

    head, at_one = fastdiv.LinearLogits(hidden, weight), fastdiv.LinearLogits(hidden, weight, scale=1 / 0.7)
    got = fastdiv.linear_loss(head, None, loss, teacher=fastdiv.LogProbabilities(log_q), temperature=0.7, **options)
    want = fastdiv.linear_loss(at_one, None, loss, teacher=log_q, **plain)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    teacher = fastdiv.LogProbabilities(log_q.detach())
    stats, gradient = fastdiv.value_and_gradient(
        logits, None, {kind: 0.5}, teacher=teacher, temperature=0.7, backend=backend
    )
    leaf = logits.requires_grad_()
    same = fastdiv.divergence(leaf, teacher, kind, temperature=0.7, backend="reference")
    torch.testing.assert_close(stats[kind], same.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(same.sum() * 0.5, leaf)[0], rtol=1e-4, atol=1e-6)


def test_where_log_probabilities_are_refused() -> None:
    teacher = fastdiv.LogProbabilities(Y)
    for temperature in (torch.ones(B, T), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="divergence: a teacher given as LogProbabilities goes with one number"):
            fastdiv.divergence(X, teacher, temperature=temperature)
    with pytest.raises(TypeError, match=r"entropy: logits must be a tensor .* got LogProbabilities"):
        fastdiv.entropy(teacher)  # type: ignore[arg-type]


# Tracing and other devices


@pytest.mark.filterwarnings("ignore")
def test_all_forms_trace_without_a_look_at_their_values(backend: str) -> None:
    if backend == "triton":
        return  # what is traced is the same

    def every(x: Tensor, y: Tensor, labels: Tensor, mask: Tensor, temperature: Tensor) -> Tensor:
        options = {"mask": mask, "temperature": temperature, "backend": backend}
        return fastdiv.token_stats(x, labels, teacher=y, outputs=("log_prob", "js"), **options).log_prob

    inputs = (X, Y[:1], LABELS.flatten(), MASK.long(), torch.tensor(0.7))
    assert_bitwise_equal(torch.compile(every, fullgraph=True, backend="eager")(*inputs), every(*inputs))


def test_values_elsewhere_are_looked_at_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look waits for the device; a meta tensor has nothing to look at."""
    assert fastdiv.accept.looks_at(MASK)
    assert not fastdiv.accept.looks_at(MASK.to("meta"))
    monkeypatch.setenv("FASTDIV_CHECK", "1")
    assert not fastdiv.accept.looks_at(MASK.to("meta"))
    options = {"mask": MASK.long().to("meta"), "temperature": torch.tensor(0.7, device="meta")}
    assert fastdiv.accept.mask("log_prob", "mask", options["mask"]).is_meta


def test_no_argument_waits_for_its_device() -> None:
    """A tensor without values refuses what would read one."""
    with FakeTensorMode():
        source = fastdiv.Logits(torch.empty(B, T, V, device="cuda"))
        mask = fastdiv.checks.mask("log_prob", source, torch.empty(B, T, dtype=torch.int64, device="cuda"))
        labels = fastdiv.checks.labels("log_prob", source, torch.empty(B * T, dtype=torch.int64, device="cuda"))
        assert mask is not None and mask.shape == labels.shape == (B, T) and mask.dtype == torch.bool
        for device in ("cuda", "cpu"):
            _, spread = fastdiv.checks.temperature("log_prob", source, torch.empty((), device=device))
            assert spread is not None and spread.shape == (B, T) and spread.device.type == "cuda"


# numpy's numbers


NUMBERS: dict[str, Callable[..., Any]] = {
    "temperature": lambda f, i: fastdiv.log_prob(X, LABELS, temperature=f(0.5)),
    "integer temperature": lambda f, i: fastdiv.log_prob(X, LABELS, temperature=i(2)),
    "ignore_index": lambda f, i: fastdiv.log_prob(X, LABELS, ignore_index=i(3)),
    "workspace": lambda f, i: fastdiv.entropy(fastdiv.LinearLogits(X, random(9, V)), workspace=i(2048)),
    "beta of js": lambda f, i: fastdiv.divergence(X, Y, "js", beta=f(0.25)),
    "scale, softcap": lambda f, i: fastdiv.entropy(fastdiv.Logits(X, scale=f(0.5), softcap=f(2.0))),
    "k": lambda f, i: fastdiv.select.top_k(X, k=i(3)),
    "ratio": lambda f, i: fastdiv.select.top_k(X, ratio=f(0.25)),
    "seed, step": lambda f, i: fastdiv.select.random_subset(MASK, k=i(2), seed=i(5), step=i(7)),
    "clip": lambda f, i: ppo_clip(*tokens(), clip_low=f(0.5), clip_high=f(0.25), dual_clip=f(1.5))[0],
    "cov": lambda f, i: clip_cov_select(
        *tokens(), ratio=f(0.5), covariance_low=f(-1.0), covariance_high=f(2.0), seed=i(1), step=i(2)
    ),
    "beta of kl_cov": lambda f, i: kl_cov(*tokens(), beta=f(0.5), ratio=f(0.5), normalizer=i(7))[0],
    "length": lambda f, i: aggregate.seq_mean_token_sum_norm(tokens()[0], length=i(8), normalizer=f(2.0)),
    "beta of dpo": lambda f, i: dpo(*pairs(), beta=f(0.5))[0],
    "alpha": lambda f, i: tdpo2(*pairs(), beta=f(0.5), alpha=f(0.25), normalizer=i(2))[0],
    "l1": lambda f, i: sparse_po(*pairs(), *weights(), beta=f(0.5), l1_reward=f(0.25), l1_kl=f(0.5))[0],
    "weights": lambda f, i: fastdiv.value_and_gradient(X, LABELS, {"log_prob": f(0.5), "entropy": i(2)})[1],
    "eps": lambda f, i: fastdiv.objectives.advantages.grpo(X[0, 0], torch.zeros(V, dtype=torch.int64), eps=f(0.5)),
}


def tokens() -> list[Tensor]:
    return [random(B, T, seed=s).requires_grad_() for s in range(3)]


def pairs() -> list[Responses]:
    return [Responses(*tokens()[:2], MASK, tokens()[2].abs()) for _ in range(2)]


def weights() -> list[fastdiv.objectives.TokenWeights]:
    return [fastdiv.objectives.TokenWeights(*tokens()[:2]) for _ in range(2)]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kinds", [(np.float32, np.int64), (np.float64, np.int32), (np.float16, np.int16)])
def test_numbers_of_numpy(name: str, kinds: tuple[type, type]) -> None:
    """Those that binary fractions hold, so that the result is the same in every bit."""
    got, want = NUMBERS[name](*kinds), NUMBERS[name](float, int)
    assert torch.equal(got, want) and got.dtype == want.dtype and got.requires_grad == want.requires_grad


@pytest.mark.parametrize("wrong", [True, np.True_, "1"])
def test_weights_that_are_no_numbers(wrong: object) -> None:
    with pytest.raises(TypeError, match="value_and_gradient: weights of 'entropy' must be a number or a floating tens"):
        fastdiv.value_and_gradient(X, LABELS, {"entropy": wrong})  # type: ignore[dict-item]


# Masks across tokens


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_masks_of_numbers_across_tokens(dtype: torch.dtype) -> None:
    mask, (a, b, c) = MASK.to(dtype), [t.detach() for t in tokens()]
    assert torch.equal(fastdiv.select.top_k(a, mask, k=3), fastdiv.select.top_k(a, MASK, k=3))
    draw = {"k": 3, "seed": 0, "step": 0}
    assert torch.equal(fastdiv.select.random_subset(mask, **draw), fastdiv.select.random_subset(MASK, **draw))
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda m: fastdiv.masked_covariance(a, b, m).per_token,
        lambda m: ppo_clip(a, b, c, m)[0],
        lambda m: kl_cov(a, b, c, m, selected=m)[0],
        lambda m: fastdiv.objectives.sampled_kl(a, b, m)[0],
        lambda m: aggregate.normalizer(m, "seq_mean_token_mean"),
        lambda m: dpo(Responses(a, b, m), Responses(b, a, m))[0],
        lambda m: fastdiv.objectives.mapo_masks({"all": [a]}, m),
    ]
    for call in calls:
        assert torch.equal(call(mask), call(MASK))
    with pytest.raises(ValueError, match="ppo_clip: mask must hold nothing but 0 and 1, got 2"):
        ppo_clip(a, b, c, mask * 2)
