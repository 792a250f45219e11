"""Golden numbers and the small batch they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

GOLDEN = json.loads((Path(__file__).parent.parent / "golden/rl_golden.json").read_text())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    return GOLDEN


@pytest.fixture
def fixture_a() -> dict[str, Tensor]:
    """Two sequences of four tokens, float64; the last token of the second is padding filled with garbage."""
    batch = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in GOLDEN["fixtureA"].items()}
    batch["mask"] = batch["mask"] > 0
    batch["logp"].requires_grad_()
    return batch
