// Statistics of one model, and ranks.
#include "statistics_launch.h"

namespace fd {

namespace {

template <typename T>
FD_KERNEL void FD_BOUNDS(kMostThreads, 4) rank_kernel(const Rank args) {
  constexpr int kWide = kPack<T>;
  const Tile& tile = args.tile;
  const int64_t row = block();
  if (!takes_part(tile, row)) return;
  const int columns = static_cast<int>(tile.columns);
  const Row<T> x(tile.student, row, 0, columns, 0);
  for (int64_t k = 0; k < tile.labels_per_row; ++k) {
    const int64_t at = row * tile.labels_per_row + k;
    const float label = args.label_logits[at];
    int above = 0;
    walk<4, false>(x, x, 0, false, [&](int column, const uint4& raw, const uint4&, auto whole) {
      float t[kWide];
      x.template read<whole.value>(raw, column, t);
#pragma unroll
      for (int i = 0; i < kWide; ++i) above += t[i] > label;
    });
    double sums[1] = {static_cast<double>(above)};
    block_sum(sums);
    if (thread() == 0) args.rank[at] += static_cast<int64_t>(sums[0]);
  }
}

template <typename T>
int launch_rank(const Rank& args, const Queue& queue) {
  const int threads = threads_for(ceil_div(args.tile.columns, kPack<T>));
  return launch(rank_kernel<T>, Launch{args.tile.rows, 1, threads, sizeof(Desk)}, queue, args);
}

}  // namespace

#if !defined(FD_LOCKSTEP)
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
#endif

int statistics(const Statistics& args, const Queue& queue) {
  if (args.divergence >= 0) return statistics_with_divergence(args, queue);
  if (args.tile.teacher.data) return statistics_with_kl(args, queue);
  return by_dtype(args.tile, [&](auto kind) {
    using T = decltype(kind);
    return args.wanted & kBeyondFirst ? launch_statistics<T, Moments::kAll, Nothing>(args, queue)
                                      : launch_statistics<T, Moments::kFirst, Nothing>(args, queue);
  });
}

int rank(const Rank& args, const Queue& queue) {
  return by_dtype(args.tile, [&](auto kind) { return launch_rank<decltype(kind)>(args, queue); });
}

}  // namespace fd
