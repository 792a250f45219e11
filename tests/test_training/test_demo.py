from __future__ import annotations

import json
import sys

from letters import Letters

from fastdiv.training import demo, loop


def test_demo_end_to_end_with_the_tiny_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "load_task", lambda config, seed: Letters())

    def here(command, check):  # a process of its own matters for memory alone
        assert command[:3] == [sys.executable, "-m", "fastdiv.training.demo"] and check
        assert demo.main(command[3:]) == 0

    monkeypatch.setattr(demo.subprocess, "run", here)
    out = tmp_path / "run"
    flags = ["--model=tiny", f"--output={out}", "--steps=2", "--device=cpu"]
    flags += ["--rollout.prompts=2", "--rollout.group_size=4"]
    assert demo.main(flags) == 0
    said = capsys.readouterr().out
    assert "reward" in said and "plain torch" in said and str(out) in said
    measured = json.loads((out / "comparison.json").read_text())
    assert measured["tokens"] > 150 and measured["vocabulary"] == 257
    exact, ours = measured["paths"]["float64"], measured["paths"]["fastdiv"]
    assert abs(exact["loss"] - ours["loss"]) < 1e-6 * max(1, abs(exact["loss"]))
    assert 0 < ours["weight_error"] < 1e-5 and 0 < ours["hidden_error"] < 1e-5
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2

    monkeypatch.setattr(demo, "compare", lambda trainer, folder: measured)
    assert demo.main([*flags, "--steps=1"]) == 0
    assert f"replacing the run in {out}" in capsys.readouterr().out
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert demo.main([*flags, "--modle=x"]) == 2
