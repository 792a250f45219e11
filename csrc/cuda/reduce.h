// From a thread's numbers to a block's, and from a block's to a cluster's, in an order that is always the
// same.
#pragma once
#include "../row_state.h"
#include "device.h"
#include "frame.h"

namespace fd {

constexpr int kMostThreads = 256, kWarpSize = 32;

// A float sum that keeps what additions round off (Kahan): hundreds of equal terms are all rounded the same
// way.
template <bool kFinite>
struct Sum {
  float value = 0.0f, excess = 0.0f;
  FD_DEVICE void add(float x) {
    const float y = x - excess, next = value + y;
    excess = kFinite || abs(next) < INFINITY ? (next - value) - y : 0.0f;
    value = next;
  }
  FD_DEVICE void scale(float factor) {
    value *= factor;
    excess *= factor;
  }
  FD_DEVICE double total() const { return static_cast<double>(value) - excess; }
};

// What threads tell each other.  It lies first in the shared memory; packs that are kept follow.
struct alignas(16) Desk {
  double warps[8][kMostThreads / kWarpSize];
  double parts[5][8];  // of this block, for the others of its cluster: no place is written twice
  RowState state;
  Frame frame;
};

FD_DEVICE Desk& desk() { return *reinterpret_cast<Desk*>(shared_memory()); }

// The places in `parts`.
enum Exchange { kTops, kColumnsHigh, kColumnsLow, kFirstLook, kSecondLook };

// The largest of a cluster's threads, in each of them; NaN if there is one.
template <Exchange kPlace, int N>
FD_DEVICE void cluster_max(float (&x)[N]) {
  static_assert(N <= 8);
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes; lanes /= 2) x[i] = max_nan(x[i], shuffle_xor(x[i], lanes));
    if (thread() % kWarpSize == 0) desk().warps[i][thread() / kWarpSize] = x[i];
  }
  sync();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    for (int j = 0; j < threads() / kWarpSize; ++j)
      x[i] = max_nan(x[i], static_cast<float>(desk().warps[i][j]));
    if (cluster_size() > 1 && thread() == 0) desk().parts[kPlace][i] = x[i];
  }
  if (cluster_size() == 1) {
    sync();
    return;
  }
  cluster_sync();
#pragma unroll
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < cluster_size(); ++j)
      x[i] = max_nan(x[i], static_cast<float>(*of_block(&desk().parts[kPlace][i], j)));
}

// Sums over a block, in every thread.
template <int N>
FD_DEVICE void block_sum(double (&x)[N]) {
  static_assert(N <= 8);
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes; lanes /= 2) x[i] += shuffle_xor(x[i], lanes);
    if (thread() % kWarpSize == 0) desk().warps[i][thread() / kWarpSize] = x[i];
  }
  sync();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = 0.0;
    for (int j = 0; j < threads() / kWarpSize; ++j) x[i] += desk().warps[i][j];
  }
  sync();
}

// Sums over a cluster; thread 0 of each block gets them.
template <Exchange kPlace, int N>
FD_DEVICE void cluster_sum(double (&x)[N]) {
  block_sum(x);
  if (cluster_size() == 1) return;
  if (thread() == 0)
    for (int i = 0; i < N; ++i) desk().parts[kPlace][i] = x[i];
  cluster_sync();
  if (thread() != 0) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = 0.0;
    for (int j = 0; j < cluster_size(); ++j) x[i] += *of_block(&desk().parts[kPlace][i], j);
  }
}

}  // namespace fd
