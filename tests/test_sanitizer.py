"""compute-sanitizer over the kernels of each GPU backend, in processes of their own.

These tests run in one process: every tool starts once, two at a time.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_gpu import BACKENDS, why_absent

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

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
    """All tools on all backends present, two at a time: each process has a torch of its own on the GPU."""
    pool = ThreadPoolExecutor(2)
    runs = [(tool, name) for name in BACKENDS if not why_absent(name) for tool in TOOLS if (tool, name) not in UNFIT]
    return {(tool, name): pool.submit(sanitize, sanitizer, tool, name) for tool, name in runs}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", BACKENDS)
def test_the_sanitizer_finds_nothing(tool: str, name: str) -> None:
    if absent := why_absent(name):
        pytest.skip(f"the {name} backend is absent: {absent}")
    if reason := UNFIT.get((tool, name)):
        pytest.skip(reason)
    places = [os.environ.get("PATH", os.defpath), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    if not (sanitizer := shutil.which("compute-sanitizer", path=os.pathsep.join(places))):
        pytest.skip("compute-sanitizer is neither on PATH nor under CUDA_HOME")
    if tool == "racecheck":  # else it would check nothing
        native = Path(str(importlib.import_module("fastdiv._C").__file__))
        named = native.read_bytes().count(f"{OURS}17statistics_kernel".encode())
        assert named, f"the names of the kernels do not begin with {OURS}"
    status, output = sanitized(sanitizer)[tool, name].result()
    if "begun" not in output:
        said = [line for line in output.splitlines() if line.strip()]
        pytest.skip(f"compute-sanitizer does not run here: {said[-1] if said else status}")
    found = re.search(r"SUMMARY: (?!0 )", output)  # warnings too, which leave the status at 0
    assert status == 0 and "computed" in output and not found, output[-5000:]
