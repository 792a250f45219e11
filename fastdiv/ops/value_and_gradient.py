"""Statistics and their gradient at once, where the weights of the loss are known beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastdiv import accept, checks, library, plain
from fastdiv.ops.call import Call, prepare
from fastdiv.ops.stats import TokenStats
from fastdiv.sources import LinearLogits, LogProbabilities, Source, work_dtype
from fastdiv.statistics import differentiable, per_label


@torch.no_grad()
def value_and_gradient(
    logits: Tensor | Source,
    labels: Tensor | None,
    weights: Mapping[str, Tensor | float],
    *,
    teacher: Tensor | Source | LogProbabilities | None = None,
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    overwrite: bool = False,
    backend: str | None = None,
) -> tuple[TokenStats, Tensor]:
    """Per-token statistics, and the gradient of L = sum_t sum_o weights[o]_t o_t with respect to the logits.

    For losses that are linear in the statistics, whose weights are known before the forward: cross-entropy (log_prob:
    -1 / tokens), policy gradients (log_prob: -advantage / tokens), an entropy bonus, distillation.  Nothing here is
    differentiable; hand the gradient on by `logits.backward(gradient)`.

    The backend "cuda" keeps a row of one model in shared memory where it fits (on sm_90 and later 400 000 entries of 16
    bits): each logit is read once, each gradient written once, for log_prob, entropy and logsumexp.  All else takes
    the launches of `token_stats` and of its backward.

    Arguments:
        logits: [*, V], a tensor or `Logits`; float16, bfloat16, float32 (float64 with the reference backend).
        labels: [*] or [*, K], as in `token_stats`; None if no output needs them.
        weights: output -> its weights: [*] ([*, K] for outputs per label, if labels are), or one number for all.
        overwrite: the gradient takes the place of the logits, which must be contiguous and share no memory with another
            argument: no memory of their size.  Autograd hears of it: a graph that saved the logits raises.
        teacher, beta, temperature, mask, ignore_index, backend: as in `token_stats`; the teacher gets no gradient.

    Returns:
        (`TokenStats` of the outputs in `weights`, gradient [*, V] in the logits' dtype).  Rows that are masked, or
        whose labels are all ignored, have a gradient of 0.

    Raises:
        As `token_stats`; TypeError for `LinearLogits` (`linear_loss` serves those) and for weights that are neither
        numbers nor floating tensors; ValueError for outputs without a gradient, for weights of another shape or
        device, and where `overwrite` is asked of logits that are not contiguous or whose memory another argument
        has.

    Memory beyond inputs and results: O(tokens).

    >>> stats, gradient = value_and_gradient(torch.zeros(2, 4), torch.tensor([1, 2]), {"log_prob": -0.5})
    >>> gradient[0]
    tensor([ 0.1250, -0.3750,  0.1250,  0.1250])
    """
    operator = "value_and_gradient"
    if isinstance(logits, LinearLogits):
        raise TypeError(f"{operator}: logits must exist, got LinearLogits; linear_loss is for those")
    if not isinstance(weights, Mapping) or not weights:
        raise TypeError(f"{operator}: weights must map outputs to weights, got {checks.describe(weights)}")
    plain.check(operator, {f"weights of {name!r}": weight for name, weight in weights.items()})
    call = prepare(
        operator,
        logits,
        labels,
        teacher=teacher,
        outputs=tuple(weights),
        parameters={"beta": beta},
        temperature=temperature,
        mask=mask,
        ignore_index=ignore_index,
        backend=backend,
        workspace=None,
    )
    tensor = call.tensors[0]
    if overwrite and not tensor.is_contiguous():
        raise ValueError(f"{operator}: overwrite needs contiguous logits, got strides {tensor.stride()}")
    given = {name: _weights(operator, name, weight, call) for name, weight in weights.items()}
    if overwrite and not plain.watched(tensor):
        read: dict[str, Tensor | None] = {"labels": call.labels, "mask": call.mask, "temperature": call.temperature}
        read |= {"teacher": call.tensors[1]} if len(call.tensors) == 2 else {}
        read |= {f"weights of {name!r}": value for name, value in given.items()}
        _check_apart(operator, tensor, read)
    with checks.named(operator):
        outputs, gradient = library.value_and_gradient(
            call.request,
            overwrite,
            tensor,
            call.tensors[1:],
            list(given.values()),
            call.labels,
            call.mask,
            call.temperature,
        )
    return TokenStats(zip(call.request.outputs, outputs, strict=True)), gradient


def _weights(operator: str, name: str, value: object, call: Call) -> Tensor:
    """The weights of an output, [tokens] or [tokens, K]."""
    if not differentiable(name):
        raise ValueError(f"{operator}: output {name!r} has no gradient, so it takes no weight")
    device, lead = call.tensors[0].device, call.tensors[0].shape[:-1]
    shape = call.labels.shape if per_label(name) and call.labels is not None else lead
    flat = (math.prod(lead), *shape[len(lead) :])
    argument, expected = f"weights of {name!r}", "a number or a floating tensor"
    if not isinstance(value, Tensor):
        number = accept.number(operator, argument, value, expected)
        return call.tensors[0].new_full(flat, number, dtype=work_dtype(*(t.dtype for t in call.tensors)))
    if not value.is_floating_point():
        raise TypeError(f"{operator}: {argument} must be {expected}, got {accept.describe(value)}")
    if value.shape != shape or value.device != device:
        raise ValueError(
            f"{operator}: {argument} must be {list(shape)} on {device}, got {checks.describe(value)} on {value.device}"
        )
    return value.reshape(flat)


def _check_apart(operator: str, written: Tensor, read: Mapping[str, Tensor | None]) -> None:
    """Raise if what is written over is also read as something else."""
    begin, end = _extent(written)
    for name, tensor in read.items():
        if tensor is None or tensor.device != written.device:
            continue
        first, last = _extent(tensor)
        if first < end and begin < last:
            raise ValueError(
                f"{operator}: overwrite needs logits whose memory nothing else has, got {name} in the same memory; "
                "clone() one of them"
            )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor lies; nothing of an empty one."""
    if tensor.numel() == 0:
        return 0, 0
    count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + count * tensor.element_size()
