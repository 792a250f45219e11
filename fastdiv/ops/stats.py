"""Several numbers per token from one pass over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiv import checks, library, plain
from fastdiv.autograd import TokenStatistics, TransformedStatistics
from fastdiv.ops.call import Call, prepare
from fastdiv.sources import LogProbabilities, Source


class TokenStats(dict[str, Tensor]):
    """Output name -> tensor; `stats.entropy` is `stats["entropy"]`."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{name!r} was not among the outputs {tuple(self)}") from None

    def __reduce__(self) -> tuple[type[TokenStats], tuple[dict[str, Tensor]]]:
        """As a call with a plain dict, which `torch.load` takes by default."""
        return TokenStats, (dict(self),)


torch.serialization.add_safe_globals([TokenStats])


def run(operator: str, student: Tensor | Source, labels: Tensor | None, **options: object) -> TokenStats:
    """The one way from a public operator to the kernels."""
    call = prepare(operator, student, labels, **options)  # type: ignore[arg-type]
    with checks.named(operator):
        outputs = outputs_of(call)
    return TokenStats(zip(call.request.outputs, outputs, strict=True))


def outputs_of(call: Call) -> tuple[Tensor, ...]:
    """The outputs of a call, in its order."""
    beside = call.labels, call.mask, call.temperature
    student, teacher = call.tensors[: call.students], call.tensors[call.students :]
    found: Sequence[Tensor]
    if plain.transformed():
        found = TransformedStatistics.apply(call.request, call.students, *beside, *call.tensors)
    elif plain.watched(*call.tensors, *beside):
        found = library.stats(call.request, student, teacher, *beside)  # the operator has its own autograd
    elif torch.is_grad_enabled() and any(t.requires_grad for t in call.tensors):
        found = TokenStatistics.apply(call.request, call.students, *beside, *call.tensors)
    else:
        found = library.run_stats(call.request, student, teacher, *beside)
    return tuple(found[:-2])


def token_stats(
    source: Tensor | Source,
    labels: Tensor | None = None,
    *,
    teacher: Tensor | Source | LogProbabilities | None = None,
    outputs: tuple[str, ...] = ("log_prob", "entropy"),
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
    workspace: int | None = None,
) -> TokenStats:
    """Any set of per-token statistics of p = softmax(logits / temperature), in one pass where the formulas allow it.

    ==================  ==========================================================  =========  ========
    output              formula (natural logarithm: nats)                           shape      gradient
    ==================  ==========================================================  =========  ========
    log_prob            z_y - log sum_v exp(z_v), z = logits / temperature          labels     yes
    entropy             H = - sum p log p                                           [*]        yes
    logsumexp           log sum_v exp(z_v)                                          [*]        yes
    log_sum_sq_probs    log sum p^2                                                 [*]        yes
    varentropy          sum p (log p)^2 - H^2                                       [*]        yes
    max_log_prob        max_v log p_v                                               [*]        yes
    mean_logit          sum_v z_v / V                                               [*]        yes
    argmax              lowest id of the largest logit, int64                       [*]        no
    is_top1             label == argmax, bool                                       labels     no
    rank                number of ids with a logit above the label's, int64         labels     no
    a divergence        forward_kl reverse_kl jeffreys js tv, see `divergence`      [*]        yes
    ==================  ==========================================================  =========  ========

    Arguments:
        source: logits [*, V], or a source: `Logits`, `LinearLogits`.  float64, float32, float16 or bfloat16.
        labels: token ids [*] or [*, K], any integer dtype; needed by log_prob, is_top1 and rank.  Flat ones are taken
            for [B, T, V] too; [1, 1, K] are K ids that all tokens share.
        teacher: the second model's logits, same shape; needed by divergences.  Gets a gradient if it asks for one.
            `LogProbabilities` are not divided by the temperature.
        outputs: names from the table.
        beta: mixture weight of `js`, in (0, 1); default 0.5.
        temperature: above 0; a number, or a tensor: one per token [*], one per sequence [B] (last sizes may be left
            out), or 0-dim.  Divides both models' logits, after scale and softcap.
        mask: bool [*], or 0 and 1 in any dtype.  Tokens where it is False cost nothing, give 0, and receive exactly
            zero gradient.
        ignore_index: a label that is not one: its per-label outputs are 0 and have no gradient; a token all of whose
            labels are ignored counts as masked.
        backend: "native", "cuda", "triton" or "reference"; None chooses (`fastdiv.info()` and FASTDIV_LOG=1 tell).
        workspace: bytes for tiles of projected logits; default 128 MiB on a CPU; elsewhere 256 MiB, and 1 GiB
            where tiles are full rows (`js`, `tv`, `rank`, `linear_loss`).  0 asks for the least: sums of one model that
            merge are taken on the chip by `triton` (no tile at all; slower), and all else in tiles of about 1 MiB.

    Returns:
        `TokenStats`, a dict with attribute access.  Numbers are float32, or float64 if any input is float64, whatever
        the input's dtype; statistics are never rounded to a smaller one.  Gradients come in each input's dtype.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it and what came.
        IndexError: a label outside [0, V) that is not `ignore_index` (on a CPU; elsewhere that row becomes NaN).
        RuntimeError: second derivatives are asked for.

    A size of 1 in labels, mask, temperature or teacher stands for any: what is shared is not copied.

    A -inf logit has probability 0, contributes 0 and receives gradient 0.  A row of -inf, or one with NaN or +inf,
    gives NaN in that row alone (logsumexp and mean_logit of all -inf: -inf; mean_logit with +inf: +inf).  A probability
    below the smallest normal float32 counts as 0.

    Memory beyond inputs, outputs and gradients: O(tokens), and for `LinearLogits` the workspace, O(tokens H) and, where
    slices of the vocabulary are visited more than once, a weight gradient in float32.

    >>> stats = token_stats(torch.zeros(2, 8), torch.tensor([3, 5]), outputs=("log_prob", "entropy", "rank"))
    >>> [round(x, 4) for x in stats.log_prob.tolist()], round(float(stats.entropy[0]), 4)
    ([-2.0794, -2.0794], 2.0794)
    """
    return run(
        "token_stats",
        source,
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
