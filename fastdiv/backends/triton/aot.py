"""Compiles every kernel for GPUs that are not there, and says what it needs of them.

`launches` records what the backend would launch, with the arguments it would pass; `compile_for` compiles one such
launch.  NVIDIA: Triton's wheel carries ptxas and cuobjdump, so the machine code is real and its counts are read from
it.  AMD: the wheel carries LLVM, and the assembly names its counts.
"""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdiv.backends.triton import blocks, launch
from fastdiv.backends.triton.language import INTERPRETED
from fastdiv.backends.triton.rows import COUNTS
from fastdiv.divergences import DIVERGENCES
from fastdiv.request import Transform
from fastdiv.statistics import COEFFICIENTS, WANTED, empty_state
from fastdiv.tiles import Rows, Tile

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")

VOCABULARY = 151936
"""Of the launches: the largest shapes of `blocks` are the ones that need most."""

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One kernel with the arguments of one launch."""

    kernel: Any
    shape: blocks.Shape
    arguments: tuple[Any, ...]
    fixed: dict[str, Any]
    title: str


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs: registers a thread, bytes of stack (spills) a thread, bytes of shared memory."""

    registers: int
    stack: int
    shared: int
    seconds: float
    narrow: tuple[str, ...]
    """Pointer arithmetic that multiplies in 32 bits, as lines of Triton's IR."""

    @property
    def ok(self) -> bool:
        return self.stack == 0 and not self.narrow


def target(name: str) -> GPUTarget:
    """`sm_90` or `gfx942` as Triton names it.  Raises ValueError for anything else."""
    if found := re.fullmatch(r"sm_(\d+)a?", name):
        return GPUTarget("cuda", int(found[1]), 32)
    if re.fullmatch(r"gfx[0-9a-f]+", name):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"target: expected sm_<number> or gfx<number>, got {name!r}")


@contextlib.contextmanager
def _recording(title: str, launches: list[Launch]) -> Iterator[None]:
    original = launch.run

    def record(kernel: Any, rows: int, shape: blocks.Shape, *arguments: Any, times: int = 1, **fixed: Any) -> None:
        launches.append(Launch(kernel, shape, arguments, fixed, title))

    launch.run = record
    try:
        yield
    finally:
        launch.run = original


def _tile(dtype: torch.dtype, teacher: bool, transform: Transform, labels: int = 1) -> Tile:
    side = Rows(torch.empty(2, VOCABULARY, dtype=dtype), None, transform)
    return Tile(
        side, side if teacher else None, 0, VOCABULARY, torch.ones(2), torch.zeros(2, labels, dtype=torch.int64)
    )


def launches() -> list[Launch]:
    """Every kernel that the backend can launch: each dtype, each set of sums that an operator asks for and all of
    them at once, each divergence, with and without a transform, from logits and from a workspace."""
    result: list[Launch] = []
    plain, capped = Transform(), Transform(0.5, 30.0)
    everything = sum(WANTED.values())
    single = {"normaliser": 0, "entropy": WANTED["first"], "one model's": everything & ~96}
    pairs = {"forward_kl": WANTED["forward"], "reverse_kl": WANTED["reverse"], "both models'": everything}
    state, found = empty_state(2, torch.device("cpu")), torch.zeros(2, 1)
    frame, sums = torch.zeros(2, 7), torch.zeros(2, 1, 3, dtype=torch.float64)
    terms = [(d, d.parameter.default if d.parameter else 0.0) for d in DIVERGENCES.values()]
    for dtype, transform in itertools.product((torch.bfloat16, torch.float16, torch.float32), (plain, capped)):
        how = f"{str(dtype).removeprefix('torch.')}{' softcap' if transform is capped else ''}"
        one, two = _tile(dtype, False, transform), _tile(dtype, True, transform)
        for (name, wanted), fresh in itertools.product(single.items(), (True, False)):
            with _recording(f"{how} {name} sums{'' if fresh else ', added'}", result):
                launch.accumulate(one, wanted, state, found, fresh)
        for (name, wanted), fresh in itertools.product(pairs.items(), (True, False)):
            with _recording(f"{how} {name} sums{'' if fresh else ', added'}", result):
                launch.accumulate(two, wanted, state, found, fresh)
        for term in terms:
            with _recording(f"{how} {term[0].name}", result):
                launch.compare(two, [term], frame, sums)
                c = torch.zeros(2, COEFFICIENTS + 1)
                launch.gradient(two, [term], frame, c, found, two.student, two.teacher)
        with _recording(how, result):
            launch.rank(one, found, torch.zeros(2, 1, dtype=torch.int64))
            launch.gradient(one, [], frame, torch.zeros(2, COEFFICIENTS), found, one.student, None)
    with _recording("", result):
        launch.frames(state, torch.ones(2))
    return result


def _type(value: Any) -> Any:
    """An argument's type in Triton's words."""
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, bool) or value is None:
        return "constexpr"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    return tuple(_type(v) for v in value)


def compile_for(it: Launch, name: str) -> Report:
    """Compiles one launch for one target."""
    gpu = target(name)
    names = it.kernel.arg_names
    values = dict(zip(names, it.arguments, strict=False))
    fixed = {**it.fixed, "ROWS": it.shape.rows, "BLOCK": it.shape.block}
    fixed |= {k: v for k, v in values.items() if _type(v) == "constexpr"}
    signature = {n: "constexpr" if n in fixed else _type(values[n]) for n in names}
    aligned = [n for n, v in values.items() if n not in fixed and _aligned(n, v)]
    source = ASTSource(
        fn=it.kernel,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in fixed.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    begin = time.perf_counter()
    compiled = triton.compile(source, target=gpu, options={"num_warps": it.shape.warps})
    seconds = time.perf_counter() - begin
    registers, stack = _counts(compiled, gpu)
    return Report(registers, stack, compiled.metadata.shared, seconds, tuple(narrow_pointers(compiled.asm["ttir"])))


def _aligned(name: str, value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, int) and value % 16 == 0 and name not in COUNTS


def _counts(compiled: Any, gpu: GPUTarget) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread."""
    if gpu.backend == "hip":
        text = compiled.asm["amdgcn"]
        count = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)}
        return count["vgpr_count"], count["private_segment_fixed_size"]
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]) + int(found[3])


def narrow_pointers(ttir: str) -> list[str]:
    """Lines of Triton's IR that multiply 32-bit numbers on the way to a pointer: those overflow at 2^31 elements."""
    made: dict[str, tuple[str, list[str]]] = {}
    pointers: list[str] = []
    for line in ttir.splitlines():
        found = re.match(r"\s*(%[\w#]+)(?::\d+)? = (.*)", line)
        if not found:
            continue
        operands = re.findall(r"%[\w#]+", found[2])
        made[found[1]] = (line.strip(), operands)
        if "tt.addptr" in found[2]:
            pointers.append(operands[1])
    narrow, seen = [], set()
    while pointers:
        name = pointers.pop()
        if name in seen or name not in made:
            continue
        seen.add(name)
        line, operands = made[name]
        if re.search(r"= arith\.muli .*: (tensor<[\dx]+xi32>|i32)", line):
            narrow.append(line)
        pointers += operands
    return narrow


def check(targets: list[str], brief: bool = False) -> int:
    """Compiles every launch for every target and prints what it needs.

    Returns:
        0, or 1 where a kernel does not compile, spills registers, or multiplies on the way to a pointer in 32 bits.

    Raises:
        ValueError: the kernels were loaded for the interpreter, which has nothing to compile.
    """
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    every, failed = launches(), 0
    print(f"triton {triton.__version__}: {len(every)} kernels for {', '.join(targets)}")
    for name in targets:
        most, seconds, bad = 0, 0.0, 0
        if not brief:
            print(f"\n{name:10}  {'kernel':11} {'registers':>9} {'stack':>6} {'shared':>7} {'seconds':>8}")
        for it in every:
            try:
                report = compile_for(it, name)
            except Exception as error:  # of Triton, LLVM or ptxas: whatever it is, this kernel does not compile
                bad += 1
                print(f"{name:10}  {it.kernel.__name__} ({it.title}) does not compile: {error}")
                continue
            most, seconds, bad = max(most, report.registers), seconds + report.seconds, bad + (not report.ok)
            if not (brief and report.ok):
                numbers = f"{report.registers:9} {report.stack:6} {report.shared:7} {report.seconds:8.2f}"
                print(f"{name:10}  {it.kernel.__name__:11} {numbers}  {it.title}")
            for line in report.narrow:
                print(f"{name:10}  32-bit pointer arithmetic: {line}")
        print(f"{name:10}  {len(every) - bad} of {len(every)} kernels pass, at most {most} registers, {seconds:.0f} s")
        failed += bad
    return 1 if failed else 0
