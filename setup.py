"""Builds the native module `fastdiv._C` from csrc/: g++ and nvcc run by ninja, neither torch nor its headers needed.

FASTDIV_BUILD says what must come out: `auto` (default) the native module where all it needs is at hand, with CUDA
kernels where nvcc is too, else a pure Python package, and a line that says which and why; `cpu` the native module
without CUDA kernels, or an error; `cuda` with them, or an error; `none` pure Python.  FASTDIV_CUDA_ARCHS="80 90 100"
chooses the GPUs; CXX and NVCC name other compilers and their arguments.  FASTDIV_LOCKSTEP=1, for tests, adds
`fastdiv._lockstep`: the CUDA kernels compiled by g++ (csrc/cuda/lockstep.h).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc/cuda"))
import nvcc

# No -march: csrc/rows_avx2.cpp and rows_avx512.cpp ask for newer instruction sets, so one binary serves every machine.
# No -ffast-math: infinities and NaN have a meaning here.  The two -fno- flags change no value, and let
# loops over exp and log vectorize.
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
# A step of these loops is one long chain of operations: the next one must start before it ends (6 % here).
FAST_FLAGS = ["-O3", "-funroll-loops", "-fschedule-insns"]
# CUDA kernels on a CPU: g++ takes four times as long to make them fast, and warns of registers that only the lanes
# with work fill.
LOCKSTEP_FLAGS = ["-O1", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
# -fopenmp alone asks for libgomp.so.1 by that name: a process keeps the copy that torch has already loaded.
LINK_FLAGS = ["-shared", "-fopenmp", "-Wl,--as-needed"]
# CUDA's runtime is linked in: the module loads where there is none.  Its names are hidden ones, so that no libcudart
# that torch brings takes their place.
CUDA_LINK_FLAGS = ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
# The C++ files that differ between modules; the others are compiled once for all.
OF_ONE_MODULE = ("binding.cpp", "lockstep.cpp")
# What nvcc says goes to a log beside the object; ptxas' counts stay there for resources.py, the rest is shown.
NVCC_LOG = '>$out.log 2>&1; s=$$?; grep -v -e "^ptxas info" -e "bytes stack frame" $out.log; exit $$s'


def compiler() -> list[str] | None:
    """The C++ compiler's command: CXX if it is set, else g++ or c++; None if it is not there."""
    candidates = (shlex.split(os.environ.get("CXX", "")) or [name] for name in ("g++", "c++"))
    return next((command for command in candidates if shutil.which(command[0])), None)


def obstacle() -> str | None:
    """What keeps the native module from being built here and what to do about it; None if nothing does."""
    if not sys.platform.startswith("linux"):
        return f"the native module is for Linux, this is {sys.platform}: use FASTDIV_BUILD=none"
    if compiler() is None:
        return f"no C++ compiler (CXX={os.environ.get('CXX', '')!r}): install g++ or let CXX name one"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python.h: install Python's headers (python3-dev)"
    if missing := [name for name in ("pybind11", "ninja") if not importlib.util.find_spec(name)]:
        return f"no Python package {' or '.join(missing)}: pip install {' '.join(missing)}"
    return None


def cxx_command(*flags: str) -> list[str]:
    """What compiles C++, up to the `-c`."""
    import pybind11

    includes = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    return [*(compiler() or ()), *CXX_FLAGS, *includes, *flags]


class Module(Extension):
    """A native module: which variant of the sources, what compiles C++ and *.cu, and flags that end its link."""

    def __init__(self, name: str, variant: str, cxx: list[str], cu: list[str], link: list[str]) -> None:
        sources = [*Path("csrc").rglob("*.cpp"), *(Path("csrc").rglob("*.cu") if cu else ())]
        super().__init__(name, sorted(map(str, sources)))
        self.variant, self.cxx, self.cu, self.link = variant, cxx, cu, link

    def compilation(self, source: Path) -> tuple[str, str, list[str]]:
        """How `source` becomes an object: folder of the object, rule, command up to its `-c`."""
        if source.suffix == ".cu":
            return self.variant, "compile_cuda" if self.variant == "cuda" else "compile", self.cu
        if source.name in OF_ONE_MODULE:
            return self.variant, "compile", self.cxx
        return "", "compile", cxx_command(*FAST_FLAGS)


def ninja_file(modules: dict[str, Module], objects_dir: str) -> str:
    """The text of a build.ninja that compiles under `objects_dir` what the modules, by their files, are made of."""

    def path(text: str) -> str:
        return re.sub(r"([$ :])", r"$\1", text)

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines = [f"builddir = {path(objects_dir)}"]  # ninja keeps there which headers each object depends on
    for rule, end in (("compile", ""), ("compile_cuda", NVCC_LOG)):
        lines += [f"rule {rule}", f"  command = $words -MMD -MF $out.d -c $in -o $out {end}"]
        lines += ["  depfile = $out.d", "  deps = gcc", "  description = compile $in"]
    lines += [f"rule link\n  command = {command([*(compiler() or ()), *LINK_FLAGS])} $in -o $out $words"]
    lines += ["  description = link $out"]
    statements = {}  # by output: modules share objects
    for target, module in modules.items():
        objects = []
        for source in module.sources:
            folder, rule, words = module.compilation(Path(source))
            objects.append(path(os.path.join(objects_dir, folder, source + ".o")))
            statements[objects[-1]] = f"{rule} {path(source)}\n  words = {command(words)}"
        statements[path(target)] = f"link {' '.join(objects)}\n  words = {command(module.link)}"
    return "\n".join([*lines, *(f"build {output}: {how}" for output, how in statements.items()), ""])


class NinjaBuild(build_ext):
    """`build_ext` by way of ninja: parallel, and only what changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # in place, copy also a module that is older than the one of another FASTDIV_BUILD there

    def build_extensions(self) -> None:
        modules = {self.get_ext_fullpath(module.name): module for module in self.extensions}
        if (lockstep := self.get_ext_fullpath("fastdiv._lockstep")) not in modules:
            Path(lockstep).unlink(missing_ok=True)  # a wheel takes whatever lies in that folder
        build = Path(self.build_temp, "build.ninja")
        build.parent.mkdir(parents=True, exist_ok=True)
        build.write_text(ninja_file(modules, self.build_temp))
        if status := subprocess.call([sys.executable, "-m", "ninja", "-f", str(build)]):
            raise SystemExit(status)


def native_modules() -> list[Extension]:
    """What FASTDIV_BUILD and FASTDIV_LOCKSTEP ask for; [] for a pure Python package."""
    wanted = os.environ.get("FASTDIV_BUILD", "auto")
    if wanted not in ("auto", "cpu", "none", "cuda"):
        raise SystemExit(f"fastdiv: FASTDIV_BUILD must be auto, cpu, none or cuda, got {wanted!r}")
    if wanted == "none":
        return []
    if reason := obstacle():
        if wanted != "auto":
            raise SystemExit(f"fastdiv: FASTDIV_BUILD={wanted}, but {reason}")
        print(f"fastdiv: building without the native module: {reason}")
        return []
    lockstep = os.environ.get("FASTDIV_LOCKSTEP", "") not in ("", "0")
    return [native_module(wanted), *([lockstep_module()] if lockstep else [])]


def native_module(wanted: str) -> Module:
    """`fastdiv._C`, unless `wanted` is cpu with CUDA kernels; under `auto` a line says whether they are in."""
    cpu = Module("fastdiv._C", "cpu", cxx_command(*FAST_FLAGS), [], [])
    if wanted == "cpu":
        return cpu
    try:
        toolkit = nvcc.find()
    except nvcc.Missing as reason:
        if wanted == "cuda":
            raise SystemExit(f"fastdiv: FASTDIV_BUILD=cuda, but {reason}") from None
        print(f"fastdiv: building the native module without CUDA kernels: {reason}")
        return cpu
    flags, made = nvcc.gencode(toolkit.wanted())
    print(f"fastdiv: building the native module with CUDA kernels for {', '.join(made)}")
    cxx = cxx_command(*FAST_FLAGS, "-DFD_CUDA", f'-DFD_CUDA_ARCHITECTURES="{" ".join(made)}"')
    cu = [*toolkit.command, *nvcc.FLAGS, "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden", *flags]
    return Module("fastdiv._C", "cuda", cxx, cu, [f"-L{toolkit.libraries}", *CUDA_LINK_FLAGS])


def lockstep_module() -> Module:
    """`fastdiv._lockstep`, for tests."""
    if platform.machine() != "x86_64":
        raise SystemExit(f"fastdiv: FASTDIV_LOCKSTEP is for x86_64, this is {platform.machine()}: build without it")
    defines = ["-DFD_MODULE=_lockstep", "-DFD_LOCKSTEP", "-DFD_CUDA", '-DFD_CUDA_ARCHITECTURES="lockstep"']
    cxx = cxx_command(*LOCKSTEP_FLAGS, *defines)
    return Module("fastdiv._lockstep", "lockstep", cxx, [*cxx, "-x", "c++"], [])


setup(
    packages=[*find_packages(include=["fastdiv", "fastdiv.*"]), "fastdiv.benchmarks"],
    package_dir={"fastdiv.benchmarks": "benchmarks"},
    ext_modules=native_modules(),
    cmdclass={"build_ext": NinjaBuild},
)
