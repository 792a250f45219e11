from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from letters import Letters, tiny

from fastdiv.cli import main
from fastdiv.training import checkpoint
from fastdiv.training.config import OptimizerConfig, UserError
from fastdiv.training.loop import Trainer

CHANGING = ("rollout_seconds", "loss_seconds", "step_seconds", "loss_peak_mib")

# Killed in the fourth step, one step after the last checkpoint, while a save is half done.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from letters import Letters, tiny
from fastdiv.training import checkpoint
from fastdiv.training.loop import Trainer

out = Path(sys.argv[2])
def die(record):
    if record["step"] == 3:
        (out / "checkpoints" / ".step-000004.partial").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
Trainer(tiny(out), task=Letters(), on_step=die).run()
"""


def curves(path):
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CHANGING} for line in lines]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    straight = Trainer(tiny(tmp_path / "straight"), task=Letters())
    straight.run()

    here, out = str(Path(__file__).parent), tmp_path / "killed"
    process = subprocess.run([sys.executable, "-c", KILLED, here, str(out)], capture_output=True, timeout=600)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert len(curves(out)) == 3 and checkpoint.latest(out / "checkpoints").name == "step-000002"
    torch.manual_seed(12345)  # whatever the process did before must not matter

    resumed = Trainer(tiny(out, resume=True), task=Letters())
    assert resumed.step == 2 and len(curves(out)) == 2
    resumed.run()
    assert curves(out) == curves(tmp_path / "straight")
    assert len(resumed.records) == 6
    for name, weight in straight.policy.model.state_dict().items():
        assert torch.equal(weight, resumed.policy.model.state_dict()[name]), name
    for one, other in zip(
        straight.optimizer.state_dict()["state"].values(),
        resumed.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(one[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000006"]


def test_what_would_change_the_curves_is_refused(tmp_path):
    config = tiny(tmp_path / "run", steps=2)
    Trainer(config, task=Letters()).run()
    with pytest.raises(UserError, match="already holds a run; continue it with --resume"):
        Trainer(config, task=Letters())
    faster = dataclasses.replace(config, resume=True, optimizer=OptimizerConfig(lr=1.0))
    with pytest.raises(UserError, match=r"optimizer\.lr was 0\.003 in the checkpoint and is 1\.0 now"):
        Trainer(faster, task=Letters())
    longer = dataclasses.replace(config, resume=True, steps=3)
    assert len(Trainer(longer, task=Letters()).run()) == 3


def test_resume_without_a_checkpoint_starts_over_and_says_so(tmp_path, capsys):
    config = tiny(tmp_path / "run", steps=1, checkpoint_every=0)
    Trainer(config, task=Letters()).run()
    again = Trainer(dataclasses.replace(config, resume=True), task=Letters())
    assert "no checkpoint in" in capsys.readouterr().out
    again.run()
    assert len(curves(tmp_path / "run")) == 1


def test_a_failed_save_leaves_the_last_checkpoint_alone(tmp_path, monkeypatch):
    trainer = Trainer(tiny(tmp_path / "run", steps=2), task=Letters())
    trainer.run()
    folder = tmp_path / "run" / "checkpoints"

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(checkpoint.torch, "save", full_disk)
        checkpoint.save(folder, 3, trainer.policy, trainer.optimizer, {}, trainer.identity, keep=1)
    assert checkpoint.latest(folder).name == "step-000002"
    checkpoint.save(folder, 3, trainer.policy, trainer.optimizer, {}, trainer.identity, keep=1)
    assert os.listdir(folder) == ["step-000003"]


def test_a_checkpoint_is_a_model_directory(tmp_path):
    Trainer(tiny(tmp_path / "run", steps=2), task=Letters()).run()
    last = checkpoint.latest(tmp_path / "run" / "checkpoints")
    config = tiny(tmp_path / "next", steps=1, model=str(last))
    record = Trainer(config, task=Letters()).run()[0]
    assert record["kl_ref"] == pytest.approx(0, abs=1e-6)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_keep_and_latest_count_steps_as_numbers(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run"), task=Letters())
    folder = tmp_path / "checkpoints"
    for step in (8, 9, 10, 11):
        checkpoint.save(folder, step, trainer.policy, trainer.optimizer, {}, trainer.identity, keep=2)
    assert names(folder) == ["step-000010", "step-000011"]
    for step in (999_999, 1_000_000):  # one digit more: by their names the second would be the older
        checkpoint.save(folder, step, trainer.policy, trainer.optimizer, {}, trainer.identity, keep=2)
    assert names(folder) == ["step-1000000", "step-999999"]
    assert checkpoint.latest(folder).name == "step-1000000"


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_of_more_than_nine_steps_is_resumed_from_its_last(tmp_path, every):
    config = tiny(tmp_path / "run", steps=10, checkpoint_every=every, keep=2)
    Trainer(config, task=Letters()).run()
    assert names(tmp_path / "run" / "checkpoints") == ["step-000009", "step-000010"]
    assert Trainer(dataclasses.replace(config, resume=True), task=Letters()).step == 10


def test_starting_over_beside_checkpoints_is_refused(tmp_path):
    config = tiny(tmp_path / "run", steps=2)
    Trainer(config, task=Letters()).run()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="already holds a run"):
        Trainer(config, task=Letters())
    assert names(tmp_path / "run" / "checkpoints") == ["step-000002"]


def test_checkpoints_of_another_run_are_neither_deleted_nor_resumed(tmp_path):
    config = tiny(tmp_path / "one", steps=6, checkpoint_every=1)
    Trainer(config, task=Letters()).run()
    theirs = tmp_path / "one" / "checkpoints" / "step-000006"
    short = tiny(tmp_path / "two", steps=3, checkpoint_every=1)
    trainer = Trainer(short, task=Letters())
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "checkpoints").mkdir()
    theirs.rename(tmp_path / "two" / "checkpoints" / theirs.name)
    trainer.run()
    assert names(tmp_path / "two" / "checkpoints") == ["step-000003", "step-000006"]
    with pytest.raises(UserError, match="step-000006 is of another run"):
        Trainer(dataclasses.replace(short, steps=7, resume=True), task=Letters())
    (tmp_path / "two" / "checkpoints" / "step-000006").rename(tmp_path / "two" / "checkpoints" / "step-000004")
    trainer.step = 3
    with pytest.raises(UserError, match="step-000004 is of another run"):
        trainer.config = dataclasses.replace(short, steps=4)
        trainer.run()
    assert "step-000004" in names(tmp_path / "two" / "checkpoints")


def test_checkpoints_of_no_known_run_are_refused(tmp_path):
    config = tiny(tmp_path / "run", steps=2)
    Trainer(config, task=Letters()).run()
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(UserError, match=r"has no run\.json"):
        Trainer(dataclasses.replace(config, resume=True), task=Letters())


FLAGS = "--model=tiny --device=cpu --checkpoint_every=1 --rollout.prompts=2 --rollout.group_size=2".split()
FLAGS += ["--rollout.max_new_tokens=4"]


@pytest.fixture
def run(tmp_path, capfd):
    """A run of two steps on a file; its flags, and a way to have a command refused."""
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "0+2=", "answer": "2"}\n')
    flags = ["train", *FLAGS, f"--data.task={tmp_path / 'd.jsonl'}", f"--output={tmp_path / 'run'}"]

    def refused(*more):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        capfd.readouterr()
        assert main([*flags, *more]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("fastdiv train: error: ") and err.count("\n") == 1, out + err
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        return err

    assert main([*flags, "--steps=2", "--keep=2"]) == 0
    return SimpleNamespace(folder=tmp_path / "run", data=tmp_path / "d.jsonl", flags=flags, refused=refused)


def test_data_changed_in_place_is_refused(run):
    whole = run.data.read_bytes()
    run.data.write_bytes(whole.replace(b"1+1", b"4-2"))
    assert "data.task has changed" in run.refused("--steps=3", "--resume")
    run.data.write_bytes(whole)
    assert main([*run.flags, "--steps=3", "--resume"]) == 0


@pytest.mark.parametrize("part", ["state.pt", "model.safetensors", "run.json"])
def test_a_damaged_checkpoint_is_one_line(run, part):
    path = run.folder / "checkpoints" / "step-000002" / part
    whole = path.read_bytes()
    path.unlink()
    assert "step-000002" in run.refused("--steps=3", "--resume")
    for damaged in (whole[: len(whole) // 2], b"", b"[1, 2]"):
        path.write_bytes(damaged)
        assert "step-000002" in run.refused("--steps=3", "--resume")
    shutil.rmtree(path.parent)
    assert main([*run.flags, "--steps=3", "--resume"]) == 0


def test_a_checkpoint_of_other_entries_is_one_line(run):
    path = run.folder / "checkpoints" / "step-000002" / "state.pt"
    torch.save({"step": 2}, path)
    assert "state.pt cannot be read" in run.refused("--steps=3", "--resume")


def test_a_damaged_line_of_metrics_is_named(run):
    path = run.folder / "metrics.jsonl"
    first, second = path.read_bytes().splitlines()
    for line in (b"not json", b"[1]", b'{"reward": 1}', b"\xff\xfe", b'{"step": "1"}', b""):
        path.write_bytes(first + b"\n" + line + b"\n")
        assert "metrics.jsonl:2 is damaged" in run.refused("--steps=3", "--resume")
    path.write_bytes(first + b"\n" + second + b"\n" + b'{"step": 3, "rew')  # interrupted
    assert main([*run.flags, "--steps=3", "--resume"]) == 0


def test_a_checkpoint_with_nan_weights_is_refused(run):
    from safetensors.torch import load_file, save_file

    path = run.folder / "checkpoints" / "step-000002" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    assert "NaN in its weights: model.norm.weight" in run.refused("--steps=3", "--resume")
