"""What the documents show runs: examples in docstrings, code in the README, and its markers."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import fastdiv

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fastdiv.__path__, "fastdiv.")
    if not re.search(r"\.(_C|training|benchmarks|cli|__main__)", module.name)
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError:
        if name.startswith(("fastdiv.backends.native", "fastdiv.backends.triton")):
            return  # absent backends are named in the report's header
        raise
    names = {"torch": torch, "fastdiv": fastdiv, **vars(fastdiv)}
    assert doctest.testmod(module, extraglobs=names).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    public = (
        fastdiv.log_prob,
        fastdiv.entropy,
        fastdiv.divergence,
        fastdiv.token_stats,
        fastdiv.linear_loss,
        fastdiv.value_and_gradient,
    )
    for function in public:
        assert any(test.examples for test in finder.find(function)), function.__name__


def test_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    exec("\n".join(blocks), names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor) and loss.isfinite()


@pytest.mark.parametrize(("marker", "command"), [("main-job", "make demo"), ("tests", "make test")])
def test_the_two_commands_stand_between_their_markers(marker: str, command: str) -> None:
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(rf"<!-- {marker} -->\s*```\n(.*?)\n```\s*<!-- /{marker} -->", text, re.DOTALL)
    assert block == command
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
