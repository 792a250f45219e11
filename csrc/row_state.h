// How row statistics move to a larger maximum.  The same algebra merges two cuts of a row.
#pragma once
#include <cmath>

#include "rows.h"

namespace fd {

inline double total(const Normaliser& n) { return n.max == -INFINITY ? n.tail : 1.0 + n.tail; }
inline double log_sum(const Normaliser& n) { return std::log1p(n.tail); }
// An offset that may be subtracted: a row of -inf so far has none yet.
inline float offset(const Normaliser& n) { return n.max == -INFINITY ? 0.0f : static_cast<float>(n.max); }

// Raises a normaliser's maximum; returns the shift in z.  An infinite logit spoils the row.
inline double raise(Normaliser& n, double max, double inverse_temperature) {
  const double shift = n.max == -INFINITY ? 0.0 : (max - n.max) * inverse_temperature;
  n.tail = max == INFINITY ? NAN : total(n) * std::exp(-shift);
  n.max = max;
  return shift;
}

// x * factor, where a vanished factor removes even an infinite x.
inline double fade(double x, double factor) { return factor == 0.0 ? 0.0 : x * factor; }

// The two one-pass divergences when log-offsets of student and teacher move by `a` and `b`: with s = b - a,
//   sum q phi(d + s) = sum q phi(d) + (exp(s) - 1) sum p - s sum q      (all then times exp(-b)), and with
//   roles swapped.
inline double shift_kl(double kl, double a, double b, double sum_p, double sum_q) {
  const double s = b - a, fade_b = std::exp(-b);
  const double growth = std::fabs(s) < 1.0 ? fade_b * std::expm1(s) : std::exp(-a) - fade_b;
  return fade(kl, fade_b) + growth * sum_p - fade(s * sum_q, fade_b);
}

// New maxima of both models (each >= the old one).
inline void raise(RowState& r, double student_max, double teacher_max, double inverse_temperature) {
  const double sum_p = total(r.student), sum_q = total(r.teacher);
  double a = 0.0, b = 0.0;
  if (student_max > r.student.max) {
    a = raise(r.student, student_max, inverse_temperature);
    const double f = std::exp(-a);
    r.second = f * (r.second - 2.0 * a * r.first + a * a * sum_p);
    r.first = f * (r.first - a * sum_p);
    r.squares = sum_p == 0.0 ? 0.0 : f * f * (1.0 + r.squares);
  }
  if (teacher_max > r.teacher.max) b = raise(r.teacher, teacher_max, inverse_temperature);
  if (a != 0.0 || b != 0.0) {
    r.forward = shift_kl(r.forward, a, b, sum_p, sum_q);
    r.reverse = shift_kl(r.reverse, b, a, sum_q, sum_p);
  }
}

}  // namespace fd
