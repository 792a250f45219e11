// Statistics of one model and their gradient in one launch, where the weights of the outputs are known: the
// row stays in shared memory, so each logit is read once and each gradient written once, over the logits if
// need be.
#pragma once
#include "labels.h"
#include "statistics.h"

namespace fd {

struct ValueAndGradientLaunch {
  ValueAndGradient given;
  int packs = 0;  // of a block
};

template <typename T>
FD_KERNEL void FD_BOUNDS(kMostThreads, 2) value_and_gradient_kernel(const ValueAndGradientLaunch args) {
  constexpr int kWide = kPack<T>;
  const ValueAndGradient& given = args.given;
  const Tile& tile = given.tile;
  const int64_t row = block() / cluster_size();
  const Slice slice = slice_of(tile, args.packs * kWide);
  const int columns = slice.columns, step = threads() * kWide;
  const Row<T> x(tile.student, row, slice.begin, columns, 0);
  Sink dx(given.gradient, row);
  dx.first += static_cast<int64_t>(slice.begin) * static_cast<int64_t>(sizeof(T));
  if (!takes_part(tile, row)) {
    const float nothing[kWide] = {};
    for (int c = thread() * kWide; c < columns; c += step) dx.template store<false>(x, c, nothing);
    return;
  }
  uint4* const kept = reinterpret_cast<uint4*>(shared_memory() + sizeof(Desk));
  const float it = tile.inverse_temperature[row];
  first_look<Moments::kFirst, false, 4>(x, x, slice, tile, row, it, kept, nullptr, given.label_logits);

  // dL/dz = p (c0 + c1 lp) + sum of gain ([v = label] - p), as in fastdiv/statistics.py.
  const Labels labels{tile.labels + row * tile.labels_per_row,
                      given.of_log_prob + row * tile.labels_per_row,
                      tile.labels_per_row,
                      tile.first_column + slice.begin,
                      columns,
                      reinterpret_cast<float*>(kept + args.packs)};
  if (thread() == 0) {
    const RowState& s = desk().state;
    const double entropy = log_sum(s.student) - s.first / total(s.student);
    const double of_entropy = given.of_entropy[row], of_logsumexp = given.of_logsumexp[row];
    double* c = &desk().parts[kSecondLook];
    c[0] = of_logsumexp - (of_entropy == 0.0 ? 0.0 : of_entropy * entropy);
    c[1] = -of_entropy;
    c[2] = 0.0;
    for (int64_t k = 0; k < labels.count; ++k) c[2] += labels.gains[k];
    desk().frame = frame_of(s, it);
  }
  sync();
  const double* c = &desk().parts[kSecondLook];
  const float c0 = static_cast<float>(c[0]), c1 = static_cast<float>(c[1]),
              label_total = static_cast<float>(c[2]);
  const Frame frame = desk().frame;
  const auto slope = [&](float lp, float p, float gain) { return p * ((c0 - gain) + floored(lp) * c1); };

  labels.form(x, it, [&](int, float t, float same, float& g) {
    const float lp = frame.log_p(t, it);
    g = slope(lp, exp(lp), label_total - same);
    return lp;
  });
#pragma unroll 1
  for (int column = thread() * kWide; column < columns; column += step) {
    float t[kWide], g[kWide];
    x.template read<false>(kept[column / kWide], column, t);
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const float lp = frame.log_p(t[j], it);
      g[j] = slope(lp, exp(lp), label_total);
    }
    through_softcap(x, kept[column / kWide], g);
    taken_back(x, it, t, g);
    dx.template store<false>(x, column, g);
  }
  labels.write(dx);
  if (cluster_size() > 1) cluster_sync();  // no block may go while another reads what it has
  if (cluster_rank() == 0 && thread() == 0) given.state[row] = desk().state;
}

}  // namespace fd
