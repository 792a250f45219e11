"""The benchmarks run, measure what they say, and refuse a contestant that computes something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastdiv.benchmarks import floors, from_logits, memory, per_call
from fastdiv.benchmarks.__main__ import main
from fastdiv.benchmarks.common import (
    COMPILE,
    EAGER,
    FASTDIV,
    FLOOR,
    Contestant,
    Disagreement,
    Place,
    check_agreement,
)
from fastdiv.benchmarks.timing import interleave, paired_ratio
from torch import Tensor

SMALL = ["--scale", "small", "--rounds", "2"]


def test_every_work_from_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "run.json"
    only = ["--only", "from_hidden", "--only", "from_logits", "--no-compile", "--no-memory"]
    assert main([*SMALL, *only, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["scale"] == "small"
    assert {"cpu", "cores", "instruction_set", "threads", "torch", "date"} <= document["machine"].keys()
    assert set(document["works"]["from_hidden"]) == {"log_prob_entropy", "linear_loss", "reverse_kl"}
    names = {f"{n}_{d}" for n in ("log_prob_entropy", "reverse_kl", "js") for d in ("forward", "backward")}
    assert set(document["works"]["from_logits"]) == names
    printed = capsys.readouterr().out
    for work, cases in document["works"].items():
        for name, case in cases.items():
            assert f"{work}/{name}" in printed
            assert case["contestants"].keys() == {FLOOR, EAGER, FASTDIV}
            assert case["absent"] == {COMPILE: "switched off"}
            assert case["floor"]["amount"] > 0 and case["floor"]["chosen"]
            for contestant in case["contestants"].values():
                assert len(contestant["times_s"]) == 2
                assert 0 < contestant["min_s"] <= contestant["median_s"]
                assert contestant["to_floor"]["low"] <= contestant["to_floor"]["high"]
            assert case["contestants"][FLOOR]["to_floor"] == {"median": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compile_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert main([*SMALL, "--only", "from_logits/reverse_kl_backward", "--json", str(path)]) == 0
    case = json.loads(path.read_text())["works"]["from_logits"]["reverse_kl_backward"]
    assert case["absent"] == {}
    assert case["contestants"].keys() == {FLOOR, EAGER, COMPILE, FASTDIV}
    tokens, vocabulary = from_logits.SIZES["cpu"]["small"]
    results = 4 * (1 + tokens + tokens * vocabulary)  # loss, reverse_kl, d_student
    for name in (EAGER, COMPILE, FASTDIV):
        assert case["contestants"][name]["memory_bytes"]["results"] == results
    # Plain torch keeps several tensors of the gradient's size.
    assert case["contestants"][EAGER]["memory_bytes"]["peak"] > 3 * results


def test_import_time(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert main(["--only", "import_time", "--rounds", "1", "--json", str(path)]) == 0
    case = json.loads(path.read_text())["works"]["import_time"]["import"]
    assert min(contestant["min_s"] for contestant in case["contestants"].values()) > 0.01


def test_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--only", "from_nothing"])
    assert caught.value.code == 2
    assert "from_hidden/linear_loss" in capsys.readouterr().err


def doubled_gradient(student: Tensor, teacher: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Right values, wrong gradient."""
    outputs = from_logits.fastdiv_js(student, teacher, weights)
    return outputs | {"loss": 2 * outputs["loss"] - outputs["loss"].detach()}


def other_divergence(student: Tensor, teacher: Tensor, weights: Tensor) -> dict[str, Tensor]:
    return {"loss": (weights * 0).sum() + student.sum() * 0, "js": from_logits.eager.reverse_kl(student, teacher)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(doubled_gradient, "d_student of fastdiv"), (other_divergence, "loss of fastdiv")],
)
def test_wrong_contestant_voids_the_case(
    wrong: Contestant, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = from_logits.cases

    def cases(scale: str, place: Place) -> list[from_logits.Case]:
        return [replace(c, contestants={**c.contestants, FASTDIV: wrong}) for c in original(scale, place)]

    monkeypatch.setattr(from_logits, "cases", cases)
    assert main([*SMALL, "--only", "from_logits/js_backward", "--no-compile", "--no-memory"]) == 1
    printed = capsys.readouterr()
    assert f"void: js_backward: {message}" in printed.err
    assert f"from_logits/js_backward: void: js_backward: {message}" in printed.out


@pytest.mark.parametrize(
    "other",
    [{"x": torch.tensor([1.0, 2.01])}, {"x": torch.tensor([1.0, torch.nan])}, {"x": torch.ones(1, 2)}, {}],
    ids=["value", "nan", "shape", "missing"],
)
def test_disagreement(other: dict[str, Tensor]) -> None:
    right = {"x": torch.tensor([1.0, 2.0])}
    check_agreement("case", {"a": right, "b": {"x": right["x"] + 1e-5}})
    with pytest.raises(Disagreement):
        check_agreement("case", {"a": right, "b": other})


@pytest.mark.parametrize(("teacher", "recompute", "count"), [(False, True, 4), (False, False, 3), (True, True, 6)])
def test_every_tiling_does_all_products(
    teacher: bool, recompute: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, hidden, vocabulary = 10, 3, 1100  # no tile divides them
    operations = 0
    multiply = floors._multiply

    def counting(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> Tensor:
        nonlocal operations
        operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return multiply(out, a, b, add)

    monkeypatch.setattr(floors, "_multiply", counting)
    floor = floors.products(rows, hidden, vocabulary, teacher=teacher, recompute=recompute)
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    tensors = {n: torch.randn(rows if "hidden" in n else vocabulary, hidden) for n in names}
    passes = floor.passes(tensors)
    done = []
    for name in passes[0]:
        operations = 0
        for candidates in passes:
            candidates[name]()
        done.append(operations)
    assert len(done) > 3
    assert set(done) == {floor.amount} == {2.0 * count * rows * hidden * vocabulary}


def test_the_fastest_candidate_of_each_pass_is_the_floor() -> None:
    ran: list[str] = []
    cost = {"slow": 4.0, "fast": 1.0, "middle": 2.0, "other": 3.0}

    def meter(work: Callable[[], object]) -> tuple[float, object]:
        work()
        return cost[ran[-1]], None

    candidates: floors.Candidates = {name: lambda name=name: ran.append(name) for name in cost}  # type: ignore[misc]
    floor = floors.Floor("test", 1.0, "flop", lambda tensors: [candidates, candidates], trials=2)
    run, names = floor.fastest({}, meter)
    assert len(ran) == 2 * (4 + 3 * 2)
    assert ran.count("slow") == 2
    ran.clear()
    run()
    assert names == ran == ["fast", "fast"]


def test_rounds_interleave_and_rotate() -> None:
    order: list[str] = []
    measures = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}  # type: ignore[func-returns-value,misc]
    assert interleave(measures, 2) == {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.0]}
    assert order == ["a", "b", "c", "b", "c", "a"]


def test_ratios_are_taken_within_a_round() -> None:
    # The ratio of the medians would be 0.2.
    assert paired_ratio([2, 20, 200], [1, 100, 100]) == {"median": 2.0, "low": 1.1, "high": 2.0}
    assert paired_ratio([3], [2]) == {"median": 1.5, "low": 1.5, "high": 1.5}


def test_peak_memory_sees_what_is_freed_again() -> None:
    peak, _ = memory.peak_bytes(lambda: float(torch.ones(64 << 18).sum()))
    assert 63 << 20 <= peak < 80 << 20  # the kernel's counters lag by some pages per thread


def test_the_cost_per_call_is_measured() -> None:
    found = per_call.measure(rounds=1)
    assert list(found) == ["no graph", "graph", "backward"]
    assert all(row["fastdiv"] > 0.0 and row["torch"] > 0.0 and row["ratio"] > 0.0 for row in found.values())
