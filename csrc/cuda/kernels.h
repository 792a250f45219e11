// Which sets of outputs have a kernel of their own, and how much a launch takes.
//
// A kernel costs build time and bytes on every target, so there is one for what trainers ask for token by
// token.
//
// One model: log_prob, entropy, logsumexp and max_log_prob's value (Moments::kFirst); every statistic (kAll).
// Two models: log_prob and entropy beside one KL, beside both (jeffreys), or beside one divergence that needs
// both normalisers (js, tv), in one launch that reads each logit once where it fits; every statistic beside
// both KLs. Gradients: of one model's outputs; of those and one divergence, to the student; of a list of
// divergences that is walked for each logit, to both models. Both at once: log_prob, entropy and logsumexp
// with the gradient of their weighted sum.
//
// Two models may have one dtype, or any two: for those a kernel asks what it reads.  All else is several
// launches.
#pragma once
#include "elements.h"
#include "launch_rows.h"
#include "machine.h"

namespace fd {

// launch(T{}) for the dtype of the student's logits.
template <typename F>
int by_dtype(const Tile& tile, F launch) {
  if (tile.columns > kMostColumns) return kNotHere;
  switch (tile.student.dtype) {
    case kFloat32:
      return launch(float{});
    case kFloat16:
      return launch(Float16{});
    default:
      return launch(BFloat16{});
  }
}

// The same for two models; launch(Any{}) where their dtypes differ.
template <typename F>
int by_dtypes(const Tile& tile, F launch) {
  if (tile.columns > kMostColumns) return kNotHere;
  return tile.student.dtype == tile.teacher.dtype ? by_dtype(tile, launch) : launch(Any{});
}

#if defined(FD_LOCKSTEP)
// Small enough that both looks and clusters are seen at small vocabularies.
constexpr int kThreads = 64, kLargestCluster = 2;
constexpr int64_t kKept = 4 << 10;
#else
constexpr int kThreads = 256, kLargestCluster = 8;
// Bytes of a block's packs: two blocks fit a processor of sm_90 and sm_100.
constexpr int64_t kKept = 100 << 10;
#endif

// Threads for a number of packs: a function of the row's size alone, as the order of sums depends on it.
inline int threads_for(int64_t packs) {
  int threads = 32;
  while (threads < kThreads && threads < packs) threads *= 2;
  return threads;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks that keep a row's packs of `bytes` each in shared memory; the packs of each block, and its bytes
// with what else it needs.  No block: they do not fit.
struct Share {
  int blocks = 0;
  int64_t packs = 0, shared = 0;
};
inline Share share_of(int64_t packs, int64_t bytes, const Machine& machine, int64_t more) {
  const int64_t room = machine.shared - more;
  for (int blocks = 1; blocks <= machine.cluster && blocks <= kLargestCluster; blocks *= 2) {
    const int64_t own = ceil_div(packs, blocks);
    if (own * bytes <= kKept && own * bytes <= room) return {blocks, own, own * bytes + more};
  }
  return {};
}

}  // namespace fd
