"""Builds the native module `fastdiv._C` from csrc/: g++ run by ninja, neither torch nor its headers needed.

FASTDIV_BUILD says what must come out: `auto` (default) the native module where all it needs is at hand, else
a pure Python package and a printed line that says why; `cpu` the native module or an error; `none` pure
Python; `cuda` is refused, as this release has no CUDA sources.  CXX names another compiler and its arguments.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# No -march: the kernels carry clones for newer instruction sets, so one binary serves every machine.
# No -ffast-math: infinities and NaN have a meaning here.  The two -fno- flags change no value, and let
# loops over exp and log vectorize.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
# A step of these loops is one long chain of operations: the next one must start before it ends (6 % here).
CXX_FLAGS += ["-funroll-loops", "-fschedule-insns"]
# -fopenmp alone asks for libgomp.so.1 by that name: a process keeps the copy that torch has already loaded.
LINK_FLAGS = ["-shared", "-fopenmp", "-Wl,--as-needed"]


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


def compile_commands() -> dict[str, list[str]]:
    """Per suffix of a source file, the command that compiles it, up to its `-c`."""
    import pybind11

    includes = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    return {".cpp": [*(compiler() or ()), *CXX_FLAGS, *includes]}


def ninja_file(sources: list[str], objects_dir: str, target: str) -> str:
    """The text of a build.ninja that compiles `sources` under `objects_dir` and links them into `target`."""

    def path(text: str) -> str:
        return re.sub(r"([$ :])", r"$\1", text)

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines = [f"builddir = {path(objects_dir)}"]  # ninja keeps there which headers each object depends on
    for suffix, words in compile_commands().items():
        lines += [f"rule compile{suffix}", f"  command = {command(words)} -MMD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", "  description = compile $in"]
    lines += ["rule link", f"  command = {command([*(compiler() or ()), *LINK_FLAGS])} $in -o $out"]
    lines += ["  description = link $out"]
    objects = [path(os.path.join(objects_dir, source + ".o")) for source in sources]
    for source, object_ in zip(sources, objects, strict=True):
        lines += [f"build {object_}: compile{Path(source).suffix} {path(source)}"]
    return "\n".join([*lines, f"build {path(target)}: link {' '.join(objects)}", ""])


class NinjaBuild(build_ext):
    """`build_ext` by way of ninja: parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp, "build.ninja")
        build.parent.mkdir(parents=True, exist_ok=True)
        build.write_text(ninja_file(ext.sources, self.build_temp, self.get_ext_fullpath(ext.name)))
        if status := subprocess.call([sys.executable, "-m", "ninja", "-f", str(build)]):
            raise SystemExit(status)


def native_modules() -> list[Extension]:
    """What FASTDIV_BUILD asks for: [fastdiv._C], or [] for a pure Python package."""
    wanted = os.environ.get("FASTDIV_BUILD", "auto")
    if wanted == "cuda":
        raise SystemExit("fastdiv: FASTDIV_BUILD=cuda, but this release has no CUDA sources: use auto or cpu")
    if wanted not in ("auto", "cpu", "none"):
        raise SystemExit(f"fastdiv: FASTDIV_BUILD must be auto, cpu, none or cuda, got {wanted!r}")
    if wanted == "none":
        return []
    if reason := obstacle():
        if wanted == "cpu":
            raise SystemExit(f"fastdiv: FASTDIV_BUILD=cpu, but {reason}")
        print(f"fastdiv: building without the native module: {reason}")
        return []
    return [Extension("fastdiv._C", sorted(str(path) for path in Path("csrc").glob("*.cpp")))]


setup(
    packages=[*find_packages(include=["fastdiv", "fastdiv.*"]), "fastdiv.benchmarks"],
    package_dir={"fastdiv.benchmarks": "benchmarks"},
    ext_modules=native_modules(),
    cmdclass={"build_ext": NinjaBuild},
)
