"""`make gpu` and the benchmarks' GPU side, as far as a CPU can tell: no failure ends the run without results."""

from __future__ import annotations

import json
import os
import re
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
from fastdiv.benchmarks import common, floors, from_hidden, from_logits, gpu, others, timing
from fastdiv.benchmarks.common import COMPILE, EAGER, FASTDIV, PLACES, Case, Place, Settings, Tensors, Unavailable
from torch import Tensor

from fastdiv import backends

SMALL = ["--scale", "small", "--rounds", "2", "--no-compile", "--no-memory"]
CPU, GPU = torch.device("cpu"), torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    preferred = backends.select([HERE.dtype], CPU, None)
    for case in (case for cases in works.values() for case in cases.values()):
        assert {EAGER, FASTDIV} <= case["contestants"].keys()
        assert case["contestants"][FASTDIV]["backend"] == preferred and case["dtype"] == "bfloat16"
    expected = {others.LIGER, others.TRL}
    alone = works["from_logits"]["log_prob_alone_forward"]
    assert expected <= alone["contestants"].keys() | alone["absent"].keys()
    assert common.TRITON not in works["from_hidden"]["log_prob_entropy"]["absent"]
    assert alone["absent"][common.TRITON] == f"it is for beside the cuda backend, fastdiv ran on {preferred}"
    table = path.with_suffix(".txt").read_text()
    assert table in capsys.readouterr().out
    assert "of floor" in table and "GB/s" in table and f"fastdiv ({preferred})" in table
    assert f"from_logits/js_forward: fastdiv's {preferred} kernels move 0.0021 GB" in table
    for way in ("forward", "backward"):
        case = works["from_logits"][f"log_prob_entropy_{way}"]
        share = f"{100 / case['contestants'][FASTDIV]['to_floor']['median']:.1f} %"
        chosen = case["floor"]["chosen"][0]
        line = f"64 x 4096 bfloat16, of the floor's bytes per second ({chosen}): fastdiv ({preferred}) {share}\n"
        assert f"from_logits/log_prob_entropy_{way}: {line}" in table


@pytest.mark.skipif(backends.available()["cuda"] is not None, reason="the cuda backend is absent")
@pytest.mark.skipif(backends.available()["triton"] is not None, reason="the triton backend is absent")
def test_both_backends_of_a_gpu_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLACES, "cuda", replace(HERE, device=GPU.type))
    monkeypatch.setitem(from_logits.SIZES["cuda"], "small", (5, 300))
    monkeypatch.setenv("FASTDIV_BACKEND", "cuda")  # as it is where there is a GPU
    from fastdiv.backends.triton import launch

    kernels: set[str] = set()
    run = launch.run

    def watched(kernel: Any, *arguments: Any, **fixed: Any) -> None:
        kernels.add(kernel.__name__)
        run(kernel, *arguments, **fixed)

    monkeypatch.setattr(launch, "run", watched)
    path = tmp_path / "run.json"
    assert bench.main([*SMALL, "--device", "cuda", "--only", "from_logits", "--json", str(path)]) == 0
    assert {"accumulate", "gradient"} <= kernels  # those that cuda has too
    works = json.loads(path.read_text())["works"]["from_logits"]
    for name, case in works.items():
        ours, beside = case["contestants"][FASTDIV], case["contestants"][common.TRITON]
        assert (ours["backend"], beside["backend"]) == ("cuda", "triton")
        assert beside["fastdiv_to_it"]["median"] > 0
        assert beside["of_floor"] == 1 / beside["to_floor"]["median"] and common.FLOOR in case["contestants"]
        assert (ours["moved_bytes"] == beside["moved_bytes"]) == (name != "js_forward")
    table = path.with_suffix(".txt").read_text()
    (line,) = (li for li in table.splitlines() if li.startswith("from_logits/log_prob_entropy_forward: 5 x 300"))
    assert re.search(r"fastdiv \(cuda\) [\d.]+ %, fastdiv triton [\d.]+ %$", line)
    notes = [li.split(" move")[0] for li in table.splitlines() if "kernels move" in li]
    assert notes == ["from_logits/js_forward: fastdiv's triton kernels"]


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
    it = small_case(case, 300, monkeypatch)
    inputs = it.inputs()
    counted = [Launches(launch.run)]

    def meter(work: Callable[[], Any]) -> tuple[float, Any]:
        counted.append(Launches(counted[0]._run))
        monkeypatch.setattr(launch, "run", counted[-1])
        return 0.0, work()

    it.execute(it.contestants[FASTDIV], inputs, meter)
    student = inputs["student"].numel() * inputs["student"].element_size()
    assert it.moved is not None and counted[-1].read + counted[-1].written == it.moved("triton")
    assert counted[-1].written == (student if it.timed == "backward" else 0)
    assert it.floor.amount <= it.moved("triton")


def small_case(name: str, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setitem(from_logits.SIZES["cuda"], "small", (5, vocabulary))
    (it,) = (c for c in from_logits.cases("small", replace(HERE, device=GPU.type)) if c.name == name)
    return it


@pytest.mark.skipif(backends.available()["cuda"] is not None, reason="the cuda backend is absent")
@pytest.mark.parametrize("vocabulary", [300, 4096], ids=["fits", "does not fit"])
@pytest.mark.parametrize("case", [case.name for case in from_logits.cases("small", HERE)])
def test_the_stated_traffic_is_that_of_cuda(case: str, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch by launch: a pair of rows that does not stay on the chip is read again for its second look."""
    monkeypatch.setenv("FASTDIV_BACKEND", "cuda")
    it = small_case(case, vocabulary, monkeypatch)
    backend, inputs, passes = backends.get("cuda"), it.inputs(), []
    models = 1 + ("teacher" in inputs)
    on_chip = from_logits.fits_on_chip(vocabulary, replace(HERE, device=GPU.type))
    assert GPU.type == "cuda" or on_chip == (vocabulary == 300)

    class Counted:
        """The native module, whose launches add the passes over one tensor of logits' size that they take."""

        def __init__(self, of: Any) -> None:
            self.of = of

        def __getattr__(self, name: str) -> Any:
            return Counted(self.of.cuda) if name == "cuda" else getattr(self.of, name)

        def statistics(self, *arguments: Any) -> None:
            known = arguments[5]
            passes.append(models * (1 if known or models == 1 or on_chip else 2))
            self.of.statistics(*arguments)

        def gradient(self, *arguments: Any) -> None:
            passes.append(models + 1)
            self.of.gradient(*arguments)

    def meter(work: Callable[[], Any]) -> tuple[float, Any]:
        passes.clear()
        with monkeypatch.context() as patch:
            patch.setattr(backend, "_native", Counted(backend._native))  # type: ignore[attr-defined]
            return 0.0, work()

    it.execute(it.contestants[FASTDIV], inputs, meter)
    assert it.moved is not None and len(passes) == 1
    assert it.moved("cuda") == passes[0] * inputs["student"].numel() * 2
    assert it.floor.amount <= it.moved("cuda")


def test_what_stays_on_the_chip_is_what_the_kernels_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = (gpu.ROOT / "csrc/cuda/kernels.h").read_text()
    machine = (gpu.ROOT / "csrc/cuda/machine.h").read_text()
    clusters = re.findall(r"kLargestCluster = (\d+);", kernels)
    kept = [int(number) << 10 for number in re.findall(r"kKept = (\d+) << 10;", kernels)]
    assert list(map(int, clusters)) == [from_logits.CLUSTER_IN_LOCKSTEP, from_logits.CLUSTER]
    assert kept == [from_logits.KEPT_IN_LOCKSTEP, from_logits.KEPT]
    assert "major >= 9 ? 8 : 1" in machine

    monkeypatch.setenv("FASTDIV_LOCKSTEP", "0")
    for major, per_processor, v, dtype, fits in (
        (9, 228, 151936, torch.bfloat16, True),
        (9, 228, 204800, torch.bfloat16, True),
        (9, 228, 204801, torch.bfloat16, False),
        (9, 228, 151936, torch.float32, False),
        (8, 164, 151936, torch.bfloat16, False),
        (8, 164, 25600, torch.bfloat16, True),
        (8, 100, 25600, torch.bfloat16, False),
    ):
        it = SimpleNamespace(major=major, shared_memory_per_multiprocessor=per_processor << 10)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, it=it: it)
        assert from_logits.fits_on_chip(v, Place("cuda", "cuda", dtype)) == fits


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
    paths = [gpu.ROOT / "tests" / name for name in gpu.FILES]
    every, none = gpu.choose(paths, [])
    assert none == {} and all(Path(file).exists() for file in every)
    names = {Path(file).name for file in every}
    assert {"test_gpu.py", "test_stats.py", "test_golden.py", "test_cuda.py", "test_triton_linear.py"} <= names
    with _without(monkeypatch, "mpmath"):
        fewer, left_out = gpu.choose(paths, [])
    assert left_out == {"test_precision.py": ["mpmath"]}
    assert len(fewer) == len(every) - 1
    fewer, left_out = gpu.choose(paths, ["cuda"])
    assert left_out == {Path(f).name: ["cuda backend"] for f in every if Path(f).name.startswith("test_cuda")}
    assert {"test_cuda.py", "test_cuda_tokens.py"} <= left_out.keys() and len(fewer) == len(every) - len(left_out)
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
    parts = ("fastdiv.benchmarks.first_gpu", "--maxfail=40", "--device", "tests/test_sanitizer.py")
    assert [[part for part in parts if part in command] for command in commands] == [[part] for part in parts]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "tests.txt"]
    printed = capsys.readouterr().out
    assert "1 failed" in printed and "gpu: tests: not finished in 210 s" in printed and "benchmarks: passed" in printed
    assert "gpu: first look: passed" in printed and "gpu: sanitizer: passed" in printed
