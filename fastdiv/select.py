"""Selection of tokens: exactly k of them, the same ones however the batch is split, ordered or sharded.

Both selectors find the k smallest integer keys by radix selection: a histogram of 11-bit digits per pass,
summed over the ranks of the process group. That is integer arithmetic on counts, so the answer is exact and
identical on all ranks; it needs neither a sort nor a gather of the tokens, and it never waits for the
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiv import accept, plain
from fastdiv.accept import describe
from fastdiv.ops.covariance import all_reduce_sum, check_alike, everyone, token_kernels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DIGIT = 11
_UINT64 = (1 << 64) - 1


@torch.no_grad()
def top_k(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    k: int | Tensor | None = None,
    ratio: float | None = None,
    largest: bool = True,
    index: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """The k valid tokens with the largest (or smallest) score; equal scores are taken in order of their
    global index.

    -0.0 equals 0.0; NaN at a valid token counts as larger than everything.

    Arguments:
        scores: [*], any floating dtype.
        mask: [*], bool or 1 and 0, the tokens to choose from; None: all.
        k: how many over the whole scope (int, or 0-dim integer tensor); more than there are takes all.
        ratio: in (0, 1], in place of k: see `k_from_ratio`, with the number of valid tokens. Exactly one of
            the two.
        largest: False takes the smallest scores.
        index: [*], int64, non-negative, the token's number in the whole scope, each number once; None: its
            position in this call, with a process group in the concatenation of the ranks' tokens. Give it
            to make ties independent of how the batch is cut.
        process_group: the scope is the union of the tokens of all its ranks (a few all-reduces of 2048
            counts); None: the tokens of this call.
        backend: "cuda" and "triton" have kernels of their own (a launch a digit); the others are the same plain
            torch. None: theirs for CUDA tensors where one is present, unless torch.compile traces the call; else
            plain torch. The choice of tokens is the same.

    Returns:
        bool [*], True for the selected tokens of this call.

    Raises:
        TypeError, ValueError: wrong dtype or shape, not exactly one of k and ratio, k or ratio out of range; a backend
            that is unknown or does not run on the device.
        RuntimeError: a backend that is absent.
    """
    mask = check_alike("top_k", mask, {"scores": scores}, precise=False)
    _check_index("top_k", index, scores)
    wanted = _check_k("top_k", k, ratio)
    first = _first_index(scores, process_group) if index is None else None
    if kernels := token_kernels("top_k", scores.device, backend):
        plain.check("top_k", {"scores": scores, "mask": mask, "index": index, "k": k})
        return kernels.smallest(
            scores, mask, index, scores, k=wanted, largest=largest, offset=first, process_group=process_group
        )
    valid = everyone(scores) if mask is None else mask
    index = _positions(scores, first) if index is None else index
    need = _how_many(all_reduce_sum(valid.sum(), process_group), wanted)
    key, bits = _ordered_bits(scores)
    return _k_smallest([(~key if largest else key, bits), (index, 64)], valid, need, process_group)


@torch.no_grad()
def random_subset(
    eligible: Tensor,
    *,
    k: int | Tensor | None = None,
    ratio: float | None = None,
    seed: int,
    step: int,
    index: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """A uniformly random subset of k eligible tokens, decided by (seed, step, global token index) alone.

    Every token draws the 64-bit number hash(seed, step, index), and the k smallest win. For fixed seed and
    step the hash is a bijection of the index, so there are no ties. No random generator is read or
    advanced.

    Arguments:
        eligible: [*], bool or 1 and 0.
        k, ratio: as in `top_k`; a ratio refers to the number of eligible tokens of the scope.
        seed, step: integers; change `step` with every optimiser step, otherwise the same tokens win again.
        index: [*], int64, as in `top_k`; give it to make the choice independent of how the batch is cut.
        process_group, backend: as in `top_k`.

    Returns:
        bool [*], True for the chosen tokens of this call.

    Raises:
        TypeError, ValueError, RuntimeError: as `top_k`; TypeError: seed or step no integer.
    """
    eligible = accept.mask("random_subset", "eligible", eligible)
    seed, step = (accept.integer("random_subset", name, n) for name, n in (("seed", seed), ("step", step)))
    _check_index("random_subset", index, eligible)
    wanted = _check_k("random_subset", k, ratio)
    first = _first_index(eligible, process_group) if index is None else None
    drawn = _draw(seed, step)
    if kernels := token_kernels("random_subset", eligible.device, backend):
        plain.check("random_subset", {"eligible": eligible, "index": index, "k": k})
        return kernels.smallest(
            None, eligible, index, eligible, k=wanted, drawn=drawn, offset=first, process_group=process_group
        )
    index = _positions(eligible, first) if index is None else index
    need = _how_many(all_reduce_sum(eligible.sum(), process_group), wanted)
    return _k_smallest([(_mix(_mix(index) ^ drawn), 64)], eligible, need, process_group)


def k_from_ratio(ratio: float, count: Tensor) -> Tensor:
    """How many tokens a ratio means: max(1, int(ratio * count)), and 0 when there are none.

    The floor of one token is the rule of the entropy-mechanism paper's code (arXiv 2505.22617): on a small
    scope the effective ratio exceeds the nominal one. `count` is a 0-dim integer tensor; so is the result,
    on the same device.
    """
    ratio = _check_ratio("k_from_ratio", ratio)
    return (count.double() * ratio).to(torch.int64).clamp(min=1).minimum(count)


def _check_k(operator: str, k: int | Tensor | None, ratio: float | None) -> int | float | Tensor:
    """The one of the two that is given; a ratio as a float, k as it came."""
    if (k is None) == (ratio is None):
        raise ValueError(f"{operator}: give exactly one of k and ratio, got k={k}, ratio={ratio}")
    if ratio is not None:
        return _check_ratio(operator, ratio)
    if isinstance(k, Tensor):
        if k.dim() != 0 or k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
            raise TypeError(f"{operator}: a tensor k must be a 0-dim integer, got {k.dtype} {list(k.shape)}")
        return k
    k = accept.integer(operator, "k", k)
    if k < 0:
        raise ValueError(f"{operator}: k must not be negative, got {k}")
    return k


def _check_ratio(operator: str, ratio: float) -> float:
    ratio = accept.number(operator, "ratio", ratio)
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"{operator}: ratio must be in (0, 1], got {ratio}")
    return ratio


def _how_many(count: Tensor, wanted: int | float | Tensor) -> Tensor:
    """k of `count` tokens."""
    if isinstance(wanted, float):
        return k_from_ratio(wanted, count)
    if isinstance(wanted, Tensor):
        return wanted.to(torch.int64).clamp(min=0).minimum(count)
    return count.clamp(max=wanted)


def _check_index(operator: str, index: Tensor | None, like: Tensor) -> None:
    if index is None:
        return
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError(f"{operator}: index must be an int64 tensor, got {describe(index)}")
    if index.shape != like.shape or index.device != like.device:
        raise ValueError(
            f"{operator}: index must be {list(like.shape)} on {like.device}, got {list(index.shape)} on {index.device}"
        )


def _first_index(like: Tensor, process_group: ProcessGroup | None) -> Tensor | None:
    """0-dim, how many tokens the ranks before this one have; None without a group."""
    if process_group is None:
        return None
    sizes = torch.zeros(process_group.size(), dtype=torch.int64, device=like.device)
    sizes[process_group.rank()] = like.numel()
    return all_reduce_sum(sizes, process_group)[: process_group.rank()].sum()


def _positions(like: Tensor, first: Tensor | None) -> Tensor:
    index = torch.arange(like.numel(), device=like.device).view(like.shape)
    return index if first is None else index + first


def _ordered_bits(scores: Tensor) -> tuple[Tensor, int]:
    """Integer keys in the order of the scores, read as unsigned numbers, and their width."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = torch.where(scores.isnan(), torch.nan, scores) + 0.0  # one NaN; -0.0 becomes 0.0
    width = 64 if scores.dtype == torch.float64 else 32
    bits = scores.view(torch.int64 if width == 64 else torch.int32)
    # negative floats order backwards: flip all their bits; of the others only the sign bit
    return (bits ^ (bits >> (width - 1) | torch.iinfo(bits.dtype).min)).to(torch.int64), width


def _k_smallest(
    keys: Sequence[tuple[Tensor, int]], alive: Tensor, need: Tensor, process_group: ProcessGroup | None
) -> Tensor:
    """The `need` lexicographically smallest tuples of keys among the alive tokens, most significant digit
    first."""
    chosen = torch.zeros_like(alive)
    for key, bits in keys:
        for shift in reversed(range(0, bits, _DIGIT)):
            # the shift extends the sign; cut to one digit, negative keys come last, as unsigned numbers do
            digit = key >> shift & ((1 << _DIGIT) - 1)
            histogram = key.new_zeros(1 << _DIGIT).scatter_add_(0, digit.flatten(), alive.flatten().long())
            histogram = all_reduce_sum(histogram, process_group)
            up_to = histogram.cumsum(0)
            pivot = (up_to < need).sum()
            chosen |= alive & (digit < pivot)
            alive = alive & (digit == pivot)
            # gather, because indexing with a 0-dim tensor would wait for its value
            need = need - (up_to - histogram).gather(0, pivot.view(1)).squeeze(0)
    return chosen | (alive & (need > 0))


def _draw(seed: int, step: int) -> int:
    """A key for (seed, step), as int64. A token's 64 bits are two rounds of the splitmix64 finaliser around it."""
    return _signed(_mix_int(_mix_int(seed & _UINT64) + step & _UINT64))


_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_INCREMENT = 0x9E3779B97F4A7C15


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(_INCREMENT)
    for shift, multiplier in _MULTIPLIERS:
        x = (x ^ _logical_shift(x, shift)) * _signed(multiplier)
    return x ^ _logical_shift(x, 31)


def _mix_int(x: int) -> int:
    x = x + _INCREMENT & _UINT64
    for shift, multiplier in _MULTIPLIERS:
        x = (x ^ x >> shift) * multiplier & _UINT64
    return x ^ x >> 31


def _logical_shift(x: Tensor, shift: int) -> Tensor:
    return x >> shift & ((1 << (64 - shift)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
