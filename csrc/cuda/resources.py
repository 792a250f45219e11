"""Compiles every kernel of csrc/cuda/*.cu for GPUs that need not be there, and says what each one needs of them.

    python csrc/cuda/resources.py [--brief] [sm_80 sm_90a ...]     # no GPU, no torch
    python csrc/cuda/resources.py --logs build/temp*/cuda/csrc/cuda/*.log     # of a build that is there

Fails where a kernel does not compile, spills registers or keeps a stack in memory.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nvcc

SOURCES = Path(__file__).resolve().parent
TARGETS = ("sm_80", "sm_90a", "sm_100a", "sm_120")


@dataclass(frozen=True)
class Kernel:
    """What one kernel needs, as ptxas counts it: registers a thread, bytes a thread, static bytes a block."""

    target: str
    name: str
    registers: int
    stack: int
    stores: int
    loads: int
    shared: int

    @property
    def ok(self) -> bool:
        return not (self.stack or self.stores or self.loads)


@dataclass(frozen=True)
class Compilation:
    """One source for one target: ptxas' words, and nvcc's if it failed."""

    target: str
    text: str
    failed: bool
    seconds: float


def kernels_of(text: str) -> list[Kernel]:
    """Reads `ptxas -v`.  A device function that was not inlined counts as a kernel without registers of its own."""
    found: list[Kernel] = []
    target = entry = name = ""
    stack = stores = loads = 0
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(.+)' for '(\w+)'", line):
            entry, target = match[1], match[2]
        elif match := re.search(r"Function properties for (\S+)", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, match.groups())
            if name != entry:
                found.append(Kernel(target, name, 0, stack, stores, loads, 0))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found.append(Kernel(target, entry, int(match[1]), stack, stores, loads, int(shared[1]) if shared else 0))
    return found


def readable(names: list[str]) -> dict[str, str]:
    """Each name without namespaces, casts and arguments; mangled ones stay so where there is no c++filt."""
    demangled = names
    if names and shutil.which("c++filt"):
        demangled = subprocess.run(
            ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
        ).stdout.splitlines()
    short = []
    for name in demangled:
        name = re.sub(r"(\(anonymous namespace\)|\b_?[A-Za-z]\w*)::", "", name.removeprefix("void "))
        name = re.sub(r"\([^()]*\)$", "", name)
        short.append(re.sub(r"\(\w+\)(?=[-\d])", "", name).replace("> >", ">>"))
    return dict(zip(names, short, strict=True))


def compile_source(toolkit: nvcc.Toolkit, source: Path, target: str) -> Compilation:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        code = f"-gencode=arch=compute_{target[3:]},code={target}"
        command = [*toolkit.command, *nvcc.FLAGS, code, "--cubin", "-o", f"{folder}/cubin", str(source)]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return Compilation(target, result.stdout, result.returncode != 0, time.perf_counter() - start)


def compile_all(toolkit: nvcc.Toolkit, sources: list[Path], targets: list[str]) -> list[Compilation]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pairs = [(source, target) for target in targets for source in sources]
        return list(pool.map(lambda pair: compile_source(toolkit, *pair), pairs))


def report(done: Iterable[Compilation], brief: bool) -> bool:
    """Prints a table a target (or a line); returns whether every kernel compiled and keeps its values in registers."""
    done = list(done)
    kernels = [kernel for one in done for kernel in kernels_of(one.text)]
    names = readable(sorted({kernel.name for kernel in kernels}))
    for target in dict.fromkeys([one.target for one in done] + [kernel.target for kernel in kernels]):
        of_target = sorted((k for k in kernels if k.target == target), key=lambda k: names[k.name])
        seconds = sum(one.seconds for one in done if one.target == target)
        if not target:
            continue
        most = max((kernel.registers for kernel in of_target), default=0)
        took = f", {seconds:.1f} s" if seconds else ""
        print(f"cuda: {target}: {len(of_target)} kernels, at most {most} registers{took}")
        if brief:
            of_target = [kernel for kernel in of_target if not kernel.ok]
        if of_target:
            print("  registers  spill stores   loads   stack  static shared  kernel")
        for k in of_target:
            print(f"  {k.registers:9}  {k.stores:12}  {k.loads:6}  {k.stack:6}  {k.shared:13}  {names[k.name]}", end="")
            print("" if k.ok else "  <- not in registers alone")
    for one in done:
        if one.failed:
            print(f"cuda: {one.target}: does not compile\n{one.text}", end="")
    if not kernels:
        print("cuda: ptxas named no kernel")
    return bool(kernels) and all(kernel.ok for kernel in kernels) and not any(one.failed for one in done)


def main() -> int:
    parser = argparse.ArgumentParser(description="What the CUDA kernels need of a GPU, compiled without one.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--brief", action="store_true", help="one line a target instead of one a kernel")
    parser.add_argument("--logs", nargs="+", type=Path, metavar="FILE", help="read what a build left, compile nothing")
    arguments = parser.parse_args()
    if arguments.logs:
        return not report([Compilation("", log.read_text(), False, 0.0) for log in arguments.logs], arguments.brief)

    targets = arguments.targets or list(TARGETS)
    try:
        toolkit = nvcc.find()
    except nvcc.Missing as reason:
        print(f"cuda: kernels not compiled: {reason}")
        return 0
    for target in targets:
        if not (target.startswith("sm_") and toolkit.knows(target[3:])):
            known = " ".join(f"sm_{name}" for name in toolkit.known)
            raise SystemExit(f"resources.py: target: expected one of {known}, got {target!r}")
    sources = sorted(SOURCES.glob("*.cu"))
    if not sources:
        raise SystemExit(f"resources.py: no *.cu in {SOURCES}")
    return not report(compile_all(toolkit, sources, targets), arguments.brief)


if __name__ == "__main__":
    sys.exit(main())
