"""`token_stats` of one model, from logits: every output and its gradient against the textbook."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from cases import MODEL_OUTPUTS, check, dtypes, token_stats
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiv
from fastdiv.testing import FACTOR, assert_bitwise_equal, logits, reference

CHOICES = ("argmax", "is_top1", "rank")


def labels_for(x: Tensor, k: int | None, seed: int, ignored: float = 0.2) -> Tensor:
    """[*] or [*, k], some of them -100."""
    generator = torch.Generator().manual_seed(seed)
    shape = x.shape[:-1] if k is None else (*x.shape[:-1], k)
    labels = torch.randint(0, x.shape[-1], shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = -100
    return labels


@settings(max_examples=60)
@given(
    data=st.data(),
    seed=st.integers(0, 1000),
    k=st.sampled_from([None, 1, 3]),
    temperature=st.sampled_from([1.0, 0.7, 2.5]),
)
def test_values(backend: str, data: st.DataObject, seed: int, k: int | None, temperature: float) -> None:
    x = data.draw(logits(dtypes=dtypes(backend)))
    options = {"labels": labels_for(x, k, seed), "outputs": MODEL_OUTPUTS, "temperature": temperature}
    check(*token_stats(lambda x: (x,), backend=backend, **options), x)


@settings(max_examples=60)
@given(
    data=st.data(),
    seed=st.integers(0, 1000),
    k=st.sampled_from([None, 1, 3]),
    temperature=st.sampled_from([1.0, 0.7, 2.5]),
    outputs=st.sampled_from([*((name,) for name in MODEL_OUTPUTS), MODEL_OUTPUTS]),
    layout=st.sampled_from(["random", "expanded", "strided"]),
)
def test_gradients(
    backend: str,
    data: st.DataObject,
    seed: int,
    k: int | None,
    temperature: float,
    outputs: tuple[str, ...],
    layout: str,
) -> None:
    x = data.draw(logits(dtypes=dtypes(backend), broken=False)).requires_grad_()
    options: dict[str, Any] = {
        "outputs": outputs,
        "temperature": temperature,
        "labels": labels_for(x, k, seed),
    }
    check(*token_stats(lambda x: (x,), backend=backend, **options), x, seed=seed, layout=layout)


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 1000), k=st.sampled_from([None, 3]))
def test_choices(backend: str, data: st.DataObject, seed: int, k: int | None) -> None:
    x = data.draw(logits(dtypes=dtypes(backend), broken=False))
    options: dict[str, Any] = {"labels": labels_for(x, k, seed), "outputs": CHOICES}
    got = fastdiv.token_stats(x, backend=backend, **options)
    exact = reference(x, **options)
    assert [got[name].dtype for name in CHOICES] == [torch.int64, torch.bool, torch.int64]
    for name in CHOICES:
        assert torch.equal(got[name], exact[name]), name


@settings(max_examples=40)
@given(
    data=st.data(),
    seed=st.integers(0, 1000),
    transform=st.sampled_from([(None, 0.25), (32.0, 1.0), (4.0, 2.0), (64.0, -0.5), (30.0, 1.0)]),
)
def test_transform(backend: str, data: st.DataObject, seed: int, transform: tuple[float | None, float]) -> None:
    sizes = {"rows": (7,), "vocabularies": (31, 128, 1025)}
    x = data.draw(logits(dtypes=dtypes(backend), broken=False, masked=False, **sizes)).requires_grad_()
    softcap, scale = transform
    # Twice the rule's factor where t / softcap is not exact: the slope 1 - tanh^2 is formed from the capped logits t,
    # while autograd has kept tanh itself, and near the cap each rounding is amplified.
    factor = 2.0 * FACTOR if softcap == 30.0 else FACTOR
    options: dict[str, Any] = {"labels": labels_for(x, None, seed), "outputs": MODEL_OUTPUTS}
    pair = token_stats(lambda x: (fastdiv.Logits(x, softcap, scale),), backend=backend, **options)
    check(*pair, x, seed=seed, neighbours=6, factor=factor)


@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 1000), per_token=st.booleans(), masked=st.booleans())
def test_per_token_temperature_and_mask(
    backend: str, data: st.DataObject, seed: int, per_token: bool, masked: bool
) -> None:
    x = data.draw(logits(dtypes=dtypes(backend), broken=False, rows=(1, 2, 7))).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"outputs": MODEL_OUTPUTS, "labels": labels_for(x, None, seed)}
    if per_token:
        options["temperature"] = torch.rand(x.shape[0], generator=generator) + 0.5
    if masked:
        options["mask"] = torch.rand(x.shape[0], generator=generator) < 0.5
    check(*token_stats(lambda x: (x,), backend=backend, **options), x, seed=seed, neighbours=6)


@pytest.mark.parametrize("name", MODEL_OUTPUTS)
@pytest.mark.parametrize("v", [5, 33, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_output_of_ordinary_logits(backend: str, name: str, v: int, dtype: torch.dtype) -> None:
    """Where nothing is extreme, the rule leaves a formula no room: an error of 1e-4 in any term shows in float32."""
    x = (torch.randn(16, v, generator=torch.Generator().manual_seed(v)) * 1.5).to(dtype).requires_grad_()
    options: dict[str, Any] = {"outputs": (name,), "labels": torch.arange(16) % v, "temperature": 1.3}
    check(*token_stats(lambda x: (x,), backend=backend, **options), x)


@pytest.mark.parametrize("v", [50257, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabulary(backend: str, v: int, dtype: torch.dtype) -> None:
    x = (torch.randn(2, v, generator=torch.Generator().manual_seed(v)) * 3).to(dtype).requires_grad_()
    options: dict[str, Any] = {"outputs": MODEL_OUTPUTS, "labels": torch.tensor([0, v - 1])}
    check(*token_stats(lambda x: (x,), backend=backend, **options), x)


def test_leading_shape(backend: str) -> None:
    x = torch.randn(2, 3, 4, 17, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.randint(0, 17, (2, 3, 4, 2))
    outputs = (*MODEL_OUTPUTS, *CHOICES)
    got = fastdiv.token_stats(x, labels, outputs=outputs, backend=backend)
    flat = fastdiv.token_stats(x.view(24, 17), labels.view(24, 2), outputs=outputs, backend=backend)
    for name in outputs:
        per_label = name in ("log_prob", "is_top1", "rank")
        assert got[name].shape == ((2, 3, 4, 2) if per_label else (2, 3, 4)), name
        assert_bitwise_equal(got[name].flatten(), flat[name].flatten(), name)


def test_every_stride(backend: str) -> None:
    """Leading dimensions in any order are read in place; the gradient comes in the tensor's shape."""
    x = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(2))
    moved = x.transpose(0, 1).detach().requires_grad_()
    plain = moved.detach().contiguous().requires_grad_()
    for source in (moved, plain):
        fastdiv.entropy(source, backend=backend).square().sum().backward()
    assert moved.grad is not None and plain.grad is not None
    assert_bitwise_equal(moved.grad, plain.grad)


def test_access_by_name(backend: str) -> None:
    stats = fastdiv.token_stats(torch.zeros(2, 8), outputs=("entropy", "argmax"), backend=backend)
    assert stats.entropy is stats["entropy"] and list(stats) == ["entropy", "argmax"]
    with pytest.raises(AttributeError, match=r"'rank' was not among the outputs \('entropy', 'argmax'\)"):
        _ = stats.rank


def test_one_output_alone_is_the_same_as_among_others(backend: str) -> None:
    x = torch.randn(5, 3000, generator=torch.Generator().manual_seed(3)) * 5
    labels = torch.arange(5)
    together = fastdiv.token_stats(x, labels, outputs=(*MODEL_OUTPUTS, *CHOICES), backend=backend)
    for name in together:
        alone = fastdiv.token_stats(x, labels, outputs=(name,), backend=backend)
        assert_bitwise_equal(alone[name], together[name], name)


def test_saved_statistics_load_by_default() -> None:
    stats = fastdiv.token_stats(torch.randn(3, 5), torch.arange(3))
    file = io.BytesIO()
    torch.save({"stats": stats}, file)
    file.seek(0)
    for again in (torch.load(file)["stats"], copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert type(again) is fastdiv.TokenStats and list(again) == list(stats)
        assert_bitwise_equal(again.entropy, stats.entropy)
