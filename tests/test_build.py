"""What FASTDIV_BUILD promises: the native module with or without CUDA, pure Python, or a line that says what to do."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fastdiv

ROOT = Path(__file__).parent.parent
TORCH_LIBGOMP = Path(torch.__file__).resolve().parent / "lib/libgomp.so.1"
NEEDS_NVCC = pytest.mark.skipif(
    not shutil.which("nvcc", path=f"{os.environ['PATH']}:{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"),
    reason="no nvcc on PATH or under CUDA_HOME",
)
SMALL_SOURCES = {
    "answer.h": "#define ANSWER 41",
    "answer.cpp": '#include "answer.h"\nint answer() { return ANSWER; }',
    # Thread 0 reads what 63 others wrote before the barrier.
    "sum.cu": """#include "device.h"
namespace {
struct Sum { int* total; };
FD_KERNEL void FD_BOUNDS(64, 1) sum_kernel(Sum args) {
  int* own = reinterpret_cast<int*>(fd::shared_memory());
  own[fd::thread()] = fd::thread();
  fd::sync();
  int total = 0;
  for (int i = 0; i < fd::threads(); ++i) total += own[i];
  if (fd::thread() == 0) *args.total = total;
}
}  // namespace
int sum(int* total) { return fd::launch(&sum_kernel, {1, 1, 64, 256}, {}, Sum{total}); }""",
    # Without pybind11, which takes seconds.
    "binding.cpp": """#include <Python.h>
#ifndef FD_MODULE
#define FD_MODULE _C
#endif
#define PASTE(a, b) a##b
#define INIT(name) PASTE(PyInit_, name)
int answer();
int sum(int* total);
static PyObject* answer_of(PyObject*, PyObject*) { return PyLong_FromLong(answer()); }
#ifdef FD_CUDA
static PyObject* sum_of(PyObject*, PyObject*) {
  int total = -1;
  return PyLong_FromLong(sum(&total) ? -1 : total);
}
#endif
static PyMethodDef methods[] = {{"answer", answer_of, METH_NOARGS, nullptr},
#ifdef FD_CUDA
                                {"sum", sum_of, METH_NOARGS, nullptr},
#endif
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "small", nullptr, -1,     methods,
                                 nullptr,               nullptr, nullptr, nullptr};
PyMODINIT_FUNC INIT(FD_MODULE)() {
  PyObject* m = PyModule_Create(&definition);
#ifdef FD_CUDA
  PyModule_AddStringConstant(m, "architectures", FD_CUDA_ARCHITECTURES);
#endif
  return m;
}""",
}
SPILLS = """#include "device.h"
namespace fd {
struct Long { float* data; };
template <int N>
FD_KERNEL void FD_BOUNDS(1024, 2) greedy(Long args) {
  float own[N];
#pragma unroll
  for (int i = 0; i < N; ++i) own[i] = args.data[thread() * N + i];
  sync();
#pragma unroll
  for (int i = 0; i < N; ++i) args.data[thread() * N + i] = own[i] * own[(i * 7 + 3) % N];
}
int run(Long args) { return launch(&greedy<64>, {1, 1, 1024, 0}, {}, args); }
}  // namespace fd"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads: no test writes into the repository."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("fastdiv", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return copy


@pytest.fixture
def small(tree: Path) -> Path:
    """A tree whose sources compile in seconds."""
    for path in (tree / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".cu") and path.name != "lockstep.cpp":
            path.unlink()
    for name, text in SMALL_SOURCES.items():
        (tree / "csrc" / ("cuda" if name.endswith(".cu") else "") / name).write_text(text + "\n")
    return tree


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("CXX", "NVCC", "FASTDIV_BUILD", "FASTDIV_CUDA_ARCHS", "FASTDIV_LOCKSTEP", "PYTHONPATH")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    words = [sys.executable, *command]
    return subprocess.run(words, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300)


def build_ext(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # nvcc, itself, cannot have a $ in its arguments.
    objects = "objects, quoted" if environment.get("FASTDIV_BUILD") == "cuda" else "objects, $quoted"
    return run("setup.py", "--quiet", "build_ext", "--inplace", "--build-temp", objects, cwd=tree, **environment)


def printed(tree: Path, module: str, expression: str) -> str:
    """What `expression` gives of the module built there, which is loaded without torch."""
    program = f"import sys; sys.path.append('fastdiv'); import {module} as m; print({expression})"
    result = run("-c", program, cwd=tree)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTDIV_BUILD": "cpu", "CXX": "/missing"}, "no C++ compiler (CXX='/missing'): install g++"),
        ({"FASTDIV_BUILD": "cuda", "CXX": "/missing"}, "FASTDIV_BUILD=cuda, but no C++ compiler"),
        (
            {"FASTDIV_BUILD": "cuda", "NVCC": "/missing"},
            "FASTDIV_BUILD=cuda, but no nvcc (NVCC='/missing'): let NVCC name",
        ),
        ({"FASTDIV_BUILD": "cuda", "NVCC": "false"}, "but false does not run (status 1): let NVCC name another"),
        ({"FASTDIV_BUILD": "cuda", "NVCC": "echo sm_80"}, "echo knows no sm_90: install CUDA 11.8 or newer"),
        pytest.param(
            {"FASTDIV_BUILD": "auto", "FASTDIV_CUDA_ARCHS": "80, 90a;sm_100"},
            "with a (90a) for features of that one GPU; got 'sm_100'",
            marks=NEEDS_NVCC,
        ),
        ({"FASTDIV_BUILD": "fast"}, "FASTDIV_BUILD must be auto, cpu, none or cuda, got 'fast'"),
    ],
    ids=["cpu without g++", "cuda without g++", "no nvcc", "broken nvcc", "old nvcc", "architecture", "unknown"],
)
def test_refused_in_one_line(tree: Path, environment: dict[str, str], message: str) -> None:
    result = build_ext(tree, **environment)
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert message in line


def test_auto_without_compiler_is_pure_python_and_says_so(tree: Path) -> None:
    result = build_ext(tree, CXX="/missing")
    assert result.returncode == 0, result.stderr
    assert "without the native module: no C++ compiler (CXX='/missing')" in result.stdout
    assert not list(tree.rglob("*.so"))


def test_pure_python_wheel_works_and_says_what_is_missing(tree: Path, tmp_path: Path) -> None:
    options = ("--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(tmp_path))
    built = run("-m", "pip", "wheel", *options, ".", cwd=tree, FASTDIV_BUILD="none")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")

    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {"fastdiv"}
    assert (installed / "fastdiv/py.typed").exists()
    assert (installed / "fastdiv/benchmarks/__init__.py").exists()

    # Without the finder of an editable install, which would add the repository's native module to this copy.
    program = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    program += "import fastdiv; print(fastdiv.__file__); print(fastdiv.info()['backends']['native'])"
    used = run("-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert used.returncode == 0, used.stderr
    file, native = used.stdout.splitlines()
    assert Path(file).is_relative_to(installed)
    assert "not built" in native


def test_build_is_incremental_follows_headers_and_fails_aloud(small: Path) -> None:
    first = build_ext(small, FASTDIV_BUILD="cpu")
    assert first.returncode == 0, first.stderr
    assert "compile csrc/binding.cpp" in first.stdout and printed(small, "_C", "m.answer()") == "41"

    # Without nvcc `auto` is the same build, and says so; and it replaces what another build has put there since.
    (module,) = (small / "fastdiv").glob("_C*.so")
    module.write_text("another build's")
    again = build_ext(small, NVCC="/missing")
    assert "no work to do" in again.stdout
    assert "building the native module without CUDA kernels: no nvcc (NVCC='/missing')" in again.stdout
    assert printed(small, "_C", "m.answer()") == "41"

    (small / "csrc/answer.h").write_text("#define ANSWER 42\n")
    second = build_ext(small, FASTDIV_BUILD="cpu")
    assert "compile csrc/answer.cpp" in second.stdout and printed(small, "_C", "m.answer()") == "42"
    assert "compile csrc/binding.cpp" not in second.stdout

    # Also under `auto`, and although a module from before lies there: nothing falls back silently.
    (small / "csrc/answer.h").write_text('#error "no answer"\n')
    third = build_ext(small, NVCC="/missing")
    assert third.returncode != 0 and "no answer" in third.stdout


@NEEDS_NVCC
def test_cuda_build_loads_without_a_gpu_or_a_cuda_library(small: Path) -> None:
    built = build_ext(small, FASTDIV_BUILD="cuda", FASTDIV_CUDA_ARCHS="80;90a")
    assert built.returncode == 0, built.stdout + built.stderr
    assert "with CUDA kernels for sm_80, sm_90a, ptx_80\n" in built.stdout
    assert "ptxas info" not in built.stdout
    assert printed(small, "_C", "m.answer(), m.architectures") == "41 sm_80 sm_90a ptx_80"
    (module,) = (small / "fastdiv").glob("_C*.so")
    assert "libcu" not in subprocess.check_output(["ldd", module], text=True)
    assert " cuda" not in subprocess.check_output(["nm", "--dynamic", module], text=True)  # of the one linked in

    logs = list(small.glob("objects*/**/*.log"))
    reported = run("csrc/cuda/resources.py", "--logs", *map(str, logs), cwd=small)
    assert reported.returncode == 0, reported.stdout + reported.stderr
    assert "cuda: sm_80: 1 kernels" in reported.stdout and "cuda: sm_90a: 1 kernels" in reported.stdout

    # Another header, another module: each in the same tree as before.
    (small / "csrc/cuda/device.h").write_text("#error device\n")
    broken = build_ext(small, FASTDIV_BUILD="cuda", FASTDIV_CUDA_ARCHS="80;90a")
    assert broken.returncode != 0 and "#error device" in broken.stdout
    assert build_ext(small, FASTDIV_BUILD="cpu").returncode == 0
    assert printed(small, "_C", "hasattr(m, 'architectures')") == "False"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="lock-step is for x86_64")
def test_lockstep_runs_kernels_on_a_cpu_and_stays_out_of_wheels(small: Path) -> None:
    built = build_ext(small, FASTDIV_BUILD="cpu", FASTDIV_LOCKSTEP="1")
    assert built.returncode == 0, built.stdout + built.stderr
    assert printed(small, "_lockstep", "m.sum(), m.architectures") == f"{sum(range(64))} lockstep"
    assert printed(small, "_C", "hasattr(m, 'sum')") == "False"
    assert list(small.glob("build/**/_lockstep*"))

    assert "no work to do" in build_ext(small, FASTDIV_BUILD="cpu", FASTDIV_LOCKSTEP="1").stdout
    assert build_ext(small, FASTDIV_BUILD="cpu").returncode == 0
    assert not list(small.glob("build/**/_lockstep*"))


def test_lockstep_elsewhere_is_refused_in_one_line(small: Path) -> None:
    program = (
        "import platform, runpy, sys; platform.machine = lambda: 'aarch64'; sys.argv = ['setup.py', '--version']\n"
    )
    program += "runpy.run_path('setup.py')"
    result = run("-c", program, cwd=small, FASTDIV_BUILD="cpu", FASTDIV_LOCKSTEP="1")
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert line == "fastdiv: FASTDIV_LOCKSTEP is for x86_64, this is aarch64: build without it"


@NEEDS_NVCC
def test_resources_are_counted_and_a_spill_fails(small: Path) -> None:
    plain = run("csrc/cuda/resources.py", "sm_80", cwd=small)
    assert plain.returncode == 0, plain.stdout + plain.stderr
    head, _, row = plain.stdout.splitlines()
    assert head.startswith("cuda: sm_80: 1 kernels, at most ") and row.split()[1:] == ["0", "0", "0", "0", "sum_kernel"]

    (small / "csrc/cuda/spills.cu").write_text(SPILLS + "\n")
    spilt = run("csrc/cuda/resources.py", "--brief", "sm_80", cwd=small)
    assert spilt.returncode == 1, spilt.stdout + spilt.stderr
    head, _, row = spilt.stdout.splitlines()
    assert head.startswith("cuda: sm_80: 2 kernels, at most 32 registers") and int(row.split()[1]) > 0
    assert row.endswith("greedy<64>  <- not in registers alone")

    (small / "csrc/cuda/spills.cu").write_text("#error spills\n")
    broken = run("csrc/cuda/resources.py", "--brief", "sm_80", cwd=small)
    assert broken.returncode == 1 and "#error spills" in broken.stdout


def test_resources_say_that_there_is_no_nvcc(small: Path) -> None:
    result = run("csrc/cuda/resources.py", cwd=small, NVCC="/missing")
    assert result.returncode == 0
    assert result.stdout == "cuda: kernels not compiled: no nvcc (NVCC='/missing'): let NVCC name one\n"


@pytest.mark.skipif(importlib.util.find_spec("fastdiv._C") is None, reason="the native module is not built")
@pytest.mark.skipif(not TORCH_LIBGOMP.exists(), reason="this torch brings no libgomp.so.1 of its own")
def test_native_module_shares_torchs_openmp() -> None:
    result = run("-c", "import torch, fastdiv._C; print(open('/proc/self/maps').read())", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    maps = result.stdout.splitlines()
    assert {line.split(maxsplit=5)[5] for line in maps if "libgomp" in line} == {str(TORCH_LIBGOMP)}


def test_a_process_in_any_folder_imports_what_the_tests_import(tmp_path: Path) -> None:
    program = "import fastdiv; print(fastdiv.__file__)"
    said = subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, text=True)
    assert Path(said.strip()) == Path(fastdiv.__file__).resolve()
