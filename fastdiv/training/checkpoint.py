"""Checkpoints that are whole or absent, and from which a run goes on as if it had never stopped."""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from .models import Policy, without_bars

_NAME = re.compile(r"step-(\d{6,})")


def save(
    folder: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
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
        keep: older checkpoints beyond this many are deleted.

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
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(folder)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = _all(folder)
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``state.pt`` of a checkpoint: step, optimizer, config, rng."""
    state: dict[str, Any] = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    return state


def restore(checkpoint: Path, state: dict[str, Any], policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights, optimiser and random generators back, bit for bit."""
    from safetensors.torch import load_model

    load_model(policy.model, checkpoint / "model.safetensors", device=str(policy.device))
    optimizer.load_state_dict(state["optimizer"])
    _set_rng_state(state["rng"])


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


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
