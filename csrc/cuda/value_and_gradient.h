// Statistics of one model and their gradient in one launch, where the weights of the outputs are known: the
// row stays in shared memory, so each logit is read once and each gradient written once, over the logits if
// need be.
#pragma once
#include "sink.h"
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
  const int64_t* labels = tile.labels + row * tile.labels_per_row;
  const float* gains = given.of_log_prob + row * tile.labels_per_row;
  if (thread() == 0) {
    const RowState& s = desk().state;
    const double entropy = log_sum(s.student) - s.first / total(s.student);
    const double of_entropy = given.of_entropy[row], of_logsumexp = given.of_logsumexp[row];
    double* c = desk().parts[kSecondLook];
    c[0] = of_logsumexp - (of_entropy == 0.0 ? 0.0 : of_entropy * entropy);
    c[1] = -of_entropy;
    c[2] = 0.0;
    for (int64_t k = 0; k < tile.labels_per_row; ++k) c[2] += gains[k];
    desk().frame = frame_of(s, it);
  }
  sync();
  const double* c = desk().parts[kSecondLook];
  const float c0 = static_cast<float>(c[0]), c1 = static_cast<float>(c[1]),
              label_total = static_cast<float>(c[2]);
  const float max = desk().frame.x_max, norm = desk().frame.x_norm;
  const auto slope = [&](float lp, float p, float gain) { return p * ((c0 - gain) + floored(lp) * c1); };

  // At a label 1 - p = -expm1(log p) keeps its digits.  Formed while the logits are there, written last.
  float* const exact = reinterpret_cast<float*>(kept + args.packs);
  const auto place = [&](int64_t k) { return labels[k] - tile.first_column - slice.begin; };
#pragma unroll 1
  for (int64_t k = thread(); k < tile.labels_per_row; k += threads()) {
    if (place(k) < 0 || place(k) >= columns) continue;
    float same = 0.0f;
    for (int64_t l = 0; l < tile.labels_per_row; ++l) same += labels[l] == labels[k] ? gains[l] : 0.0f;
    const float t[1] = {x.at(static_cast<int>(place(k)))}, lp = (t[0] - max) * it - norm;
    float g[1] = {slope(lp, exp(lp), label_total - same) - (same == 0.0f ? 0.0f : same * expm1f(lp))};
    taken_back(x, it, t, g);
    exact[k] = g[0];
  }
  if (tile.labels_per_row) sync();
#pragma unroll 1
  for (int column = thread() * kWide; column < columns; column += step) {
    float t[kWide], g[kWide];
    x.template read<false>(kept[column / kWide], column, t);
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const float lp = (t[j] - max) * it - norm;
      g[j] = slope(lp, exp(lp), label_total);
    }
    taken_back(x, it, t, g);
    dx.template store<false>(x, column, g);
  }
  if (tile.labels_per_row) sync();
  for (int64_t k = thread(); k < tile.labels_per_row; k += threads())
    if (place(k) >= 0 && place(k) < columns) dx.put(static_cast<int>(place(k)), exact[k]);
  if (cluster_size() > 1) cluster_sync();  // no block may go while another reads what it has
  if (cluster_rank() == 0 && thread() == 0) given.state[row] = desk().state;
}

}  // namespace fd
