// Row gradients: each logit of the models that matter is read once, each gradient written once.
#pragma once
#include "../pointwise.h"
#include "frame.h"
#include "labels.h"
#include "launch_rows.h"
#include "reduce.h"

namespace fd {

// The divergences of a launch: none; one, to the student; or a list that is walked for each logit, to both
// models.
struct NoTerm {
  static constexpr bool kPair = false, kToTeacher = false;
};
#define FD_ONE_TERM(name)                                                                             \
  struct name##_gradient {                                                                            \
    static constexpr bool kPair = true, kToTeacher = false;                                           \
    FD_DEVICE static void add(const RowGradient& args, const float* gains, float d, float p, float q, \
                              float& dx, float&) {                                                    \
      dx += gains[0] * name##_dlp(d, p, q, args.parameters[0]);                                       \
    }                                                                                                 \
  };
FD_DIVERGENCES(FD_ONE_TERM)
#undef FD_ONE_TERM
struct ListedTerms {
  static constexpr bool kPair = true, kToTeacher = true;
  FD_DEVICE static void add(const RowGradient& args, const float* gains, float d, float p, float q, float& dx,
                            float& dy) {
    for (int i = 0; i < args.terms; ++i) {
      const float a = args.parameters[i];
      switch (args.divergences[i]) {
#define FD_CASE(name)                        \
  case k_##name:                             \
    dx += gains[i] * name##_dlp(d, p, q, a); \
    dy += gains[i] * name##_dlq(d, p, q, a); \
    break;
        FD_DIVERGENCES(FD_CASE)
#undef FD_CASE
      }
    }
  }
};

template <typename T, typename Terms>
FD_KERNEL void FD_BOUNDS(kMostThreads, Terms::kToTeacher ? 2
                                       : Terms::kPair    ? 3
                                                         : 4) gradient_kernel(const RowGradient args) {
  constexpr int kWide = kPack<T>, kFlight = Terms::kToTeacher ? 1 : 2;  // loads of a thread at a time
  constexpr bool kPair = Terms::kPair;
  const Tile& tile = args.tile;
  const int64_t row = block();
  const bool wanted = args.student.data, wanted_too = Terms::kToTeacher && args.teacher.data;
  const int columns = static_cast<int>(tile.columns);
  const Sink dx(wanted ? args.student : args.teacher, row), dy(wanted_too ? args.teacher : args.student, row);

  // Packs begin where those of the student's gradient are aligned; its logits usually are there too.
  constexpr int kWidth = 16 / kWide;
  // A 16-bit gradient may lie in the first half of its row of float32 logits: then all have read before one
  // writes.
  const bool narrower = dx.dtype != kFloat32 || (wanted_too && dy.dtype != kFloat32);
  const bool together = kWidth == 4 && narrower;
  const int origin = together ? 0 : -misalignment(dx.first) / kWidth;
  const Row<T> x(tile.student, row, 0, columns, origin);
  const Row<T> y = kPair ? Row<T>(tile.teacher, row, 0, columns, origin) : Row<T>();
  const int step = threads() * kWide;

  if (!takes_part(tile, row)) {
    const float nothing[kWide] = {};
    for (int c = origin + thread() * kWide; c < columns; c += step) {
      if (wanted) dx.template store<false>(x, c, nothing);
      if (wanted_too) dy.template store<false>(x, c, nothing);
    }
    return;
  }
  const float it = tile.inverse_temperature[row];
  if (thread() == 0) desk().frame = frame_of(args.state[row], it);
  const float* c = args.coefficients + row * (6 + args.terms);
  const float c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3], c4 = c[4], e0 = c[5];
  const bool polynomial = c1 != 0.0f || c2 != 0.0f || c3 != 0.0f || c4 != 0.0f;
  const Labels labels{args.gain_labels + row * args.gains_per_row,
                      args.label_gains + row * args.gains_per_row,
                      wanted ? args.gains_per_row : 0,
                      tile.first_column,
                      columns,
                      reinterpret_cast<float*>(shared_memory() + sizeof(Desk))};
  float label_total = 0.0f;
  for (int64_t k = 0; k < labels.count; ++k) label_total += labels.gains[k];
  sync();
  const Frame frame = desk().frame;

  // Gradients with respect to z at logits t and u, where the labels' gains add up to `gain` elsewhere.
  const auto slopes = [&](float t, float u, float gain, float& g, float& h) {
    t = frame.settled_x(t);
    const float lp = frame.log_p(t, it), p = exp(lp);
    g = (c0 - gain) * p;
    if (polynomial) {
      const float bounded = floored(lp);
      g += p * (bounded * (c1 + bounded * c2) + c3 * p) + c4;
    }
    if constexpr (kPair) {
      u = frame.settled_y(u);
      const float q = exp(frame.log_q(u, it));
      h = e0 == 0.0f ? 0.0f : e0 * q;
      Terms::add(args, c + 6, frame.log_ratio(t, u, it), p, q, g, h);
    }
    return lp;
  };

  labels.form(x, it, [&](int column, float t, float same, float& g) {
    float unused;
    return slopes(t, kPair ? y.at(column) : 0.0f, label_total - same, g, unused);
  });

  const auto write = [&](int column, const uint4& x_raw, const uint4& y_raw, auto whole) {
    float t[kWide], u[kWide] = {}, g[kWide], h[kWide] = {};
    x.template read<whole.value>(x_raw, column, t);
    if constexpr (kPair) y.template read<whole.value>(y_raw, column, u);
#pragma unroll
    for (int j = 0; j < kWide; ++j) slopes(t[j], u[j], label_total, g[j], h[j]);
    if (wanted) {
      through_softcap(x, x_raw, g);
      taken_back(x, it, t, g);
      dx.template store<whole.value>(x, column, g);
    }
    if (wanted_too) {
      if constexpr (kPair) through_softcap(y, y_raw, h);
      taken_back(y, it, u, h);
      dy.template store<whole.value>(y, column, h);
    }
  };
  walk<kFlight, kPair>(x, y, origin, together, write);
  labels.write(dx);
}

}  // namespace fd
