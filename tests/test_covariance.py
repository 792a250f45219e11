"""`masked_covariance`: golden numbers, exact centring, padding that cannot leak, one answer for all ranks."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdiv import backends
from fastdiv.ops.covariance import masked_covariance

GOLDEN = json.loads((Path(__file__).parent / "golden/rl_golden.json").read_text())
FIXTURE = GOLDEN["fixtureA"]


@pytest.fixture(
    scope="session", params=[n for n, absent in backends.available().items() if absent is None and n != "native"]
)
def backend(request: pytest.FixtureRequest) -> str:
    """The backends present, without "native": over tokens that is plain torch, as "reference" is."""
    return str(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def fixture(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    advantages, log_prob = (torch.tensor(FIXTURE[name], dtype=dtype) for name in ("adv", "logp"))
    return advantages, log_prob, torch.tensor(FIXTURE["mask"]) > 0


def test_golden(backend: str) -> None:
    got = masked_covariance(*fixture(), backend=backend)
    expected = torch.tensor(GOLDEN["cov/tokens"], dtype=torch.float64)
    torch.testing.assert_close(got.per_token, expected, rtol=1e-9, atol=0)
    assert got.covariance.item() == pytest.approx(GOLDEN["cov/mean"], rel=1e-9)
    assert got.mean_x.item() == pytest.approx(GOLDEN["cov/adv_mean"], rel=1e-9)
    assert got.mean_y.item() == pytest.approx(GOLDEN["cov/logp_mean"], rel=1e-9)
    assert got.count.item() == 7 and got.count.dtype == torch.int64


def test_one_sequence_with_one_advantage_has_no_covariance(backend: str) -> None:
    x, y, mask = fixture()
    for row in range(2):
        assert masked_covariance(x[row], y[row], mask[row], backend=backend).per_token.abs().max() < 1e-15


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_centring_is_exact(offset: float, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator) + offset
    y = torch.randn(50, generator=generator) - offset
    xs, ys = ([Fraction(v) for v in t.tolist()] for t in (x, y))
    mean_x, mean_y = sum(xs) / 50, sum(ys) / 50
    exact = torch.tensor([float((a - mean_x) * (b - mean_y)) for a, b in zip(xs, ys, strict=True)])
    got = masked_covariance(x, y, backend=backend)
    torch.testing.assert_close(got.per_token, exact, rtol=2**-23, atol=0)  # the last rounding to float32
    assert got.covariance.item() == pytest.approx(exact.double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_masked_values_are_never_read(garbage: float, backend: str) -> None:
    x, y, mask = fixture(torch.float32)
    clean = masked_covariance(x, y, mask, backend=backend)
    dirty = masked_covariance(x.masked_fill(~mask, garbage), y.masked_fill(~mask, garbage), mask, backend=backend)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


def test_order_and_shape_do_not_matter(backend: str) -> None:
    x, y, order = torch.randn(64), torch.randn(64), torch.randperm(64)
    whole, shuffled = masked_covariance(x, y, backend=backend), masked_covariance(x[order], y[order], backend=backend)
    assert torch.equal(whole.per_token[order], shuffled.per_token)
    assert torch.equal(
        whole.per_token.view(4, 16), masked_covariance(x.view(4, 16), y.view(4, 16), backend=backend).per_token
    )


@pytest.mark.parametrize("shape", [(4,), (0,), (2, 0)])
def test_nothing_valid_gives_zeros(shape: tuple[int, ...], backend: str) -> None:
    x = torch.full(shape, torch.nan)
    got = masked_covariance(x, x, torch.zeros(shape, dtype=torch.bool), backend=backend)
    assert got.per_token.shape == x.shape
    for value in got:
        assert torch.equal(value, torch.zeros_like(value))


def test_dtypes_and_gradient(backend: str) -> None:
    x = torch.randn(8, requires_grad=True)
    got = masked_covariance(x.bfloat16(), x, backend=backend)
    assert not any(value.requires_grad for value in got)
    assert got.per_token.dtype == got.mean_y.dtype == torch.float32
    assert masked_covariance(x.double(), x, backend=backend).per_token.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"y must have the shape of x, \[2, 3\], got \[2, 4\]"),
        (
            {"y": torch.zeros(2, 4, dtype=torch.long)},
            TypeError,
            "y must have a floating dtype, got int64",
        ),
        ({"mask": torch.full((2, 4), 2.0)}, ValueError, "mask must hold nothing but 0 and 1, got 2"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, "mask must have the shape of x"),
        ({"y": [1.0]}, TypeError, "y must be a tensor, got list"),
    ],
)
def test_errors(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    x, y, mask = fixture()
    with pytest.raises(error, match="masked_covariance: " + message):
        masked_covariance(**{"x": x, "y": y, "mask": mask} | change)
