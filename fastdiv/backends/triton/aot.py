"""Compiles every kernel for GPUs that are not there, and says what it needs of them.

`launches` records what the backend would launch, with the arguments it would pass; `compile_for` compiles one such
launch.  NVIDIA: Triton's wheel carries ptxas and cuobjdump, so the machine code is real and its counts are read from
it.  AMD: the wheel carries LLVM, and the assembly names its counts.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdiv.backends.triton import blocks, covariance, launch, linear, selection
from fastdiv.backends.triton.language import INTERPRETED
from fastdiv.backends.triton.rows import COUNTS
from fastdiv.divergences import DIVERGENCES
from fastdiv.request import Request, Transform
from fastdiv.statistics import OUTPUTS, WANTED, Sums, Tokens, differentiable, empty_state
from fastdiv.tiles import Rows, Tile

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")

VOCABULARY = 151936
"""Of the launches: the largest shapes of `blocks` are the ones that need most."""

PLAIN, CAPPED = Transform(), Transform(0.5, 30.0)

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
    spilled: int
    """Registers that an AMD kernel spills, vector and scalar.  Scalar ones go to lanes of a vector register and take no
    stack.  NVIDIA's show in `stack`."""
    shared: int
    seconds: float
    narrow: tuple[str, ...]
    """Pointer arithmetic that multiplies in 32 bits, as lines of Triton's IR."""

    @property
    def ok(self) -> bool:
        return self.stack == 0 and self.spilled == 0 and not self.narrow


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


def _tokens(mask: bool) -> Tokens:
    labels = torch.zeros(2, 1, dtype=torch.int64)
    return Tokens(torch.ones(2), labels, -100, torch.ones(2, dtype=torch.bool) if mask else None, VOCABULARY)


def _tile(dtype: torch.dtype, teacher: bool, transform: Transform, first: bool = True) -> Tile:
    side = Rows(torch.empty(2, VOCABULARY, dtype=dtype), None, transform)
    return Tile(side, side if teacher else None, 0 if first else VOCABULARY, VOCABULARY, _tokens(first))


def _request(outputs: tuple[str, ...]) -> Request:
    parameters = tuple(0.5 if name in DIVERGENCES else 0.0 for name in outputs)
    return Request.of(outputs, PLAIN, PLAIN, 1.0, parameters, -100, "triton", 0)


def launches() -> list[Launch]:
    """What the backend launches: each dtype, with and without a transform; the sums of each operator and all sums at
    once, from logits (the first tile) and added to earlier ones (a workspace's); each divergence; what `linear`,
    `covariance` and `selection` name."""
    result: list[Launch] = []
    everything = sum(WANTED.values())
    both = WANTED["forward"] | WANTED["reverse"]
    single = {"normaliser": 0, "entropy": WANTED["first"], "one model": everything & ~both}
    pair = {"forward_kl": WANTED["forward"], "reverse_kl": WANTED["reverse"], "both models": everything}
    kinds = itertools.product((torch.bfloat16, torch.float16, torch.float32), (PLAIN, CAPPED))
    for dtype, transform in kinds:
        how = f"{str(dtype).removeprefix('torch.')}{' softcap' if transform is CAPPED else ''}"
        for teacher, sets in ((False, single), (True, pair)):
            for (name, wanted), first in itertools.product(sets.items(), (True, False)):
                if not first and dtype != torch.float32:
                    continue  # the tiles of a workspace are float32
                with _recording(f"{how}, {name}{'' if first else ', added'}", result):
                    tile = _tile(dtype, teacher, transform, first)
                    launch.accumulate(tile, wanted, *_empty(("rank",))[:2])
        for outputs in (("log_prob",), ("log_prob", "entropy"), *((name,) for name in DIVERGENCES), tuple(DIVERGENCES)):
            request, own = _request(outputs), _tokens(True)
            with _recording(f"{how}, {'+'.join(outputs)}", result):
                sums = Sums(*_empty(outputs))
                tile = _tile(dtype, any(name in DIVERGENCES for name in outputs), transform)
                if len(outputs) < len(DIVERGENCES):
                    launch.compare(tile, list(request.compared), sums)
                prepared = launch.prepare(request, own, sums, {name: torch.ones(2) for name in outputs})
                launch.gradient(tile, prepared, tile.student, tile.teacher)
        with _recording(how, result):
            launch.rank(_tile(dtype, False, transform), Sums(*_empty(("rank",))))
    every = (*OUTPUTS, *DIVERGENCES)
    with _recording(", ".join(every), result):
        launch.finish(_request(every), _tokens(True), Sums(*_empty(every)))
        differentiated = {name: torch.ones(2) for name in every if differentiable(name)}
        launch.prepare(_request(every), _tokens(True), Sums(*_empty(every)), differentiated)
    for title, call in itertools.chain.from_iterable(m.aot_launches() for m in (linear, covariance, selection)):
        with _recording(title, result):
            call()
    return _distinct(result)


def _empty(outputs: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(state, label logits, sums of a second look, ranks) of two rows."""
    compared = torch.zeros(2, len(_request(outputs).compared), 3, dtype=torch.float64)
    return empty_state(2, torch.device("cpu")), torch.zeros(2, 1), compared, torch.zeros(2, 1, dtype=torch.int64)


def _distinct(every: list[Launch]) -> list[Launch]:
    """Each kernel once for each set of types and fixed arguments."""
    found = {(it.kernel.__name__, str(tuple(map(_type, it.arguments))), str(it.fixed)): it for it in reversed(every)}
    return list(reversed(found.values()))


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
    registers, stack, spilled = _counts(compiled, gpu)
    narrow = tuple(narrow_pointers(compiled.asm["ttir"]))
    return Report(registers, stack, spilled, compiled.metadata.shared, seconds, narrow)


def _aligned(name: str, value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, int) and value % 16 == 0 and name not in COUNTS


def _counts(compiled: Any, gpu: GPUTarget) -> tuple[int, int, int]:
    """(registers, bytes of stack, spilled registers) of a thread."""
    if gpu.backend == "hip":
        return amd_counts(compiled.asm["amdgcn"])
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]) + int(found[3]), 0


def amd_counts(assembly: str) -> tuple[int, int, int]:
    """`_counts` of AMD's assembly, which names them."""
    names = "vgpr_count|private_segment_fixed_size|vgpr_spill_count|sgpr_spill_count"
    count = {k: int(v) for k, v in re.findall(rf"\.({names}):\s+(\d+)", assembly)}
    spilled = count["vgpr_spill_count"] + count["sgpr_spill_count"]
    return count["vgpr_count"], count["private_segment_fixed_size"], spilled


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


@functools.cache
def _every() -> list[Launch]:
    return launches()


def _attempt(at: int, name: str) -> Report | str:
    """The report of one of `launches`, or why it does not compile."""
    try:
        return compile_for(_every()[at], name)
    except Exception as error:  # of Triton, LLVM or ptxas
        return f"{type(error).__name__}: {error}"


def check(targets: list[str], brief: bool = False) -> int:
    """Compiles every launch for every target, on all cores, and prints what it needs.

    Returns:
        0, or 1 where a kernel does not compile, spills registers, or multiplies on the way to a pointer in 32 bits.

    Raises:
        ValueError: the kernels were loaded for the interpreter, which has nothing to compile.
    """
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    every, failed = _every(), 0
    print(f"triton {triton.__version__}: {len(every)} kernels for {', '.join(targets)}", flush=True)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for name in targets:
            reports = list(pool.map(_attempt, range(len(every)), [name] * len(every)))
            if not brief:
                needs = f"{'registers':>9} {'stack':>6} {'spilled':>7} {'shared':>7}"
                print(f"\n{name:10}  {'kernel':16} {needs} {'seconds':>8}")
            for it, report in zip(every, reports, strict=True):
                if isinstance(report, str):
                    print(f"{name:10}  {it.kernel.__name__} ({it.title}) does not compile: {report}")
                    continue
                if not (brief and report.ok):
                    needs = f"{report.registers:9} {report.stack:6} {report.spilled:7} {report.shared:7}"
                    numbers = f"{needs} {report.seconds:8.2f}"
                    print(f"{name:10}  {it.kernel.__name__:16} {numbers}  {it.title}")
                for line in report.narrow:
                    print(f"{name:10}  32-bit pointer arithmetic: {line}")
            good = [report for report in reports if isinstance(report, Report) and report.ok]
            most, seconds = max((r.registers for r in good), default=0), sum(r.seconds for r in good)
            print(f"{name:10}  {len(good)} of {len(every)} pass, at most {most} registers, {seconds:.0f} s", flush=True)
            failed += len(every) - len(good)
    return 1 if failed else 0
