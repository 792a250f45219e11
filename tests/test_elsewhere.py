"""Moving a test's tensors to another device changes nothing but where the work is done."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from elsewhere import Moved, elsewhere
from torch import Tensor

import fastdiv
from fastdiv.ops import stats
from fastdiv.ops.call import Call, prepare
from fastdiv.testing import assert_bitwise_equal

CPU = torch.device("cpu")
WIDE = torch.arange(60.0).view(6, 10)


@pytest.mark.parametrize(
    "view",
    [WIDE, WIDE[1:5, 2:7], WIDE.T, WIDE[:1].expand(4, 10), WIDE.flatten().as_strided((8, 9), (1, 1), 5), WIDE[0, 0]],
    ids=["whole", "cut", "turned", "shared", "window", "number"],
)
def test_a_moved_tensor_keeps_its_layout(view: Tensor) -> None:
    there = Moved.apply(view, CPU)
    assert there.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    assert (there.shape, there.stride(), there.storage_offset()) == (view.shape, view.stride(), view.storage_offset())
    assert_bitwise_equal(there, view)


def test_the_gradient_comes_back_twice() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (first,) = torch.autograd.grad((Moved.apply(x, CPU) ** 3).sum(), x, create_graph=True)
    assert first.tolist() == [3.0, 12.0, 27.0]
    assert torch.autograd.grad(first.sum(), x)[0].tolist() == [6.0, 12.0, 18.0]


def results(backend: str) -> list[Tensor]:
    """Values and gradients of calls that take every kind of argument."""
    generator = torch.Generator().manual_seed(0)
    x, y, hidden, weight = (
        torch.randn(*shape, generator=generator).requires_grad_() for shape in ((5, 40), (5, 40), (5, 8), (40, 8))
    )
    labels, mask = torch.tensor([3, -100, 5, 39, 0]), torch.tensor([True, True, False, True, True])
    weights = torch.rand(5, generator=generator)
    own = fastdiv.LinearLogits(hidden, weight, softcap=20.0)
    temperature = torch.rand(5, generator=generator) + 0.5
    options: dict[str, Any] = {"mask": mask, "temperature": temperature, "backend": backend}
    outputs = ("log_prob", "entropy", "argmax", "js")
    first = fastdiv.token_stats(own, labels, teacher=fastdiv.Logits(y, scale=0.5), outputs=outputs, **options)
    second = fastdiv.divergence(x, y, "reverse_kl", **options)
    third = fastdiv.linear_loss(own, labels, lambda s, rows: s.log_prob * weights[rows], **options)
    total = first.log_prob.sum() + first.entropy.sum() + first.js.sum() + second.square().sum() + third
    return [*first.values(), second, third, *torch.autograd.grad(total, (x, y, hidden, weight))]


def test_calls_give_the_same_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    want = results("reference")
    seen: list[Call] = []

    def watched(*values: Any, **options: Any) -> Call:
        seen.append(prepare(*values, **options))
        return seen[-1]

    monkeypatch.setattr(stats, "prepare", watched)
    given = torch.randn(2, 9)
    for name in ("reference", "native"):
        seen.clear()
        with elsewhere(name, CPU, sys.modules[__name__]):
            got = results("reference")
            fastdiv.entropy(given, backend="reference")
        moved = seen[-1].tensors[0].data_ptr() != given.data_ptr()
        assert moved == (name == "reference")
        for a, b in zip(got, want, strict=True):
            assert_bitwise_equal(a, b)
    assert stats.prepare is watched


def test_a_wrong_label_is_the_same_error_elsewhere() -> None:
    with elsewhere("reference", CPU, sys.modules[__name__]), pytest.raises(IndexError, match="got 9 at token 1"):
        fastdiv.log_prob(torch.zeros(2, 9), torch.tensor([0, 9]), backend="reference")


@pytest.mark.parametrize("graph", [False, True])
def test_outputs_come_home(graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = sys.modules["elsewhere"]
    move, seen = tools.move, []

    def watched(value: Any, device: torch.device) -> Any:
        seen.append(value)
        return move(value, device)

    monkeypatch.setattr(tools, "move", watched)
    with elsewhere("reference", CPU, sys.modules[__name__]):
        output = fastdiv.entropy(torch.randn(2, 9, requires_grad=graph), backend="reference")
    assert_bitwise_equal(seen[-1], output)
