"""What only the Triton backend promises: skipped rows, gradients over logits, kernels for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastdiv
from fastdiv.request import Transform
from fastdiv.statistics import Tokens
from fastdiv.testing import assert_bitwise_equal
from fastdiv.tiles import Rows, Tile

pytest.importorskip("triton")
if fastdiv.info()["backends"]["triton"] is not None:  # type: ignore[index]
    pytest.skip("the triton backend is absent", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("these call kernels on CPU tensors", allow_module_level=True)

from triton.runtime import interpreter

from fastdiv.backends.triton import aot, launch, rows

V = 300  # two blocks of 256


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def framed(count: int, c0: float = 1.0) -> launch.Framed:
    """Gradients p c0 of rows whose normalisers are 1: logits are log-probabilities."""
    frame, c = torch.zeros(count, rows.FRAME.value), torch.zeros(count, 6)
    frame[:, 7], c[:, 0] = 1.0, c0
    return launch.Framed(c, torch.zeros(count, 0, dtype=torch.int64), torch.zeros(count, 0), [], frame, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_gradient_may_lie_in_the_first_half_of_its_row(dtype: torch.dtype) -> None:
    logits = torch.log_softmax(random(5, V), -1)
    want = logits.exp().to(dtype)
    buffer = logits.clone()
    target = Rows(buffer.view(dtype)[:, :V], None, Transform())
    tokens = Tokens(torch.ones(5), torch.zeros(5, 0, dtype=torch.int64), -100, None, V)
    tile = Tile(Rows(buffer, None, Transform()), None, 0, V, tokens)
    launch.gradient(tile, framed(5), target, None)
    error = (buffer.view(dtype)[:, :V].float() - want.float()).abs()
    assert (error <= 2.0 * torch.finfo(dtype).eps * want.float()).all()


@pytest.mark.parametrize(
    ("logits", "student", "teacher", "waits"),
    [
        (torch.float32, torch.bfloat16, None, True),
        (torch.float32, torch.float16, torch.float32, True),
        (torch.float32, None, torch.bfloat16, True),
        (torch.float32, torch.float32, torch.float16, True),
        (torch.float32, torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, None, False),
    ],
)
def test_a_narrow_gradient_is_written_when_all_threads_have_read(
    monkeypatch: pytest.MonkeyPatch,
    logits: torch.dtype,
    student: torch.dtype | None,
    teacher: torch.dtype | None,
    waits: bool,
) -> None:
    """The interpreter has one thread, so a barrier that is missing changes no number; it is counted instead."""
    barriers: list[object] = []
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_barrier", lambda self: barriers.append(self))
    side = Rows(random(1, V).to(logits), None, Transform())
    tokens = Tokens(torch.ones(1), torch.zeros(1, 0, dtype=torch.int64), -100, None, V)
    tile = Tile(side, side if teacher else None, 0, V, tokens)
    targets = [None if d is None else Rows(torch.empty(1, V, dtype=d), None, Transform()) for d in (student, teacher)]
    launch.gradient(tile, framed(1), *targets)
    assert bool(barriers) == waits


def test_masked_rows_are_neither_read_nor_change_others() -> None:
    x, labels = random(6, V), torch.arange(6)
    mask = torch.tensor([True, False, True, True, False, True])
    spoiled = torch.where(mask[:, None], x, torch.nan).requires_grad_()
    outputs = ("log_prob", "entropy", "rank")
    got = fastdiv.token_stats(spoiled, labels, mask=mask, outputs=outputs, backend="triton")
    alone = x[mask].requires_grad_()
    want = fastdiv.token_stats(alone, labels[mask], outputs=outputs, backend="triton")
    (got.log_prob.sum() + got.entropy.sum()).backward()
    (want.log_prob.sum() + want.entropy.sum()).backward()
    assert spoiled.grad is not None and alone.grad is not None
    for name in outputs:
        assert_bitwise_equal(got[name][mask], want[name], name)
        assert not got[name][~mask].any()
    assert_bitwise_equal(spoiled.grad[mask], alone.grad)
    assert not spoiled.grad[~mask].any()


def test_number_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """From logits: sums and outputs forward, coefficients and gradient backward."""
    names: list[str] = []
    original = launch.run
    monkeypatch.setattr(
        launch, "run", lambda kernel, *a, **k: (names.append(kernel.__name__), original(kernel, *a, **k))
    )
    x = random(3, V).requires_grad_()
    out = fastdiv.token_stats(x, torch.arange(3), outputs=("log_prob", "entropy"), backend="triton")
    assert names == ["accumulate", "finish"]
    (out.log_prob + out.entropy).sum().backward()
    assert names[2:] == ["prepare", "gradient"]


@pytest.mark.parametrize("compared", [False, True])
def test_least_memory_keeps_logits_on_the_chip(monkeypatch: pytest.MonkeyPatch, compared: bool) -> None:
    names: list[str] = []
    original = launch.run
    monkeypatch.setattr(
        launch, "run", lambda kernel, *a, **k: (names.append(kernel.__name__), original(kernel, *a, **k))
    )
    hidden, weight = random(5, 24).requires_grad_(), random(V, 24, seed=1).requires_grad_()
    head, labels = fastdiv.LinearLogits(hidden, weight, random(V, seed=2)), torch.tensor([3, -100, 0, V - 1, 7])
    teacher = random(5, V, seed=3) if compared else None
    outputs = ("log_prob", "entropy", *(("js",) if compared else ()))
    got, want = (
        fastdiv.token_stats(head, labels, teacher=teacher, outputs=outputs, backend=backend, workspace=0)
        for backend in ("triton", "native" if fastdiv.info()["backends"]["native"] is None else "reference")  # type: ignore[index]
    )
    assert ("sum_spans" in names) != compared
    for name in outputs:
        assert torch.allclose(got[name], want[name], rtol=1e-6, atol=1e-6), name
    gradients = [torch.autograd.grad(sum(v.sum() for v in out.values()), (hidden, weight)) for out in (got, want)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_fails_says_which_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **fixed: object) -> None:
        raise RuntimeError("no such instruction")

    class Kernel:
        __name__ = "accumulate"

        def __getitem__(self, grid: object) -> object:
            return fail

    monkeypatch.setattr(launch, "accumulate_kernel", Kernel())
    with pytest.raises(
        RuntimeError, match=r"kernel accumulate does not compile or run on the interpreter.*no such inst"
    ):
        fastdiv.entropy(random(3, V), backend="triton")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastdiv.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


AMD = """
	.set gradient.num_vgpr, 61
	.set gradient.private_seg_size, 0
amdhsa.kernels:
  - .agpr_count:     7
    .args:
      - .offset:         0
        .size:           8
    .group_segment_fixed_size: 1024
    .kernarg_segment_size: 192
    .name:           gradient
    .private_segment_fixed_size: {stack}
    .sgpr_count:     44
    .sgpr_spill_count: {scalar}
    .symbol:         gradient.kd
    .vgpr_count:     61
    .vgpr_spill_count: {vector}
    .wavefront_size: 64
"""


@pytest.mark.parametrize(("stack", "scalar", "vector", "ok"), [(0, 0, 0, True), (0, 18, 0, False), (76, 0, 19, False)])
def test_spills_are_read_from_amd_assembly(stack: int, scalar: int, vector: int, ok: bool) -> None:
    """Scalar registers spill to lanes of a vector register, which the stack does not show."""
    found = aot.amd_counts(AMD.format(stack=stack, scalar=scalar, vector=vector))
    assert found == (61, stack, scalar + vector)
    assert aot.Report(*found, shared=0, seconds=0.0, narrow=()).ok == ok


def test_check_refuses_unknown_targets() -> None:
    done = run("check", "--aot", "sm_90", "volta")
    assert done.returncode == 2 and "expected sm_<number> or gfx<number>, got 'volta'" in done.stderr


CODE = """
import triton, triton.language as tl
from fastdiv.backends.triton import aot, blocks
import torch

@triton.jit
def narrow(x, stride, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(x + at, 1.0, mask=at < n)

it = aot.Launch(narrow, blocks.Shape(1, 128, 1), (torch.zeros(4), 1000, 9), {}, "")
report = aot.compile_for(it, "sm_90")
assert len(report.narrow) == 1 and "muli" in report.narrow[0] and not report.ok, report
one = next(it for it in aot.launches() if it.kernel.__name__ == "rank")
for target in ("sm_80", "gfx942"):
    report = aot.compile_for(one, target)
    assert report.ok and report.registers > 8, report
"""


def test_ahead_of_time_compilation_counts_and_finds_narrow_pointers(tmp_path: object) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    file = f"{tmp_path}/code.py"  # Triton reads a kernel's source
    with open(file, "w") as out:
        out.write(CODE)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
