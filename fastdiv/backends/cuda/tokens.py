"""Masked moments and selection of tokens by the kernels of csrc/cuda/covariance.cu and selection.cu.

`fastdiv.ops.covariance` and `fastdiv.select` say in plain torch what they are; here they take a few launches, and none
waits for the device.  `module` has the kernels: `fastdiv._C.cuda`, or for CPU tensors `fastdiv._lockstep.cuda`.

Bytes: x, y and mask are read twice; keys and mask once a digit, and nothing any more once the digits so far decide, and
then once to mark.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiv.backends.addresses import DTYPES
from fastdiv.backends.cuda import queue
from fastdiv.backends.tokens import as_bytes, digits, of_all_ranks, plain
from fastdiv.ops.covariance import all_reduce_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DTYPES = {**DTYPES, torch.float64: 3}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def covariance(
    module: Any, x: Tensor, y: Tensor, mask: Tensor | None, dtype: torch.dtype, process_group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `MaskedCovariance`, in two launches without a process group, and one that writes a zero."""
    shape, device, where = x.shape, x.device, queue(x.device)
    x, y, mask = plain(x), plain(y), as_bytes(mask)
    tokens = module.Pairs(_address(x), _DTYPES[x.dtype], _address(y), _DTYPES[y.dtype], _address(mask), x.numel())
    total, parts = torch.empty(1 + module.most_parts, module.pair_sums, dtype=torch.float64, device=device).split(
        [1, module.most_parts]
    )
    arrived = torch.zeros(1, dtype=torch.int32, device=device)
    module.moments(tokens, _address(parts), _address(arrived), _address(total), *where)
    if process_group is not None:
        total.copy_(of_all_ranks(total.T, process_group))
    per_token = torch.empty(shape, dtype=dtype, device=device)
    scalars = torch.empty(3, dtype=dtype, device=device)
    count = torch.empty((), dtype=torch.int64, device=device)
    results = _address(per_token), _address(scalars), _address(count)
    module.centre(tokens, _address(total), _DTYPES[dtype], *results, *where)
    return per_token, scalars[0], scalars[1], scalars[2], count


def smallest(
    module: Any,
    scores: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    like: Tensor,
    *,
    k: int | float | Tensor,
    largest: bool = False,
    drawn: int = 0,
    offset: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Bool, shaped `like`: the k smallest by (key, index), where the key is the score, or a random number from `drawn`.

    A float k is a ratio.  Launches: one for zeros, one for each of the `digits`, one to mark.
    """
    count, device, where = like.numel(), like.device, queue(like.device)
    turns = digits(count, scores, index, offset)
    scores = None if scores is None else plain(scores)
    mask, index = as_bytes(mask), None if index is None else index.contiguous()
    tokens = module.Candidates(
        _address(scores),
        0 if scores is None else _DTYPES[scores.dtype],
        largest,
        drawn % (1 << 64),
        _address(mask),
        _address(index),
        _address(offset),
        count,
    )
    wanted = k.to(device, torch.int64, non_blocking=True) if isinstance(k, Tensor) else None
    quota = module.Quota(
        _address(wanted),
        k if isinstance(k, float) else 0.0,
        min(k, (1 << 63) - 1) if isinstance(k, int) else 0,
    )
    bins, fields = 1 << module.digit_bits, module.found_fields
    memory = torch.zeros(len(turns) * (bins + fields), dtype=torch.int64, device=device)
    counts = memory[: len(turns) * bins].view(-1, bins)
    found = memory[len(turns) * bins :].view(-1, fields)
    before = module.Counted(0, 0, 0, False, False)
    for turn, (of_number, shift) in enumerate(turns):
        addresses = _address(counts[turn]), _address(found[turn])
        module.count_digits(tokens, quota, before, shift, bool(of_number), *addresses, *where)
        all_reduce_sum(counts[turn], process_group)
        before = module.Counted(*addresses, shift, bool(of_number), turn == 0)
    chosen = torch.empty(like.shape, dtype=torch.bool, device=device)
    module.choose(tokens, quota, before, _address(chosen), *where)
    return chosen
