"""The least that a work can cost: its bare matrix products, or bare reads and writes of its tensors.

A floor computes nothing useful.  Its buffers exist before it is timed, and of several ways to run it the
fastest on this machine is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .timing import Meter

Candidates = dict[str, Callable[[], object]]
_COLUMNS = {"cpu": (512, 1024, 2048, 4096), "cuda": (4096, 16384, 32768)}
_ROW_SHARES = (1, 4)  # one such part of all rows, with the whole vocabulary


@dataclass(frozen=True)
class Floor:
    """What must be paid for, as passes that follow one another.

    Arguments:
        name: what it consists of.
        amount, unit: floating-point operations ("flop") or bytes moved ("byte").
        passes: from the case's tensors to, for each pass, its candidates: ways to run it, by name.
        trials: after each candidate ran once, how often the three fastest are tried again.
    """

    name: str
    amount: float
    unit: str
    passes: Callable[[dict[str, Tensor]], list[Candidates]]
    trials: int

    def fastest(self, tensors: dict[str, Tensor], meter: Meter) -> tuple[Callable[[], object], list[str]]:
        """All passes as one call, each run as its fastest candidate, and the names of these."""
        names, works = [], []
        for candidates in self.passes({name: tensor.detach() for name, tensor in tensors.items()}):
            cost = {name: meter(work)[0] for name, work in candidates.items()}
            for name in sorted(cost, key=cost.__getitem__)[:3]:
                cost[name] = min(cost[name], *(meter(candidates[name])[0] for _ in range(self.trials)))
            names.append(min(cost, key=cost.__getitem__))
            works.append(candidates[names[-1]])
        return lambda: [work() for work in works], names


def bytes_moved(rows: int, vocabulary: int, itemsize: int, reads: int, writes: int) -> float:
    """Bytes of `reads` passes over [rows, vocabulary] tensors and of `writes` tensors of that size."""
    return float(rows * vocabulary * itemsize * (reads + writes))


def products(rows: int, hidden: int, vocabulary: int, *, teacher: bool, recompute: bool) -> Floor:
    """The matrix products of a loss from hidden states: its gradients to `hidden` and `weight`, the teacher frozen.

    Arguments:
        rows, hidden, vocabulary: sizes; one product is 2 rows hidden vocabulary operations.
        teacher: the loss compares with a second head of the same size.
        recompute: the logits are formed once for the forward and again for the backward; False: once for both.
    """
    heads = 2 if teacher else 1
    count = heads * (2 if recompute else 1) + 2

    def passes(tensors: dict[str, Tensor]) -> list[Candidates]:
        pairs = [(tensors["hidden"], tensors["weight"])]
        if teacher:
            pairs.append((tensors["teacher_hidden"], tensors["teacher_weight"]))
        return [_sweeps(pairs, gradients) for gradients in ([False, True] if recompute else [True])]

    return Floor(f"{count} matrix products", 2.0 * count * rows * hidden * vocabulary, "flop", passes, trials=1)


def _sweeps(heads: Sequence[tuple[Tensor, Tensor]], gradients: bool) -> Candidates:
    """One pass over the tiles of logits, for each tiling."""
    hidden, weight = heads[0]
    rows, vocabulary = len(hidden), len(weight)
    # Written once, so that no candidate pays for fresh pages.
    buffers = [hidden.new_ones(rows * vocabulary) for _ in heads]
    d_hidden, d_weight = torch.ones_like(hidden), torch.ones_like(weight)

    def sweep(tile_rows: int, columns: int) -> None:
        for top in range(0, rows, tile_rows):
            r = slice(top, top + tile_rows)
            for left in range(0, vocabulary, columns):
                c = slice(left, left + columns)
                tiles = [
                    _multiply(_view(buffer, h[r], w[c]), h[r], w[c].T)
                    for buffer, (h, w) in zip(buffers, heads, strict=True)
                ]
                if gradients:
                    _multiply(d_hidden[r], tiles[0], weight[c], add=left > 0)
                    _multiply(d_weight[c], tiles[0].T, hidden[r], add=top > 0)

    tilings = [(rows, columns) for columns in _COLUMNS[hidden.device.type] if columns < vocabulary]
    tilings += [(-(-rows // share), vocabulary) for share in _ROW_SHARES]
    return {f"{r} x {c}": lambda r=r, c=c: sweep(r, c) for r, c in tilings}  # type: ignore[misc]


def _view(buffer: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> Tensor:
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def traffic(names: Sequence[str], rows: int, vocabulary: int, *, write: bool, itemsize: int = 4) -> Floor:
    """Reading the tensors `names` [rows, vocabulary] once and, if `write`, writing one more of that size.

    Float32 on a CPU.  On a GPU it is a copy that moves as many bytes, half of them read and half written: a reduction
    of torch does not reach the bandwidth of its memory.
    """
    amount = bytes_moved(rows, vocabulary, itemsize, len(names), int(write))
    text = f"{len(names)} read{'s' * (len(names) > 1)}" + " + 1 write" * write

    def passes(tensors: dict[str, Tensor]) -> list[Candidates]:
        read = [tensors[name] for name in names]
        if read[0].device.type == "cuda":
            return [_copy(int(amount), read[0].device)]
        return [_writes(read) if write else _reads(read)]

    return Floor(text, amount, "byte", passes, trials=5)


def _copy(count: int, device: torch.device) -> Candidates:
    source, target = (torch.ones(count // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return {"copy of as many bytes": lambda: target.copy_(source)}


def _reads(tensors: list[Tensor]) -> Candidates:
    flat = [tensor.reshape(-1) for tensor in tensors]
    return {
        "sum": lambda: [x.sum() for x in flat],
        "sum of each row": lambda: [x.sum(-1) for x in tensors],
        "amax": lambda: [x.amax() for x in flat],
        "amax of each row": lambda: [x.amax(-1) for x in tensors],
        "dot": lambda: torch.dot(flat[0], flat[-1]),
    }


def _writes(tensors: list[Tensor]) -> Candidates:
    out = torch.ones_like(tensors[0])
    if len(tensors) == 1:
        x = tensors[0]
        return {"copy": lambda: out.copy_(x), "multiply": lambda: torch.mul(x, 2.0, out=out)}
    x, y = tensors
    return {"add": lambda: torch.add(x, y, out=out), "multiply": lambda: torch.mul(x, y, out=out)}
