// Gradients of what depends on one model.
#include "gradient_launch.h"

namespace fd {

int gradient(const RowGradient& args, const Queue& queue) {
  if (args.tile.columns > kMostColumns || args.terms > kMostTerms) return kNotHere;
  if (args.terms > 0 || args.teacher.data) return gradient_of_pair(args, queue);
  return by_dtype(args.tile, [&](auto kind) { return launch_gradient<decltype(kind), NoTerm>(args, queue); });
}

}  // namespace fd
