// Generated from fastdiv/pointwise.py by `python -m fastdiv.translate csrc`; a test keeps the two equal.
// clang-format off
#pragma once
#include "language.h"

// Every divergence, in the order of fastdiv/divergences.py: the place in this list is its number.
#define FD_DIVERGENCES(X) X(forward_kl) X(reverse_kl) X(jeffreys) X(js) X(tv)
// Those that need both normalisers before their terms can be summed.
#define FD_COMPARED(X) X(js) X(tv)

namespace fd {

enum DivergenceNumber : int32_t {
#define FD_NUMBER(name) k_##name,
  FD_DIVERGENCES(FD_NUMBER)
#undef FD_NUMBER
};

FD_INLINE float forward_kl_value(float d, float p, float q, float) {
  return chosen(abs(d) < 0.5f, (q * phi(d)), ((p - q) - chosen(q > 0.0f, (q * d), 0.0f)));
}

FD_INLINE float forward_kl_dlp(float d, float p, float q, float) {
  return chosen(abs(d) < 0.5f, (q * (d + phi(d))), (p - q));
}

FD_INLINE float forward_kl_dlq(float d, float, float q, float) {
  return chosen(q > 0.0f, (-q * d), 0.0f);
}

FD_INLINE float reverse_kl_value(float d, float p, float q, float) {
  return chosen(abs(d) < 0.5f, (p * phi(-d)), ((q - p) + chosen(p > 0.0f, (p * d), 0.0f)));
}

FD_INLINE float reverse_kl_dlp(float d, float p, float, float) {
  return chosen(p > 0.0f, (p * d), 0.0f);
}

FD_INLINE float reverse_kl_dlq(float d, float p, float q, float) {
  return chosen(abs(d) < 0.5f, (p * (phi(-d) - d)), (q - p));
}

FD_INLINE float jeffreys_value(float d, float p, float q, float a) {
  return (forward_kl_value(d, p, q, a) + reverse_kl_value(d, p, q, a));
}

FD_INLINE float jeffreys_dlp(float d, float p, float q, float a) {
  return (forward_kl_dlp(d, p, q, a) + reverse_kl_dlp(d, p, q, a));
}

FD_INLINE float jeffreys_dlq(float d, float p, float q, float a) {
  return (forward_kl_dlq(d, p, q, a) + reverse_kl_dlq(d, p, q, a));
}

FD_INLINE float weight_of_q(float a) {
  return chosen(a < 0.0f, (1.0f + a), a);
}

FD_INLINE float weight_of_p(float a) {
  return chosen(a < 0.0f, -a, (1.0f - a));
}

FD_INLINE float log_mixture(float d, float a) {
  const float w = chosen(d > 0.0f, weight_of_p(a), weight_of_q(a));
  const float rest = chosen(d > 0.0f, weight_of_q(a), weight_of_p(a));
  return log((w + (rest * exp(-abs(d)))));
}

FD_INLINE float mixture_beyond_p(float d, float p, float q, float a) {
  return (weight_of_q(a) * chosen(abs(d) < 0.5f, (p * (phi(-d) - d)), (q - p)));
}

FD_INLINE float mixture_beyond_q(float d, float p, float q, float a) {
  return (weight_of_p(a) * chosen(abs(d) < 0.5f, (q * (phi(d) + d)), (p - q)));
}

FD_INLINE float p_log_mixture_over_p(float d, float p, float q, float a) {
  const float e = mixture_beyond_p(d, p, q, a);
  const float far = chosen(p <= 0.0f, 0.0f, (p * (log_mixture(d, a) - chosen(d > 0.0f, 0.0f, d))));
  return chosen(abs(e) < (0.5f * p), (e - psi(e, p)), far);
}

FD_INLINE float q_log_mixture_over_q(float d, float p, float q, float a) {
  const float e = mixture_beyond_q(d, p, q, a);
  const float far = chosen(q <= 0.0f, 0.0f, (q * (log_mixture(d, a) + chosen(d < 0.0f, 0.0f, d))));
  return chosen(abs(e) < (0.5f * q), (e - psi(e, q)), far);
}

FD_INLINE float js_value(float d, float p, float q, float a) {
  const float e = mixture_beyond_p(d, p, q, a);
  const float u = mixture_beyond_q(d, p, q, a);
  const float of_p = chosen(abs(e) < (0.5f * p), psi(e, p), (e - p_log_mixture_over_p(d, p, q, a)));
  const float of_q = chosen(abs(u) < (0.5f * q), psi(u, q), (u - q_log_mixture_over_q(d, p, q, a)));
  return ((weight_of_p(a) * of_p) + (weight_of_q(a) * of_q));
}

FD_INLINE float js_dlp(float d, float p, float q, float a) {
  return (-weight_of_p(a) * p_log_mixture_over_p(d, p, q, a));
}

FD_INLINE float js_dlq(float d, float p, float q, float a) {
  return (-weight_of_q(a) * q_log_mixture_over_q(d, p, q, a));
}

FD_INLINE float tv_value(float d, float p, float q, float) {
  return (0.5f * chosen(abs(d) < 0.5f, (q * abs((d + phi(d)))), abs((p - q))));
}

FD_INLINE float tv_dlp(float d, float p, float q, float) {
  return chosen(d > 0.0f, (0.5f * p), chosen(d < 0.0f, (-0.5f * p), ((0.0f * p) * q)));
}

FD_INLINE float tv_dlq(float d, float p, float q, float) {
  return chosen(d > 0.0f, (-0.5f * q), chosen(d < 0.0f, (0.5f * q), ((0.0f * p) * q)));
}

}  // namespace fd
