// How a block reads tokens: what covariance.cu and selection.cu share.
#pragma once
#include "device.h"
#include "elements.h"
#include "launch_tokens.h"

namespace fd {

constexpr int kThreads = 512, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kEach = 4;  // tokens of a thread at a time, so that their loads overlap
constexpr int64_t kStep = kThreads * kEach;

inline int64_t parts_of(int64_t whole, int64_t size) { return (whole + size - 1) / size; }

// How a launch walks the tokens: each block takes `loops` steps of kStep tokens.
struct Walk {
  int64_t blocks, loops;
};
inline Walk walk(int64_t count, int64_t most_blocks) {
  const int64_t steps = parts_of(count, kStep), loops = parts_of(steps, most_blocks);
  return {loops ? parts_of(steps, loops) : 0, loops};
}

template <typename Args>
int launch_blocks(void (*kernel)(Args), int64_t blocks, int64_t shared, const Queue& queue,
                  const Args& args) {
  return launch(kernel, Launch{blocks, 1, kThreads, shared}, queue, args);
}

// A thread's tokens begin at `first` and lie a block apart.
FD_DEVICE int64_t first_token(int64_t step) { return step * kStep + thread(); }

FD_DEVICE void taking_part(const uint8_t* mask, int64_t first, int64_t count, bool (&here)[kEach]) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = first + i * kThreads;
    here[i] = at < count && (mask == nullptr || mask[at] != 0);
  }
}

FD_DEVICE double widen(double x) { return x; }

template <typename T, typename Result, typename Convert>
FD_DEVICE void read_as(const void* data, int64_t first, const bool (&here)[kEach], Result (&result)[kEach],
                       Convert convert) {
  const T* from = static_cast<const T*>(data) + first;
#pragma unroll
  for (int i = 0; i < kEach; ++i) result[i] = here[i] ? convert(widen(from[i * kThreads])) : Result{};
}

template <typename Result, typename Convert>
FD_DEVICE void read(const Values& values, int64_t first, const bool (&here)[kEach], Result (&result)[kEach],
                    Convert convert) {
  switch (values.dtype) {
    case kFloat64:
      return read_as<double>(values.data, first, here, result, convert);
    case kFloat32:
      return read_as<float>(values.data, first, here, result, convert);
    case kFloat16:
      return read_as<Float16>(values.data, first, here, result, convert);
    default:
      return read_as<BFloat16>(values.data, first, here, result, convert);
  }
}

}  // namespace fd
