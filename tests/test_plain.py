"""No tensor without memory of its own reaches a kernel; transforms that are not supported are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdiv
from fastdiv import select
from fastdiv.testing import assert_bitwise_equal

X, Y, LABELS = torch.randn(4, 30), torch.randn(4, 30), torch.arange(4)
HIDDEN, WEIGHT, BIAS = torch.randn(4, 8), torch.randn(30, 8), torch.randn(30)
MASK, HEAT, NUMBERS = torch.tensor([True, True, True, False]), torch.rand(4) + 0.5, torch.randn(4)


def stats(**changed: Any) -> Any:
    given = {"logits": X, "labels": LABELS, "teacher": Y, "mask": MASK, "temperature": HEAT} | changed
    source, labels = given.pop("logits"), given.pop("labels")
    return fastdiv.token_stats(source, labels, outputs=("log_prob", "js"), backend="native", **given)


def weighted(**changed: Any) -> Any:
    given = {"logits": X, "labels": LABELS, "weight": NUMBERS, "teacher": Y, "mask": MASK, "temperature": HEAT}
    given |= changed
    source, labels, weight = given.pop("logits"), given.pop("labels"), given.pop("weight")
    return fastdiv.value_and_gradient(source, labels, {"log_prob": weight, "js": 1.0}, backend="native", **given)


def loss(**changed: Any) -> Any:
    given = {"hidden": HIDDEN, "weight": WEIGHT, "bias": BIAS, "labels": LABELS} | changed
    head = fastdiv.LinearLogits(given.pop("hidden"), given.pop("weight"), given.pop("bias"))
    labels, given = given.pop("labels"), {"teacher": Y, "mask": MASK, "temperature": HEAT} | given
    return fastdiv.linear_loss(
        head, labels, lambda s, rows: s.js - s.log_prob, outputs=("js", "log_prob"), backend="native", **given
    )


Call = Callable[[Callable[[Tensor], Any]], Any]
CASES: dict[str, tuple[str, Call]] = {}
for _function, _names in (
    (stats, {"logits": X, "labels": LABELS, "teacher": Y, "mask": MASK, "temperature": HEAT}),
    (weighted, {"logits": X, "labels": LABELS, "teacher": Y, "mask": MASK, "temperature": HEAT, "weight": NUMBERS}),
    (loss, {"hidden": HIDDEN, "weight": WEIGHT, "bias": BIAS, "labels": LABELS, "teacher": Y, "mask": MASK}),
    (loss, {"temperature": HEAT}),
):
    _operator = {stats: "token_stats", weighted: "value_and_gradient", loss: "linear_loss"}[_function]
    for _name, _value in _names.items():
        CASES[f"{_operator}: {_name}"] = _operator, lambda d, f=_function, n=_name, v=_value: f(**{n: d(v)})
for _backend in ("cuda", "triton"):
    CASES |= {
        f"masked_covariance: x {_backend}": (
            "masked_covariance",
            lambda d, b=_backend: fastdiv.masked_covariance(d(NUMBERS), d(HEAT), MASK, backend=b),
        ),
        f"masked_covariance: mask {_backend}": (
            "masked_covariance",
            lambda d, b=_backend: fastdiv.masked_covariance(NUMBERS, HEAT, d(MASK), backend=b),
        ),
        f"top_k: scores {_backend}": ("top_k", lambda d, b=_backend: select.top_k(d(NUMBERS), k=2, backend=b)),
        f"top_k: index {_backend}": (
            "top_k",
            lambda d, b=_backend: select.top_k(NUMBERS, k=2, index=d(LABELS), backend=b),
        ),
        f"top_k: k {_backend}": ("top_k", lambda d, b=_backend: select.top_k(NUMBERS, k=d(LABELS[2]), backend=b)),
        f"random_subset: eligible {_backend}": (
            "random_subset",
            lambda d, b=_backend: select.random_subset(d(MASK), k=2, seed=0, step=0, backend=b),
        ),
    }


@pytest.fixture(scope="module")
def distribute() -> Iterator[Callable[[Tensor], Any]]:
    """A tensor as a DTensor, whose own address is 0."""
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda t: distribute_tensor(t, mesh, [Replicate()])
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_a_wrapper_is_refused_by_name(name: str, distribute: Callable[[Tensor], Any]) -> None:
    operator, call = CASES[name]
    with pytest.raises(TypeError, match=rf"{operator}: .* must be a plain tensor with its own memory, got DTensor"):
        call(distribute)


class Named(Tensor):
    """A subclass with memory of its own."""


def test_a_subclass_with_memory_is_welcome(backend: str) -> None:
    got = fastdiv.log_prob(X.as_subclass(Named), LABELS.as_subclass(Named), backend=backend)
    assert_bitwise_equal(got.as_subclass(Tensor), fastdiv.log_prob(X, LABELS, backend=backend))


def test_lazily_negated_memory_is_read_as_it_should(backend: str) -> None:
    lazy = torch.complex(torch.zeros(4, 30), -X).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, X)
    want = fastdiv.log_prob(X, LABELS, backend=backend)
    assert_bitwise_equal(fastdiv.log_prob(lazy, LABELS, backend=backend), want)
    _, got = fastdiv.value_and_gradient(lazy, LABELS, {"log_prob": 1.0}, backend=backend)
    assert_bitwise_equal(got, fastdiv.value_and_gradient(X, LABELS, {"log_prob": 1.0}, backend=backend)[1])
    own = fastdiv.LinearLogits(lazy, torch.ones(3, 30))
    got = fastdiv.linear_loss(own, LABELS % 3, lambda s, rows: s.log_prob, backend=backend)
    plain = fastdiv.LinearLogits(X, torch.ones(3, 30))
    torch.testing.assert_close(got, fastdiv.linear_loss(plain, LABELS % 3, lambda s, rows: s.log_prob, backend=backend))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([X[:2], X[2:]], layout=layout)
    for call in (
        lambda: fastdiv.entropy(nested),
        lambda: fastdiv.log_prob(X, nested),
        lambda: fastdiv.linear_loss(fastdiv.LinearLogits(nested, WEIGHT), None, lambda s, rows: s.entropy),
        lambda: fastdiv.value_and_gradient(nested, None, {"entropy": 1.0}),
    ):
        with pytest.raises(TypeError, match="must not be a nested tensor; pass its values"):
            call()


def test_sparse_logits_are_refused() -> None:
    with pytest.raises(TypeError, match=r"entropy: logits must be dense, got layout torch.sparse_coo"):
        fastdiv.entropy(X.to_sparse())


def test_vmap_is_refused() -> None:
    for call in (
        lambda x: fastdiv.entropy(x),
        lambda x: fastdiv.value_and_gradient(x[None], None, {"entropy": 1.0})[1],
        lambda x: fastdiv.linear_loss(
            fastdiv.LinearLogits(x[None], WEIGHT), None, lambda s, r: s.entropy, outputs=("entropy",)
        ),
    ):
        given = HIDDEN if "linear_loss" in call.__code__.co_names else X
        with pytest.raises(RuntimeError, match=r": vmap over (logits|head.hidden) is not supported"):
            torch.func.vmap(call)(given)
    with pytest.raises(RuntimeError, match="entropy: vmap over logits is not supported"):
        torch.func.vmap(torch.func.grad(fastdiv.entropy))(X)
    with pytest.raises(RuntimeError, match=r"vmap .* is not supported"):
        torch.func.jacrev(fastdiv.entropy)(X)


# torch's own forward-mode machinery uses torch.jit.script, which it calls deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_jvp_is_refused() -> None:
    for call, x in (
        (fastdiv.entropy, X),
        (lambda x: fastdiv.value_and_gradient(x, None, {"entropy": 1.0})[1], X),
        (lambda x: fastdiv.linear_loss(fastdiv.LinearLogits(x, WEIGHT), LABELS, lambda s, r: s.log_prob), HIDDEN),
    ):
        with pytest.raises(RuntimeError, match=r": forward-mode differentiation \(jvp\) of .* is not supported"):
            torch.func.jvp(call, (x,), (torch.ones_like(x),))


def shapes(found: Any) -> Any:
    return [(t.shape, t.dtype) for t in found]


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_tensors_without_memory_have_the_right_shapes(where: str) -> None:
    mode = FakeTensorMode()

    def without(t: Tensor) -> Tensor:
        return mode.from_tensor(t) if where == "fake" else t.to("meta")

    def run(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x, labels = change(X.half()), change(LABELS)
        numbers, gradient = fastdiv.value_and_gradient(x, labels, {"log_prob": 1.0, "entropy": change(NUMBERS)})
        over = change(X.half())
        _, same = fastdiv.value_and_gradient(over, labels, {"log_prob": 1.0}, overwrite=True)
        head = fastdiv.LinearLogits(change(HIDDEN), change(WEIGHT).requires_grad_())
        total = fastdiv.linear_loss(head, labels, lambda s, rows: s.log_prob, mask=change(MASK))
        return [*numbers.values(), gradient, same, total, *torch.autograd.grad(total, head.weight)]

    assert shapes(run(without)) == shapes(run(lambda t: t.clone()))
