"""Which run a folder or a checkpoint belongs to."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastdiv.training.config import UserError

_NAME = "run.json"


@dataclass(frozen=True)
class Run:
    """The identity of a run, ``run.json`` in its folder and in each of its checkpoints.

    Arguments:
        id: another for every start from step 0; empty where nothing was written down.
        data: fingerprint of the task's data; None where the configuration decides it alone.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    data: str | None = None

    def write(self, folder: Path) -> None:
        """Writes ``folder/run.json``, at once or not at all."""
        temporary = folder / f".{_NAME}.partial"
        temporary.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        temporary.replace(folder / _NAME)

    @classmethod
    def read(cls, folder: Path) -> Run:
        """What :meth:`write` wrote; an empty id where there is no file."""
        path = folder / _NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(str(values["id"]), values["data"])
        except FileNotFoundError:
            return cls("")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"output: {path} is damaged") from error


def holds_run(output: Path) -> bool:
    """Whether ``output`` has metrics or checkpoints of a run; one that stopped in its first step has none."""
    metrics = output / "metrics.jsonl"
    return (metrics.exists() and metrics.stat().st_size > 0) or any((output / "checkpoints").glob("step-*"))


def remove_run(output: Path) -> None:
    """Deletes what a run left in ``output``, and nothing else."""
    for part in ("metrics.jsonl", "curves.png", "config.yaml", "comparison.json", _NAME):
        (output / part).unlink(missing_ok=True)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
