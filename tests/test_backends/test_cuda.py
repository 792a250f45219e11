"""Which GPUs the cuda backend takes: those that its build has code for, the others are refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastdiv import backends
from fastdiv.backends import cuda

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("built", "runs", "refused"),
    [
        ("sm_80 sm_90", [(8, 0), (8, 6), (8, 9), (9, 0)], [(7, 5), (10, 0), (12, 0)]),
        ("sm_90 ptx_90", [(9, 0), (10, 0), (12, 1)], [(8, 0), (8, 9)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("sm_100a", [(10, 0)], [(9, 0), (10, 3)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("ptx_100", [(10, 0), (10, 3), (12, 0)], [(9, 0)]),
        ("", [], [(9, 0)]),
    ],
)
def test_code_runs_where_it_was_built_for(
    built: str, runs: list[tuple[int, int]], refused: list[tuple[int, int]]
) -> None:
    names = cuda.architectures(SimpleNamespace(cuda=SimpleNamespace(architectures=built)))
    assert names == built.split()
    for capability in runs:
        assert cuda.runs_on(names, *capability), capability
    for capability in refused:
        assert not cuda.runs_on(names, *capability), capability


def test_a_module_without_kernels_runs_nowhere() -> None:
    assert cuda.architectures(SimpleNamespace()) == []


@pytest.fixture
def of_this_build(monkeypatch: pytest.MonkeyPatch) -> cuda.Cuda:
    """The backend of a build for sm_90, on a machine whose GPU is an sm_80."""
    native = SimpleNamespace(cuda=SimpleNamespace(architectures="sm_90"))
    monkeypatch.setenv("FASTDIV_LOCKSTEP", "0")
    monkeypatch.delenv("FASTDIV_BACKEND", raising=False)
    monkeypatch.setattr(cuda, "module", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    backend = cuda.Cuda()
    monkeypatch.setitem(backends._LOADED, "cuda", backend)
    return backend


def test_a_gpu_without_code_is_refused_by_name(of_this_build: cuda.Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "it was built for sm_90, got sm_80"
    assert of_this_build.refuses(torch.float32, GPU) == reason
    with pytest.raises(ValueError, match=f"^fastdiv: backend 'cuda' was asked for but {reason}$"):
        backends.select([torch.bfloat16], GPU, "cuda")
    assert backends.select([torch.bfloat16], GPU, None) in ("triton", "reference")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert of_this_build.refuses(torch.float32, GPU) is None
    assert backends.select([torch.bfloat16], GPU, None) == "cuda"


def test_other_dtypes_and_devices_are_refused_by_name(of_this_build: cuda.Cuda) -> None:
    assert of_this_build.refuses(torch.float64, GPU) == "it takes float32, float16 and bfloat16, got torch.float64"
    assert of_this_build.refuses(torch.float32, torch.device("cpu")) == "it runs on cuda, got cpu"
