// The k smallest tokens, by radix selection.  fastdiv/select.py says in plain torch what they are.
#include "tokens.h"

namespace fd {
namespace {

// Blocks that count: each adds up to kBins numbers at the end.
constexpr int kMostCounters = 256;

struct CountMemory {
  uint32_t counts[kBins];  // a block counts fewer than 2^32 tokens
  int64_t warps[kWarps];
  int64_t digit, taken, shared_by;
};

FD_DEVICE uint64_t mixed(uint64_t x) {  // splitmix64's finaliser
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

FD_DEVICE uint64_t number_of(const Candidates& tokens, int64_t at) {
  if (tokens.index) return static_cast<uint64_t>(tokens.index[at]);
  return static_cast<uint64_t>(tokens.offset ? at + *tokens.offset : at);
}

// Bits in the order of the scores.  They decide throughout: there is one NaN, the largest, and one zero, but
// a subnormal number is none.
struct Ordered {
  bool largest;

  FD_DEVICE uint64_t operator()(double x) const {
    uint64_t bits = __builtin_bit_cast(uint64_t, x);
    const uint64_t sign = uint64_t{1} << 63, size = bits & ~sign;
    if (size > 0x7ff0000000000000u) bits = 0x7ff8000000000000u;
    if (size == 0) bits = 0;
    bits = bits & sign ? ~bits : bits | sign;
    return largest ? ~bits : bits;
  }
  FD_DEVICE uint64_t operator()(float x) const {
    uint32_t bits = to_bits(x);
    const uint32_t sign = uint32_t{1} << 31, size = bits & ~sign;
    if (size > 0x7f800000u) bits = 0x7fc00000u;
    if (size == 0) bits = 0;
    bits = bits & sign ? ~bits : bits | sign;
    return largest ? ~bits : bits;
  }
};

FD_DEVICE void read_keys(const Candidates& tokens, int64_t first, const bool (&here)[kEach],
                         uint64_t (&keys)[kEach]) {
  if (tokens.scores.data) return read(tokens.scores, first, here, keys, Ordered{tokens.largest});
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    keys[i] = here[i] ? mixed(mixed(number_of(tokens, first + i * kThreads)) ^ tokens.drawn) : 0;
}

FD_DEVICE int64_t how_many(int64_t count, const Quota& quota) {
  int64_t k = quota.k;
  if (quota.on_device) {
    k = *quota.on_device;
    k = k < 0 ? 0 : k;
  } else if (quota.ratio != 0.0) {
    k = static_cast<int64_t>(static_cast<double>(count) * quota.ratio);
    k = k < 1 ? 1 : k;
  }
  return k < count ? k : count;
}

// The counted digit of the last token to be taken.  Every block finds it for itself.
FD_DEVICE Found narrowed(CountMemory& memory, const Counted& digit, const Quota& quota) {
  Found found = *digit.found;
  if (found.settled) return found;
  constexpr int kOwn = kBins / kThreads;
  int64_t own[kOwn], sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sum += own[i] = digit.counts[kOwn * thread() + i];
  const int lane = thread() % kWarp;
  int64_t up_to = sum, count = 0;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int64_t below = shuffle_up(up_to, lanes);
    up_to += lane >= lanes ? below : 0;
  }
  if (lane == kWarp - 1) memory.warps[thread() / kWarp] = up_to;
  sync();
  for (int warp = 0; warp < kWarps; ++warp) {
    up_to += warp < thread() / kWarp ? memory.warps[warp] : 0;
    count += memory.warps[warp];
  }
  if (digit.first) found.need = how_many(count, quota);
  int64_t below = up_to - sum;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t bin = kOwn * thread() + i;
    if ((below < found.need || bin == 0) && below + own[i] >= found.need) {  // true of one bin
      memory.digit = bin;
      memory.taken = below;
      memory.shared_by = own[i];
    }
    below += own[i];
  }
  sync();
  found.need -= memory.taken;
  found.settled = found.need == memory.shared_by;
  const uint64_t rest = found.settled ? (uint64_t{1} << digit.shift) - 1 : 0;
  const uint64_t digits = static_cast<uint64_t>(memory.digit) << digit.shift | rest;
  if (digit.of_number) {
    found.number |= digits;
  } else {
    found.key |= digits;
    if (found.settled) found.number = ~uint64_t{0};
  }
  return found;
}

FD_KERNEL void FD_BOUNDS(kThreads, 2) count_digit(const CountDigits args) {
  auto& memory = *reinterpret_cast<CountMemory*>(shared_memory());
  for (int bin = thread(); bin < kBins; bin += kThreads) memory.counts[bin] = 0;
  Found found = {};
  if (args.before.counts) {
    found = narrowed(memory, args.before, args.quota);
    if (block() == 0 && thread() == 0) *args.found = found;
    if (found.settled) return;
  }
  sync();
  for (int64_t i = 0; i < args.loops; ++i) {
    const int64_t first = first_token(block() * args.loops + i);
    bool here[kEach];
    uint64_t keys[kEach];
    taking_part(args.tokens.mask, first, args.tokens.count, here);
    read_keys(args.tokens, first, here, keys);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (!here[j]) continue;
      uint64_t digits = keys[j], known = found.key;
      if (args.of_number) {
        if (keys[j] != found.key) continue;
        digits = number_of(args.tokens, first + j * kThreads), known = found.number;
      }
      if ((digits ^ known) >> args.shift >> kDigitBits) continue;  // in two steps: at most by 63 each
      atomic_add(&memory.counts[(digits >> args.shift) % kBins], uint32_t{1});
    }
  }
  sync();
  for (int bin = thread(); bin < kBins; bin += kThreads)
    if (memory.counts[bin]) atomic_add(&args.counts[bin], int64_t{memory.counts[bin]});
}

FD_KERNEL void FD_BOUNDS(kThreads, 2) choose_tokens(const Choose args) {
  auto& memory = *reinterpret_cast<CountMemory*>(shared_memory());
  const Found last = narrowed(memory, args.last, args.quota);
  const int64_t first = first_token(block());
  bool here[kEach];
  uint64_t keys[kEach];
  taking_part(args.tokens.mask, first, args.tokens.count, here);
  read_keys(args.tokens, first, here, keys);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = first + i * kThreads;
    if (at >= args.tokens.count) continue;
    bool taken = here[i] && last.need > 0 && keys[i] <= last.key;
    // Random keys have no ties, but where an index names tokens twice; then it is both or neither.
    if (taken && keys[i] == last.key && args.tokens.scores.data)
      taken = number_of(args.tokens, at) <= last.number;
    args.chosen[at] = taken;
  }
}

}  // namespace

int count_digits(CountDigits args, const Queue& queue) {
  const Walk steps = walk(args.tokens.count, kMostCounters);
  args.loops = steps.loops;
  return launch_blocks(count_digit, steps.blocks, sizeof(CountMemory), queue, args);
}

int choose(const Choose& args, const Queue& queue) {
  return launch_blocks(choose_tokens, parts_of(args.tokens.count, kStep), sizeof(CountMemory), queue, args);
}

}  // namespace fd
