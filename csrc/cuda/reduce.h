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
  double parts[24];  // of this block, for the others of its cluster: no place is written twice
  RowState state;
  Frame frame;
};

FD_DEVICE Desk& desk() { return *reinterpret_cast<Desk*>(shared_memory()); }

// The places in `parts`.
enum Exchange { kTops = 0, kColumnsHigh = 2, kColumnsLow = 3, kFirstLook = 8, kSecondLook = 16 };

// Joins what the blocks of a cluster have at a place, in all lanes of a warp: a lane reads of one block, so
// that one number of each costs no more time than one number.
template <int kPlace, int N, typename Join>
FD_DEVICE void join_blocks(double (&x)[N], double nothing, const Join& join) {
  const int lane = thread() % kWarpSize, rank = lane % 8;
  constexpr int kTurns = (N + 3) / 4;
  double own[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = lane / 8 + 4 * turn;
    own[turn] = i < N && rank < cluster_size() ? *of_block(&desk().parts[kPlace + i], rank) : nothing;
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
    for (int lanes = 4; lanes; lanes /= 2) own[turn] = join(own[turn], shuffle_xor(own[turn], lanes));
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (4 * turn + k < N) x[4 * turn + k] = shuffle(own[turn], 8 * k);
  }
}

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
    if (cluster_size() > 1 && thread() == 0) desk().parts[kPlace + i] = x[i];
  }
  if (cluster_size() == 1) {
    sync();
    return;
  }
  cluster_sync();
  double tops[N];
  join_blocks<kPlace>(tops, -INFINITY, [](double a, double b) {
    return static_cast<double>(max_nan(static_cast<float>(a), static_cast<float>(b)));
  });
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = static_cast<float>(tops[i]);
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
    for (int i = 0; i < N; ++i) desk().parts[kPlace + i] = x[i];
  cluster_sync();
  if (thread() < kWarpSize) join_blocks<kPlace>(x, 0.0, [](double a, double b) { return a + b; });
}

}  // namespace fd
