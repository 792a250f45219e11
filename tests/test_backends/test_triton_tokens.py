"""The kernels over tokens against plain torch: the same tokens to the bit, the same covariance to the last digits."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiv import backends, select
from fastdiv.ops.covariance import masked_covariance

ABSENT = backends.available()["triton"]
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"triton: {ABSENT}")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NASTY = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3e38, 5e-324, 1e-40, 6e-8])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def same(function: Any, *tensors: Tensor | None, **options: Any) -> Tensor:
    """What both backends choose, which has to be the same."""
    moved = [t if t is None else t.to(DEVICE) for t in tensors]
    options = {name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in options.items()}
    plain = function(*moved, backend="reference", **options)
    chosen = function(*moved, backend="triton", **options)
    assert chosen.dtype == torch.bool and torch.equal(plain, chosen)
    return chosen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8))
def test_top_k_chooses_the_same(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    tokens = (0, 1, 5, 64, 65, 150, 200, 300)[seed]
    picks = NASTY.double()[torch.randint(0, len(NASTY), (tokens,))]
    scores = torch.where(torch.rand(tokens) < 0.5, picks, torch.randn(tokens).round(decimals=1)).to(dtype)
    mask = None if seed % 4 == 3 else torch.rand(tokens) < 0.7
    far = torch.randperm(tokens) * 70_001 + (torch.randperm(tokens) << 45)
    k = (0, 1, tokens // 3, torch.tensor(tokens // 2, dtype=torch.int32), tokens + 3)
    wanted = [{"k": some} for some in k] + [{"ratio": some} for some in (1e-9, 0.29, 1.0)]
    for i, options in enumerate(wanted[seed % 2 :: 2]):
        same(select.top_k, scores, mask, index=(None, far)[(i + seed // 2) % 2], largest=i < 2, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_number_has_its_place(dtype: torch.dtype) -> None:
    """One number more at a time: subnormals, infinities, the two zeros and NaNs of any sign and payload."""
    scores = torch.cat([NASTY.double(), -NASTY.double()]).to(dtype)
    if dtype == torch.float32:
        scores = torch.cat([scores, torch.tensor([0x7F800001, -1, -0x00400000], dtype=torch.int32).view(dtype)])
    for k in range(1, len(scores), 2):
        assert same(select.top_k, scores, k=k).sum() == k
    same(select.top_k, scores, k=9, largest=False)


@pytest.mark.parametrize("k", [1, 63, 64, 65, 199])
def test_ties_across_blocks_and_programs(k: int) -> None:
    chosen = same(select.top_k, torch.zeros(200), k=k)
    assert torch.equal(chosen.cpu(), torch.arange(200) < k)
    same(select.top_k, torch.zeros(200), k=k, index=(200 - torch.arange(200)) << 50)
    same(select.top_k, torch.zeros(200), k=k, index=torch.arange(200) // 2)  # numbers given twice: both or neither


@pytest.mark.parametrize("k", [10, 60, 100, 150])
def test_close_scores(k: int) -> None:
    """Many share the first digits, so that all digits decide, and neighbours differ in the last bit of one."""
    scores = 1 + torch.rand(200, generator=torch.Generator().manual_seed(k))
    same(select.top_k, scores, k=k)
    same(select.top_k, (scores + scores.double() * 1e-12), k=k, largest=False)


def test_the_least_number_is_not_drawn_by_none() -> None:
    """Token 5 draws 0, the smallest there is: k = 0 does not take it, k = 1 takes it before all others."""
    from fastdiv.backends.triton import selection

    eligible = torch.ones(9, dtype=torch.bool, device=DEVICE)
    drawn = int(select._mix(torch.tensor(5))) ^ -select._signed(select._INCREMENT)
    for k in (0, 1):
        chosen = selection.smallest(None, eligible, None, eligible, k=k, drawn=drawn)
        assert chosen.nonzero().flatten().tolist() == [5] * k


@pytest.mark.parametrize("seed", [0, -1, 2**63 + 5])
def test_random_subset_chooses_the_same(seed: int) -> None:
    torch.manual_seed(0)
    for tokens in (0, 1, 200):
        eligible, index = torch.rand(tokens) < 0.6, torch.randperm(tokens) << 40
        for options in ({"k": 0}, {"k": 17}, {"k": 999}, {"ratio": 0.3}):
            same(select.random_subset, eligible, seed=seed, step=seed % 7, **options)
            same(select.random_subset, eligible, seed=seed, step=3, index=index, **options)
            same(select.random_subset, eligible, seed=seed, step=3, index=torch.arange(tokens) // 2, **options)


def test_shapes_and_strides_do_not_matter() -> None:
    torch.manual_seed(0)
    scores, mask, index = torch.randn(9, 14).round(decimals=1), torch.rand(9, 14) < 0.5, torch.randperm(126).view(9, 14)
    for view in (lambda t: t.T, lambda t: t[:, 1:-1], lambda t: t[::2, ::3], lambda t: t[:, :1].expand(-1, 14)):
        assert same(select.top_k, view(scores), view(mask), k=11).shape == view(scores).shape
        same(select.top_k, view(scores), view(mask), k=11, index=view(index))
        same(select.random_subset, view(mask), k=11, seed=0, step=0)
        x, y, m = (view(t).to(DEVICE) for t in (scores, index.float(), mask))
        plain = masked_covariance(x, y, m, backend="reference").per_token
        torch.testing.assert_close(masked_covariance(x, y, m, backend="triton").per_token, plain)


def moments(x: Tensor, y: Tensor, mask: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """(plain torch's, the kernels') fields."""
    x, y, mask = x.to(DEVICE), y.to(DEVICE), None if mask is None else mask.to(DEVICE)
    results = [masked_covariance(x, y, mask, backend=name) for name in ("reference", "triton")]
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(*results, strict=True))
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("tokens", [1, 16, 33, 100, 300])
def test_covariance_is_as_exact(dtype: torch.dtype, offset: float, tokens: int) -> None:
    """In float64: float32 results would hide what the kernels lose."""
    torch.manual_seed(tokens)
    offset = min(offset, 1e4) if dtype == torch.float16 else offset
    x, y = (torch.randn(tokens) + offset).to(dtype), torch.randn(tokens, dtype=torch.float64) * 3 - offset
    for mask in (None, torch.rand(tokens) < 0.6, torch.arange(tokens) >= 20, torch.arange(tokens) == tokens - 1):
        fields = moments(x, y, mask)
        torch.testing.assert_close(*fields[1], rtol=1e-12, atol=1e-14)
        for plain, own in fields:
            torch.testing.assert_close(own, plain, rtol=1e-12, atol=1e-14 * max(offset, 1.0))


def test_a_shift_far_from_the_mean_costs_no_digits() -> None:
    """The first block is elsewhere, and constant: all that follows is summed about the wrong number."""
    torch.manual_seed(0)
    x, y = torch.randn(300, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    x[:16], y[:16] = 1e6, -1e6
    for plain, own in moments(x, y):
        torch.testing.assert_close(own, plain, rtol=1e-13, atol=1e-11)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 40, 99])
def test_what_is_not_finite_and_valid_shows_as_in_plain_torch(bad: float, where: int) -> None:
    x, y = torch.arange(100.0), torch.arange(100.0) % 7
    x[where] = bad
    fields = moments(x, y)
    assert not fields[1][1].isfinite()
    for plain, own in fields:
        torch.testing.assert_close(own, plain, equal_nan=True)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels as they are launched."""
    from fastdiv.backends.triton import launch

    names: list[str] = []
    run = launch.run

    def count(kernel: Any, *arguments: Any, **options: Any) -> None:
        names.append(kernel.__name__)
        run(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "run", count)
    return names


def test_few_launches(launched: list[str]) -> None:
    """Beside these, a selection sets one array to zero.  Plain torch: 26, 164, 163, 212 and 132 operations."""
    mask, index = torch.ones(300, dtype=torch.bool, device=DEVICE), torch.arange(300, device=DEVICE)
    scores = torch.zeros(300, device=DEVICE)
    for call, expected in (
        (lambda: masked_covariance(scores, scores, mask, backend="triton"), 2),
        (lambda: select.top_k(scores, mask, k=7, backend="triton"), 3 + 1 + 1),
        (lambda: select.top_k(scores, mask, k=7, index=index, backend="triton"), 3 + 6 + 1),
        (lambda: select.top_k(scores.double(), mask, k=7, index=index, backend="triton"), 6 + 6 + 1),
        (lambda: select.random_subset(mask, k=7, seed=0, step=0, backend="triton"), 6 + 1),
    ):
        launched.clear()
        call()
        assert len(launched) == expected


def test_who_is_asked(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.zeros(3)
    calls = (
        lambda **name: masked_covariance(scores, scores, **name),
        lambda **name: select.top_k(scores, k=1, **name),
        lambda **name: select.random_subset(scores == 0, k=1, seed=0, step=0, **name),
    )
    monkeypatch.delenv("FASTDIV_BACKEND", raising=False)
    for call in calls:
        call()
        call(backend="reference")
        assert not launched
        with pytest.raises(ValueError, match="unknown backend 'tritn', did you mean 'triton'"):
            call(backend="tritn")
        monkeypatch.setenv("FASTDIV_BACKEND", "triton")
        call(backend="reference")
        assert not launched
        if DEVICE.type == "cpu":
            call()
            assert launched
        else:
            with pytest.raises(ValueError, match="'triton' was asked for but it runs on cuda devices, got cpu"):
                call()
        launched.clear()
        monkeypatch.delenv("FASTDIV_BACKEND")


def test_a_compiled_call_is_plain_torch(launched: list[str]) -> None:
    """The compiler fuses it by its own means, on a GPU too."""
    torch.manual_seed(0)
    scores, mask = torch.randn(30, device=DEVICE), torch.rand(30, device=DEVICE) < 0.5
    compiled = torch.compile(lambda s, m: select.top_k(s, m, k=4), backend="eager", fullgraph=True)
    assert torch.equal(compiled(scores, mask), select.top_k(scores, mask, k=4, backend="reference"))
    assert not launched


def test_triton_is_loaded_by_the_first_kernel_alone() -> None:
    code = """
import sys, torch, fastdiv
from fastdiv import select
select.top_k(torch.zeros(3), k=1, backend="reference")
fastdiv.masked_covariance(torch.zeros(3), torch.zeros(3))
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
