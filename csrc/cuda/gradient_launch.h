// How row gradients are launched.
#pragma once
#include "gradient.h"
#include "kernels.h"

namespace fd {

template <typename T, typename Terms>
int launch_gradient(const RowGradient& args, const Queue& queue) {
  const int threads = threads_for(ceil_div(args.tile.columns, kPack<T>));
  const int64_t labels = static_cast<int64_t>(sizeof(float)) * args.gains_per_row;
  const Launch shape{args.tile.rows, 1, threads, static_cast<int64_t>(sizeof(Desk)) + labels};
  return launch(gradient_kernel<T, Terms>, shape, queue, args);
}

int gradient_of_pair(const RowGradient& args, const Queue& queue);

}  // namespace fd
