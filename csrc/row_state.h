// How row statistics move to a larger maximum.  The same algebra merges two cuts of a row.
#pragma once
#include <cmath>

#include "rows.h"

namespace fd {

FD_INLINE double total(const Normaliser& n) { return n.max == -INFINITY ? n.tail : 1.0 + n.tail; }
FD_INLINE double log_sum(const Normaliser& n) { return std::log1p(n.tail); }
// An offset that may be subtracted: a row of -inf so far has none yet.
FD_INLINE float offset(const Normaliser& n) { return n.max == -INFINITY ? 0.0f : static_cast<float>(n.max); }

// A logit above this is the row's maximum: the exponentials of all others together are less than a half.
// Infinite where no logit is known to be.
FD_INLINE float above_others(const Normaliser& n, double inverse_temperature) {
  const bool alone = n.tail < 0.5 && n.max > -INFINITY;
  return alone ? static_cast<float>(n.max - 0.25 / inverse_temperature) : INFINITY;
}

// Raises a normaliser's maximum; returns the shift in z.  An infinite logit spoils the row.
FD_INLINE double raise(Normaliser& n, double max, double inverse_temperature) {
  const double shift = n.max == -INFINITY ? 0.0 : (max - n.max) * inverse_temperature;
  n.tail = max == INFINITY ? NAN : total(n) * std::exp(-shift);
  n.max = max;
  return shift;
}

// x * factor.  What a probability below the smallest normal float has added is nothing, even where it is
// infinite: else the order of the vocabulary would decide whether a KL is.
FD_INLINE double fade(double x, double factor) { return factor < 0x1p-126 ? 0.0 : x * factor; }

// How far a part of a row lies below the whole row's maximum.
struct Drop {
  double by, fade;
  bool below = true;
};
// The two one-pass divergences when log-offsets of student and teacher move by `a` and `b`: with s = b - a,
//   sum q phi(d + s) = sum q phi(d) + (exp(s) - 1) sum p - s sum q      (all then times exp(-b)), and with
//   roles swapped.
FD_INLINE double grown(double kl, const Drop& a, const Drop& b, double sum_p, double sum_q) {
  const double s = b.by - a.by;
  const double growth = std::fabs(s) < 1.0 ? b.fade * std::expm1(s) : a.fade - b.fade;
  return fade(kl, b.fade) + growth * sum_p - fade(s * sum_q, b.fade);
}

FD_INLINE double shift_kl(double kl, double a, double b, double sum_p, double sum_q) {
  return grown(kl, {a, std::exp(-a)}, {b, std::exp(-b)}, sum_p, sum_q);
}

// New maxima of both models (each >= the old one, or NaN).
FD_INLINE void raise(RowState& r, double student_max, double teacher_max, double inverse_temperature) {
  const double sum_p = total(r.student), sum_q = total(r.teacher);
  double a = 0.0, b = 0.0;
  if (!(student_max <= r.student.max)) {
    a = raise(r.student, student_max, inverse_temperature);
    const double f = std::exp(-a);
    r.second = f * (r.second - 2.0 * a * r.first + a * a * sum_p);
    r.first = f * (r.first - a * sum_p);
    r.squares = sum_p == 0.0 ? 0.0 : f * f * (1.0 + r.squares);
  }
  if (!(teacher_max <= r.teacher.max)) b = raise(r.teacher, teacher_max, inverse_temperature);
  if (a != 0.0 || b != 0.0) {
    r.forward = shift_kl(r.forward, a, b, sum_p, sum_q);
    r.reverse = shift_kl(r.reverse, b, a, sum_q, sum_p);
  }
}

FD_INLINE double larger(double a, double b) { return a != a || a > b ? a : b; }

FD_INLINE Drop drop_of(const Normaliser& n, double max, double inverse_temperature) {
  const double by = n.max == -INFINITY ? 0.0 : (max - n.max) * inverse_temperature;
  return {by, std::exp(-by), !(max <= n.max)};
}
// What a part adds to the tail of the whole.
FD_INLINE double tail_of(const Normaliser& n, const Drop& drop) {
  return drop.below ? total(n) * drop.fade : n.tail;
}
// Adds to `r` what other columns of the row gave, of the student alone or of both models.  Each field is read
// and written where it lies: a GPU's thread has no room for two states.  Of two equal maxima one is counted
// apart, as always.
template <bool kPair>
FD_INLINE void merge(RowState& r, const RowState& other, double inverse_temperature) {
  const double x = larger(r.student.max, other.student.max);
  const Drop a = drop_of(r.student, x, inverse_temperature),
             c = drop_of(other.student, x, inverse_temperature);
  if (kPair) {
    const double y = larger(r.teacher.max, other.teacher.max);
    const Drop b = drop_of(r.teacher, y, inverse_temperature),
               d = drop_of(other.teacher, y, inverse_temperature);
    const double p = total(r.student), q = total(r.teacher);
    const double other_p = total(other.student), other_q = total(other.teacher);
    r.forward = grown(r.forward, a, b, p, q) + grown(other.forward, c, d, other_p, other_q);
    r.reverse = grown(r.reverse, b, a, q, p) + grown(other.reverse, d, c, other_q, other_p);
    r.teacher.tail = tail_of(r.teacher, b) + tail_of(other.teacher, d);
    if (!b.below && !d.below && y > -INFINITY) r.teacher.tail += 1.0;
    r.teacher.max = y;
    if (y == INFINITY) r.teacher.tail = NAN;
  }
  const double p = total(r.student), other_p = total(other.student);
  r.second = a.fade * (r.second - 2.0 * a.by * r.first + a.by * a.by * p) +
             c.fade * (other.second - 2.0 * c.by * other.first + c.by * c.by * other_p);
  r.first = a.fade * (r.first - a.by * p) + c.fade * (other.first - c.by * other_p);
  const double squares = a.below ? a.fade * a.fade * (p == 0.0 ? 0.0 : 1.0 + r.squares) : r.squares;
  const double other_squares =
      c.below ? c.fade * c.fade * (other_p == 0.0 ? 0.0 : 1.0 + other.squares) : other.squares;
  const double both = !a.below && !c.below && x > -INFINITY ? 1.0 : 0.0;
  r.squares = squares + other_squares + both;
  r.sum += other.sum;
  if (other.student.max > r.student.max) r.argmax = other.argmax;
  r.student.tail = tail_of(r.student, a) + tail_of(other.student, c) + both;
  r.student.max = x;
  if (x == INFINITY) r.student.tail = NAN;
}

}  // namespace fd
