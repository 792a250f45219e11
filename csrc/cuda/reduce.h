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

// What the threads of a block tell each other.  It lies first in the shared memory; packs that are kept
// follow.
struct alignas(16) Desk {
  double numbers[8][kMostThreads / kWarpSize];
  double sums[4];
  RowState state;
  Frame frame;
};

FD_DEVICE Desk& desk() { return *reinterpret_cast<Desk*>(shared_memory()); }

// The largest of a block, in every thread; NaN if there is one.
FD_DEVICE float block_max(float x) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes; lanes /= 2) x = max_nan(x, shuffle_xor(x, lanes));
  double* numbers = desk().numbers[0];
  if (thread() % kWarpSize == 0) numbers[thread() / kWarpSize] = x;
  sync();
  for (int i = 0; i < threads() / kWarpSize; ++i) x = max_nan(x, static_cast<float>(numbers[i]));
  sync();
  return x;
}

// Sums over a block, in every thread.
template <int N>
FD_DEVICE void block_sum(double (&x)[N]) {
  static_assert(N <= 8);
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes; lanes /= 2) x[i] += shuffle_xor(x[i], lanes);
    if (thread() % kWarpSize == 0) desk().numbers[i][thread() / kWarpSize] = x[i];
  }
  sync();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = 0.0;
    for (int j = 0; j < threads() / kWarpSize; ++j) x[i] += desk().numbers[i][j];
  }
  sync();
}

// From the state of each block's columns to that of all the cluster's, on the desk of the first block.
template <bool kPair>
FD_DEVICE void cluster_merge(double inverse_temperature) {
  cluster_sync();
  if (cluster_rank() == 0 && thread() == 0)
    for (int i = 1; i < cluster_size(); ++i)
      merge<kPair>(desk().state, *of_block(&desk().state, i), inverse_temperature);
  cluster_sync();
}

// Sums over a cluster; only thread 0 gets them.
template <int N>
FD_DEVICE void cluster_sum(double (&sums)[N]) {
  block_sum(sums);
  if (thread() == 0)
    for (int i = 0; i < N; ++i) desk().sums[i] = sums[i];
  cluster_sync();
  if (thread() == 0)
    for (int i = 0; i < N; ++i) {
      sums[i] = 0.0;
      for (int j = 0; j < cluster_size(); ++j) sums[i] += of_block(desk().sums, j)[i];
    }
  cluster_sync();
}

}  // namespace fd
