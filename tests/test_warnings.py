"""A warning that our code gives or causes fails its test; one of another package about itself is shown."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

WARN = "import warnings\ndef warn(level): warnings.warn('old', {category}, stacklevel=level)"
CALL = "def call(warn): warn(2)"
OURS = sorted({path.stem for path in Path(__file__).parent.rglob("*.py")})


def module(name: str, text: str) -> dict[str, object]:
    """The names of a module `name` of this text."""
    names: dict[str, object] = {"__name__": name}
    exec(text, names)
    return names


@pytest.mark.parametrize("category", ["UserWarning", "DeprecationWarning", "FutureWarning"])
@pytest.mark.parametrize("ours", ["fastdiv", "fastdiv.ops.linear", "benchmarks.common", *OURS])
def test_ours_is_an_error(ours: str, category: str) -> None:
    with pytest.raises(Warning, match="old"):
        module(ours, WARN.format(category=category))["warn"](1)  # type: ignore[operator]


@pytest.mark.parametrize("category", ["UserWarning", "DeprecationWarning", "FutureWarning"])
@pytest.mark.parametrize("caller", ["fastdiv.training.rollout", "torch.jit", "fastdivider"])
def test_what_our_call_causes_is_an_error(caller: str, category: str) -> None:
    warn = module("torch.jit._script", WARN.format(category=category))["warn"]
    call = module(caller, CALL)["call"]
    if caller.startswith("fastdiv."):
        with pytest.raises(Warning, match="old"):
            call(warn)  # type: ignore[operator]
        return
    with warnings.catch_warnings(record=True) as shown:
        call(warn)  # type: ignore[operator]
    assert [str(warning.message) for warning in shown] == ["old"]
