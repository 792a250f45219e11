"""`make gpu` and the benchmarks' GPU side, as far as a CPU can tell: no failure ends the run without results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastdiv.benchmarks import __main__ as bench
from fastdiv.benchmarks import floors, from_hidden, from_logits, gpu, others, timing
from fastdiv.benchmarks.common import COMPILE, EAGER, FASTDIV, PLACES, Case, Place, Settings, Tensors, Unavailable
from torch import Tensor

from fastdiv import backends

SMALL = ["--scale", "small", "--rounds", "2", "--no-compile", "--no-memory"]
HERE = Place("cuda", "cpu", torch.bfloat16)
"""The cases of a GPU, on a CPU."""


@pytest.fixture
def cuda_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLACES, "cuda", HERE)


@pytest.mark.usefixtures("cuda_is_here")
def test_every_case_of_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    assert bench.main([*SMALL, "--device", "cuda", "--json", str(path)]) == 0
    works = json.loads(path.read_text())["works"]
    assert set(works) == {"from_hidden", "from_logits"}
    assert set(works["from_hidden"]) == {"log_prob_entropy", "linear_loss", "reverse_kl", "log_prob_alone"}
    kinds = ("log_prob_entropy", "reverse_kl", "js", "log_prob_alone")
    assert set(works["from_logits"]) == {f"{kind}_{way}" for kind in kinds for way in ("forward", "backward")}
    for case in (case for cases in works.values() for case in cases.values()):
        assert {EAGER, FASTDIV} <= case["contestants"].keys()
    expected = {others.LIGER, others.TRL}
    alone = works["from_logits"]["log_prob_alone_forward"]
    assert expected <= alone["contestants"].keys() | alone["absent"].keys()
    table = path.with_suffix(".txt").read_text()
    assert table in capsys.readouterr().out
    assert "of floor" in table and "GB/s" in table
    assert "from_logits/js_forward: fastdiv's kernels move 0.0021 GB" in table


class Launches:
    """Counts the bytes of logits that Triton's kernels read, and of gradients that they write."""

    def __init__(self, run: Callable[..., None]) -> None:
        self._run, self.read, self.written = run, 0, 0

    def __call__(self, kernel: Any, rows: int, shape: Any, *arguments: Any, **fixed: Any) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        columns = named.get("columns", 0)
        size = {n: rows * columns * t.element_size() for n, t in named.items() if isinstance(t, Tensor)}
        self.read += size.get("x", 0) + size.get("y", 0)
        self.written += size.get("dx", 0) + size.get("dy", 0)
        self._run(kernel, rows, shape, *arguments, **fixed)


@pytest.mark.skipif(backends.available()["triton"] is not None, reason="the triton backend is absent")
@pytest.mark.parametrize("case", [case.name for case in from_logits.cases("small", HERE)])
def test_the_stated_traffic_is_that_of_the_kernels(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiv.backends.triton import launch

    monkeypatch.setenv("FASTDIV_BACKEND", "triton")
    place = replace(HERE, device="cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setitem(from_logits.SIZES["cuda"], "small", (5, 300))
    (it,) = (c for c in from_logits.cases("small", place) if c.name == case)
    inputs = it.inputs()
    counted = [Launches(launch.run)]

    def meter(work: Callable[[], Any]) -> tuple[float, Any]:
        counted.append(Launches(counted[0]._run))
        monkeypatch.setattr(launch, "run", counted[-1])
        return 0.0, work()

    it.execute(it.contestants[FASTDIV], inputs, meter)
    student = inputs["student"].numel() * inputs["student"].element_size()
    assert counted[-1].read + counted[-1].written == it.moved
    assert counted[-1].written == (student if it.timed == "backward" else 0)
    assert it.floor.amount <= it.moved


def test_bytes_moved() -> None:
    assert floors.bytes_moved(3, 5, 2, reads=2, writes=1) == 3 * 5 * 2 * 3


def case_with(**contestants: Callable[..., Tensors]) -> Case:
    (case,) = (c for c in from_logits.cases("small", HERE) if c.name == "js_forward")
    names = {"eager": EAGER, "ours": FASTDIV, "compiled": COMPILE}
    return replace(
        case,
        contestants={names.get(n, n): f for n, f in contestants.items()},
        rounds=1,
        guests=("guest", "other"),
    )


def test_who_cannot_take_part_is_named() -> None:
    def hungry(**inputs: Tensor) -> Tensors:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")

    def wrong(**inputs: Tensor) -> Tensors:
        return {name: 2.0 * value for name, value in from_logits.eager_js(**inputs).items()}

    def broken(**inputs: Tensor) -> Tensors:
        raise RuntimeError("no such kernel")

    def missing(**inputs: Tensor) -> Tensors:
        return others.trl_log_prob(**inputs)  # of other arguments

    ours, plain = from_logits.fastdiv_js, from_logits.eager_js
    case = case_with(eager=hungry, ours=ours, guest=wrong, other=missing, compiled=broken, fine=plain)
    result = case.run(Settings(rounds=1))
    assert result.times.keys() == {"floor", FASTDIV, "fine"}
    assert result.absent[EAGER] == "out of memory: CUDA out of memory. Tried to allocate 9 GiB"
    assert "loss of guest is off that of fastdiv" in result.absent["guest"]
    assert result.absent[COMPILE] == "failed: no such kernel"
    assert "Error" in result.absent["other"]
    with pytest.raises(RuntimeError, match="no such kernel"):
        case_with(eager=from_logits.eager_js, ours=broken).run(Settings())
    with pytest.raises(Unavailable, match="out of memory"):
        case_with(eager=hungry).run(Settings())


@pytest.mark.usefixtures("cuda_is_here")
@pytest.mark.parametrize(
    ("error", "message"),
    [(ValueError("no kernel image"), "void: no kernel image"), (KeyboardInterrupt(), "the run: void: interrupted")],
)
def test_what_was_measured_before_a_failure_is_written(
    error: BaseException, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    run = Case.run

    def failing(self: Case, settings: Settings) -> Any:
        if self.name == "linear_loss":
            raise error
        return run(self, settings)

    monkeypatch.setattr(Case, "run", failing)
    path = tmp_path / "run.json"
    assert bench.main([*SMALL, "--device", "cuda", "--only", "from_hidden", "--json", str(path)]) == 1
    document = json.loads(path.read_text())
    assert "log_prob_entropy" in document["works"]["from_hidden"]
    assert message in path.with_suffix(".txt").read_text() and message in capsys.readouterr().err
    assert ("reverse_kl" in document["works"]["from_hidden"]) == isinstance(error, Exception)


@pytest.mark.usefixtures("cuda_is_here")
def test_no_case_is_begun_after_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*SMALL, "--device", "cuda", "--only", "from_logits/js_forward", "--seconds", "-1"]) == 1
    assert "from_logits/js_forward: void: not begun within -1 s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["--device", "cuda"])
    assert caught.value.code == 2
    assert gpu.main() == 2
    assert capsys.readouterr().err.count("torch sees no CUDA device") == 2


def test_a_gpu_is_timed_by_events_around_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def elapsed_time(self, other: Event) -> float:
            return 1500.0

    flush = SimpleNamespace(zero_=lambda: order.append("flush"))
    cuda = SimpleNamespace(
        Event=Event, synchronize=lambda: order.append("wait"), _sleep=lambda cycles: order.append("sleep")
    )
    fake = SimpleNamespace(cuda=cuda, uint8=torch.uint8, empty=lambda *shape, **options: flush)
    monkeypatch.setattr(timing, "torch", fake)
    assert timing.DeviceSeconds()(lambda: order.append("work")) == (1.5, None)
    assert order == ["wait", "flush", "sleep", "record", "work", "record", "wait"]


def test_from_hidden_has_no_traffic_of_its_own() -> None:
    """Products decide there."""
    assert {case.moved for case in from_hidden.cases("small", HERE)} == {None}
    assert {case.floor.unit for case in from_hidden.cases("small", HERE)} == {"flop"}


# The commands of `make gpu`


def test_a_command_that_does_not_end_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["import time", "try:", "    print('begun', flush=True)", "    time.sleep(600)"]
    program = "\n".join([*lines, "except KeyboardInterrupt:", "    print('said')"])
    log, limit, wait = tmp_path / "log", 0.125, subprocess.Popen.wait

    def once_begun(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        while timeout == limit and "begun" not in log.read_text():
            time.sleep(0.01)
        return wait(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", once_begun)
    with log.open("w") as output:
        assert gpu.run([sys.executable, "-c", program], limit, dict(os.environ), output) is None
    assert log.read_text().split() == ["begun", "said"]


def test_a_command_gives_its_status() -> None:
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 600.0, dict(os.environ)) == 3


@contextmanager
def _without(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[None]:
    find = gpu.importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name in names else find(name))
        yield


def test_tests_that_lack_a_package_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every, none = gpu.choose([gpu.ROOT / "tests" / name for name in gpu.FILES])
    assert none == {} and all(Path(file).exists() for file in every)
    assert {"test_gpu.py", "test_stats.py", "test_golden.py"} <= {Path(file).name for file in every}
    with _without(monkeypatch, "mpmath"):
        fewer, left_out = gpu.choose([gpu.ROOT / "tests" / name for name in gpu.FILES])
    assert left_out == {"test_precision.py": ["mpmath"]}
    assert len(fewer) == len(every) - 1
    with _without(monkeypatch, "hypothesis"):
        assert gpu.tests(tmp_path / "log") == "not run: pytest and hypothesis are needed"


def test_failing_tests_do_not_keep_the_benchmarks_from_running(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], seconds: float, environment: dict[str, str], output: Any = None) -> int | None:
        commands.append(command)
        if output:
            output.write("1 failed\n")
            return None
        (tmp_path / "results" / "gpu.json").write_text("{}")
        return 0

    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "old.json").write_text("{}")
    os.utime(tmp_path / "results" / "old.json", (0, 0))
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu.main() == 1
    assert [("pytest" in command, "--device" in command) for command in commands] == [(True, False), (False, True)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "tests.txt"]
    printed = capsys.readouterr().out
    assert "1 failed" in printed and "gpu: tests: not finished in 210 s" in printed and "benchmarks: passed" in printed
