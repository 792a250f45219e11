// The launch of statistics and gradient at once.
#include "value_and_gradient.h"

#include "kernels.h"

namespace fd {

namespace {

template <typename T>
int launch_value_and_gradient(const ValueAndGradient& args, const Queue& queue) {
  const Machine machine = machine_of(queue.device);
  const int64_t packs = ceil_div(args.tile.columns, kPack<T>);
  const int64_t labels = static_cast<int64_t>(sizeof(float)) * args.tile.labels_per_row;
  const Share share = share_of(packs, sizeof(uint4), machine, static_cast<int64_t>(sizeof(Desk)) + labels);
  if (!share.blocks) return kNotHere;
  const ValueAndGradientLaunch call{args, static_cast<int>(share.packs)};
  const Launch shape{args.tile.rows, share.blocks, threads_for(share.packs), share.shared};
  return launch(value_and_gradient_kernel<T>, shape, queue, call);
}

}  // namespace

int value_and_gradient(const ValueAndGradient& args, const Queue& queue) {
  return by_dtype(args.tile,
                  [&](auto kind) { return launch_value_and_gradient<decltype(kind)>(args, queue); });
}

}  // namespace fd
