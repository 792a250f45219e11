// How a row's statistics are launched; the kernel is chosen by dtype and by what is wanted.
#pragma once
#include "kernels.h"
#include "machine.h"
#include "statistics.h"

namespace fd {

template <typename T, Moments kMoments, typename Term>
int launch_statistics(const Statistics& args, const Queue& queue) {
  constexpr bool kPair = Term::kSums > 0;
  const OnDevice device(queue.device);
  if (device.error != cudaSuccess) return device.error;
  const Machine machine = machine_of(queue.device);
  const int64_t packs = ceil_div(args.tile.columns, kPack<T>);
  StatisticsLaunch call{args, static_cast<int>(packs), false};
  Launch shape{args.tile.rows, 1, threads_for(packs), sizeof(Desk)};
  if (kPair && !args.known) {
    const int64_t room = machine.shared - static_cast<int64_t>(sizeof(Desk));
    const int most = machine.cluster < kLargestCluster ? machine.cluster : kLargestCluster;
    const Share share = share_of(packs, 2 * sizeof(uint4), most, room < kKept ? room : kKept);
    if (share.blocks) {
      call.packs = static_cast<int>(share.packs);
      call.keep = true;
      shape.cluster = share.blocks;
      shape.threads = threads_for(share.packs);
      shape.shared += share.packs * 2 * static_cast<int64_t>(sizeof(uint4));
    }
  }
  return launch(statistics_kernel<T, kMoments, Term>, shape, queue, call);
}

int statistics_with_kl(const Statistics& args, const Queue& queue);
int statistics_with_divergence(const Statistics& args, const Queue& queue);

}  // namespace fd
