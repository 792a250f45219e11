// Gradients of divergences, to the student and to the teacher.
#include "gradient_launch.h"

namespace fd {

namespace {

template <typename T>
int of_pair(const RowGradient& args, const Queue& queue) {
  if (args.terms != 1 || args.teacher.data) return launch_gradient<T, ListedTerms>(args, queue);
  switch (args.divergences[0]) {
#define FD_CASE(name) \
  case k_##name:      \
    return launch_gradient<T, name##_gradient>(args, queue);
    FD_DIVERGENCES(FD_CASE)
#undef FD_CASE
    default:
      return kNotHere;
  }
}

}  // namespace

int gradient_of_pair(const RowGradient& args, const Queue& queue) {
  if (args.tile.student.dtype != args.tile.teacher.dtype)
    return launch_gradient<Any, ListedTerms>(args, queue);
  return by_dtype(args.tile, [&](auto kind) { return of_pair<decltype(kind)>(args, queue); });
}

}  // namespace fd
