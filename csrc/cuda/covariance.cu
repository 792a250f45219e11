// Masked moments of tokens.  fastdiv/ops/covariance.py says in plain torch what they are.
#include "tokens.h"

namespace fd {
namespace {

static_assert(kMostParts <= kThreads, "the last block has a thread for each part");

struct ToDouble {
  template <typename T>
  FD_DEVICE double operator()(T x) const {
    return x;
  }
};

struct JoinMemory {
  double warps[kWarps][3];
  int32_t last;
};

FD_DEVICE void lane_sum(double (&x)[3], int lanes) {
#pragma unroll
  for (int by = lanes / 2; by > 0; by /= 2) {
#pragma unroll
    for (int i = 0; i < 3; ++i) x[i] += shuffle_xor(x[i], by);
  }
}

// Sums over the block, the same in every thread, in an order that is always the same.
FD_DEVICE void block_sum(JoinMemory& memory, double (&x)[3]) {
  const int lane = thread() % kWarp, warp = thread() / kWarp;
  lane_sum(x, kWarp);
  sync();  // the sums before have been read
  if (lane == 0) {
    for (int i = 0; i < 3; ++i) memory.warps[warp][i] = x[i];
  }
  sync();
  for (int i = 0; i < 3; ++i) x[i] = memory.warps[lane % kWarps][i];
  lane_sum(x, kWarps);
}

// The threads' sums as one, shifted by its means.
FD_DEVICE PairSums joined(JoinMemory& memory, const PairSums& own) {
  double total[3] = {own.count, own.x, own.y};
  block_sum(memory, total);
  const double divisor = total[0] > 1.0 ? total[0] : 1.0;
  const double mean_x = total[1] / divisor, mean_y = total[2] / divisor;
  const double a = own.shift_x - mean_x, b = own.shift_y - mean_y;
  double rest[3] = {own.rest_x + own.count * a, own.rest_y + own.count * b,
                    own.products + own.rest_x * b + own.rest_y * a + own.count * a * b};
  block_sum(memory, rest);
  return {total[0], total[1], total[2], mean_x, mean_y, rest[0], rest[1], rest[2]};
}

// Whether all other blocks have been here; what they wrote before can be read.
FD_DEVICE bool last_to_arrive(JoinMemory& memory, uint32_t* arrived) {
  sync();
  if (thread() == 0) {
    fence();
    memory.last = atomic_add(arrived, uint32_t{1}) + 1 == blocks();
    fence();
  }
  sync();
  return memory.last;
}

// A thread's shift is its first number.
FD_KERNEL void FD_BOUNDS(kThreads, 2) sum_moments(const Moments args) {
  auto& memory = *reinterpret_cast<JoinMemory*>(shared_memory());
  PairSums own = {};
  for (int64_t i = 0; i < args.loops; ++i) {
    const int64_t first = first_token(block() * args.loops + i);
    bool here[kEach];
    double x[kEach], y[kEach];
    taking_part(args.tokens.mask, first, args.tokens.count, here);
    read(args.tokens.x, first, here, x, ToDouble{});
    read(args.tokens.y, first, here, y, ToDouble{});
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (here[j]) {
        if (own.count == 0.0) own.shift_x = x[j], own.shift_y = y[j];
        const double rest_x = x[j] - own.shift_x, rest_y = y[j] - own.shift_y;
        own.count += 1.0;
        own.x += x[j];
        own.y += y[j];
        own.rest_x += rest_x;
        own.rest_y += rest_y;
        own.products += rest_x * rest_y;
      }
  }
  const PairSums part = joined(memory, own);
  if (thread() == 0) args.parts[block()] = part;
  if (!last_to_arrive(memory, args.arrived)) return;
  const PairSums total = joined(memory, thread() < blocks() ? args.parts[thread()] : PairSums{});
  if (thread() == 0) *args.total = total;
}

FD_DEVICE void write(void* data, int32_t dtype, int64_t at, double x) {
  if (dtype == kFloat64)
    static_cast<double*>(data)[at] = x;
  else
    static_cast<float*>(data)[at] = static_cast<float>(x);
}

FD_KERNEL void FD_BOUNDS(kThreads, 2) centre_pairs(const Centre args) {
  const PairSums& total = *args.total;
  const double mean_x = total.shift_x, mean_y = total.shift_y;
  if (block() == 0 && thread() == 0) {
    write(args.scalars, args.dtype, 0, total.products / (total.count > 1.0 ? total.count : 1.0));
    write(args.scalars, args.dtype, 1, mean_x);
    write(args.scalars, args.dtype, 2, mean_y);
    *args.valid = static_cast<int64_t>(total.count);
  }
  const int64_t first = first_token(block());
  bool here[kEach];
  double x[kEach], y[kEach];
  taking_part(args.tokens.mask, first, args.tokens.count, here);
  read(args.tokens.x, first, here, x, ToDouble{});
  read(args.tokens.y, first, here, y, ToDouble{});
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = first + i * kThreads;
    if (at < args.tokens.count)
      write(args.per_token, args.dtype, at, here[i] ? (x[i] - mean_x) * (y[i] - mean_y) : 0.0);
  }
}

}  // namespace

// At least one block: there are sums of no tokens, too.
int moments(Moments args, const Queue& queue) {
  const Walk steps = walk(args.tokens.count, kMostParts);
  args.loops = steps.loops;
  return launch_blocks(sum_moments, steps.blocks + !steps.blocks, sizeof(JoinMemory), queue, args);
}

int centre(const Centre& args, const Queue& queue) {
  const int64_t blocks = parts_of(args.tokens.count, kStep);
  return launch_blocks(centre_pairs, blocks + !blocks, 0, queue, args);
}

}  // namespace fd
