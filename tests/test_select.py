"""Selection: against sorting in Python, with ties, without a host sync, the same on one process and two."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiv import backends, select
from fastdiv.objectives.policy import clip_cov_select, kl_cov_select
from fastdiv.ops.covariance import masked_covariance

aten = torch.ops.aten

NASTY = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3.0e38, -3.0e38])


@pytest.fixture(
    scope="session", params=[n for n, absent in backends.available().items() if absent is None and n != "native"]
)
def backend(request: pytest.FixtureRequest) -> str:
    """The backends present, without "native": over tokens that is plain torch, as "reference" is."""
    return str(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def by_sorting(scores: list[float], index: list[int], valid: list[bool], k: int, largest: bool) -> set[int]:
    """Positions a sort would choose: NaN above everything, ties to the lower index."""

    def order(position: int) -> tuple[float, float, int]:
        nan = math.isnan(scores[position])
        sign = -1.0 if largest else 1.0
        return sign * nan, 0.0 if nan else sign * scores[position], index[position]

    return set(sorted((p for p in range(len(scores)) if valid[p]), key=order)[:k])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_top_k_is_a_sort(dtype: torch.dtype, data: st.DataObject, backend: str) -> None:
    values = data.draw(st.lists(NASTY | st.floats(-4, 4, width=16), max_size=12))
    scores = torch.tensor(values, dtype=dtype)
    valid = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    index = data.draw(st.permutations(range(len(values)))) if data.draw(st.booleans()) else [*range(len(values))]
    index = [i * 70_001 + (i << 40) for i in index]
    k, largest = data.draw(st.integers(0, 14)), data.draw(st.booleans())
    mask = torch.tensor(valid, dtype=torch.bool)
    got = select.top_k(
        scores, mask, k=k, largest=largest, index=torch.tensor(index, dtype=torch.int64), backend=backend
    )
    chosen = by_sorting(scores.double().tolist(), index, valid, k, largest)
    assert set(got.nonzero().flatten().tolist()) == chosen


def test_ties_go_to_the_lower_index(backend: str) -> None:
    equal = torch.zeros(6)
    assert select.top_k(equal, k=2, backend=backend).tolist() == [True, True, False, False, False, False]
    index = torch.tensor([5, 4, 3, 2, 1, 0])
    assert select.top_k(equal, k=2, index=index, backend=backend).tolist() == [False, False, False, False, True, True]
    assert select.top_k(equal, k=2, index=index, largest=False, backend=backend).sum() == 2
    signs = torch.tensor([-0.0, 0.0, 0.0, -0.0])
    assert select.top_k(signs, k=2, backend=backend).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("ratio", "valid", "k"),
    [(2e-4, 7, 1), (0.3, 7, 2), (1.0, 7, 7), (0.3, 0, 0), (0.29, 100, int(0.29 * 100)), (2e-3, 1000, 2)],
)
def test_k_from_ratio(ratio: float, valid: int, k: int, backend: str) -> None:
    mask = torch.arange(1000) < valid
    assert select.top_k(torch.randn(1000), mask, ratio=ratio, backend=backend).sum() == k
    assert select.random_subset(mask, ratio=ratio, seed=0, step=0, backend=backend).sum() == k


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_choice_follows_the_tokens(parts: int, backend: str) -> None:
    """However tokens are ordered or cut, the index says who they are."""
    scores = torch.randn(8, 16).round(decimals=1)
    mask, index = torch.rand(8, 16) < 0.8, torch.arange(128).view(8, 16)
    expected = (
        select.top_k(scores, mask, k=20, backend=backend),
        select.random_subset(mask, k=20, seed=3, step=5, backend=backend),
    )
    rows = torch.randperm(8)
    for chunks in (rows.chunk(parts), rows.flip(0).chunk(parts)):
        joined = torch.cat(chunks)
        got = (
            select.top_k(scores[joined], mask[joined], k=20, index=index[joined], backend=backend),
            select.random_subset(mask[joined], k=20, seed=3, step=5, index=index[joined], backend=backend),
        )
        for whole, cut in zip(expected, got, strict=True):
            assert torch.equal(whole[joined], cut)


def splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 2), (-1, 7), (2**63 + 5, 10**9)])
def test_random_subset_is_the_documented_hash(seed: int, step: int, backend: str) -> None:
    eligible = torch.rand(300) < 0.5
    key = splitmix((splitmix(seed % 2**64) + step) % 2**64)
    drawn = sorted(eligible.nonzero().flatten().tolist(), key=lambda i: splitmix(splitmix(i) ^ key))
    got = select.random_subset(eligible, k=25, seed=seed, step=step, backend=backend)
    assert set(got.nonzero().flatten().tolist()) == set(drawn[:25])


def test_random_subset_never_changes_between_releases(backend: str) -> None:
    got = select.random_subset(torch.ones(40, dtype=torch.bool), k=5, seed=1, step=2, backend=backend)
    assert got.nonzero().flatten().tolist() == [0, 26, 31, 36, 37]


def test_random_subset_leaves_the_global_generator_alone(backend: str) -> None:
    eligible = torch.ones(50, dtype=torch.bool)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = select.random_subset(eligible, k=10, seed=1, step=1, backend=backend)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, select.random_subset(eligible, k=10, seed=1, step=1, backend=backend))
    assert not torch.equal(first, select.random_subset(eligible, k=10, seed=1, step=2, backend=backend))
    assert not torch.equal(first, select.random_subset(eligible, k=10, seed=2, step=1, backend=backend))


def test_random_subset_is_uniform() -> None:
    """Counts of tokens and of pairs over many steps stay within five standard deviations."""
    tokens, k, steps = 8, 3, 1200
    singles: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    eligible = torch.ones(tokens, dtype=torch.bool)
    for step in range(steps):
        chosen = select.random_subset(eligible, k=k, seed=7, step=step).nonzero().flatten().tolist()
        singles.update(chosen)
        pairs.update((a, b) for a in chosen for b in chosen if a < b)
    for counts, p in ((singles, k / tokens), (pairs, k * (k - 1) / tokens / (tokens - 1))):
        spread = 5 * math.sqrt(steps * p * (1 - p))
        assert all(abs(n - steps * p) < spread for n in counts.values())
    assert len(pairs) == tokens * (tokens - 1) // 2


def test_no_value_is_ever_read_by_the_host() -> None:
    """A fake tensor has no values: reading one (item, nonzero, a branch) raises."""
    with FakeTensorMode():
        scores, mask = torch.randn(4, 8), torch.rand(4, 8) < 0.5
        assert select.top_k(scores, mask, ratio=0.1).shape == (4, 8)
        assert select.random_subset(mask, ratio=0.1, seed=0, step=0).shape == (4, 8)
        assert masked_covariance(scores, scores, mask).per_token.shape == (4, 8)
        assert kl_cov_select(scores, scores, mask, ratio=0.1).dtype == torch.bool
        assert clip_cov_select(scores, scores, scores, mask, ratio=0.1, seed=0, step=0).dtype == torch.bool


def test_k_may_be_a_tensor(backend: str) -> None:
    scores = torch.randn(30)
    for k in (0, 4, 30, 31):
        assert torch.equal(
            select.top_k(scores, k=torch.tensor(k), backend=backend), select.top_k(scores, k=k, backend=backend)
        )


class NeverWait(TorchDispatchMode):
    """Fails on what makes the host wait for a GPU: reading a value, and results as large as their values say."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        picks = args[1] if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()
        masked = any(a is not None and a.dtype == torch.bool for a in picks)
        if func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal) or masked:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("wait", [Tensor.item, Tensor.nonzero, lambda t: t[t > 0], lambda t: bool(t.any())])
def test_waiting_would_be_seen(wait: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NeverWait():
        wait(torch.ones(1))


def test_nothing_waits_for_the_device(backend: str) -> None:
    scores, mask, index = torch.randn(4, 8), torch.rand(4, 8) < 0.5, torch.arange(32).view(4, 8)
    with NeverWait():
        for k in ({"ratio": 0.1}, {"k": 3}, {"k": torch.tensor(3)}):
            select.top_k(scores, mask, backend=backend, **k)  # type: ignore[arg-type]
            select.top_k(scores, index=index, backend=backend, **k)  # type: ignore[arg-type]
            select.random_subset(mask, seed=0, step=0, backend=backend, **k)  # type: ignore[arg-type]
        masked_covariance(scores, scores, mask, backend=backend)
        masked_covariance(scores, scores.bfloat16(), backend=backend)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of k and ratio, got k=None, ratio=None"),
        ({"k": 1, "ratio": 0.5}, ValueError, "exactly one of k and ratio"),
        ({"k": 1, "backend": "gpu"}, ValueError, "^top_k: unknown backend 'gpu'; known are native, cuda"),
        ({"k": -1}, ValueError, "k must not be negative, got -1"),
        ({"k": 1.5}, TypeError, "k must be an int, got float 1.5"),
        ({"k": torch.tensor(1.0)}, TypeError, "a tensor k must be a 0-dim integer, got torch.float32"),
        ({"ratio": 0.0}, ValueError, r"ratio must be in \(0, 1\], got 0.0"),
        ({"ratio": 20}, ValueError, r"ratio must be in \(0, 1\], got 20"),
        ({"k": 1, "index": torch.zeros(4)}, TypeError, "index must be an int64 tensor, got float32"),
        (
            {"k": 1, "index": torch.zeros(3, dtype=torch.long)},
            ValueError,
            r"index must be \[4\] on cpu, got \[3\]",
        ),
        ({"k": 1, "mask": torch.full((4,), 0.5)}, ValueError, "top_k: mask must hold nothing but 0 and 1, got 0.5"),
    ],
)
def test_errors(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select.top_k(torch.zeros(4), **arguments)  # type: ignore[arg-type]


def test_errors_of_random_subset() -> None:
    with pytest.raises(
        ValueError, match=r"random_subset: eligible must hold nothing but 0 and 1, got 3 in float32 \[4\]"
    ):
        select.random_subset(torch.full((4,), 3.0), k=1, seed=0, step=0)
    with pytest.raises(TypeError, match="random_subset: step must be an int, got float"):
        select.random_subset(torch.ones(4, dtype=torch.bool), k=1, seed=0, step=0.5)  # type: ignore[arg-type]


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    log_prob = -torch.rand(24, generator=generator) * 4
    old = log_prob + torch.randn(24, generator=generator) * 0.2
    advantages = torch.randn(24, generator=generator).round()
    mask = torch.rand(24, generator=generator) < 0.8
    scores = torch.randint(0, 4, (24,), generator=generator).float()
    return {"log_prob": log_prob, "old": old, "advantages": advantages, "mask": mask, "scores": scores}


def everything(part: dict[str, Tensor], index: Tensor | None, group: object) -> dict[str, Tensor]:
    """Every selection and the covariance of the tokens of one rank, in the scope of the group."""
    log_prob, old, advantages, mask = part["log_prob"], part["old"], part["advantages"], part["mask"]
    where = {"index": index, "process_group": group}
    covariance = masked_covariance(advantages, log_prob, mask, process_group=group)  # type: ignore[arg-type]
    arguments = {"ratio": 0.2, "covariance_low": 0.0, "seed": 1, "step": 2}
    return {
        "top_k": select.top_k(part["scores"], mask, k=7, **where),  # type: ignore[arg-type]
        "smallest": select.top_k(part["scores"], mask, ratio=0.4, largest=False, **where),  # type: ignore[arg-type]
        "random": select.random_subset(mask, k=9, seed=4, step=6, **where),  # type: ignore[arg-type]
        "clip_cov": clip_cov_select(log_prob, old, advantages, mask, **arguments, **where),  # type: ignore[arg-type]
        "kl_cov": kl_cov_select(log_prob, advantages, mask, ratio=0.2, **where),  # type: ignore[arg-type]
    } | {f"covariance.{name}": value for name, value in covariance._asdict().items()}


def worker(rank: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    os.environ["FASTDIV_BACKEND"] = backend
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    results: dict[str, dict[str, Tensor]] = {}
    for cut in (5, 24):  # uneven shares, and a rank without any token
        share = slice(0, cut) if rank == 0 else slice(cut, None)
        part = {name: value[share] for name, value in batch().items()}
        results[f"joined in order {cut}"] = everything(part, None, group)
        mine = torch.arange(24)[rank::2] if cut == 5 else torch.arange(24)[share]
        part = {name: value[mine] for name, value in batch().items()}
        results[f"by index {cut}"] = everything(part, mine, group) | {"mine": mine}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_answer_of_one(backend: str, tmp_path: Path) -> None:
    if reason := backends.get(backend).refuses(torch.float32, torch.device("cpu")):
        pytest.skip(f"the ranks' tensors are on a CPU: {reason}")
    torch.multiprocessing.spawn(worker, args=(str(tmp_path), backend), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    single = everything(batch(), None, None)
    assert all(single[name].any() for name in ("top_k", "smallest", "random", "clip_cov", "kl_cov"))
    for way in ranks[0]:
        mine = [rank[way].pop("mine", None) for rank in ranks]
        for name, expected in single.items():
            got = [rank[way][name] for rank in ranks]
            if expected.dim() == 0:  # means and sums: the same number on both ranks, to the bit
                assert torch.equal(got[0], got[1]), (way, name)
                torch.testing.assert_close(got[0], expected, rtol=1e-6, atol=0)
            elif mine[0] is None:
                torch.testing.assert_close(torch.cat(got), expected, msg=f"{way} {name}")
            else:
                for part, where in zip(got, mine, strict=True):
                    torch.testing.assert_close(part, expected[where], msg=f"{way} {name}")
