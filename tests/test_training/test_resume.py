from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from letters import Letters, tiny

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
