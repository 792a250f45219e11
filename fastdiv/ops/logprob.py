"""Log-probabilities of chosen tokens, and entropy."""

from __future__ import annotations

from torch import Tensor

from fastdiv.ops.stats import run
from fastdiv.sources import Source


def log_prob(
    logits: Tensor | Source,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
    workspace: int | None = None,
) -> Tensor:
    """Log-probability of chosen tokens: log p_y = z_y - log sum_v exp(z_v), z = logits / temperature, in nats.

    d log p_y / dz_v = [v = y] - p_v.  1 - p_y is formed as -expm1(log p_y), so a confident token keeps its gradient.

    Arguments:
        logits: [*, V], or a source.
        labels: [*] or [*, K], any integer dtype.
        temperature, mask, ignore_index, backend, workspace: as in `token_stats`.

    Returns:
        float32 (float64 for float64 input) in the shape of `labels`; 0 at masked and ignored places.

    Raises:
        As `token_stats`.

    >>> log_prob(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([-0.6931])
    """
    return run(
        "log_prob",
        logits,
        labels,
        teacher=None,
        outputs=("log_prob",),
        parameters={},
        temperature=temperature,
        mask=mask,
        ignore_index=ignore_index,
        backend=backend,
        workspace=workspace,
    ).log_prob


def entropy(
    logits: Tensor | Source,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
    workspace: int | None = None,
) -> Tensor:
    """Entropy H = - sum_v p_v log p_v of p = softmax(logits / temperature), in nats.

    dH / dz_v = - p_v (log p_v + H).

    Arguments:
        logits: [*, V], or a source.
        temperature, mask, backend, workspace: as in `token_stats`.

    Returns:
        float32 (float64 for float64 input) [*]; 0 at masked tokens.

    Raises:
        As `token_stats`.

    >>> entropy(torch.zeros(1, 4))
    tensor([1.3863])
    """
    return run(
        "entropy",
        logits,
        None,
        teacher=None,
        outputs=("entropy",),
        parameters={},
        temperature=temperature,
        mask=mask,
        ignore_index=-100,
        backend=backend,
        workspace=workspace,
    ).entropy
