"""From the sums of a row to its outputs, once.  Scalar functions in the language of `fastdiv.pointwise`, in float64.

Arguments are columns of the state (`fastdiv.statistics.STATE`): with z = logit / temperature and m its maximum,
`tail` is sum exp(z - m) over all entries but one maximum, `first` and `second` are sum exp(z - m) (z - m)^k, and so
on.  A row of -inf has no distribution: everything but its logsumexp is NaN.

`fastdiv.statistics` runs the text on tensors, the Triton backend compiles it, `fastdiv.translate` writes it in C++.
"""

# mypy: ignore-errors

from fastdiv.language import expm1, log1p, where


def log_norm(maximum, tail):
    """log sum exp(z - m)."""
    return where(maximum == -float("inf"), float("nan"), log1p(tail))


def mean_shifted(maximum, tail, first):
    """E_p[z - m]."""
    return where(maximum == -float("inf"), float("nan"), first / (1.0 + tail))


def entropy(maximum, tail, first):
    return log_norm(maximum, tail) - mean_shifted(maximum, tail, first)


def varentropy(maximum, tail, first, second):
    """Var_p[log p]."""
    mean = mean_shifted(maximum, tail, first)
    variance = second / (1.0 + tail) - mean * mean
    return where(variance < 0.0, 0.0, variance)


def log_sum_sq_probs(maximum, tail, squares):
    """log sum p^2; `squares` is sum exp(2 (z - m)) over all entries but one maximum."""
    return log1p(squares) - 2.0 * log_norm(maximum, tail)


def log_prob(maximum, tail, inverse_temperature, logit):
    return (logit - maximum) * inverse_temperature - log_norm(maximum, tail)


def logsumexp(maximum, tail, inverse_temperature):
    return maximum * inverse_temperature + log1p(tail)


def kl(total, tail, offset):
    """KL from the sum of its non-negative terms on unnormalised exponentials, `tail` that of the model in front.

    The offsets that it was summed with have normalisers that differ by `offset`, so the sum, normalised, is KL +
    phi(offset).  In float64 phi may be formed by subtraction: its error is about 1e-16 offset.
    """
    divergence = total / (1.0 + tail) - (expm1(offset) - offset)
    return where(divergence < 0.0, 0.0, divergence)
