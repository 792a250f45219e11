"""What FASTDIV_BUILD promises: the native module, a pure Python package, or a line that says what to do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TORCH_LIBGOMP = Path(torch.__file__).resolve().parent / "lib/libgomp.so.1"
SMALL_SOURCES = {
    "answer.h": "#define ANSWER 41",
    "answer.cpp": '#include "answer.h"\nint answer() { return ANSWER; }',
    "binding.cpp": "#include <pybind11/pybind11.h>\nint answer();\n"
    'PYBIND11_MODULE(_C, m) { m.def("answer", &answer); }',
}


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


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "FASTDIV_BUILD")}
    words = [sys.executable, *command]
    return subprocess.run(words, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300)


def build_ext(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ("setup.py", "--quiet", "build_ext", "--inplace", "--build-temp", "objects, $quoted")
    return run(*command, cwd=tree, **environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTDIV_BUILD": "cpu", "CXX": "/missing"}, "no C++ compiler (CXX='/missing'): install g++"),
        ({"FASTDIV_BUILD": "cuda"}, "this release has no CUDA sources"),
        ({"FASTDIV_BUILD": "fast"}, "FASTDIV_BUILD must be auto, cpu, none or cuda, got 'fast'"),
    ],
    ids=["cpu without compiler", "cuda", "unknown"],
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


def test_build_is_incremental_follows_headers_and_fails_aloud(tree: Path) -> None:
    shutil.rmtree(tree / "csrc")
    (tree / "csrc").mkdir()
    for name, text in SMALL_SOURCES.items():
        (tree / "csrc" / name).write_text(text + "\n")

    def answer() -> str:
        program = "import sys; sys.path.append('fastdiv'); import _C; print(_C.answer())"
        return run("-c", program, cwd=tree).stdout.strip()

    first = build_ext(tree, FASTDIV_BUILD="cpu")
    assert first.returncode == 0, first.stderr
    assert "compile csrc/binding.cpp" in first.stdout and answer() == "41"

    assert "no work to do" in build_ext(tree).stdout

    (tree / "csrc/answer.h").write_text("#define ANSWER 42\n")
    second = build_ext(tree)
    assert "compile csrc/answer.cpp" in second.stdout and answer() == "42"
    assert "compile csrc/binding.cpp" not in second.stdout

    # Also under `auto`, and although a module from before lies there: nothing falls back silently.
    (tree / "csrc/answer.h").write_text('#error "no answer"\n')
    third = build_ext(tree)
    assert third.returncode != 0 and "no answer" in third.stdout


@pytest.mark.skipif(importlib.util.find_spec("fastdiv._C") is None, reason="the native module is not built")
@pytest.mark.skipif(not TORCH_LIBGOMP.exists(), reason="this torch brings no libgomp.so.1 of its own")
def test_native_module_shares_torchs_openmp() -> None:
    result = run("-c", "import torch, fastdiv._C; print(open('/proc/self/maps').read())", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    maps = result.stdout.splitlines()
    assert {line.split(maxsplit=5)[5] for line in maps if "libgomp" in line} == {str(TORCH_LIBGOMP)}
