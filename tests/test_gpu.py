"""What only a GPU can show: graphs, streams, repeated runs, memory, waiting, long offsets, the sanitizer."""

from __future__ import annotations

import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastdiv
from fastdiv import backends
from fastdiv.backends import cuda
from fastdiv.testing import assert_bitwise_equal

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

CUDA = torch.device("cuda")
BACKENDS = ("cuda", "triton")
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


def why_absent(name: str) -> str | None:
    """None for a backend that runs on this GPU."""
    return backends.available()[name] or backends.get(name).refuses(torch.bfloat16, CUDA)


def built_for_this_gpu() -> bool:
    """Whether the native module has CUDA kernels that should run."""
    try:
        native = importlib.import_module("fastdiv._C")
    except ImportError:
        return False
    return cuda.runs_on(cuda.architectures(native), *torch.cuda.get_device_capability())


@pytest.fixture(params=BACKENDS)
def gpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend of a GPU in turn: every call runs on it."""
    name = str(request.param)
    if absent := why_absent(name):
        if name == "cuda" and built_for_this_gpu():
            pytest.fail(f"fastdiv._C was built for this GPU, but the cuda backend is absent: {absent}")
        pytest.skip(f"the {name} backend is absent: {absent}")
    monkeypatch.setenv("FASTDIV_BACKEND", name)
    return name


EACH = pytest.mark.usefixtures("gpu_backend")


def test_cuda_tensors_go_to_the_first_backend_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDIV_BACKEND", raising=False)
    present = [name for name in BACKENDS if not why_absent(name)]
    assert backends.select([torch.bfloat16], CUDA, None) == [*present, "reference"][0]


@EACH
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


@EACH
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


@EACH
@WORKS
def test_another_device_than_the_current_one(work: Work) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("the second GPU is of another kind, where sums may have another order")
    tensors = inputs(0)
    x, y, labels = (t.detach().to("cuda:1") for t in tensors)
    got = step(work, (x.requires_grad_(), y, labels))
    assert {t.device for t in got} == {x.device} and torch.cuda.current_device() == 0
    assert_same([t.to(CUDA) for t in got], step(work, tensors))


@EACH
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


@EACH
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


@EACH
def test_memory_from_logits() -> None:
    x, _, labels = inputs(0, rows=4096)
    bound = 4096 * PER_TOKEN
    with torch.no_grad():
        assert peak(lambda: fastdiv.token_stats(x, labels)) <= bound

    def both() -> None:
        stats = fastdiv.token_stats(x, labels)
        torch.autograd.grad(stats.log_prob.sum() + stats.entropy.sum(), x)

    assert peak(both) <= x.numel() * x.element_size() + bound


@EACH
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


@EACH
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


# Arguments: the device, the backend, and the parts to be run.  Nothing is compared here: other tests do.
SANITIZED = """
import sys, torch, fastdiv
from fastdiv.select import random_subset, top_k
device, backend = torch.device(sys.argv[1]), sys.argv[2]
torch.ones(3, device=device).sum().item()
print("begun", flush=True)

ONE, BOTH = ("log_prob", "entropy"), ("log_prob", "entropy", "js")
MANY = ("log_prob", "entropy", "varentropy", "argmax", "rank", "reverse_kl", "js", "tv")

def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, device=device).to(dtype)

def differentiate(stats, *wanted):
    torch.autograd.grad(sum(s.sum() for s in stats.values() if s.requires_grad), wanted)

def rows():
    # The last: one that is spread over a cluster of blocks, where there are clusters.
    for count, v, dtype in ((5, 1, torch.float32), (5, 1023, torch.bfloat16), (5, 5001, torch.float32),
                            (2, 151936, torch.bfloat16)):
        x, y = (normal(count, v, dtype=dtype).requires_grad_() for _ in range(2))
        # A backend may not look at logits of labels that are none.
        strange = [-100, v, -1] if device.type == "cuda" else [-100, 0, v - 1]
        labels = torch.tensor([0, v - 1, *strange], device=device)[:count]
        differentiate(fastdiv.token_stats(x, labels, outputs=ONE, backend=backend), x)
        weights = {"log_prob": 1.0, "entropy": 0.5}
        fastdiv.value_and_gradient(x.detach().clone(), labels, weights, overwrite=True, backend=backend)
        for outputs in (BOTH, ("log_prob", "reverse_kl")):
            differentiate(fastdiv.token_stats(x, labels, teacher=y.detach(), outputs=outputs, backend=backend), x)
        if count > 2:
            differentiate(fastdiv.token_stats(x, labels, teacher=y, outputs=MANY, backend=backend), x, y)

def tokens():
    scores, other = normal(5000), normal(5000)
    mask, index = scores > -0.5, torch.arange(5000, device=device) * 3
    fastdiv.masked_covariance(scores, other, mask, backend=backend)
    top_k(scores, mask, k=700, backend=backend)
    top_k(scores, mask, ratio=0.2, index=index, backend=backend)
    random_subset(mask, k=700, seed=0, step=0, backend=backend)

def hidden():
    mask = torch.tensor([True, False, True, True, True], device=device)
    for v, dtype in ((1, torch.float32), (1023, torch.bfloat16), (5001, torch.float32)):
        states, weight = (normal(n, 24, dtype=dtype).requires_grad_() for n in (5, v))
        labels, source = torch.tensor([0, v - 1, 0, -100, 0], device=device), fastdiv.LinearLogits(states, weight)
        for options in ({}, {"workspace": 0}):
            stats = {"log_prob": fastdiv.log_prob(source, labels, mask=mask, backend=backend, **options)}
            differentiate(stats, states, weight)

for part in sys.argv[3:]:
    globals()[part]()
if device.type == "cuda":
    torch.cuda.synchronize()
print("computed")
"""
# initcheck would judge the vendor's matrix products too, so it gets no hidden states.
TOOLS = {
    "memcheck": ("rows", "tokens", "hidden"),
    "synccheck": ("rows", "tokens", "hidden"),
    "initcheck": ("rows", "tokens"),
    "racecheck": ("rows", "tokens", "hidden"),
}
UNFIT = {
    ("racecheck", "triton"): "threads of Triton's reductions write one number at once, which is reported: triton #7264"
}
OURS = "_ZN2fd"
"""How the names of the CUDA kernels begin."""
PATIENCE = 150  # seconds


def sanitize(sanitizer: str, tool: str, backend: str) -> tuple[int, str]:
    """Status and output of the program, every tensor in an allocation of its own so that its ends are known."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]
    if tool == "racecheck":  # only of the CUDA kernels; initcheck has to see who writes what they read
        command += ["--kernel-name", f"kns={OURS}"]
    command += [sys.executable, "-c", SANITIZED, "cuda", backend, *TOOLS[tool]]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FASTDIV_CHECK": "0"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return 124, f"begun, and not finished in {PATIENCE} s"
    return done.returncode, done.stdout + done.stderr


@functools.cache
def sanitized(sanitizer: str) -> dict[tuple[str, str], Future[tuple[int, str]]]:
    """All tools on all backends present, at once: each takes most of its time on one core."""
    pool = ThreadPoolExecutor(len(TOOLS) * len(BACKENDS))
    runs = [(tool, name) for name in BACKENDS if not why_absent(name) for tool in TOOLS if (tool, name) not in UNFIT]
    return {(tool, name): pool.submit(sanitize, sanitizer, tool, name) for tool, name in runs}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_sanitizer_finds_nothing(tool: str, gpu_backend: str) -> None:
    if reason := UNFIT.get((tool, gpu_backend)):
        pytest.skip(reason)
    places = [os.environ.get("PATH", os.defpath), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    if not (sanitizer := shutil.which("compute-sanitizer", path=os.pathsep.join(places))):
        pytest.skip("compute-sanitizer is neither on PATH nor under CUDA_HOME")
    if tool == "racecheck":  # else it would check nothing
        native = Path(str(importlib.import_module("fastdiv._C").__file__))
        named = native.read_bytes().count(f"{OURS}17statistics_kernel".encode())
        assert named, f"the names of the kernels do not begin with {OURS}"
    status, output = sanitized(sanitizer)[tool, gpu_backend].result()
    if "begun" not in output:
        said = [line for line in output.splitlines() if line.strip()]
        pytest.skip(f"compute-sanitizer does not run here: {said[-1] if said else status}")
    found = re.search(r"SUMMARY: (?!0 )", output)  # warnings too, which leave the status at 0
    assert status == 0 and "computed" in output and not found, output[-5000:]
