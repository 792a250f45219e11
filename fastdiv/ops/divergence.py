"""Divergences between two models, per token."""

from __future__ import annotations

from torch import Tensor

from fastdiv import checks
from fastdiv.ops.stats import run
from fastdiv.sources import LogProbabilities, Source


def divergence(
    student: Tensor | Source,
    teacher: Tensor | Source | LogProbabilities,
    kind: str = "reverse_kl",
    *,
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
    workspace: int | None = None,
) -> Tensor:
    """Divergence between p = softmax(student / temperature) and q = softmax(teacher / temperature), per token, in nats.

    ============  ========================================  =======================================
    kind          formula                                   d / d z, z = student / temperature
    ============  ========================================  =======================================
    forward_kl    KL(q || p) = sum q log(q / p)             p - q
    reverse_kl    KL(p || q) = sum p log(p / q)             p (log(p / q) - KL(p || q))
    jeffreys      KL(p || q) + KL(q || p)                   the sum of both
    js            beta KL(q || m) + (1 - beta) KL(p || m)   (1 - beta) p (log(p / m) - KL(p || m))
    tv            sum |p - q| / 2                           p (sign(p - q) - sum p sign(p - q)) / 2
    ============  ========================================  =======================================

    `js`, m = beta q + (1 - beta) p, is the generalised Jensen-Shannon divergence of GKD (Agarwal et al., arXiv
    2306.13649); its ends are 0, not the KLs.  No temperature-squared factor is applied.  The KLs are summed in a form
    all of whose terms are non-negative, so a KL of 5e-7 over 131072 tokens is right to 1e-3 in float32.

    Arguments:
        student, teacher: [*, V] each, or sources.  Either may ask for a gradient.
        kind: from the table.
        beta: mixture weight of `js`, in (0, 1), default 0.5.
        temperature, mask, backend, workspace: as in `token_stats`.

    Returns:
        float32 (float64 if an input is float64) [*]; 0 at masked tokens.  +inf for a KL whose second distribution is
        0 where the first is not.

    Raises:
        As `token_stats`.

    >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.0]])
    >>> divergence(student, teacher, "forward_kl"), divergence(student, teacher, "tv")
    (tensor([0.1201]), tensor([0.2311]))
    """
    name = checks.kind("divergence", kind)
    return run(
        "divergence",
        student,
        None,
        teacher=teacher,
        outputs=(name,),
        parameters={"beta": beta},
        temperature=temperature,
        mask=mask,
        ignore_index=-100,
        backend=backend,
        workspace=workspace,
    )[name]
