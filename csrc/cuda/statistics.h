// Row statistics: one block, or one cluster of them, takes a row.
//
// A first look sums exponentials about a maximum that grows.  Divergences need the normalisers of both
// models, so they are summed in a second look: at the packs that the blocks have kept in shared memory, or at
// memory again.
#pragma once
#include "../pointwise.h"
#include "frame.h"
#include "launch_rows.h"
#include "online.h"

namespace fd {

// What a second look sums: nothing; the KLs, whose place is in the state; or one divergence of pointwise.h.
struct Nothing {
  static constexpr int kSums = 0;
};
template <bool kWithForward, bool kWithReverse>
struct Kl {
  static constexpr int kSums = kWithForward + kWithReverse;
  static constexpr bool kIsForward = kWithForward, kIsReverse = kWithReverse;
  FD_DEVICE static void add(float d, float p, float q, float, float (&sums)[kSums]) {
    if (kWithForward) sums[0] += chosen(abs(d) < 0.5f, q * phi(d), (p - q) - (q > 0.0f ? q * d : 0.0f));
    if (kWithReverse)
      sums[kSums - 1] += chosen(abs(d) < 0.5f, p * phi(-d), (q - p) + (p > 0.0f ? p * d : 0.0f));
  }
};
#define FD_COMPARED_TERM(name)                                                            \
  struct name##_term {                                                                    \
    static constexpr int kSums = 3;                                                       \
    static constexpr bool kIsForward = false, kIsReverse = false;                         \
    FD_DEVICE static void add(float d, float p, float q, float a, float (&sums)[kSums]) { \
      sums[0] += name##_value(d, p, q, a);                                                \
      sums[1] += name##_dlp(d, p, q, a);                                                  \
      sums[2] += name##_dlq(d, p, q, a);                                                  \
    }                                                                                     \
  };
FD_COMPARED_TERM(tv)
// js_value, js_dlp and js_dlq of pointwise.h, with what they share formed once.
struct js_term {
  static constexpr int kSums = 3;
  static constexpr bool kIsForward = false, kIsReverse = false;
  FD_DEVICE static void add(float d, float p, float q, float a, float (&sums)[kSums]) {
    const float of_q = weight_of_q(a), of_p = weight_of_p(a), e = mixture_beyond_p(d, p, q, a),
                u = mixture_beyond_q(d, p, q, a), psi_e = psi(e, p), psi_u = psi(u, q),
                mixture = log_mixture(d, a);
    const bool near_p = abs(e) < 0.5f * p, near_q = abs(u) < 0.5f * q;
    const float far_p = p <= 0.0f ? 0.0f : p * (mixture - (d > 0.0f ? 0.0f : d));
    const float far_q = q <= 0.0f ? 0.0f : q * (mixture + (d < 0.0f ? 0.0f : d));
    const float over_p = chosen(near_p, e - psi_e, far_p), over_q = chosen(near_q, u - psi_u, far_q);
    const float dlp = -of_p * over_p, dlq = -of_q * over_q;
    sums[0] += of_p * chosen(near_p, psi_e, e - far_p) + of_q * chosen(near_q, psi_u, u - far_q);
    sums[1] += dlp;
    sums[2] += dlq;
  }
};
#undef FD_COMPARED_TERM

// Sums on unnormalised exponentials, as the state has them, from the KL of a tile's own distributions.
FD_DEVICE double unnormalised(double kl, const Normaliser& of, const Normaliser& against) {
  if (of.max == -INFINITY) return total(against);
  if (against.max == -INFINITY) return INFINITY;
  const double apart = log_sum(against) - log_sum(of);
  return (kl + (expm1(apart) - apart)) * total(of);
}

struct StatisticsLaunch {
  Statistics given;
  int packs = 0;      // of a block
  bool keep = false;  // they stay in shared memory for the second look
};

// A block's share of a row.
struct Slice {
  int begin, columns;
};
FD_DEVICE Slice slice_of(const Tile& tile, int columns_per_block) {
  const int begin = cluster_rank() * columns_per_block, left = static_cast<int>(tile.columns) - begin;
  return {begin, left < 0 ? 0 : left < columns_per_block ? left : columns_per_block};
}

// The first look: the state of the tile's row onto each block's desk, logits of labels, and packs to where
// they are kept (null: nowhere).
template <Moments kMoments, bool kPair, int kFlight, typename T>
FD_DEVICE void first_look(const Row<T>& x, const Row<T>& y, const Slice& slice, const Tile& tile, int64_t row,
                          float it, uint4* x_kept, uint4* y_kept, float* label_logits) {
  constexpr int kWide = kPack<T>;
  const int columns = slice.columns;
  const float it2 = it * kLog2E, slack = 4.0f / it;
  using Student = Online<kMoments>;
  using Teacher = Online<Moments::kNone>;
  Student student;
  Teacher teacher;
  walk<kFlight, kPair>(x, y, 0, false, [&](int column, const uint4& x_raw, const uint4& y_raw, auto whole) {
    float t[kWide];
    x.template read<whole.value>(x_raw, column, t);
    student.template add<whole.value>(t, it2, slack, column, columns);
    if (x_kept) x_kept[column / kWide] = x_raw;
    if constexpr (kPair) {
      y.template read<whole.value>(y_raw, column, t);
      teacher.template add<whole.value>(t, it2, slack, column, columns);
      if (y_kept) y_kept[column / kWide] = y_raw;
    }
  });
  const int64_t* labels = tile.labels + row * tile.labels_per_row;
  for (int64_t k = thread(); k < tile.labels_per_row; k += threads()) {
    const int64_t at = labels[k] - tile.first_column - slice.begin;
    if (at >= 0 && at < columns) label_logits[row * tile.labels_per_row + k] = x.at(static_cast<int>(at));
  }
  float tops[kPair ? 2 : 1] = {student.max};
  if constexpr (kPair) tops[1] = teacher.max;
  cluster_max<kTops>(tops);
  double argmax = 0.0;
  if constexpr (kMoments == Moments::kAll) argmax = student.lowest_top(tops[0], slice.begin);
  double sums[Student::kSums + (kPair ? Teacher::kSums : 0)];
  student.tell(tops[0], it2, sums);
  if constexpr (kPair) teacher.tell(tops[1], it2, sums + Student::kSums);
  cluster_sum<kFirstLook>(sums);
  if (thread() != 0) return;
  RowState& state = desk().state;
  state = {{}, 0.0, 0.0, 0.0, 0.0, argmax + tile.first_column, {-INFINITY, 0.0}, 0.0, 0.0};
  Student::hand_in(tops[0], sums, state.student, &state);
  if constexpr (kPair) Teacher::hand_in(tops[1], sums + Student::kSums, state.teacher, nullptr);
}

// Blocks of a processor: the more of them, the fewer registers a thread has, and nothing may be spilled.
template <typename T, Moments kMoments, typename Term>
constexpr int kBlocksAtOnce = Term::kSums || kMoments == Moments::kAll || kPack<T> == 4 ? 3 : 4;

template <typename T, Moments kMoments, typename Term>
FD_KERNEL void FD_BOUNDS(kMostThreads, (kBlocksAtOnce<T, kMoments, Term>))
    statistics_kernel(const StatisticsLaunch args) {
  constexpr int kWide = kPack<T>, kFlight = Term::kSums ? 2 : 4;  // loads of a thread at a time
  constexpr bool kPair = Term::kSums > 0;
  const Tile& tile = args.given.tile;
  const int64_t row = block() / cluster_size();
  if (!takes_part(tile, row)) return;
  const float it = tile.inverse_temperature[row];
  const Slice slice = slice_of(tile, args.packs * kWide);
  const int columns = slice.columns;
  const Row<T> x(tile.student, row, slice.begin, columns, 0);
  const Row<T> y = kPair ? Row<T>(tile.teacher, row, slice.begin, columns, 0) : Row<T>();
  uint4* const x_kept = reinterpret_cast<uint4*>(shared_memory() + sizeof(Desk));
  uint4* const y_kept = x_kept + args.packs;
  const bool leads = cluster_rank() == 0 && thread() == 0;

  if (args.given.known) {
    if (thread() == 0) desk().state = args.given.state[row];
  } else {
    const bool keep = kPair && args.keep;
    first_look<kMoments, kPair, kFlight>(x, y, slice, tile, row, it, keep ? x_kept : nullptr,
                                         keep ? y_kept : nullptr, args.given.label_logits);
  }

  if constexpr (kPair) {
    if (thread() == 0) desk().frame = frame_of(desk().state, it);
    sync();
    const Frame frame = desk().frame;
    double totals[Term::kSums] = {};
    Sum<false> sums[Term::kSums];
    const int step = threads() * kWide;
#pragma unroll 1
    for (int c = thread() * kWide; c < columns; c += step) {
      const uint4 x_raw = args.keep ? x_kept[c / kWide] : x.load(c);
      const uint4 y_raw = args.keep ? y_kept[c / kWide] : y.load(c);
      float t[kWide], u[kWide], few[Term::kSums] = {};
      x.template read<false>(x_raw, c, t);
      y.template read<false>(y_raw, c, u);
#pragma unroll
      for (int j = 0; j < kWide; ++j)
        Term::add(frame.log_ratio(t[j], u[j], it), exp(frame.log_p(t[j], it)), exp(frame.log_q(u[j], it)),
                  args.given.parameter, few);
#pragma unroll
      for (int j = 0; j < Term::kSums; ++j) sums[j].add(few[j]);
    }
#pragma unroll
    for (int j = 0; j < Term::kSums; ++j) totals[j] = sums[j].total();
    cluster_sum<kSecondLook>(totals);
    RowState& whole = desk().state;
    if (leads && Term::kIsForward) whole.forward = unnormalised(totals[0], whole.teacher, whole.student);
    if (leads && Term::kIsReverse)
      whole.reverse = unnormalised(totals[Term::kSums - 1], whole.student, whole.teacher);
    if (leads && !Term::kIsForward && !Term::kIsReverse) {
      double* to = args.given.sums + row * args.given.sums_per_row;
      for (int j = 0; j < Term::kSums; ++j) to[j] += totals[j];
    }
  }
  if (cluster_size() > 1) cluster_sync();  // no block may go while another reads what it has
  if (!leads || args.given.known) return;
  RowState& state = args.given.state[row];
  if (args.given.fresh)
    state = desk().state;
  else
    merge<kPair>(state, desk().state, it);
}

}  // namespace fd
