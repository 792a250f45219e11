"""What only a GPU can show: graphs, streams, repeated runs, memory, waiting, long offsets, the sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastdiv
from fastdiv import backends
from fastdiv.testing import assert_bitwise_equal

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
if absent := backends.available()["triton"]:
    pytest.skip(f"the triton backend is absent: {absent}", allow_module_level=True)

CUDA = torch.device("cuda")
V = 50257
MIB = 1 << 20
PER_TOKEN = 8 * 100  # bytes: a hundred numbers, against 50257


def statistics(x: Tensor, y: Tensor, labels: Tensor) -> list[Tensor]:
    return list(fastdiv.token_stats(x, labels, outputs=("log_prob", "entropy")).values())


def reverse_kl(x: Tensor, y: Tensor, labels: Tensor) -> list[Tensor]:
    return [fastdiv.divergence(x, y, "reverse_kl")]


def js(x: Tensor, y: Tensor, labels: Tensor) -> list[Tensor]:
    return [fastdiv.divergence(x, y, "js")]


Work = Callable[[Tensor, Tensor, Tensor], list[Tensor]]
WORKS = pytest.mark.parametrize("work", [statistics, reverse_kl, js])


def inputs(seed: int, rows: int = 64, v: int = V) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits in bfloat16, labels."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    x, y = (torch.randn(rows, v, generator=generator, device=CUDA).mul_(4).bfloat16() for _ in range(2))
    return x.requires_grad_(), y, torch.randint(v, (rows,), generator=generator, device=CUDA)


def step(work: Work, tensors: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The outputs, then the student's gradient of their sum."""
    outputs = work(*tensors)
    (gradient,) = torch.autograd.grad(torch.stack(outputs).sum(), tensors[0])
    return [*(o.detach() for o in outputs), gradient]


def refill(tensors: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert_bitwise_equal(a, b)


def test_cuda_tensors_go_to_triton() -> None:
    assert backends.select([torch.bfloat16], CUDA, None) == "triton"


@WORKS
def test_a_captured_graph_computes_new_inputs(work: Work) -> None:
    tensors = inputs(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and takes what libraries keep
        for _ in range(3):
            step(work, tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(work, tensors)
    for seed in (1, 2):
        refill(tensors, inputs(seed))
        graph.replay()
        assert_same(got, step(work, inputs(seed)))


@WORKS
def test_work_follows_the_current_stream(work: Work) -> None:
    """The stream is kept busy before it fills the inputs: who does not stand in its queue reads zeros."""
    values, tensors = inputs(0), inputs(1)
    want = step(work, values)
    refill(tensors, tuple(torch.zeros_like(t) for t in tensors))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        refill(tensors, values)
        got = step(work, tensors)
    side.synchronize()
    assert_same(got, want)


@WORKS
def test_250_runs_are_one(work: Work) -> None:
    tensors = inputs(0, rows=200)
    want = step(work, tensors)
    for _ in range(249):
        assert_same(step(work, tensors), want)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@WORKS
def test_the_host_does_not_wait(work: Work, request: pytest.FixtureRequest) -> None:
    tensors = inputs(0)
    step(work, tensors)  # compiles
    request.getfixturevalue("no_waiting")
    step(work, tensors)
    with pytest.raises(RuntimeError, match="synchroniz"):
        tensors[0].sum().item()


def peak(run: Callable[[], object]) -> int:
    """Bytes beyond what was allocated before, at most, in the second of two calls: the first compiles."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_from_logits() -> None:
    x, _, labels = inputs(0, rows=4096)
    bound = 4096 * PER_TOKEN
    with torch.no_grad():
        assert peak(lambda: fastdiv.token_stats(x, labels)) <= bound

    def both() -> None:
        stats = fastdiv.token_stats(x, labels)
        torch.autograd.grad(stats.log_prob.sum() + stats.entropy.sum(), x)

    assert peak(both) <= x.numel() * x.element_size() + bound


def test_memory_from_hidden_states() -> None:
    """The workspace, O(tokens H), and the gradients: the weight's at most once in float32 and once in its own dtype."""
    tokens, hidden, workspace = 4096, 256, 64 * MIB
    generator = torch.Generator(CUDA).manual_seed(0)
    states, weight = (
        torch.randn(n, hidden, generator=generator, device=CUDA).bfloat16().requires_grad_() for n in (tokens, V)
    )
    labels = torch.randint(V, (tokens,), generator=generator, device=CUDA)
    source = fastdiv.LinearLogits(states, weight)

    def both() -> None:
        stats = fastdiv.token_stats(source, labels, workspace=workspace)
        torch.autograd.grad(stats.log_prob.sum() + stats.entropy.sum(), (states, weight))

    def loss() -> None:
        total = fastdiv.linear_loss(source, labels, lambda s, rows: -s.log_prob, workspace=workspace)
        torch.autograd.grad(total, (states, weight))

    gradients = (states.numel() + weight.numel()) * 2
    for run in (both, loss):
        used = peak(run)
        assert used <= 2 * workspace + 4 * gradients + tokens * (hidden * 4 * 8 + PER_TOKEN)
        assert used < tokens * V * 4 / 2


def test_rows_beyond_2_to_the_31_elements() -> None:
    rows, v = 65536, 40000
    some, _, labels = inputs(0, rows=2, v=v)
    x = torch.zeros(rows, v, dtype=torch.bfloat16, device=CUDA)
    with torch.no_grad():
        x[-2:] = some
    every = torch.zeros(rows, dtype=torch.int64, device=CUDA)
    every[-2:] = labels
    got = step(statistics, (x.requires_grad_(), x, every))
    want = step(statistics, (some, some, labels))
    assert (rows - 2) * v > 2**31
    assert_same([t[-2:] for t in got], want)


SANITIZED = """
import torch, fastdiv
for v, dtype in ((1, torch.float32), (1023, torch.bfloat16), (5001, torch.float32)):
    x, y = (torch.randn(5, v, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    labels = torch.tensor([0, v - 1, -100, v, -1], device="cuda")
    outputs = ("log_prob", "entropy", "varentropy", "argmax", "rank", "reverse_kl", "js", "tv")
    stats = fastdiv.token_stats(x, labels, teacher=y, outputs=outputs)
    sum(s.sum() for s in stats.values() if s.requires_grad).backward()
    states, weight = (torch.randn(n, 24, device="cuda").to(dtype).requires_grad_() for n in (5, v))
    mask = torch.tensor([True, False, True, True, True], device="cuda")
    fastdiv.log_prob(fastdiv.LinearLogits(states, weight), labels, mask=mask).sum().backward()
torch.cuda.synchronize()
print("computed")
"""


def sanitize(program: str) -> subprocess.CompletedProcess[str]:
    """The program under memcheck, every tensor in an allocation of its own so that its ends are known."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "99", "--report-api-errors", "no"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run([*command, sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_no_access_out_of_bounds() -> None:
    trial = sanitize("import torch; torch.ones(3, device='cuda').sum().item(); print('computed')")
    if trial.returncode or "computed" not in trial.stdout:
        said = [line for line in (trial.stdout + trial.stderr).splitlines() if line.strip()]
        pytest.skip(f"compute-sanitizer does not run here: {said[-1] if said else trial.returncode}")
    done = sanitize(SANITIZED)
    assert done.returncode == 0 and "computed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
