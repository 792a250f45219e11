// Statistics of two models with the KLs between them.
#include "statistics_launch.h"

namespace fd {

namespace {

template <typename T>
int of_two_models(const Statistics& args, const Queue& queue) {
  if (args.wanted & kBeyondFirst) return launch_statistics<T, Moments::kAll, Kl<true, true>>(args, queue);
  switch (args.wanted & (kForward | kReverse)) {
    case kForward:
      return launch_statistics<T, Moments::kFirst, Kl<true, false>>(args, queue);
    case kReverse:
      return launch_statistics<T, Moments::kFirst, Kl<false, true>>(args, queue);
    default:
      return launch_statistics<T, Moments::kFirst, Kl<true, true>>(args, queue);
  }
}

}  // namespace

int statistics_with_kl(const Statistics& args, const Queue& queue) {
  return by_dtypes(args.tile, [&](auto kind) { return of_two_models<decltype(kind)>(args, queue); });
}

}  // namespace fd
