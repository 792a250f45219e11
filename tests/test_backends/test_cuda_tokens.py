"""CUDA's kernels over tokens against plain torch: the same tokens to the bit, the same covariance to the last digits.

Without a GPU they run in lock-step on a CPU (csrc/cuda/lockstep.h), where threads also get their turns in shuffled
orders.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiv import select
from fastdiv.backends.cuda import tokens
from fastdiv.ops.covariance import masked_covariance

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
NASTY = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3e38, 5e-324, 1e-40, 6e-8])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STEP = 2048  # tokens that a block takes at a time


@pytest.fixture(scope="module")
def native() -> Any:
    """The kernels.  That they are absent is a failure: what is not tested must not look tested."""
    name = "fastdiv._C" if ON_GPU else "fastdiv._lockstep"
    try:
        return importlib.import_module(name).cuda
    except (ImportError, AttributeError) as error:
        how = "" if ON_GPU else ": FASTDIV_LOCKSTEP=1 python setup.py build_ext --inplace"
        pytest.fail(f"{name} has no CUDA kernels ({error}){how}")


@contextlib.contextmanager
def order(native: Any, seed: int) -> Iterator[None]:
    """Threads get their turns in an order that is shuffled by `seed`, or for 0 in turn; a GPU does as it likes."""
    if not ON_GPU:
        native.schedule(seed)
    yield
    if not ON_GPU:
        native.schedule(0)


@pytest.fixture(params=[0] if ON_GPU else [0, 7])
def kernels(native: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The kernels, with threads in turn, then in a shuffled order."""
    with order(native, request.param):
        yield native


def top_k(kernels: Any, scores: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """What both choose, which has to be the same."""
    scores, mask = scores.to(DEVICE), None if mask is None else mask.to(DEVICE)
    options = {name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in options.items()}
    plain = select.top_k(scores, mask, backend="reference", **options)
    k, largest = options.get("k", options.get("ratio")), options.get("largest", True)
    chosen = tokens.smallest(kernels, scores, mask, options.get("index"), scores, k=k, largest=largest)
    assert chosen.dtype == torch.bool and torch.equal(plain, chosen)
    return chosen


def random_subset(kernels: Any, eligible: Tensor, index: Tensor | None = None, **options: Any) -> Tensor:
    eligible, index = eligible.to(DEVICE), None if index is None else index.to(DEVICE)
    plain = select.random_subset(eligible, index=index, backend="reference", **options)
    k, drawn = options.get("k", options.get("ratio")), select._draw(options["seed"], options["step"])
    chosen = tokens.smallest(kernels, None, eligible, index, eligible, k=k, drawn=drawn)
    assert chosen.dtype == torch.bool and torch.equal(plain, chosen)
    return chosen


def scattered(count: int) -> Tensor:
    """Numbers of tokens in a scope that is much larger."""
    return torch.randperm(count) * 70_001 + (torch.randperm(count) << 45)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 31, 512, 1000, 2049, 4100])
def test_top_k_chooses_the_same(kernels: Any, dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(count)
    picks = NASTY.double()[torch.randint(0, len(NASTY), (count,))]
    scores = torch.where(torch.rand(count) < 0.5, picks, torch.randn(count).round(decimals=1)).to(dtype)
    mask, far = torch.rand(count) < 0.7, scattered(count)
    some = [{"k": k} for k in (0, 1, count // 3, torch.tensor(count // 2, dtype=torch.int32), count + 3, 2**62)]
    for i, options in enumerate(some + [{"ratio": ratio} for ratio in (1e-9, 0.29, 1.0)]):
        top_k(kernels, scores, (None, mask)[i % 2], index=(None, far)[i // 2 % 2], largest=i % 3 > 0, **options)
    for k in (torch.tensor(-4), torch.tensor(1 << 40), torch.tensor(7, dtype=torch.uint8)):
        top_k(kernels, scores, mask, k=k)
    assert not top_k(kernels, scores, torch.zeros(count, dtype=torch.bool), ratio=1.0).any()


@pytest.mark.parametrize("count", [100_003, 256 * STEP + 5])
def test_more_tokens_than_threads(native: Any, count: int) -> None:
    """More than one step of a block, in the latter case."""
    torch.manual_seed(0)
    scores, mask = torch.randn(count).round(decimals=3), torch.rand(count) < 0.9
    top_k(native, scores, mask, k=count // 5)
    random_subset(native, mask, seed=1, step=2, ratio=0.2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_number_has_its_place(kernels: Any, dtype: torch.dtype) -> None:
    """One number more at a time: subnormals, infinities, the two zeros and NaNs of any sign and payload."""
    scores = torch.cat([NASTY.double(), -NASTY.double()]).to(dtype)
    if dtype == torch.float32:
        scores = torch.cat([scores, torch.tensor([0x7F800001, -1, -0x00400000], dtype=torch.int32).view(dtype)])
    for k in range(1, len(scores)):
        assert top_k(kernels, scores, k=k).sum() == k
    top_k(kernels, scores, k=9, largest=False)


@pytest.mark.parametrize("k", [1, 511, 512, 513, STEP - 1, STEP, STEP + 1, 4999])
def test_ties_across_threads_and_blocks(kernels: Any, k: int) -> None:
    zeros = torch.zeros(5000)
    assert torch.equal(top_k(kernels, zeros, k=k).cpu(), torch.arange(5000) < k)
    top_k(kernels, zeros, k=k, index=(5000 - torch.arange(5000)) << 50)
    top_k(kernels, zeros, k=k, index=torch.arange(5000) // 2)  # numbers given twice: both or neither


@pytest.mark.parametrize("k", [10, 600, 1000, 1500])
def test_close_scores(kernels: Any, k: int) -> None:
    """Many share the first digits, so that all digits decide, and neighbours differ in the last bit of one."""
    scores = 1 + torch.rand(2500, generator=torch.Generator().manual_seed(k))
    top_k(kernels, scores, k=k)
    top_k(kernels, scores + scores.double() * 1e-12, k=k, largest=False)


def test_the_least_number_is_not_drawn_by_none(kernels: Any) -> None:
    """Token 5 draws 0, the smallest there is: k = 0 does not take it, k = 1 takes it before all others."""
    eligible = torch.ones(9, dtype=torch.bool, device=DEVICE)
    drawn = int(select._mix(torch.tensor(5))) ^ -select._signed(select._INCREMENT)
    for k in (0, 1):
        chosen = tokens.smallest(kernels, None, eligible, None, eligible, k=k, drawn=drawn)
        assert chosen.nonzero().flatten().tolist() == [5] * k


@pytest.mark.parametrize("seed", [0, -1, 2**63 + 5])
def test_random_subset_chooses_the_same(kernels: Any, seed: int) -> None:
    torch.manual_seed(0)
    for count in (0, 1, 31, 3000):
        eligible, index = torch.rand(count) < 0.6, scattered(count)
        for options in ({"k": 0}, {"k": 17}, {"k": 2**62}, {"ratio": 0.3}):
            random_subset(kernels, eligible, seed=seed, step=seed % 7, **options)
            random_subset(kernels, eligible, index, seed=seed, step=3, **options)
            random_subset(kernels, eligible, torch.arange(count) // 2, seed=seed, step=3, **options)


def covariance(kernels: Any, x: Tensor, y: Tensor, mask: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """(plain torch's, the kernels') fields."""
    x, y, mask = x.to(DEVICE), y.to(DEVICE), None if mask is None else mask.to(DEVICE)
    plain = masked_covariance(x, y, mask, backend="reference")
    own = tokens.covariance(kernels, x, y, mask, plain.per_token.dtype, None)
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(plain, own, strict=True))
    return list(zip(plain, own, strict=True))


def test_shapes_and_strides_do_not_matter(kernels: Any) -> None:
    torch.manual_seed(0)
    scores, mask, index = torch.randn(9, 14).round(decimals=1), torch.rand(9, 14) < 0.5, torch.randperm(126).view(9, 14)
    views = (
        lambda t: t.T,
        lambda t: t[:, 1:-1],
        lambda t: t[::2, ::3],
        lambda t: t[:, :1].expand(-1, 14),
        lambda t: t.flatten()[3:-2],  # nothing is copied, and no address is a multiple of 16
    )
    for view in views:
        assert top_k(kernels, view(scores), view(mask), k=11).shape == view(scores).shape
        top_k(kernels, view(scores), view(mask), k=11, index=view(index))
        random_subset(kernels, view(mask), view(index), k=11, seed=0, step=0)
        for plain, own in covariance(kernels, view(scores), view(index.half()), view(mask)):
            torch.testing.assert_close(own, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("count", [0, 1, 31, 1000, 5001])
def test_covariance_is_as_exact(kernels: Any, dtype: torch.dtype, offset: float, count: int) -> None:
    """In float64: float32 results would hide what the kernels lose."""
    torch.manual_seed(count)
    offset = min(offset, 1e4) if dtype == torch.float16 else offset
    x, y = (torch.randn(count) + offset).to(dtype), torch.randn(count, dtype=torch.float64) * 3 - offset
    no_one, last = torch.zeros(count, dtype=torch.bool), torch.arange(count) == count - 1
    for mask in (None, torch.rand(count) < 0.6, torch.arange(count) >= 600, last, no_one):
        fields = covariance(kernels, x, y, mask)
        torch.testing.assert_close(*fields[1], rtol=1e-12, atol=1e-14)
        for plain, own in fields:
            torch.testing.assert_close(own, plain, rtol=1e-12, atol=1e-14 * max(offset, 1.0))


@pytest.mark.parametrize("count", [100_003, 512 * STEP + 5])
def test_covariance_of_more_tokens_than_threads(native: Any, count: int) -> None:
    torch.manual_seed(0)
    x, y, mask = torch.randn(count), torch.randn(count) + 2, torch.rand(count) < 0.9
    for plain, own in covariance(native, x.double(), y.bfloat16(), mask):
        torch.testing.assert_close(own, plain, rtol=1e-11, atol=1e-14)


def test_a_shift_far_from_the_mean_costs_no_digits(kernels: Any) -> None:
    """What every thread meets first is elsewhere: all that follows is summed about the wrong number."""
    torch.manual_seed(0)
    x, y = torch.randn(STEP, dtype=torch.float64), torch.randn(STEP, dtype=torch.float64)
    x[:512], y[:512] = 1e6, -1e6
    for plain, own in covariance(kernels, x, y):
        torch.testing.assert_close(own, plain, rtol=1e-13, atol=1e-11)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 600, 2999])
def test_what_is_not_finite_shows_only_where_it_is_valid(kernels: Any, bad: float, where: int) -> None:
    x, y, mask = torch.arange(3000.0), torch.arange(3000.0) % 7, torch.arange(3000) != where
    clean = [own for _, own in covariance(kernels, x, y, mask)]
    x[where] = bad
    fields = covariance(kernels, x, y)
    assert not fields[1][1].isfinite()
    for plain, own in fields:
        torch.testing.assert_close(own, plain, equal_nan=True)
    for (_, own), expected in zip(covariance(kernels, x, y, mask), clean, strict=True):
        assert torch.equal(own, expected)


def test_repeats_to_the_bit(native: Any) -> None:
    """Whichever thread comes first."""
    torch.manual_seed(0)
    x, y, mask = (t.to(DEVICE) for t in (torch.randn(9000), torch.randn(9000) + 100, torch.rand(9000) < 0.5))
    results = []
    for seed in range(5):
        with order(native, seed):
            results.append(tokens.covariance(native, x, y, mask, torch.float64, None))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Ranks:
    """Two ranks, each a thread: what is all-reduced meets here."""

    def __init__(self) -> None:
        self.here, self.barrier = threading.local(), threading.Barrier(2)
        self.given: dict[int, Tensor] = {}

    def all_reduce_sum(self, value: Tensor, process_group: Any) -> Tensor:
        self.given[self.here.rank] = value.clone()
        self.barrier.wait(60)
        value.copy_(self.given[0] + self.given[1])
        self.barrier.wait(60)
        return value

    def both(self, of_rank: Callable[[int], Any]) -> list[Any]:
        results: dict[int, Any] = {}

        def run(rank: int) -> None:
            self.here.rank = rank
            results[rank] = of_rank(rank)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[rank] for rank in range(2)]


@pytest.mark.parametrize("cut", [700, 0, 3000])
def test_two_ranks_give_the_answer_of_one(kernels: Any, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    torch.manual_seed(0)
    scores, y, mask = torch.randn(3000).round(decimals=1), torch.randn(3000), torch.rand(3000) < 0.7
    scores, y, mask = scores.to(DEVICE), y.to(DEVICE), mask.to(DEVICE)
    drawn, plain = select._draw(4, 6), masked_covariance(scores, y, mask, backend="reference")
    ranks = Ranks()
    for module in ("fastdiv.backends.tokens", "fastdiv.backends.cuda.tokens"):
        monkeypatch.setattr(f"{module}.all_reduce_sum", ranks.all_reduce_sum)

    def chosen(rank: int) -> list[Tensor]:
        share = slice(0, cut) if rank == 0 else slice(cut, None)
        s, m = scores[share], mask[share]
        scope = {"offset": torch.tensor(rank * cut, device=DEVICE), "process_group": ranks}
        return [
            tokens.smallest(kernels, s, m, None, s, k=700, largest=True, **scope),
            tokens.smallest(kernels, s, m, None, s, k=0.4, **scope),
            tokens.smallest(kernels, None, m, None, m, k=900, drawn=drawn, **scope),
            *tokens.covariance(kernels, s, y[share], m, torch.float32, ranks),  # type: ignore[arg-type]
        ]

    for got, expected in zip(
        zip(*ranks.both(chosen), strict=True),
        (
            select.top_k(scores, mask, k=700, backend="reference"),
            select.top_k(scores, mask, ratio=0.4, largest=False, backend="reference"),
            select.random_subset(mask, k=900, seed=4, step=6, backend="reference"),
            *plain,
        ),
        strict=True,
    ):
        if expected.dim() == 0:  # the same number on both ranks, to the bit
            assert torch.equal(got[0], got[1])
            torch.testing.assert_close(got[0], expected, rtol=1e-6, atol=0)
        else:
            torch.testing.assert_close(torch.cat(got), expected, rtol=1e-6, atol=1e-9)


def test_few_launches(native: Any) -> None:
    """Beside these, each call sets one array to zero."""
    names: list[str] = []

    def counted(name: str) -> Callable[..., None]:
        return lambda *arguments: (names.append(name), getattr(native, name)(*arguments))[1]

    kernels = SimpleNamespace(
        **{name: getattr(native, name) for name in dir(native)}
        | {name: counted(name) for name in ("moments", "centre", "count_digits", "choose")}
    )
    mask, index = torch.ones(300, dtype=torch.bool, device=DEVICE), torch.arange(300, device=DEVICE)
    scores = torch.zeros(300, device=DEVICE)
    for call, expected in (
        (lambda: tokens.covariance(kernels, scores, scores, mask, torch.float32, None), 2),
        (lambda: tokens.smallest(kernels, scores, mask, None, scores, k=7), 3 + 1 + 1),
        (lambda: tokens.smallest(kernels, scores, mask, index, scores, k=7), 3 + 6 + 1),
        (lambda: tokens.smallest(kernels, scores.double(), mask, index, scores, k=7), 6 + 6 + 1),
        (lambda: tokens.smallest(kernels, None, mask, None, mask, k=7), 6 + 1),
    ):
        names.clear()
        call()
        assert len(names) == expected


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_a_graph_captures_it_and_nothing_waits(native: Any) -> None:
    torch.manual_seed(0)
    scores, mask = torch.randn(9000, device=DEVICE), torch.rand(9000, device=DEVICE) < 0.7
    k, drawn = torch.tensor(100, device=DEVICE), select._draw(0, 0)

    def everything() -> tuple[Tensor, ...]:
        return (
            tokens.smallest(native, scores, mask, None, scores, k=k, largest=True),
            tokens.smallest(native, None, mask, None, mask, k=0.3, drawn=drawn),
            *tokens.covariance(native, scores, scores, mask, torch.float64, None),
        )

    everything()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for wanted in (100, 300):
        k.fill_(wanted)
        scores.normal_()
        graph.replay()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = everything()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
        assert captured[0].sum() == wanted
