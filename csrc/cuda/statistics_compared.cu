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
  return by_dtypes(args.tile, [&](auto kind) { return with_divergence<decltype(kind)>(args, queue); });
}

}  // namespace fd
