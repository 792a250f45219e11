"""A start that fails says why in one line and leaves nothing behind, so that the corrected command runs."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch

from fastdiv.cli import main
from fastdiv.training.checks import check_head
from fastdiv.training.config import RolloutConfig, TrainConfig, UserError
from fastdiv.training.data import Problem
from fastdiv.training.loop import Trainer
from fastdiv.training.models import load_policy

SMALL = ["--steps=1", "--rollout.prompts=2", "--rollout.group_size=2", "--rollout.max_new_tokens=4", "--device=cpu"]


def sums(folder, *prompts):
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "answer": "2"}) + "\n" for p in prompts or ("1+1=", "0+2=")))
    return f"--data.task={path}"


def refusal(capfd, *arguments):
    """The one line on stderr."""
    capfd.readouterr()
    assert main(["train", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("fastdiv train: error: ") and err.count("\n") == 1, out + err
    return err


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of a model."""
    folder = tmp_path_factory.mktemp("model")
    policy = load_policy("tiny", device="cpu")
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backend=fast"], "'fast'"),
        (["--backend=cuda"], "backend 'cuda' cannot be used here"),
        (["--backend=native", "--dtype=float64"], "backend 'native' cannot be used here"),
        (["--device=meta"], "cannot compute on 'meta'"),
        (["--rollout.max_new_tokens=509"], "has 4 tokens and its answer up to 509, together 513; .* 512 positions"),
        (["--data.template={question}" + "x" * 505], "has 509 tokens and its answer up to 4, together 513"),
        (["--data.chat=true"], "no chat template"),
        (["--data.template=\udcff{question}"], "data.template must be a text in UTF-8"),
    ],
)
def test_a_corrected_command_runs(capfd, tmp_path, monkeypatch, flags, words):
    monkeypatch.delenv("FASTDIV_LOCKSTEP", raising=False)
    if "--backend=cuda" in flags and torch.cuda.is_available():
        pytest.skip("it can be used here")
    given = ["--model=tiny", *SMALL, f"--output={tmp_path / 'deep' / 'run'}", sums(tmp_path)]
    assert re.search(words, refusal(capfd, *given, *flags))
    assert [p.name for p in tmp_path.iterdir()] == ["sums.jsonl"]
    assert main(["train", *given]) == 0


def test_an_unusable_backend_of_the_environment_is_one_line(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIV_BACKEND", "fast")
    assert "'fast'" in refusal(capfd, "--model=tiny", *SMALL, f"--output={tmp_path / 'run'}", sums(tmp_path))


def test_every_prompt_of_the_run_is_measured_before_the_first_step(capfd, tmp_path):
    data = sums(tmp_path, *["1+1="] * 5, "x" * 510)
    given = ["--model=tiny", *SMALL, f"--output={tmp_path / 'run'}", data, "--steps=3"]
    assert "sums.jsonl:6 has 510 tokens" in refusal(capfd, *given)
    assert not (tmp_path / "run").exists()


def test_a_prompt_and_answer_of_all_positions_fit(tmp_path):
    flags = ["--model=tiny", *SMALL, f"--output={tmp_path / 'run'}", sums(tmp_path, "x" * 508)]
    assert main(["train", *flags]) == 0


def test_a_prompt_too_long_is_found_before_its_step_is_sampled(tmp_path):
    class Growing:
        def __len__(self):
            return 1000

        def problem(self, index):
            return Problem("x" * (509 if len(trainer_of) else 5), "", {})

        def reward(self, completion, problem):
            return 0.0

    trainer_of = []
    config = TrainConfig("tiny", str(tmp_path / "run"), device="cpu", rollout=RolloutConfig(2, 2, max_new_tokens=4))
    trainer_of.append(Trainer(config, task=Growing()))
    with pytest.raises(UserError, match="a prompt has 509 tokens and its answer up to 4, together 513"):
        trainer_of[0].train_step()


def test_an_output_that_cannot_be_is_one_line(capfd, tmp_path, monkeypatch):
    data = sums(tmp_path)
    (tmp_path / "file").touch()
    for output in ("file", "file/run", "file/deep/run"):
        said = refusal(capfd, "--model=tiny", *SMALL, f"--output={tmp_path / output}", data)
        assert f"{tmp_path / 'file'} is a file" in said
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "dangling" in refusal(capfd, "--model=tiny", *SMALL, f"--output={tmp_path / 'dangling'}", data)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))  # root may write everywhere
    said = refusal(capfd, "--model=tiny", *SMALL, f"--output={tmp_path / 'a' / 'b'}", data)
    assert f"no permission in {tmp_path}" in said
    monkeypatch.undo()
    assert "proc" in refusal(capfd, "--model=tiny", *SMALL, "--output=/proc/run", data)


@pytest.mark.parametrize(
    ("part", "how"),
    [
        ("model.safetensors", "cut"),
        ("model.safetensors", "absent"),
        ("config.json", "cut"),
        ("config.json", "absent"),
        ("tokenizer.json", "cut"),
        ("tokenizer.json", "absent"),
    ],
)
def test_a_damaged_model_is_one_line(capfd, tmp_path, saved, part, how):
    folder = shutil.copytree(saved, tmp_path / "model")
    whole = (folder / part).read_bytes()
    (folder / part).unlink()
    if how == "cut":
        (folder / part).write_bytes(whole[: len(whole) // 2])
    said = refusal(capfd, f"--model={folder}", *SMALL, f"--output={tmp_path / 'run'}", sums(tmp_path))
    assert f"model '{folder}' cannot be loaded: " in said
    assert not (tmp_path / "run").exists()


def test_a_model_with_nan_weights_is_named(capfd, tmp_path, saved):
    policy = load_policy(str(saved), device="cpu")
    with torch.no_grad():
        policy.model.get_decoder().layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    policy.model.save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    said = refusal(capfd, f"--model={tmp_path / 'model'}", *SMALL, f"--output={tmp_path / 'run'}", sums(tmp_path))
    assert "NaN in its weights: model.layers.1.mlp.up_proj.weight" in said


def test_logits_that_become_nan_are_named():
    policy = load_policy("tiny", device="cpu")
    with torch.no_grad():
        policy.model.get_decoder().norm.weight.fill_(float("inf"))
        policy.model.get_output_embeddings().weight.zero_()
    with pytest.raises(UserError, match="gives NaN logits"):
        check_head(policy)


def test_a_model_that_reads_padding_is_refused(monkeypatch):
    policy = load_policy("tiny", device="cpu")
    decoder = policy.model.get_decoder()
    forward = decoder.forward

    def deaf(input_ids, **ignored):
        return forward(input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(decoder, "forward", deaf)
    with pytest.raises(UserError, match="reads padding as text"):
        check_head(policy)


def test_a_full_disk_is_one_line(capfd, tmp_path, monkeypatch):
    from fastdiv.training import report

    def full(*args):
        raise OSError(28, "No space left on device", "config.yaml")

    monkeypatch.setattr(report, "write_config", full)
    given = ["--model=tiny", *SMALL, f"--output={tmp_path / 'run'}", sums(tmp_path)]
    assert "No space left on device" in refusal(capfd, *given)
    monkeypatch.undo()
    assert main(["train", *given]) == 0


def test_a_run_that_stops_in_its_first_step_can_be_started_anew(tmp_path, monkeypatch):
    given = ["train", "--model=tiny", *SMALL, f"--output={tmp_path / 'run'}", sums(tmp_path)]

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("too many answers at once")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(Trainer, "update", full)
        main(given)
    assert main([*given, "--optimizer.micro_batch=1"]) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
