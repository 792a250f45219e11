"""`fastdiv.objectives.list()` tells the truth about every objective."""

from __future__ import annotations

import inspect
import operator
import re

import pytest

from fastdiv import objectives


def test_every_entry_is_complete() -> None:
    entries = objectives.list()
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names)
    for entry in entries:
        assert operator.attrgetter(entry.name)(objectives) is entry.function
        assert entry.paper and entry.inputs and entry.family
        if entry.arxiv is not None:
            assert re.fullmatch(r"\d{4}\.\d{5}", entry.arxiv)
            assert entry.arxiv in (inspect.getdoc(entry.function) or "")


@pytest.mark.parametrize("module", ["advantages", "kl", "policy", "preference"])
def test_every_objective_is_listed(module: str) -> None:
    """A public function of these modules is an objective, unless it selects tokens."""
    room = getattr(objectives, module)
    public = {
        function
        for name, function in vars(room).items()
        if inspect.isfunction(function) and not name.startswith("_") and function.__module__ == room.__name__
    }
    listed = {entry.function for entry in objectives.list()}
    assert public - listed <= {objectives.clip_cov_select, objectives.kl_cov_select}


def test_what_needs_the_vocabulary() -> None:
    needs = {entry.name for entry in objectives.list() if entry.full_vocabulary}
    assert needs == {entry.name for entry in objectives.list() if "forward_kl" in entry.inputs}
    assert needs == {"tdpo1", "tdpo2", "sparse_po", "mapo"}
    policy = [entry for entry in objectives.list() if entry.family == "policy"]
    assert {entry.inputs for entry in policy} == {("log_prob", "old_log_prob", "advantages", "mask")}
