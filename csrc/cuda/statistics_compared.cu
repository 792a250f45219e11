// Statistics of two models with one divergence that needs both normalisers, or that divergence alone.
#include "statistics_launch.h"

namespace fd {

namespace {

template <typename T>
int with_divergence(const Statistics& args, const Queue& queue) {
  switch (args.divergence) {
#define FD_CASE(name) \
  case k_##name:      \
    return launch_statistics<T, Moments::kFirst, name##_term>(args, queue);
    FD_COMPARED(FD_CASE)
#undef FD_CASE
    default:
      return kNotHere;
  }
}

}  // namespace

int statistics_with_divergence(const Statistics& args, const Queue& queue) {
  if (args.wanted & ~kFirst) return kNotHere;  // other sums have no kernel beside a divergence
  if (args.tile.student.dtype != args.tile.teacher.dtype) return with_divergence<Any>(args, queue);
#define FD_CASE(number, T) \
  if (args.tile.student.dtype == number) return with_divergence<T>(args, queue);
  FD_DTYPES(FD_CASE)
#undef FD_CASE
  return kNotHere;
}

}  // namespace fd
