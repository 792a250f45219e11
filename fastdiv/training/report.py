"""What a run leaves to look at: its configuration, its metrics, a picture of the curves and a short table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiv.training.config import TrainConfig, UserError

Record = dict[str, Any]

#: Curves of the picture: key, title, unit.
_CURVES = (
    ("reward", "reward", "mean per answer"),
    ("entropy", "entropy", "nats per token"),
    ("kl_ref", "KL(policy ‖ reference), exact", "nats per token"),
    ("kl_old", "KL(sampler ‖ last update), k3", "nats per token"),
    ("selected", "selected tokens", "fraction"),
    ("grad_norm", "gradient norm", "before clipping"),
    ("response_length", "answer length", "tokens"),
    ("loss_seconds", "loss section", "seconds per step"),
)


def one_line(record: Record) -> str:
    """A few metrics for the progress bar."""
    names = {"reward": "reward", "entropy": "entropy", "kl_ref": "kl"}
    return ", ".join(f"{short} {record[key]:.3g}" for key, short in names.items() if record.get(key) is not None)


def write_config(config: TrainConfig, path: Path) -> None:
    """Writes the configuration as YAML that ``fastdiv train --config`` reads, whether resumed or not."""
    import yaml

    values = dataclasses.asdict(config)
    del values["resume"]
    values["optimizer"]["betas"] = list(config.optimizer.betas)
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def keep_records(path: Path, steps: int) -> list[Record]:
    """Cuts a metrics file back to its first ``steps`` steps, at once or not at all, and returns them."""
    if not path.exists():
        return []
    records = [record for record in read_records(path) if record["step"] <= steps]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    temporary.replace(path)
    return records


def read_records(path: Path) -> list[Record]:
    """The complete lines of a metrics file; an interrupted last line is left out.

    Raises:
        UserError: a line that is not one of ours, with its number.
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
            if not isinstance(records[-1]["step"], int):
                raise TypeError("step")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"output: {path}:{number} is damaged: not the metrics of a step") from error
    return records


def plot(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Draws the curves of a run into a PNG: thin the steps, bold the mean of five around each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (key, name, unit) in zip(figure.subplots(2, 4).flat, _CURVES, strict=True):
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel(unit, fontsize=8)
        axes.grid(alpha=0.3)
        if not points:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
            continue
        steps, values = [p[0] for p in points], [p[1] for p in points]
        axes.plot(steps, values, color="C0", linewidth=0.8, alpha=0.5)
        axes.plot(steps, _running_mean(values, 5), color="C0", linewidth=2)
        if min(values) >= 0:
            axes.set_ylim(0, 1.05 * max(values) or 1)
    figure.savefig(path, dpi=110)


def table(records: Sequence[Record], *, rows: int = 6) -> str:
    """The course of a run as text: ``rows`` stretches of equal length, each with its means."""
    columns = ("reward", "solved", "entropy", "kl_ref", "kl_old", "response_length")
    size = max(1, -(-len(records) // rows))
    lines = [f"{'steps':>9}" + "".join(f"{name:>17}" for name in columns)]
    for start in range(0, len(records), size):
        part = records[start : start + size]
        cells = [_mean([r[name] for r in part if r.get(name) is not None]) for name in columns]
        span = f"{part[0]['step']}-{part[-1]['step']}"
        lines.append(f"{span:>9}" + "".join(f"{'-' if c is None else format(c, '.4f'):>17}" for c in cells))
    return "\n".join(lines)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    parts = [values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
