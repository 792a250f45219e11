"""The mathematics, once.  Every function is scalar -> scalar in a tiny language: + - * /, comparisons, numbers, the
names of `fastdiv.language`, and calls of each other.

Arguments are p and q (probabilities of one vocabulary entry under student and teacher), d = log p - log q, and one
parameter a (the mixture weight beta for `js`; unused elsewhere).  d comes separately because it is formed from the
logits' difference, which keeps digits that log p and log q have each lost.

For each divergence D = sum of `value`: the term in its non-negative form (no cancellation when p is close to q), and
its derivatives `dlp` = d value / d log p and `dlq` = d value / d log q.  The non-negative form adds p - q to the
textbook term; the addition sums to 0 over the vocabulary and removes the first-order sensitivity to rounding of the
normalisers.

The text runs as it stands on tensors of any dtype (float64 and autograd check it); `fastdiv.translate` prints it as
the C++ header `csrc/pointwise.h`.  p = 0 or q = 0 gives the limit, never NaN; p = q = 0 gives 0 whatever d is.
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


def log_mixture_over_p(d, a):
    """log(m / p), m = a q + (1 - a) p: log1p(a (1/r - 1)) with r = p / q = exp(d)."""
    w = a * (phi(-d) - d)
    far = log(where(d > 0.0, 1.0 - a, a) + where(d > 0.0, a, 1.0 - a) * exp(-abs(d))) - where(d > 0.0, 0.0, d)
    return where(abs(d) < 0.5, w - psi(w), far)


def log_mixture_over_q(d, a):
    """log(m / q), m = a q + (1 - a) p."""
    return log_mixture_over_p(-d, 1.0 - a)


def js_value(d, p, q, a):
    """Term of a KL(q || m) + (1 - a) KL(p || m), m = a q + (1 - a) p."""
    u = (1.0 - a) * (d + phi(d))
    w = a * (phi(-d) - d)
    far_q = where(q > 0.0, q * log_mixture_over_q(d, a), 0.0)
    far_p = where(p > 0.0, p * log_mixture_over_p(d, a), 0.0)
    return where(abs(d) < 0.5, a * q * psi(u) + (1.0 - a) * p * psi(w), -a * far_q - (1.0 - a) * far_p)


def js_dlp(d, p, q, a):
    return where(p > 0.0, (a - 1.0) * p * log_mixture_over_p(d, a), 0.0)


def js_dlq(d, p, q, a):
    return where(q > 0.0, -a * q * log_mixture_over_q(d, a), 0.0)


def tv_value(d, p, q, a):
    """Term of the total variation distance: |p - q| / 2."""
    return 0.5 * where(abs(d) < 0.5, q * abs(d + phi(d)), abs(p - q))


def tv_dlp(d, p, q, a):
    return where(d > 0.0, 0.5 * p, where(d < 0.0, -0.5 * p, 0.0))


def tv_dlq(d, p, q, a):
    return where(d > 0.0, -0.5 * q, where(d < 0.0, 0.5 * q, 0.0))
