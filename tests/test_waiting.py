"""From logits nothing waits for the device, so that a call can be captured in a graph; visible on a CPU too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiv
from fastdiv import backends, engine, library

# The backends of GPUs; the others need not mind.
PRESENT = [name for name in ("cuda", "triton") if backends.available()[name] is None]

# Numbers read by the host, and sizes that depend on numbers.
WAITING = ("_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "equal")


class Watch(TorchDispatchMode):
    """Notes every operation that would wait for a GPU, inside the library's own operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "fastdiv":
            with self:
                return getattr(library, f"_{name}")(*args, **(kwargs or {}))
        indices = [i for i in args[1] if isinstance(i, Tensor)] if name.startswith("index") and len(args) > 1 else []
        # What Python's lists become has to be copied over; one number is passed along with a launch.
        listed = name == "lift_fresh" and args[0].dim() > 0
        if name in WAITING or listed or any(i.dtype == torch.bool for i in indices):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


WORKS: dict[str, Callable[[Tensor, Tensor, Tensor, str], list[Tensor]]] = {
    "statistics": lambda x, y, labels, name: list(fastdiv.token_stats(x, labels, backend=name).values()),
    "mask": lambda x, y, labels, name: [fastdiv.log_prob(x, labels, mask=labels > 1, backend=name)],
    "reverse_kl": lambda x, y, labels, name: [fastdiv.divergence(x, y, "reverse_kl", backend=name)],
    "js": lambda x, y, labels, name: [fastdiv.divergence(x, y, "js", backend=name)],
}


@pytest.mark.parametrize("name", PRESENT)
@pytest.mark.parametrize("work", WORKS)
def test_nothing_waits(work: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU alone.
    monkeypatch.setattr(engine.Problem, "_check_labels", lambda self: None)
    monkeypatch.setattr(engine.Problem, "_clean", lambda self, labels: False)
    x, y = torch.randn(4, 300).bfloat16().requires_grad_(), torch.randn(4, 300).bfloat16()
    labels = torch.tensor([0, 1, 2, 299])
    with Watch() as watch:
        total = torch.stack(WORKS[work](x, y, labels, name)).sum()
        torch.autograd.grad(total, x)
    assert watch.found == []


def test_waiting_is_seen() -> None:
    with Watch() as watch:
        x = torch.ones(3)
        x[[0, 2]] = 0.0
        x[x > 0.5].sum().item()
    assert {"lift_fresh", "index", "_local_scalar_dense"} <= set(watch.found)
