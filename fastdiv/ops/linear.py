"""The fast path when the loss is a sum over tokens: gradients are formed while each tile of logits is there."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiv import checks, plain
from fastdiv.autograd import LinearLoss
from fastdiv.engine import check_token_loss
from fastdiv.ops.call import Call, prepare
from fastdiv.ops.stats import TokenStats, outputs_of
from fastdiv.sources import LinearLogits, LogProbabilities, Source, work_dtype


def linear_loss(
    head: LinearLogits,
    labels: Tensor | None,
    token_loss: Callable[[TokenStats, Tensor], Tensor],
    *,
    teacher: Tensor | Source | LogProbabilities | None = None,
    outputs: tuple[str, ...] = ("log_prob",),
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
    workspace: int | None = None,
) -> Tensor:
    """Sum over tokens of a loss of per-token statistics, from hidden states: L = sum_t token_loss(stats, rows)_t.

    Each chunk of full rows is projected once; its statistics go through `token_loss`, whose derivative gives the row
    gradients on the spot.  Three matrix products (four with a projected teacher) where the unfused backward needs
    four (six).  Scaling is by linearity: divide by your own normaliser inside `token_loss` or outside.

    Arguments:
        head: the student, `LinearLogits`.
        labels: [*] or [*, K]; None if no output needs them.
        token_loss: called once per chunk with the chunk's `TokenStats` ([rows] or [rows, K] each) and `rows`, the flat
            token numbers of its rows (int64), with which it indexes per-token tensors of its own.  Returns [rows],
            differentiable in the statistics.  Tensors it closes over get no gradient.
        teacher, outputs, beta, temperature, mask, ignore_index, backend, workspace: as in `token_stats`.

    Returns:
        The sum, 0-dim float32 (float64 for float64 input).  Its gradients reach the tensors of `head` and `teacher`.

    Raises:
        As `token_stats`; ValueError if `token_loss` does not return one number per row; RuntimeError if a gradient is
        asked for and what it returns does not depend on the statistics, as where they are detached.

    Memory beyond inputs and gradients: the workspace and O(tokens H).  Gradients of float16 tensors wait in float32, as
    a loss scale may come after the division or before; teacher logits in float16 that want a gradient are copied too.

    Where torch.compile, a transform of torch.func or a dispatch mode looks on, `token_loss` is called once, with all
    tokens (what it gives for those that take no part is dropped), and the backward takes the fourth product.

    >>> head = LinearLogits(torch.zeros(3, 4), torch.zeros(8, 4, requires_grad=True))
    >>> linear_loss(head, torch.tensor([1, 2, 3]), lambda stats, rows: -stats.log_prob)
    tensor(6.2383, grad_fn=<LinearLossBackward>)
    """
    if not isinstance(head, LinearLogits):
        raise TypeError(f"linear_loss: head must be LinearLogits, got {checks.describe(head)}")
    if not callable(token_loss):
        raise TypeError(f"linear_loss: token_loss must be callable, got {checks.describe(token_loss)}")
    call = prepare(
        "linear_loss",
        head,
        labels,
        teacher=teacher,
        outputs=outputs,
        parameters={"beta": beta},
        temperature=temperature,
        mask=mask,
        ignore_index=ignore_index,
        backend=backend,
        workspace=workspace,
    )

    if plain.transformed() or plain.watched(*call.tensors, call.labels, call.mask, call.temperature):
        with checks.named("linear_loss"):
            return _in_one_piece(call, token_loss)

    def loss(stats: dict[str, Tensor], rows: Tensor) -> Tensor:
        return token_loss(TokenStats(stats), rows)

    # A function is told to form gradients also where no graph is recorded.
    tensors = call.tensors if torch.is_grad_enabled() else [t.detach() for t in call.tensors]
    with checks.named("linear_loss"):
        result: Tensor = LinearLoss.apply(  # type: ignore[no-untyped-call]
            call.request, loss, call.students, call.labels, call.mask, call.temperature, *tensors
        )
    return result


def _in_one_piece(call: Call, token_loss: Callable[[TokenStats, Tensor], Tensor]) -> Tensor:
    """The same sum by `fastdiv::stats` and autograd, so that whoever traces the call sees `token_loss`."""
    lead = call.tensors[0].shape[:-1]
    tokens, labels, active = math.prod(lead), call.labels, call.mask
    if labels is not None:
        counts = labels != call.request.ignore_index
        counts = counts if labels.shape == lead else counts.any(-1)
        active = counts if active is None else active & counts
    values = zip(call.request.outputs, outputs_of(call), strict=True)
    stats = TokenStats({name: value.reshape(tokens, *value.shape[len(lead) :]) for name, value in values})
    loss = token_loss(stats, torch.arange(tokens, device=call.tensors[0].device))
    check_token_loss(loss, tokens)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in call.tensors)
    if wanted and not loss.requires_grad and not torch.compiler.is_compiling():
        raise RuntimeError("linear_loss: token_loss must give a differentiable function of the statistics")
    if active is not None:
        loss = loss.masked_fill(~active.reshape(tokens), 0.0)
    return loss.double().sum().to(work_dtype(*(t.dtype for t in call.tensors)))
