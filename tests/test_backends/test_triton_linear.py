"""Statistics straight from hidden states, in Triton's interpreter or on a GPU, beside the textbook."""

from __future__ import annotations

import os

import pytest
import torch
from cases import MODEL_OUTPUTS
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

import fastdiv
from fastdiv.backends.triton import linear
from fastdiv.request import Transform
from fastdiv.statistics import OUTPUTS, STATE, WANTED, Statistics, Sums, Tokens, empty_state
from fastdiv.testing import assert_accurate, assert_bitwise_equal, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN = Transform()
EVERY = sum(WANTED[name] for name in ("first", "second", "squares", "sum", "argmax"))
OUT = (*MODEL_OUTPUTS, "argmax", "is_top1")


def made(rows: int, vocabulary: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and bias that give logits of size 3."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * (3.0 / width**0.5)
    bias = torch.randn(vocabulary, generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


def labels_for(rows: int, vocabulary: int, k: int = 2) -> Tensor:
    return torch.randint(vocabulary, (rows, k), generator=torch.Generator().manual_seed(1))


def sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    transform: Transform = PLAIN,
    temperature: Tensor | None = None,
    wanted: int = EVERY,
) -> tuple[Tensor, Tensor]:
    """(state, label logits)."""
    rows = hidden.shape[0]
    state = empty_state(rows, DEVICE)
    label_logits = torch.zeros(labels.shape, device=DEVICE)
    inverse = torch.ones(rows) if temperature is None else temperature.reciprocal()
    arrays = [None if t is None else t.to(DEVICE) for t in (hidden, weight, bias)]
    linear.statistics(*arrays, transform, inverse.to(DEVICE), labels.to(DEVICE), wanted, state, label_logits)
    return state.cpu(), label_logits.cpu()


def outputs(
    found: tuple[Tensor, Tensor], labels: Tensor, vocabulary: int, temperature: Tensor | None = None
) -> dict[str, Tensor]:
    """All outputs of one model, rounded as the operators round them."""
    state, label_logits = found
    rows = state.shape[0]
    inverse = torch.ones(rows) if temperature is None else temperature.reciprocal()
    nothing = torch.zeros(rows, 0)
    s = Statistics(
        Tokens(inverse, labels, -100, None, vocabulary),
        Sums(state, label_logits, nothing.double().reshape(rows, 0, 3), nothing.long()),
    )
    return {name: OUTPUTS[name].value(s).to(OUTPUTS[name].dtype or torch.float32) for name in OUT}


def check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transform: Transform = PLAIN,
    temperature: Tensor | None = None,
) -> None:
    """Every output of one model is as exact as plain torch's in float32."""
    vocabulary = weight.shape[0]
    labels = labels_for(hidden.shape[0], vocabulary)
    got = outputs(sums(hidden, weight, bias, labels, transform, temperature), labels, vocabulary, temperature)
    source = fastdiv.LinearLogits(hidden, weight, bias, transform.softcap or None, transform.scale)
    options = {"outputs": OUT, "temperature": 1.0 if temperature is None else temperature}
    exact = reference(source, labels, **options)
    plain = reference(source, labels, **options, dtype=torch.float32)
    for name in OUT:
        if exact[name].numel():
            assert_accurate(got[name], plain[name], exact[name], name)
        assert got[name].shape == exact[name].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 24, 80])
@pytest.mark.parametrize("vocabulary", [1, 31, 1000])
def test_every_output_of_one_model(dtype: torch.dtype, width: int, vocabulary: int) -> None:
    check(*made(5, vocabulary, width, dtype)[:2])
    check(*made(5, vocabulary, width, dtype, seed=3))


@pytest.mark.parametrize("rows", [0, 1, 17])
def test_any_number_of_rows(rows: int) -> None:
    check(*made(rows, 300, 24, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_spans(dtype: torch.dtype) -> None:
    assert linear.SPAN < 10000, "the vocabulary below must be several spans, the last one ragged"
    check(*made(3, 20000, 80, dtype))


def test_the_maximum_may_be_in_any_span_and_stand_twice() -> None:
    hidden, weight, bias = made(4, 20000, 8, torch.float32)
    bias[[7, linear.SPAN + 9, 19999]] = 60.0
    weight[[7, linear.SPAN + 9, 19999]] = 0.0
    labels = labels_for(4, 20000)
    found = sums(hidden, weight, bias, labels)
    assert found[0][:, STATE.index("argmax")].tolist() == [7.0] * 4
    torch.testing.assert_close(found[0][:, STATE.index("tail")], torch.full((4,), 2.0).double())
    torch.testing.assert_close(found[0][:, STATE.index("squares")], torch.full((4,), 2.0).double())
    for place in (300, 19999):
        bias.zero_()
        bias[place] = 60.0
        check(hidden, weight, bias)


def test_logits_that_rise_all_the_way() -> None:
    hidden, weight, _ = made(2, 20000, 8, torch.float32)
    check(hidden, weight * 0.1, torch.linspace(0.0, 100.0, 20000))


@pytest.mark.parametrize("transform", [Transform(0.3, 0.0), Transform(1.0, 2.5), Transform(-0.7, 20.0)])
def test_scale_softcap_and_a_temperature_per_row(transform: Transform) -> None:
    temperature = torch.tensor([0.5, 1.0, 3.0])
    check(*made(3, 700, 24, torch.bfloat16), transform, temperature)
    check(*made(3, 700, 24, torch.float32), transform, temperature)


@pytest.mark.parametrize("masked", [range(0, 1000, 2), range(0, 600), range(600, 1000)])
def test_entries_of_probability_zero(masked: range) -> None:
    """Also whole blocks of them, first or last."""
    hidden, weight, bias = made(3, 1000, 24, torch.float32)
    bias[list(masked)] = -torch.inf
    check(hidden, weight, bias)


def test_whole_spans_of_probability_zero() -> None:
    hidden, weight, bias = made(2, 20000, 8, torch.float32)
    bias[: linear.SPAN + 5] = -torch.inf
    bias[2 * linear.SPAN : 3 * linear.SPAN] = -torch.inf
    check(hidden, weight, bias)


def test_no_entry_of_any_probability() -> None:
    hidden, weight, _ = made(2, 500, 8, torch.float32)
    check(hidden, weight, torch.full((500,), -torch.inf))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_row_is_nan_and_alone(value: float) -> None:
    hidden, weight, _ = made(3, 5000, 8, torch.float32)
    labels = labels_for(3, 5000)
    before = sums(hidden, weight, None, labels)
    hidden[1, 2] = value
    after = sums(hidden, weight, None, labels)
    got = outputs(after, labels, 5000)
    for name in ("log_prob", "entropy", "logsumexp", "log_sum_sq_probs", "varentropy", "max_log_prob"):
        assert got[name][1].isnan().all(), name
    for index in (0, 1):
        assert_bitwise_equal(after[index][[0, 2]], before[index][[0, 2]])


def test_argmax_is_of_the_numbers_where_one_logit_is_nan() -> None:
    hidden, weight, bias = made(3, 600, 8, torch.float32)
    want = torch.nn.functional.linear(hidden, weight, bias)[:, :599].argmax(1)
    weight[599] = torch.nan
    state, _ = sums(hidden, weight, bias, labels_for(3, 600))
    assert torch.equal(state[:, STATE.index("argmax")].long(), want)
    assert state[:, STATE.index("tail")].isnan().all()


def test_label_logits_outside_the_vocabulary_are_nan() -> None:
    hidden, weight, bias = made(2, 5000, 24, torch.float32)
    labels = torch.tensor([[0, 4999, 5000, -1, -100], [2**40, 4096, 4095, -(2**40), 255]])
    _, got = sums(hidden, weight, bias, labels)
    outside = (labels < 0) | (labels >= 5000)
    assert torch.equal(got.isnan(), outside)
    exact = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    exact = exact.gather(1, torch.where(outside, 0, labels))
    torch.testing.assert_close(got[~outside].double(), exact[~outside], rtol=1e-6, atol=1e-6)


def test_no_labels() -> None:
    hidden, weight, bias = made(2, 100, 8, torch.float32)
    state, _ = sums(hidden, weight, bias, torch.zeros(2, 0, dtype=torch.int64))
    assert_bitwise_equal(state, sums(hidden, weight, bias, labels_for(2, 100))[0])


@pytest.mark.parametrize("name", ["first", "second", "squares", "sum", "argmax"])
def test_only_what_is_wanted_is_written(name: str) -> None:
    hidden, weight, bias = made(2, 5000, 8, torch.float32)
    labels = labels_for(2, 5000)
    everything, _ = sums(hidden, weight, bias, labels)
    state, _ = sums(hidden, weight, bias, labels, wanted=WANTED[name])
    written = {"max", "tail", name} | ({"first"} if name == "second" else set())
    for i, column in enumerate(STATE):
        want = everything[:, i] if column in written else empty_state(2, torch.device("cpu"))[:, i]
        assert_bitwise_equal(state[:, i], want, column)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_repeat_and_do_not_depend_on_other_rows(dtype: torch.dtype) -> None:
    hidden, weight, bias = made(37, 5000, 80, dtype)
    if DEVICE.type == "cpu":  # the interpreter's product rounds a row by its place in a block: here nothing is rounded
        hidden, weight = (hidden * 4.0).round() / 4.0, (weight * 16.0).round() / 16.0
    labels = labels_for(37, 5000)
    batch = sums(hidden, weight, bias, labels)
    again = sums(hidden, weight, bias, labels)
    for index in (0, 1):
        assert_bitwise_equal(again[index], batch[index], "a second call")
    for row in (0, 15, 16, 36):
        alone = sums(hidden[row : row + 1], weight, bias, labels[row : row + 1])
        for index in (0, 1):
            assert_bitwise_equal(alone[index], batch[index][row : row + 1], f"row {row} alone")


def test_layouts_and_two_dtypes() -> None:
    hidden, weight, bias = made(3, 600, 24, torch.bfloat16)
    labels = labels_for(3, 600)
    want = sums(hidden, weight, bias, labels)
    spread = torch.cat([hidden, hidden], 1)[:, :24]
    for h, w in ((spread, weight), (hidden.T.contiguous().T, weight), (hidden, weight.T.contiguous().T)):
        got = sums(h, w, bias, labels)
        assert_bitwise_equal(got[0], want[0])
        assert_bitwise_equal(got[1], want[1])
    check(hidden.float(), weight, bias)


def test_titles_of_launches_to_compile() -> None:
    titles = [title for title, _ in linear.aot_launches()]
    assert len(titles) == len(set(titles))
    assert {t.split()[0] for t in titles} == {"bfloat16", "float16", "float32"}
