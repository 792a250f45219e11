"""Every error message names the operator, the argument, what is expected and what came."""
# A table reads better in long lines.
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiv
from fastdiv.training.config import LossConfig, TrainConfig
from fastdiv.training.objective import WindowLoss

INF, NAN = torch.inf, torch.nan


class _Watching(TorchDispatchMode):
    """Lets every operator run, and makes `fastdiv` show its own."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def hidden_of(h: int, **options: Any) -> fastdiv.LinearLogits:
    return fastdiv.LinearLogits(torch.zeros(3, h), torch.zeros(10, 4), **options)


X = torch.zeros(3, 10)
Y = torch.zeros(3, dtype=torch.int64)
HEAD = hidden_of(4)

ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fastdiv.entropy([1.0, 2.0]), TypeError, r"entropy: logits must be a tensor \[\*, V\], Logits or LinearLogits, got list"),
    (lambda: fastdiv.entropy(torch.zeros(3, 10, dtype=torch.int64)), TypeError, r"entropy: logits must have a floating dtype, got int64 \[3, 10\]"),
    (lambda: fastdiv.entropy(torch.tensor(1.0)), ValueError, r"entropy: logits must be logits \[\*, V\], got a number"),
    (lambda: fastdiv.entropy(hidden_of(5)), ValueError, r"entropy: LinearLogits given as logits: hidden must be \[\*, 4\] to match weight \[10, 4\], got float32 \[3, 5\]"),
    (lambda: fastdiv.entropy(fastdiv.LinearLogits(torch.zeros(3, 4), torch.zeros(4))), ValueError, r"entropy: LinearLogits given as logits: weight must have 2 dimensions, got float32 \[4\]"),
    (lambda: fastdiv.entropy(hidden_of(4, bias=torch.zeros(9))), ValueError, r"entropy: LinearLogits given as logits: bias must be \[10\], got float32 \[9\]"),
    (lambda: fastdiv.entropy(hidden_of(4, softcap=0.0)), ValueError, r"entropy: softcap of logits must be a positive number or None, got 0.0"),
    (lambda: fastdiv.entropy(hidden_of(4, softcap=-1.0)), ValueError, r"softcap of logits must be a positive number or None"),
    (lambda: fastdiv.entropy(hidden_of(4, softcap=NAN)), ValueError, r"softcap of logits must be a positive number or None"),
    (lambda: fastdiv.entropy(fastdiv.Logits(X, scale=INF)), ValueError, r"entropy: scale of logits must be finite, got inf"),
    (lambda: fastdiv.entropy(fastdiv.Logits(X, scale=NAN)), ValueError, r"scale of logits must be finite, got nan"),
    (lambda: fastdiv.entropy(fastdiv.LinearLogits(torch.zeros(3, 4), torch.zeros(4, 10))), ValueError, r"entropy: LinearLogits given as logits: weight must be \[V, H\], \[V, 4\] to match hidden \[3, 4\], got float32 \[4, 10\]; transpose it"),
    (lambda: fastdiv.token_stats(hidden_of(5), Y), ValueError, r"token_stats: LinearLogits given as source: hidden"),
    (lambda: fastdiv.linear_loss(hidden_of(5), Y, lambda s, rows: s.log_prob), ValueError, r"linear_loss: LinearLogits given as head: hidden"),
    (lambda: fastdiv.divergence(X, hidden_of(5)), ValueError, r"divergence: LinearLogits given as teacher: hidden"),
    (lambda: fastdiv.divergence(hidden_of(5), X), ValueError, r"divergence: LinearLogits given as student: hidden"),
    (lambda: fastdiv.entropy(hidden_of(4, scale="1")), TypeError, r"entropy: scale of logits must be a number, got str '1'"),
    (lambda: fastdiv.divergence(X, torch.zeros(3, 11)), ValueError, r"divergence: teacher must have the student's vocabulary of 10, got 11"),
    (lambda: fastdiv.divergence(X, torch.zeros(4, 10)), ValueError, r"divergence: teacher must have shape \[3, 10\], where 1 may stand for any leading size, got \[4, 10\]"),
    (lambda: fastdiv.divergence(X, "teacher"), TypeError, r"divergence: teacher must be a tensor \[\*, V\], Logits or LinearLogits, got str 'teacher'"),
    (lambda: fastdiv.divergence(X, X, "kl"), ValueError, r"divergence: unknown divergence 'kl', did you mean 'forward_kl' KL\(teacher \|\| student\) or 'reverse_kl' KL\(student \|\| teacher\)\?; known are forward_kl, reverse_kl"),
    (lambda: fastdiv.divergence(X, X, "JSD"), ValueError, r"divergence: unknown divergence 'JSD', did you mean 'js'\?; known are"),
    (lambda: fastdiv.divergence(X, X, "forward-kl"), ValueError, r"unknown divergence 'forward-kl', did you mean 'forward_kl'( or 'reverse_kl')?\?"),
    (lambda: fastdiv.divergence(X, X, "wasserstein"), ValueError, r"unknown divergence 'wasserstein'; known are"),
    (lambda: fastdiv.divergence(X, X, 3), ValueError, r"unknown divergence 3; known are"),
    (lambda: fastdiv.divergence(X, X, "js", beta=0.0), ValueError, r"divergence: beta of 'js' must lie strictly between 0 and 1, got 0.0; at the ends use 'forward_kl'"),
    (lambda: fastdiv.divergence(X, X, "js", beta=1.0), ValueError, r"beta of 'js' must lie strictly between 0 and 1"),
    (lambda: fastdiv.divergence(X, X, "js", beta=NAN), ValueError, r"beta of 'js' must lie strictly between 0 and 1"),
    (lambda: fastdiv.divergence(X, X, "js", beta="half"), TypeError, r"divergence: beta must be a number, got str 'half'"),
    (lambda: fastdiv.divergence(X, X, "tv", beta=0.5), ValueError, r"divergence: beta is given, but none of tv takes it"),
    (lambda: fastdiv.log_prob(X, [1, 2, 3]), TypeError, r"log_prob: labels must be a tensor of token ids, got list \[1, 2, 3\]"),
    (lambda: fastdiv.log_prob(X, Y.float()), TypeError, r"log_prob: labels must have an integer dtype, got float32 \[3\]"),
    (lambda: fastdiv.log_prob(X, Y.bool()), TypeError, r"labels must have an integer dtype, got bool"),
    (lambda: fastdiv.log_prob(X, Y[:2]), ValueError, r"log_prob: labels must have shape \[3\], where 1 may stand for any size, or \[3, 'K'\] for logits \[3, 10\], got int64 \[2\]"),
    (lambda: fastdiv.log_prob(X, Y, mask=[True] * 3), TypeError, r"log_prob: mask must be a bool tensor, or one of 0 and 1, got list"),
    (lambda: fastdiv.log_prob(X, Y, mask=torch.ones(2, dtype=torch.bool)), ValueError, r"log_prob: mask must have shape \[3\], where 1 may stand for any size, got bool \[2\]"),
    (lambda: fastdiv.log_prob(X, Y, mask=torch.tensor([1, 2, 0])), ValueError, r"log_prob: mask must hold nothing but 0 and 1, got 2 in int64 \[3\]"),
    (lambda: fastdiv.log_prob(X, Y, mask=torch.tensor([0.0, -INF, 1.0])), ValueError, r"log_prob: mask must hold nothing but 0 and 1, got -inf in float32 \[3\]"),
    (lambda: fastdiv.log_prob(X, Y, mask=torch.tensor([0.0, NAN, 1.0])), ValueError, r"log_prob: mask must hold nothing but 0 and 1, got nan"),
    (lambda: fastdiv.log_prob(X, Y, temperature=0.0), ValueError, r"log_prob: temperature must be finite and above 0, got 0.0"),
    (lambda: fastdiv.log_prob(X, Y, temperature=-1), ValueError, r"temperature must be finite and above 0, got -1"),
    (lambda: fastdiv.log_prob(X, Y, temperature=NAN), ValueError, r"temperature must be finite and above 0, got nan"),
    (lambda: fastdiv.log_prob(X, Y, temperature="hot"), TypeError, r"log_prob: temperature must be a number or a tensor \[\*\], got str 'hot'"),
    (lambda: fastdiv.log_prob(X, Y, temperature=True), TypeError, r"temperature must be a number"),
    (lambda: fastdiv.log_prob(X, Y, temperature=torch.ones(2)), ValueError, r"log_prob: temperature must have shape \[3\], where 1 may stand for any size and last sizes may be left out, or be a number, got float32 \[2\]"),
    (lambda: fastdiv.log_prob(X, Y, temperature=torch.ones(3, dtype=torch.int64)), TypeError, r"temperature must have a floating dtype"),
    (lambda: fastdiv.log_prob(X, Y, temperature=torch.ones(3, requires_grad=True)), ValueError, r"temperature has no gradient here; pass temperature.detach\(\)"),
    (lambda: fastdiv.log_prob(X, Y, temperature=torch.tensor([1.0, 0.0, 1.0])), ValueError, r"^log_prob: temperature: expected numbers above 0, got 0.0"),
    (lambda: fastdiv.log_prob(X, Y, temperature=torch.tensor([1.0, NAN, 1.0])), ValueError, r"temperature: expected numbers above 0"),
    (lambda: fastdiv.log_prob(X, Y + 10), IndexError, r"^log_prob: labels: expected values in \[0, 10\) or ignore_index -100, got 10 at token 0"),
    (lambda: fastdiv.token_stats(HEAD, Y - 1), IndexError, r"^token_stats: labels: expected values in"),
    (lambda: fastdiv.log_prob(X, Y, ignore_index=None), TypeError, r"log_prob: ignore_index must be an integer, got NoneType None"),
    (lambda: fastdiv.log_prob(X, Y, workspace=-1), ValueError, r"log_prob: workspace must be a number of bytes, 0 for as few as possible, got int -1"),
    (lambda: fastdiv.log_prob(X, Y, workspace=1.5), TypeError, r"workspace must be a number of bytes, 0 for as few as possible, got float 1.5"),
    (lambda: fastdiv.log_prob(X, Y, backend="gpu"), ValueError, r"^log_prob: unknown backend 'gpu'; known are native, cuda, triton, reference"),
    (lambda: fastdiv.token_stats(X, Y, outputs=("logprob",)), ValueError, r"token_stats: unknown output 'logprob', did you mean 'log_prob'( or 'max_log_prob')?\?; known are log_prob, entropy"),
    (lambda: fastdiv.token_stats(X, Y, outputs=("enthropy",)), ValueError, r"token_stats: unknown output 'enthropy', did you mean 'entropy' or 'varentropy'\?"),
    (lambda: fastdiv.token_stats(X, Y, outputs=()), TypeError, r"token_stats: outputs must be a tuple of names, got tuple \(\)"),
    (lambda: fastdiv.token_stats(X, Y, outputs=("entropy", "entropy")), ValueError, r"outputs must not repeat a name"),
    (lambda: fastdiv.token_stats(X, outputs=("rank",)), ValueError, r"token_stats: output 'rank' needs labels, got none"),
    (lambda: fastdiv.token_stats(X, Y, outputs=("js",)), ValueError, r"token_stats: output 'js' needs a teacher, got none"),
    (lambda: fastdiv.token_stats(X, Y, teacher=X), ValueError, r"a teacher was given, but no output of \('log_prob', 'entropy'\) compares with it"),
    (lambda: fastdiv.linear_loss(X, Y, lambda s, rows: s.log_prob), TypeError, r"linear_loss: head must be LinearLogits, got float32 \[3, 10\]"),
    (lambda: fastdiv.linear_loss(HEAD, Y, "nll"), TypeError, r"linear_loss: token_loss must be callable, got str 'nll'"),
    (lambda: fastdiv.linear_loss(HEAD, Y, lambda s, rows: s.log_prob.sum()), ValueError, r"linear_loss: token_loss must return a tensor \[3\], one loss per row, got \(\)"),
    (lambda: fastdiv.linear_loss(HEAD, Y, lambda s, rows: 1.0), ValueError, r"one loss per row, got float"),
    (lambda: fastdiv.linear_loss(HEAD, None, lambda s, rows: s.log_prob), ValueError, r"linear_loss: output 'log_prob' needs labels, got none"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_errors_say_what_is_wrong(number: int) -> None:
    call, kind, pattern = ERRORS[number]
    with pytest.raises(kind, match=pattern):
        call()


UNKNOWN: list[tuple[str, Callable[[], Any], str]] = [
    ("token_stats: unknown output 'enthropy'", lambda: fastdiv.token_stats(X, Y, outputs=("enthropy",)), "'entropy'"),
    ("divergence: unknown divergence 'foward_kl'", lambda: fastdiv.divergence(X, X, "foward_kl"), "'forward_kl'"),
    ("entropy: unknown backend 'nativ'", lambda: fastdiv.entropy(X, backend="nativ"), "'native'"),
    ("linear_loss: unknown backend 'cudda'", lambda: fastdiv.linear_loss(HEAD, Y, lambda s, r: s.log_prob, backend="cudda"), "'cuda'"),
    ("value_and_gradient: unknown backend 'tritn'", lambda: fastdiv.value_and_gradient(X, Y, {"log_prob": 1.0}, backend="tritn"), "'triton'"),
    ("masked_covariance: unknown backend 'refrence'", lambda: fastdiv.masked_covariance(X, X, backend="refrence"), "'reference'"),
    ("top_k: unknown backend 'Triton'", lambda: fastdiv.select.top_k(X, k=1, backend="Triton"), "'triton'"),
    ("random_subset: unknown backend 'nativ'", lambda: fastdiv.select.random_subset(X > 0, k=1, seed=0, step=0, backend="nativ"), "'native'"),
    ("sampled_kl: unknown estimator 'k-3'", lambda: fastdiv.objectives.sampled_kl(X, X, estimator="k-3"), "'k3'"),
    ("sampled_kl: unknown gradient 'forward-kl'", lambda: fastdiv.objectives.sampled_kl(X, X, gradient="forward-kl"), "'forward_kl'"),
    ("aggregate: unknown mode 'token-mean'", lambda: fastdiv.objectives.sampled_kl(X, X, aggregation="token-mean"), "'token_mean'"),
    ("normalizer: unknown mode 'tokenmean'", lambda: fastdiv.objectives.aggregate.normalizer(X > 0, "tokenmean"), "'token_mean'"),
    ("SparseMask: unknown mode 'comon'", lambda: fastdiv.objectives.SparseMask(4, 1, mode="comon"), "'common'"),
    ("loss.objective: unknown objective 'kl-covv'", lambda: WindowLoss(LossConfig(objective="kl-covv"), seed=0), "'kl_cov'"),
    ("loss.options: unknown option of kl_cov 'rati'", lambda: WindowLoss(LossConfig(options={"rati": 1}), seed=0), "'ratio'"),
    ("loss.advantage: unknown advantage 'dr-grpo'", lambda: LossConfig(advantage="dr-grpo"), "'dr_grpo'"),
    ("dtype: unknown dtype 'float_32'", lambda: TrainConfig(dtype="float_32"), "'float32'"),
]  # fmt: skip


@pytest.mark.parametrize(("begins", "call", "near"), UNKNOWN, ids=[case[0] for case in UNKNOWN])
def test_an_unknown_name_is_answered_by_the_nearest(begins: str, call: Callable[[], Any], near: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    said = str(caught.value)
    assert said.startswith(f"{begins}, did you mean {near}") and "?; known are " in said, said


def test_other_devices_are_named() -> None:
    meta = torch.zeros(3, 10, device="meta")
    for call, pattern in (
        (lambda: fastdiv.log_prob(X, Y.to("meta")), "log_prob: labels must be on cpu, got meta"),
        (lambda: fastdiv.divergence(X, meta), "divergence: teacher must be on cpu, got meta"),
        (
            lambda: fastdiv.entropy(fastdiv.LinearLogits(torch.zeros(3, 4), torch.zeros(10, 4, device="meta"))),
            "entropy: LinearLogits given as logits: weight must be on cpu like hidden, got meta",
        ),
    ):
        with pytest.raises(ValueError, match=pattern):
            call()


def _linear_loss(labels: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    return fastdiv.linear_loss(HEAD, labels, lambda stats, rows: -stats.log_prob, temperature=temperature)


def _value_and_gradient(labels: torch.Tensor, temperature: torch.Tensor) -> object:
    return fastdiv.value_and_gradient(X, labels, {"log_prob": 1.0}, temperature=temperature)


def _token_stats(labels: torch.Tensor, temperature: torch.Tensor) -> object:
    return dict(fastdiv.token_stats(X, labels, temperature=temperature))


@pytest.mark.parametrize("how", ["eager", "watched", "compiled"])
@pytest.mark.parametrize("call", [_token_stats, _linear_loss, _value_and_gradient], ids=lambda call: call.__name__[1:])
def test_errors_about_values_name_the_operator(call: Callable[..., object], how: str) -> None:
    """Values are seen in the engine, which does not know who called; a compiled graph runs without the operator."""
    name = "fastdiv" if how == "compiled" else call.__name__[1:]
    run = torch.compile(call, backend="eager", fullgraph=True) if how == "compiled" else call
    # torch leaves no_grad() on where a compiled graph raises inside it.
    with torch.enable_grad(), _Watching() if how == "watched" else nullcontext():
        with pytest.raises(IndexError, match=rf"^{name}: labels: expected values in \[0, 10\) or ignore_index -100"):
            run(Y + 10, torch.ones(3))
        with pytest.raises(ValueError, match=rf"^{name}: temperature: expected numbers above 0, got 0.0"):
            run(Y, torch.zeros(3))
