// Generated from fastdiv/rowwise.py by `python -m fastdiv.translate csrc`; a test keeps the two equal.
// clang-format off
#pragma once
#include <cmath>
#include <cstdint>

// Every output of one model, in the order of fastdiv/statistics.py: the place in this list is its number.
#define FD_OUTPUTS(X) X(log_prob) X(entropy) X(logsumexp) X(log_sum_sq_probs) X(varentropy) X(max_log_prob) X(mean_logit) X(argmax) X(is_top1) X(rank)

namespace fd::rowwise {

using std::expm1, std::log1p;

enum OutputNumber : int32_t {
#define FD_NUMBER(name) k_##name,
  FD_OUTPUTS(FD_NUMBER)
#undef FD_NUMBER
};

inline double log_norm(double maximum, double tail) {
  return (maximum == -INFINITY ? NAN : log1p(tail));
}

inline double mean_shifted(double maximum, double tail, double first) {
  return (maximum == -INFINITY ? NAN : (first / (1.0 + tail)));
}

inline double entropy(double maximum, double tail, double first) {
  return (log_norm(maximum, tail) - mean_shifted(maximum, tail, first));
}

inline double varentropy(double maximum, double tail, double first, double second) {
  const double mean = mean_shifted(maximum, tail, first);
  const double variance = ((second / (1.0 + tail)) - (mean * mean));
  return (variance < 0.0 ? 0.0 : variance);
}

inline double log_sum_sq_probs(double maximum, double tail, double squares) {
  return (log1p(squares) - (2.0 * log_norm(maximum, tail)));
}

inline double log_prob(double maximum, double tail, double inverse_temperature, double logit) {
  return (((logit - maximum) * inverse_temperature) - log_norm(maximum, tail));
}

inline double logsumexp(double maximum, double tail, double inverse_temperature) {
  return ((maximum * inverse_temperature) + log1p(tail));
}

inline double kl(double total, double tail, double offset) {
  const double divergence = ((total / (1.0 + tail)) - (expm1(offset) - offset));
  return (divergence < 0.0 ? 0.0 : divergence);
}

}  // namespace fd::rowwise
