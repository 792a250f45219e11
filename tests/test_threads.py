"""Calls from several threads, and from processes that `spawn` starts.

Not `fork`: after a parallel region it hangs in OpenMP, as torch's own operators do.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import torch
from cases import head
from torch import Tensor

import fastdiv
from fastdiv.testing import assert_bitwise_equal


def work(seed: int, backend: str) -> list[Tensor]:
    x, y = (torch.randn(30, 2000, generator=torch.Generator().manual_seed(seed + i)).requires_grad_() for i in (0, 100))
    tensors = head(30, 500, 8, seed=seed)
    labels = torch.full((30,), seed)
    stats = fastdiv.token_stats(x, labels, teacher=y, outputs=("log_prob", "entropy", "js"), backend=backend)
    loss = fastdiv.linear_loss(
        fastdiv.LinearLogits(*tensors), labels, lambda s, rows: -s.log_prob, backend=backend, workspace=10_000
    )
    total = loss + sum(v.sum() for v in stats.values())
    return [v.detach() for v in stats.values()] + [*torch.autograd.grad(total, (x, y, *tensors))]


def test_four_threads_at_once(backend: str) -> None:
    want = [work(seed, backend) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            for got, expected in zip(pool.map(lambda seed: work(seed, backend), range(4)), want, strict=True):
                for a, b in zip(got, expected, strict=True):
                    assert_bitwise_equal(a, b)


def _child(backend: str, queue: multiprocessing.SimpleQueue[list[float]]) -> None:
    torch.set_num_threads(2)
    queue.put(fastdiv.entropy(torch.arange(40.0).view(4, 10), backend=backend).tolist())


def test_a_spawned_process(backend: str) -> None:
    want = fastdiv.entropy(torch.arange(40.0).view(4, 10), backend=backend).tolist()
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(backend, queue))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert queue.get() == want
