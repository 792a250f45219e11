"""More than 2^31 elements.  `torch.empty` on a CPU reserves addresses only: just the touched rows cost memory."""

from __future__ import annotations

import pytest
import torch

import fastdiv
from fastdiv.backends.native import Native
from fastdiv.request import Transform
from fastdiv.statistics import COEFFICIENTS, Prepared, Tokens, empty_state
from fastdiv.testing import assert_bitwise_equal
from fastdiv.tiles import Rows, Tile

V = 151936
ROWS = 2**31 // V + 100
LAST = (ROWS - 2, ROWS - 1)

if "native" not in [name for name, absent in fastdiv.info()["backends"].items() if absent is None]:  # type: ignore[attr-defined]
    pytest.skip("the native backend is absent", allow_module_level=True)


def untouched(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(ROWS * V, dtype=dtype).view(ROWS, V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_the_last_rows(backend: str, dtype: torch.dtype) -> None:
    x = untouched(dtype)
    some = torch.randn(2, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[list(LAST)] = some
    mask = torch.zeros(ROWS, dtype=torch.bool)
    mask[list(LAST)] = True
    labels = torch.zeros(ROWS, dtype=torch.int64)
    labels[-1] = V - 1
    got = fastdiv.token_stats(x, labels, mask=mask, outputs=("log_prob", "entropy", "argmax"), backend=backend)
    want = fastdiv.token_stats(some, labels[-2:], outputs=("log_prob", "entropy", "argmax"), backend=backend)
    for name, value in want.items():
        assert_bitwise_equal(got[name][-2:], value, name)


def test_rows_far_apart(backend: str) -> None:
    """Three rows, 2^30 elements from one to the next."""
    x = torch.empty(2**31 + 1000, dtype=torch.float32).as_strided((3, 1000), (2**30, 1))
    some = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    x.copy_(some)
    for t in (x, some):
        t.requires_grad_()
        fastdiv.divergence(t, torch.zeros(3, 1000), "js", backend=backend).sum().backward()
    assert x.grad is not None and some.grad is not None
    assert_bitwise_equal(x.grad, some.grad)


def test_gradient_into_the_last_rows() -> None:
    """The gradient's own offsets, which no public call reaches without gigabytes of zeros."""
    native, gradient = Native(), untouched(torch.bfloat16)
    some = torch.randn(2, V, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    own = Rows(some, torch.arange(2), Transform())
    state, c = empty_state(2, some.device), torch.zeros(2, COEFFICIENTS)
    none = torch.zeros(2, 0)
    tile = Tile(own, None, 0, V, Tokens(torch.ones(2), none.long(), -100, None, V))
    native.accumulate(tile, 0, state, torch.zeros(2, 0))
    c[:, 0] = 1.0
    target = Rows(gradient, torch.tensor(LAST), Transform())
    native.gradient(tile, Prepared(c, none.long(), none, []), state, target, None)
    want = torch.softmax(some.float(), -1)
    assert (gradient[list(LAST)].float() - want).abs().max() <= 2.0**-8 * want.max()
