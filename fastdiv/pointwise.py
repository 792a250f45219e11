"""The mathematics, once.  Every function is scalar -> scalar in a tiny language: + - * /, comparisons, numbers, the
names of `fastdiv.language`, and calls of each other.

Arguments are p and q (probabilities of one vocabulary entry under student and teacher), d = log p - log q, and one
parameter a, which only `js` uses: its mixture weight beta, or beta - 1, which has digits that beta near 1 has not.
d comes separately because it is formed from the logits' difference, which keeps digits that log p and log q have each
lost.

For each divergence D = sum of `value`: the term in its non-negative form (no cancellation when p is close to q), and
its derivatives `dlp` = d value / d log p and `dlq` = d value / d log q.  The non-negative form adds p - q to the
textbook term; the addition sums to 0 over the vocabulary and removes the first-order sensitivity to rounding of the
normalisers.

The text runs as it stands on tensors of any dtype (float64 and autograd check it); `fastdiv.translate` prints it as
the C++ header `csrc/pointwise.h`.  p = 0 or q = 0 gives the limit, never NaN; p = q = 0 gives 0 whatever d is.
NaN as p or q gives NaN.
"""

# mypy: ignore-errors

from fastdiv.language import abs, exp, log, phi, psi, where


def forward_kl_value(d, p, q, a):
    """Term of KL(q || p): q (log q - log p) + p - q = q phi(d)."""
    return where(abs(d) < 0.5, q * phi(d), p - q - where(q > 0.0, q * d, 0.0))


def forward_kl_dlp(d, p, q, a):
    return where(abs(d) < 0.5, q * (d + phi(d)), p - q)


def forward_kl_dlq(d, p, q, a):
    return where(q > 0.0, -q * d, 0.0)


def reverse_kl_value(d, p, q, a):
    """Term of KL(p || q): p (log p - log q) + q - p = p phi(-d)."""
    return where(abs(d) < 0.5, p * phi(-d), q - p + where(p > 0.0, p * d, 0.0))


def reverse_kl_dlp(d, p, q, a):
    return where(p > 0.0, p * d, 0.0)


def reverse_kl_dlq(d, p, q, a):
    return where(abs(d) < 0.5, p * (phi(-d) - d), q - p)


def jeffreys_value(d, p, q, a):
    """Term of KL(p || q) + KL(q || p)."""
    return forward_kl_value(d, p, q, a) + reverse_kl_value(d, p, q, a)


def jeffreys_dlp(d, p, q, a):
    return forward_kl_dlp(d, p, q, a) + reverse_kl_dlp(d, p, q, a)


def jeffreys_dlq(d, p, q, a):
    return forward_kl_dlq(d, p, q, a) + reverse_kl_dlq(d, p, q, a)


def weight_of_q(a):
    return where(a < 0.0, 1.0 + a, a)


def weight_of_p(a):
    return where(a < 0.0, -a, 1.0 - a)


def log_mixture(d, a):
    """log(m / the larger of p and q), m = beta q + (1 - beta) p."""
    w = where(d > 0.0, weight_of_p(a), weight_of_q(a))
    rest = where(d > 0.0, weight_of_q(a), weight_of_p(a))
    return log(w + rest * exp(-abs(d)))


def mixture_beyond_p(d, p, q, a):
    """m - p."""
    return weight_of_q(a) * where(abs(d) < 0.5, p * (phi(-d) - d), q - p)


def mixture_beyond_q(d, p, q, a):
    """m - q."""
    return weight_of_p(a) * where(abs(d) < 0.5, q * (phi(d) + d), p - q)


def p_log_mixture_over_p(d, p, q, a):
    """p log(m / p): the mixture may be close to p where q is not, as one of its weights may be small."""
    e = mixture_beyond_p(d, p, q, a)
    far = where(p <= 0.0, 0.0, p * (log_mixture(d, a) - where(d > 0.0, 0.0, d)))
    return where(abs(e) < 0.5 * p, e - psi(e, p), far)


def q_log_mixture_over_q(d, p, q, a):
    """q log(m / q)."""
    e = mixture_beyond_q(d, p, q, a)
    far = where(q <= 0.0, 0.0, q * (log_mixture(d, a) + where(d < 0.0, 0.0, d)))
    return where(abs(e) < 0.5 * q, e - psi(e, q), far)


def js_value(d, p, q, a):
    """Term of beta KL(q || m) + (1 - beta) KL(p || m): each model's m - p - p log(m / p), which is non-negative."""
    e = mixture_beyond_p(d, p, q, a)
    u = mixture_beyond_q(d, p, q, a)
    of_p = where(abs(e) < 0.5 * p, psi(e, p), e - p_log_mixture_over_p(d, p, q, a))
    of_q = where(abs(u) < 0.5 * q, psi(u, q), u - q_log_mixture_over_q(d, p, q, a))
    return weight_of_p(a) * of_p + weight_of_q(a) * of_q


def js_dlp(d, p, q, a):
    return -weight_of_p(a) * p_log_mixture_over_p(d, p, q, a)


def js_dlq(d, p, q, a):
    return -weight_of_q(a) * q_log_mixture_over_q(d, p, q, a)


def tv_value(d, p, q, a):
    """Term of the total variation distance: |p - q| / 2."""
    return 0.5 * where(abs(d) < 0.5, q * abs(d + phi(d)), abs(p - q))


def tv_dlp(d, p, q, a):
    return where(d > 0.0, 0.5 * p, where(d < 0.0, -0.5 * p, 0.0 * p * q))


def tv_dlq(d, p, q, a):
    return where(d > 0.0, -0.5 * q, where(d < 0.0, 0.5 * q, 0.0 * p * q))
