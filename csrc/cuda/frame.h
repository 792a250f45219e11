// Log-probabilities of one model and of two, once their normalisers are known.
#pragma once
#include "../row_state.h"
#include "elements.h"

namespace fd {

// What is subtracted from logits once the normalisers are known; made once a row, in double.
struct Frame {
  float x_max, x_norm, y_max, y_norm;   // lp = (t - x_max) it - x_norm
  float x_shift, y_shift, apart, rest;  // d = (((t - x_shift) - (u - y_shift)) - apart) it - rest
  float x_cut, y_cut;                   // a logit above is the maximum

  FD_DEVICE float log_p(float t, float it) const { return (t - x_max) * it - x_norm; }
  FD_DEVICE float log_q(float u, float it) const { return (u - y_max) * it - y_norm; }
  FD_DEVICE float log_ratio(float t, float u, float it) const {
    return (((t - x_shift) - (u - y_shift)) - apart) * it - rest;
  }
  // Logits whose maximum is as the normaliser has it.  A product of hidden states that was formed once more,
  // in another shape, may have rounded it otherwise; where one entry has most of the mass the digits of its
  // gradient are in that difference.
  FD_DEVICE float settled_x(float t) const { return t > x_cut ? x_max : t; }
  FD_DEVICE float settled_y(float u) const { return u > y_cut ? y_max : u; }
};

FD_DEVICE Frame frame_of(const RowState& s, double it) {
  const double x_norm = s.student.max == -INFINITY ? NAN : log_sum(s.student);
  const double y_norm = s.teacher.max == -INFINITY ? NAN : log_sum(s.teacher);
  const float apart = offset(s.student) - offset(s.teacher);
  const bool far =
      !(apart * it >= -8.0 && apart * it <= 8.0);  // then t - u has fewer digits than t - max and u - max
  return {offset(s.student),          static_cast<float>(x_norm),          offset(s.teacher),
          static_cast<float>(y_norm), far ? offset(s.student) : 0.0f,      far ? offset(s.teacher) : 0.0f,
          far ? 0.0f : apart,         static_cast<float>(x_norm - y_norm), above_others(s.student, it),
          above_others(s.teacher, it)};
}

}  // namespace fd
