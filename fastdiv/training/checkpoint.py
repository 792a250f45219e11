"""Checkpoints that are whole or absent, that know their run, and from which it goes on as if it had never stopped."""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from fastdiv.training.config import UserError
from fastdiv.training.models import Policy, without_bars
from fastdiv.training.run import Run

_NAME = re.compile(r"step-(\d{6,})")


def save(
    folder: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    run: Run,
    *,
    keep: int,
) -> Path:
    """Writes ``folder/step-NNNNNN``: model and tokenizer as ``from_pretrained`` reads them, and ``state.pt``.

    Everything is written and synced under a temporary name, then renamed: a checkpoint that can be seen is
        complete.

    Arguments:
        folder: of all checkpoints of the run.
        step: steps done.
        policy: model and tokenizer.
        optimizer: its state goes along.
        config: dotted names and values of the run, compared at resume.
        run: whose checkpoint this is.
        keep: older checkpoints of this run beyond this many are deleted; those of other runs stay.

    Returns:
        The directory written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"step-{step:06d}", folder / f".step-{step:06d}.partial"
    for stale in folder.glob(".step-*.partial"):
        shutil.rmtree(stale)
    with without_bars():
        policy.model.save_pretrained(temporary, max_shard_size="1000TB")  # one file, which restore reads
        policy.tokenizer.save_pretrained(temporary)
    state = {"step": step, "optimizer": optimizer.state_dict(), "config": config, "rng": _rng_state()}
    torch.save(state, temporary / "state.pt")
    run.write(temporary)
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    if final.exists():
        check_run(final, run)
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(folder)
    for old in [path for path in found(folder) if Run.read(path).id == run.id][:-keep]:
        shutil.rmtree(old)
    return final


def found(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, of any run, by their steps."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return found(folder)[-1] if found(folder) else None


def check_run(checkpoint: Path, run: Run) -> None:
    """Raises :class:`UserError` unless ``checkpoint`` is of ``run`` and of the same data."""
    saved = Run.read(checkpoint)
    if saved.id != run.id:
        raise UserError(f"output: {checkpoint} is of another run ({saved.id or 'unknown'}, this one is {run.id})")
    if saved.data != run.data:
        raise UserError("--resume: the file of data.task has changed since the run began")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``state.pt`` of a checkpoint: step, optimizer, config, rng."""
    path = checkpoint / "state.pt"
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not state.keys() >= {"step", "optimizer", "config", "rng"}:
            raise ValueError("entries are missing")
    except Exception as error:  # of a damaged file torch and pickle raise many classes
        raise _damaged(path, error) from error
    return state


def restore(checkpoint: Path, state: dict[str, Any], policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights, optimiser and random generators back, bit for bit."""
    from safetensors.torch import load_model

    path = checkpoint / "model.safetensors"
    try:
        load_model(policy.model, path, device=str(policy.device))
    except Exception as error:
        raise _damaged(path, error) from error
    try:
        optimizer.load_state_dict(state["optimizer"])
        _set_rng_state(state["rng"])
    except Exception as error:
        raise _damaged(checkpoint / "state.pt", error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = "it is missing" if not path.exists() else (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"--resume: {path} cannot be read: {reason}; without {path.parent} an earlier checkpoint is taken")


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
