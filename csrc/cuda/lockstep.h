// CUDA's threads on a CPU, for tests: each is a fiber that runs until it meets a barrier or a shuffle.  What
// a thread reads of another is wrong here too if a barrier is missing: `order` says in which order threads
// get their turns, and results must not depend on it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#if !defined(__x86_64__)
#error "lockstep.h switches stacks on x86-64 only"
#endif

#define FD_KERNEL static
#define FD_DEVICE inline __attribute__((always_inline))
#define FD_BOUNDS(threads, blocks)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

// Stores the registers that a call keeps, and goes on with another stack.
extern "C" void fd_switch_stack(void** from, void* to);

namespace fd {

enum Error : int { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(Error) { return "invalid argument"; }

namespace lockstep {

constexpr int kStack = 1 << 16, kWarp = 32;
constexpr int64_t kMostShared = 1 << 18;  // bytes of a block, as some GPU has them

struct Barrier {
  int waiting = 0;
  int64_t turn = 0;
};

struct Fiber {
  void* stack = nullptr;
  int thread = 0, rank = 0;
  bool done = false;
};

// The one cluster that runs in this process at a time (per thread of the host).
struct Machine {
  void* host = nullptr;
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  std::vector<std::vector<uint4>> shared;  // of each block
  std::vector<Barrier> block_barriers, warp_barriers;
  Barrier cluster_barrier;
  std::vector<uint64_t> exchange[2];  // of each thread, for shuffles in turns
  std::vector<int64_t> turns;
  std::vector<int> order;
  int now = 0, threads = 0, cluster = 1;
  int64_t first_block = 0, blocks = 0, progress = 0;
  void (*run)(const void*) = nullptr;
  const void* args = nullptr;
};

inline thread_local Machine machine;
inline int64_t schedule = 0;  // 0: threads in turn; else a seed, by which order and lead of warps are drawn

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "lockstep: %s (block %lld, %d threads)\n", what,
               static_cast<long long>(machine.first_block), machine.threads);
  std::abort();
}

inline Fiber& self() { return machine.fibers[machine.now]; }
inline void pause() { fd_switch_stack(&self().stack, machine.host); }

inline void wait(Barrier& barrier, int count) {
  const int64_t turn = barrier.turn;
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    ++barrier.turn;
    ++machine.progress;
    return;
  }
  while (barrier.turn == turn) pause();
}

inline void body() {
  machine.run(machine.args);
  self().done = true;
  ++machine.progress;
  pause();
}

inline uint64_t next(uint64_t& seed) {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return seed >> 33;
}

inline void cluster(int64_t first_block) {
  Machine& m = machine;
  const int count = m.threads * m.cluster;
  m.first_block = first_block;
  m.block_barriers.assign(m.cluster, {});
  m.warp_barriers.assign(count / kWarp, {});
  m.cluster_barrier = {};
  m.turns.assign(count, 0);
  for (auto& e : m.exchange) e.assign(count, 0);
  for (auto& s : m.shared) std::memset(s.data(), 0x7f, s.size() * sizeof(uint4));  // nobody has written it
  m.fibers.assign(count, {});
  for (int i = 0; i < count; ++i) {
    Fiber& f = m.fibers[i];
    f.thread = i % m.threads;
    f.rank = i / m.threads;
    auto top =
        reinterpret_cast<uintptr_t>(m.stacks.data() + (static_cast<size_t>(i) + 1) * kStack) & ~uintptr_t{15};
    void** frame = reinterpret_cast<void**>(top) - 2;
    frame[0] = reinterpret_cast<void*>(&body);  // where the first switch returns to
    frame[1] = nullptr;
    f.stack = frame - 6;
  }
  m.order.resize(count);
  std::iota(m.order.begin(), m.order.end(), 0);
  uint64_t seed = static_cast<uint64_t>(schedule) * 2654435761u + static_cast<uint64_t>(first_block);
  int left = count;
  bool all = true;  // every warp has its turn; else those drawn run ahead, until they wait for others
  uint64_t drawn = 0;
  while (left) {
    if (schedule)
      for (int i = count - 1; i > 0; --i) std::swap(m.order[i], m.order[next(seed) % (i + 1)]);
    const int64_t before = m.progress;
    left = 0;
    for (int i : m.order) {
      if (m.fibers[i].done) continue;
      if (all || (drawn >> (i / kWarp % 31) & 1)) {
        m.now = i;
        fd_switch_stack(&m.host, m.fibers[i].stack);
      }
      left += !m.fibers[i].done;
    }
    if (left && m.progress == before && all)
      fail("threads wait for each other at different barriers, or for one that has left");
    if (schedule && all) drawn = next(seed);
    all = !schedule || m.progress == before;
  }
}

}  // namespace lockstep

FD_DEVICE int thread() { return lockstep::self().thread; }
FD_DEVICE int threads() { return lockstep::machine.threads; }
FD_DEVICE int64_t block() { return lockstep::machine.first_block + lockstep::self().rank; }
FD_DEVICE int64_t blocks() { return lockstep::machine.blocks; }
FD_DEVICE int cluster_size() { return lockstep::machine.cluster; }
FD_DEVICE int cluster_rank() { return lockstep::self().rank; }
FD_DEVICE void sync() { lockstep::wait(lockstep::machine.block_barriers[cluster_rank()], threads()); }
FD_DEVICE void cluster_sync() {
  lockstep::wait(lockstep::machine.cluster_barrier, threads() * lockstep::machine.cluster);
}
FD_DEVICE char* shared_memory() {
  return reinterpret_cast<char*>(lockstep::machine.shared[cluster_rank()].data());
}
template <typename T>
FD_DEVICE const T* of_block(const T* own, int rank) {
  const auto at = reinterpret_cast<const char*>(own) - shared_memory();
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(lockstep::machine.shared[rank].data()) +
                                    at);
}

// What each lane of a warp gives, in two buffers by turns: a lane may be a shuffle ahead of another.
template <typename T>
T exchanged(T x, int (*source)(int lane, int by), int by) {
  static_assert(sizeof(T) <= 8);
  lockstep::Machine& m = lockstep::machine;
  const int own = m.now, first = own & ~(lockstep::kWarp - 1);
  std::vector<uint64_t>& places = m.exchange[m.turns[own]++ & 1];
  std::memcpy(&places[own], &x, sizeof(T));
  lockstep::wait(m.warp_barriers[own / lockstep::kWarp], lockstep::kWarp);
  std::memcpy(&x, &places[first + source(own - first, by)], sizeof(T));
  return x;
}
template <typename T>
T shuffle_xor(T x, int lanes) {
  return exchanged(x, [](int lane, int by) { return lane ^ by; }, lanes);
}

template <typename T>
T shuffle(T x, int lane) {
  return exchanged(x, [](int, int by) { return by; }, lane);
}

FD_DEVICE float max_nan(float a, float b) { return a != a || b != b ? NAN : a > b ? a : b; }
FD_DEVICE float min_nan(float a, float b) { return a != a || b != b ? NAN : a < b ? a : b; }
FD_DEVICE uint4 load_once(const uint4* from) { return *from; }

inline int64_t shuffle_up(int64_t x, int lanes) {
  return exchanged(x, [](int lane, int by) { return lane < by ? lane : lane - by; }, lanes);
}

// Nothing else runs between two barriers.
template <typename T>
FD_DEVICE T atomic_add(T* to, T x) {
  const T before = *to;
  *to += x;
  return before;
}
FD_DEVICE void fence() {}

template <typename Args>
Error launch(void (*kernel)(Args), const Launch& shape, const Queue&, const Args& args) {
  using namespace lockstep;
  if (shape.shared > kMostShared) return cudaErrorInvalidValue;
  struct Call {
    void (*kernel)(Args);
    const Args& args;
  } const call{kernel, args};
  Machine& m = machine;
  m.run = [](const void* call) {
    const Call& c = *static_cast<const Call*>(call);
    c.kernel(c.args);
  };
  m.args = &call;
  m.threads = shape.threads;
  m.cluster = shape.cluster;
  m.blocks = shape.clusters * shape.cluster;
  m.stacks.resize(static_cast<size_t>(shape.threads) * shape.cluster * kStack);
  m.shared.assign(shape.cluster, std::vector<uint4>(shape.shared / 16 + 1));
  for (int64_t i = 0; i < shape.clusters; ++i) cluster(i * shape.cluster);
  return cudaSuccess;
}

}  // namespace fd
