"""The fast path when the loss is a sum over tokens: gradients are formed while each tile of logits is there."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastdiv.autograd import LinearLoss
from fastdiv.checks import describe
from fastdiv.ops.call import prepare
from fastdiv.ops.stats import TokenStats
from fastdiv.sources import LinearLogits, Source


def linear_loss(
    head: LinearLogits,
    labels: Tensor | None,
    token_loss: Callable[[TokenStats, Tensor], Tensor],
    *,
    teacher: Tensor | Source | None = None,
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
    four (six). Scaling is by linearity: divide by your own normaliser inside `token_loss` or outside.

    Arguments:
        head: the student, `LinearLogits`.
        labels: [*] or [*, K]; None if no output needs them.
        token_loss: called once per chunk with the chunk's `TokenStats` ([rows] or [rows, K] each) and `rows`, the
        int64 flat
            token numbers of its rows, with which it indexes per-token tensors of its own.  Returns [rows],
            differentiable in the statistics.  Tensors it closes over get no gradient.
        teacher, outputs, beta, temperature, mask, ignore_index, backend, workspace: as in `token_stats`.

    Returns:
        The sum, 0-dim float32 (float64 for float64 input).  Its gradients reach the tensors of `head` and `teacher`.

    Raises:
        As `token_stats`; ValueError if `token_loss` does not return one number per row.

    Memory beyond inputs and gradients: the workspace and O(tokens H).

    >>> head = LinearLogits(torch.zeros(3, 4), torch.zeros(8, 4, requires_grad=True))
    >>> linear_loss(head, torch.tensor([1, 2, 3]), lambda stats, rows: -stats.log_prob)
    tensor(6.2383, grad_fn=<LinearLossBackward>)
    """
    if not isinstance(head, LinearLogits):
        raise TypeError(f"linear_loss: head must be LinearLogits, got {describe(head)}")
    if not callable(token_loss):
        raise TypeError(f"linear_loss: token_loss must be callable, got {describe(token_loss)}")
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

    def loss(stats: dict[str, Tensor], rows: Tensor) -> Tensor:
        return token_loss(TokenStats(stats), rows)

    result: Tensor = LinearLoss.apply(  # type: ignore[no-untyped-call]
        call.request, loss, call.students, call.labels, call.mask, call.temperature, *call.tensors
    )
    return result
