// Log-probabilities of one model and of two, once their normalisers are known.
#pragma once
#include "../row_state.h"
#include "elements.h"

namespace fd {

// What is subtracted from logits once the normalisers are known; made once a row, in double.
struct Frame {
  float x_max, x_norm, y_max, y_norm;  // lp = (t - x_max) it - x_norm
  float x_shift, y_shift, rest;        // d = ((t - x_shift) - (u - y_shift)) it - rest

  FD_DEVICE float log_p(float t, float it) const { return (t - x_max) * it - x_norm; }
  FD_DEVICE float log_q(float u, float it) const { return (u - y_max) * it - y_norm; }
  FD_DEVICE float log_ratio(float t, float u, float it) const {
    return ((t - x_shift) - (u - y_shift)) * it - rest;
  }
};

FD_DEVICE Frame frame_of(const RowState& s, double it) {
  const double x_norm = s.student.max == -INFINITY ? NAN : log_sum(s.student);
  const double y_norm = s.teacher.max == -INFINITY ? NAN : log_sum(s.teacher);
  const double apart = (static_cast<double>(offset(s.student)) - offset(s.teacher)) * it;
  const bool far = !(apart >= -8.0 && apart <= 8.0);  // then t - u has fewer digits than t - max and u - max
  return {offset(s.student),
          static_cast<float>(x_norm),
          offset(s.teacher),
          static_cast<float>(y_norm),
          far ? offset(s.student) : 0.0f,
          far ? offset(s.teacher) : 0.0f,
          static_cast<float>((far ? 0.0 : apart) + (x_norm - y_norm))};
}

}  // namespace fd
