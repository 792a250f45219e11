"""`log_prob` and `entropy`: shapes, labels, masks, sources and dtypes against the textbook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import check, dtypes, evaluate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiv
from fastdiv.testing import assert_accurate, assert_bitwise_equal, logits, reference


def log_prob_pair(labels: Tensor, backend: str, **options: Any) -> tuple[Any, Any]:
    def operator(x: Tensor) -> dict[str, Tensor]:
        return {"log_prob": fastdiv.log_prob(x, labels, backend=backend, **options)}

    def textbook(x: Tensor, *, dtype: torch.dtype, sizes: bool = False) -> dict[str, Tensor]:
        name = "logsumexp" if sizes else "log_prob"
        return reference(x, labels, outputs=[name], dtype=dtype, **options)

    return operator, textbook


@settings(max_examples=80)
@given(
    data=st.data(),
    k=st.sampled_from([None, 1, 4]),
    integer=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]),
    layout=st.sampled_from(["random", "expanded", "strided"]),
)
def test_log_prob(backend: str, data: st.DataObject, k: int | None, integer: torch.dtype, layout: str) -> None:
    x = data.draw(logits(dtypes=dtypes(backend), broken=False)).requires_grad_()
    shape = x.shape[:1] if k is None else (x.shape[0], k)
    # Repeated labels in one row are likely: their gradients add.
    labels = torch.randint(0, min(x.shape[1], 200), shape, generator=torch.Generator().manual_seed(5))
    check(*log_prob_pair(labels.to(integer), backend), x, layout=layout)


@pytest.mark.parametrize("ignore_index", [-100, 0, 7, 10**6])
def test_ignore_index(backend: str, ignore_index: int) -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[3, ignore_index], [ignore_index, 5], [1, 2], [ignore_index] * 2, [9, 9], [39, 1]])
    check(*log_prob_pair(labels, backend, ignore_index=ignore_index), x)
    got = evaluate(log_prob_pair(labels, backend, ignore_index=ignore_index)[0], [x])
    assert (got["log_prob"][labels == ignore_index] == 0).all()
    assert (got["gradient 0"][3] == 0).all()


def test_a_label_ignored_in_one_call_is_a_label_in_another(backend: str) -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    assert fastdiv.log_prob(x, labels, backend=backend)[0] < 0
    assert fastdiv.log_prob(x, labels, ignore_index=0, backend=backend)[0] == 0


@pytest.mark.parametrize("v", [1, 31, 127, 1023, 1025, 50257, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_class_of_vocabulary(backend: str, v: int, dtype: torch.dtype) -> None:
    x = (torch.randn(2, v, generator=torch.Generator().manual_seed(v)) * 4).to(dtype).requires_grad_()
    check(*log_prob_pair(torch.tensor([v - 1, v // 2]), backend), x, neighbours=1)

    def operator(x: Tensor) -> dict[str, Tensor]:
        return {"entropy": fastdiv.entropy(x, backend=backend)}

    def textbook(x: Tensor, *, dtype: torch.dtype, sizes: bool = False) -> dict[str, Tensor]:
        return reference(x, outputs=["logsumexp" if sizes else "entropy"], dtype=dtype)

    check(operator, textbook, x, neighbours=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_at_ties_are_rounded_to_even(backend: str, dtype: torch.dtype) -> None:
    """A gradient in a narrow dtype is the float32 one, rounded as torch does it, also halfway between two numbers.

    The label's probability is 0: its gradient is the upstream one to the last bit.
    """
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter cuts off what bfloat16 cannot hold")
    half = torch.finfo(dtype).eps / 2
    upstream = 1.0 + half * torch.arange(1.0, 65.0, 2.0)  # half of them go down, half up
    upstream = torch.cat([upstream, -upstream, upstream * 2**-9])
    narrow = torch.tensor([0.0, -200.0, -torch.inf]).to(dtype).expand(len(upstream), 3)
    gradients = []
    for x in (narrow, narrow.float()):
        x = x.clone().requires_grad_()
        got = fastdiv.log_prob(x, torch.ones(len(x), dtype=torch.int64), backend=backend)
        gradients += torch.autograd.grad(got, x, upstream)
    assert_bitwise_equal(gradients[1][:, 1], upstream)
    assert_bitwise_equal(gradients[0], gradients[1].to(dtype))


def test_masked_rows_are_never_read(backend: str) -> None:
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2, 10**9, 4, -5])
    mask = torch.tensor([True, True, False, True, False])
    x[~mask] = torch.nan
    x.requires_grad_()
    got = fastdiv.log_prob(x, labels, mask=mask, backend=backend)
    got.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(got).all() and (got[~mask] == 0).all()
    assert torch.isfinite(x.grad).all() and (x.grad[~mask] == 0).all()
    alone = x.detach()[mask].requires_grad_()
    want = fastdiv.log_prob(alone, labels[mask], backend=backend)
    want.sum().backward()
    assert alone.grad is not None
    assert_bitwise_equal(got[mask], want)
    assert_bitwise_equal(x.grad[mask], alone.grad)


def test_no_leading_dimension(backend: str) -> None:
    x = torch.randn(9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for labels in (torch.tensor(4), torch.tensor([4, 5])):
        got = fastdiv.log_prob(x, labels, backend=backend)
        assert got.shape == labels.shape
        (gradient,) = torch.autograd.grad(got.sum(), x)
        exact = reference(x, labels, outputs=["log_prob"])["log_prob"]
        plain = reference(x, labels, outputs=["log_prob"], dtype=torch.float32)["log_prob"]
        assert_accurate(got, plain, exact)
        (plain_gradient,) = torch.autograd.grad(plain.sum(), x)
        (exact_gradient,) = torch.autograd.grad(exact.sum(), x)
        assert_accurate(gradient, plain_gradient, exact_gradient.double())


def test_temperature_divides_logits(backend: str) -> None:
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    one = torch.full((4,), 0.5)
    number = fastdiv.entropy(x, temperature=0.5, backend=backend)
    assert_bitwise_equal(fastdiv.entropy(x, temperature=one, backend=backend), number)
    assert_bitwise_equal(fastdiv.entropy(x * 2.0, backend=backend), number)
    mixed = fastdiv.entropy(x, temperature=torch.tensor([0.5, 1.0, 0.5, 2.0]), backend=backend)
    assert_bitwise_equal(mixed[[0, 2]], number[[0, 2]])
    assert_bitwise_equal(mixed[1], fastdiv.entropy(x, backend=backend)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_per_token_temperature_of_any_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    got = fastdiv.entropy(x, temperature=torch.tensor([0.5, 2.0], dtype=dtype))
    assert got.dtype == torch.float32
    assert_bitwise_equal(got, fastdiv.entropy(x, temperature=torch.tensor([0.5, 2.0])))
