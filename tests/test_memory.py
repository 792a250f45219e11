"""Memory beyond inputs and gradients: O(tokens) from logits, the workspace from hidden states.

What is counted is every allocation that torch's profiler sees, as a running sum; each case runs in its own process
only where the peak of another would hide it, which it does not: the sum starts at 0 with the profile.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import DIVERGENCES, MODEL_OUTPUTS, head
from torch import Tensor

import fastdiv

MIB = 1 << 20


def peak(run: Callable[[], object]) -> int:
    """The largest number of bytes that `run` had allocated and not yet freed."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    steps = [
        (event.start_ns(), event.nbytes()) for event in profile.kineto_results.events() if event.name() == "[memory]"
    ]
    assert steps, "the profiler saw no allocation"
    now = most = 0
    for _, size in sorted(steps):
        now += size
        most = max(most, now)
    return most


def test_the_meter_measures() -> None:
    def run() -> None:
        a = torch.empty(3 * MIB, dtype=torch.uint8)
        del a
        torch.empty(2 * MIB, dtype=torch.uint8)

    assert peak(run) == 3 * MIB


@pytest.mark.parametrize("outputs", [("log_prob",), MODEL_OUTPUTS])
def test_forward_from_logits_is_linear_in_tokens(outputs: tuple[str, ...]) -> None:
    x, labels = torch.randn(256, 8192), torch.zeros(256, dtype=torch.int64)
    used = peak(lambda: fastdiv.token_stats(x, labels, outputs=outputs, backend="native"))
    assert used <= 256 * 8 * 100  # a hundred numbers per token, against 8192


def test_divergence_from_logits_is_linear_in_tokens() -> None:
    x, y = torch.randn(256, 8192), torch.randn(256, 8192)
    assert peak(lambda: fastdiv.token_stats(x, teacher=y, outputs=DIVERGENCES, backend="native")) <= 256 * 8 * 100


def test_backward_from_logits_makes_the_gradient_and_little_else() -> None:
    x, labels = torch.randn(256, 8192).requires_grad_(), torch.zeros(256, dtype=torch.int64)
    out = fastdiv.log_prob(x, labels, backend="native").sum()
    assert peak(out.backward) <= 256 * 8192 * 4 + 256 * 8 * 100


def test_reference_from_logits_is_bounded(backend: str) -> None:
    """Also plain torch goes in pieces: some temporaries of fixed size, whatever the number of tokens."""
    del backend
    x, labels = torch.randn(1024, 16384), torch.zeros(1024, dtype=torch.int64)
    assert peak(lambda: fastdiv.log_prob(x, labels, backend="reference")) <= 256 * MIB
    assert x.numel() * 4 == 64 * MIB


def from_hidden(tensors: tuple[Tensor, ...], workspace: int, how: str, backend: str) -> Callable[[], object]:
    n = tensors[0].shape[0]
    labels, own = torch.zeros(n, dtype=torch.int64), fastdiv.LinearLogits(*tensors)
    teacher = fastdiv.LinearLogits(tensors[0].detach(), tensors[1].detach() * 0.5)

    def run() -> object:
        if how == "linear_loss":
            loss = fastdiv.linear_loss(own, labels, lambda s, rows: s.log_prob, backend=backend, workspace=workspace)
        elif how == "js":
            stats = fastdiv.token_stats(own, teacher=teacher, outputs=("js",), backend=backend, workspace=workspace)
            loss = stats.js.sum()
        else:
            stats = fastdiv.token_stats(own, labels, outputs=MODEL_OUTPUTS, backend=backend, workspace=workspace)
            loss = sum(v.sum() for v in stats.values())
        return torch.autograd.grad(loss, tensors)

    return run


@pytest.mark.parametrize("how", ["token_stats", "js", "linear_loss"])
@pytest.mark.parametrize("n", [64, 512])
def test_from_hidden_states(how: str, n: int) -> None:
    """2 x workspace + O(tokens H), gradients included in their own size: flat in tokens where logits would be 8 x."""
    v, h, workspace = 16384, 32, MIB
    tensors = head(n, v, h, bias=False)
    gradients = sum(t.numel() for t in tensors) * 4
    per_token = n * (h * 4 * 8 + 8 * 100)
    used = peak(from_hidden(tensors, workspace, how, "native"))
    # Products also need the gradients once more while they are scaled or handed over (linear_loss).
    assert used <= 2 * workspace + per_token + (2 if how == "linear_loss" else 1) * gradients
    if n == 512:
        assert used < n * v * 4 / 2


def test_masked_tokens_need_no_memory() -> None:
    tensors = head(512, 4096, 32, bias=False)
    mask = torch.zeros(512, dtype=torch.bool)
    mask[:8] = True
    own = fastdiv.LinearLogits(*(t.detach() for t in tensors))
    all_of_them = peak(lambda: fastdiv.entropy(own, backend="native"))
    eight = peak(lambda: fastdiv.entropy(own, mask=mask, backend="native"))
    assert eight < all_of_them / 8
