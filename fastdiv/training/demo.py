"""``make demo``: a small model learns sums with KL-Cov; then fastdiv beside plain torch on one batch.

    python -m fastdiv.training.demo [flags of fastdiv train]

The comparison runs each path in a process of its own, so that neither inherits the other's memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiv
from fastdiv.cli import parse_train
from fastdiv.training import report
from fastdiv.training.config import LossConfig, UserError
from fastdiv.training.meter import Meter
from fastdiv.training.objective import WindowLoss
from fastdiv.training.run import holds_run

_REPEATS = 3
_BATCH = 4  # rollouts' worth of answers in the comparison
_PATHS = {"float64": "plain torch, float64", "torch": "plain torch", "fastdiv": "fastdiv"}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as ``configs/demo.yaml`` says, prints curves and comparison; returns an exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--measure"]:
        return _measure(arguments[1], Path(arguments[2]))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    begin = time.perf_counter()
    try:
        config = parse_train(["--config", "demo", *arguments])
        output = Path(config.output)
        if holds_run(output) and not config.resume:
            print(f"replacing the run in {output}")
        from fastdiv.training.loop import Trainer

        print(
            f"{config.model} on {config.data.task} with {config.loss.objective}; loading the weights",
            flush=True,
        )
        trainer = Trainer(config, replace=True)
        trainer.run()
    except (UserError, OSError) as error:
        print(f"fastdiv demo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"\n{report.table(trainer.records)}\n")
    with tempfile.TemporaryDirectory() as folder:
        measured = compare(trainer, Path(folder))
    (output / "comparison.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(_comparison_table(measured))
    print(f"\nmetrics, curves, configuration, checkpoints: {output} ({time.perf_counter() - begin:.0f} s)")
    return 0


def compare(trainer: Any, folder: Path) -> dict[str, Any]:
    """Loss and gradients of one real batch by three paths, with time and peak memory of each.

    The batch is sampled by the trained policy, which then takes one more step: log-probabilities of the
        sampler and of the
    current policy differ, as they do in training.
    """
    _save_batch(trainer, folder / "batch.pt")
    measured: dict[str, Any] = {"paths": {}}
    for path in _PATHS:
        command = [sys.executable, "-m", "fastdiv.training.demo", "--measure", path, str(folder)]
        subprocess.run(command, check=True)
        measured["paths"][path] = json.loads((folder / f"{path}.json").read_text())
    grads = {path: torch.load(folder / f"{path}.pt") for path in _PATHS}
    for path in _PATHS:
        for name, exact in grads["float64"].items():
            error = (grads[path][name].double() - exact).abs().max() / exact.abs().max()
            measured["paths"][path][f"{name}_error"] = error.item()
    for name in ("hidden", "weight"):
        between = (grads["torch"][name] - grads["fastdiv"][name]).abs().max() / grads["torch"][name].abs().max()
        measured[f"{name}_difference"] = between.item()
    batch = torch.load(folder / "batch.pt")
    measured |= {
        "tokens": len(batch["labels"]),
        "vocabulary": len(batch["weight"]),
        "threads": torch.get_num_threads(),
    }
    return measured


@torch.no_grad()
def _save_batch(trainer: Any, path: Path) -> None:
    settings, policy = trainer.config.rollout, trainer.policy
    collected = [trainer.collect(trainer.step + i) for i in range(_BATCH)]
    parts = []
    olds = [
        trainer.passes.statistics(r, slice(0, len(r.ids)), ("log_prob",), Meter(policy.device)) for _, r in collected
    ]
    with torch.enable_grad():
        trainer.train_step()
    for (problems, rollout), old in zip(collected, olds, strict=True):
        valid = rollout.response_mask
        rewards = torch.tensor(
            [trainer.task.reward(t, problems[i // settings.group_size]) for i, t in enumerate(rollout.texts)]
        )
        groups = torch.arange(len(rewards)) // settings.group_size
        advantages = fastdiv.objectives.advantages.grpo(rewards, groups).to(policy.device)
        hidden = torch.cat([rollout.hidden(policy, slice(i, i + 16)) for i in range(0, len(valid), 16)])
        parts.append(
            {
                "hidden": hidden[valid],
                "labels": rollout.labels[valid],
                "old": old["log_prob"][valid],
                "advantages": advantages[:, None].expand_as(valid)[valid],
            }
        )
    batch: dict[str, Any] = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}
    batch["weight"] = policy.model.get_output_embeddings().weight.detach().cpu()
    batch["temperature"] = settings.temperature
    batch["options"] = {"ratio": 0.02, "beta": 1.0} | trainer.config.loss.options
    torch.save(batch, path)


def _measure(path: str, folder: Path) -> int:
    """The body of a measuring process: one path; least time of a few, memory of the first full pass."""
    batch = torch.load(folder / "batch.pt")
    if path == "float64":
        batch |= {k: v.double() for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point()}
    run = _fastdiv_path if path == "fastdiv" else _torch_path
    first = {k: v[:64] if isinstance(v, Tensor) and k != "weight" else v for k, v in batch.items()}
    run(first)  # threads and libraries wake up outside the measurement
    seconds, peak, loss, grads = [], None, 0.0, dict[str, Tensor]()
    for repeat in range(1 if path == "float64" else _REPEATS):
        grads.clear()
        meter = Meter(torch.device("cpu"))
        with meter:
            loss, grads = run(batch)
        peak = meter.peak_mib if repeat == 0 else peak
        seconds.append(meter.seconds)
    torch.save(grads, folder / f"{path}.pt")
    (folder / f"{path}.json").write_text(json.dumps({"loss": loss, "seconds": min(seconds), "peak_mib": peak}))
    return 0


def _torch_path(batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """KL-Cov as one writes it: all logits, log_softmax, autograd."""
    hidden, weight = batch["hidden"].requires_grad_(), batch["weight"].requires_grad_()
    log_probs = (hidden @ weight.T / batch["temperature"]).log_softmax(-1)
    chosen = log_probs.gather(-1, batch["labels"][:, None])[:, 0]
    advantages, log_ratio, options = batch["advantages"], chosen - batch["old"], batch["options"]
    covariance = (advantages - advantages.mean()) * (chosen - chosen.mean()).detach()
    top = covariance.topk(max(1, int(options["ratio"] * len(covariance)))).indices
    loss = (-advantages * log_ratio.exp()).mean() + options["beta"] * log_ratio[top].abs().sum() / len(chosen)
    loss.backward()
    return loss.item(), {"hidden": _grad(hidden), "weight": _grad(weight)}


def _fastdiv_path(batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """The trainer's three phases: statistics, weights, backward."""
    hidden, weight = batch["hidden"].requires_grad_(), batch["weight"].requires_grad_()
    head, labels, temperature = fastdiv.LinearLogits(hidden, weight), batch["labels"], batch["temperature"]
    with torch.no_grad():
        stats = fastdiv.token_stats(head, labels, outputs=("log_prob",), temperature=temperature)
    objective = WindowLoss(LossConfig("kl_cov", options=batch["options"]), seed=0)
    everything = torch.ones_like(labels, dtype=torch.bool)
    loss, _, weights = objective(
        {"log_prob": stats["log_prob"]}, batch["old"], batch["advantages"], everything, update=0
    )
    factors = weights["log_prob"]
    total = fastdiv.linear_loss(
        head, labels, lambda chunk, rows: factors[rows] * chunk.log_prob, temperature=temperature
    )
    total.backward()
    return loss, {"hidden": _grad(hidden), "weight": _grad(weight)}


def _grad(leaf: Tensor) -> Tensor:
    """The gradient, taken away from its leaf, so that the next pass starts with as much memory as this one."""
    grad, leaf.grad = leaf.grad, None
    assert grad is not None
    return grad


def _comparison_table(measured: dict[str, Any]) -> str:
    lines = [
        f"one batch: {measured['tokens']} answer tokens x {measured['vocabulary']} words, "
        f"from hidden states to gradients, {measured['threads']} threads",
        f"{'':22}{'loss':>14}{'error d hidden':>16}{'error d weight':>16}{'seconds':>9}{'extra MiB':>11}",
    ]
    for path, name in _PATHS.items():
        row = measured["paths"][path]
        memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        errors = f"{row['hidden_error']:>16.1e}{row['weight_error']:>16.1e}"
        lines.append(f"{name:22}{row['loss']:>14.9f}{errors}{row['seconds']:>9.2f}{memory:>11}")
    lines.append(
        "largest errors and differences, relative to the largest gradient; plain torch and fastdiv differ by "
        f"{measured['hidden_difference']:.1e} and {measured['weight_difference']:.1e}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
