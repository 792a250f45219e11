// Gradients of what depends on one model.
#include "gradient_launch.h"

namespace fd {

int gradient(const RowGradient& args, const Queue& queue) {
  if (args.tile.columns > kMostColumns || args.terms > kMostTerms) return kNotHere;
  if (args.terms > 0 || args.teacher.data) return gradient_of_pair(args, queue);
#define FD_CASE(number, T) \
  if (args.tile.student.dtype == number) return launch_gradient<T, NoTerm>(args, queue);
  FD_DTYPES(FD_CASE)
#undef FD_CASE
  return kNotHere;
}

}  // namespace fd
