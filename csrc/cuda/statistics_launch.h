// How a row's statistics are launched; the kernel is chosen by dtype and by what is wanted.
#pragma once
#include "kernels.h"
#include "statistics.h"

namespace fd {

constexpr int32_t kBeyondFirst = kSecond | kSquares | kSum | kArgmax;  // Moments::kAll has them

template <typename T, Moments kMoments, typename Term>
int launch_statistics(const Statistics& args, const Queue& queue) {
  constexpr bool kPair = Term::kSums > 0;
  const int64_t packs = ceil_div(args.tile.columns, kPack<T>);
  StatisticsLaunch call{args, static_cast<int>(packs), false};
  Launch shape{args.tile.rows, 1, threads_for(packs), sizeof(Desk)};
  if (kPair && !args.known) {
    const Share share = share_of(packs, 2 * sizeof(uint4), machine_of(queue.device), sizeof(Desk));
    if (share.blocks) {
      call.packs = static_cast<int>(share.packs);
      call.keep = true;
      shape = {args.tile.rows, share.blocks, threads_for(share.packs), share.shared};
    }
  }
  return launch(statistics_kernel<T, kMoments, Term>, shape, queue, call);
}

int statistics_with_kl(const Statistics& args, const Queue& queue);
int statistics_with_divergence(const Statistics& args, const Queue& queue);

}  // namespace fd
