// What kernels know of the machine: threads, barriers, shuffles, clusters, launches.  nvcc compiles them for
// a GPU; for g++ lockstep.h has the same names, so that the same text runs, and is tested, on a CPU.
#pragma once
#include <cstdint>

#include "queue.h"

namespace fd {

// A cluster's blocks, 1 to 8 of them, are on the machine at once and see each other's shared memory.
struct Launch {
  int64_t clusters = 0;
  int cluster = 1;     // blocks
  int threads = 0;     // of a block; whole warps
  int64_t shared = 0;  // bytes of a block
};

}  // namespace fd

#if !defined(__CUDACC__)
#include "lockstep.h"
#else
#include <cuda_runtime.h>

#define FD_KERNEL __global__
#define FD_DEVICE __device__ __forceinline__
// At most `threads` of a block, and registers so that `blocks` of them fit a processor.
#define FD_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)

namespace fd {

using Error = cudaError_t;

FD_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
FD_DEVICE int threads() { return static_cast<int>(blockDim.x); }
FD_DEVICE int64_t block() { return blockIdx.x; }
FD_DEVICE int64_t blocks() { return gridDim.x; }
FD_DEVICE void sync() { __syncthreads(); }
FD_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

template <typename T>
FD_DEVICE T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(~0u, x, lanes);
}

// What another lane has.
template <typename T>
FD_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(~0u, x, lane);
}

// Before sm_90 a cluster is one block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
FD_DEVICE int cluster_size() {
  uint32_t n;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(n));
  return static_cast<int>(n);
}
FD_DEVICE int cluster_rank() {
  uint32_t n;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(n));
  return static_cast<int>(n);
}
FD_DEVICE void cluster_sync() {
  // Not `.aligned`: lanes of a warp may come here by different ways.
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
// The same place in the shared memory of another block of the cluster.
template <typename T>
FD_DEVICE const T* of_block(const T* own, int rank) {
  uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(rank));
  return reinterpret_cast<const T*>(there);
}
#else
FD_DEVICE int cluster_size() { return 1; }
FD_DEVICE int cluster_rank() { return 0; }
FD_DEVICE void cluster_sync() { __syncthreads(); }
template <typename T>
FD_DEVICE const T* of_block(const T* own, int) {
  return own;
}
#endif

// The largest; NaN if one is NaN.
FD_DEVICE float max_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
FD_DEVICE float min_nan(float a, float b) {
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// 16 bytes that are read once.
FD_DEVICE uint4 load_once(const uint4* from) { return __ldcs(from); }

FD_DEVICE int64_t shuffle_up(int64_t x, int lanes) { return __shfl_up_sync(~0u, x, lanes); }

// In shared or global memory; what was there before.
FD_DEVICE uint32_t atomic_add(uint32_t* to, uint32_t x) { return atomicAdd(to, x); }
FD_DEVICE int64_t atomic_add(int64_t* to, int64_t x) {
  return static_cast<int64_t>(
      atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x)));
}
// What this thread, or one that it met at a barrier, wrote before is seen by whoever sees what it writes
// after.
FD_DEVICE void fence() { __threadfence(); }

// Makes a device current for a while.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error = cudaGetDevice(&before_);
    changed_ = error == cudaSuccess && before_ != device;
    if (changed_) error = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  Error error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Every launch.  A cluster's blocks are neighbours in the grid.
template <typename Args>
Error launch(void (*kernel)(Args), const Launch& shape, const Queue& queue, const Args& args) {
  if (shape.clusters == 0) return cudaSuccess;
  const OnDevice device(queue.device);
  if (device.error != cudaSuccess) return device.error;
  const void* address = reinterpret_cast<const void*>(kernel);
  if (shape.shared > 48 << 10) {
    // The same number in every thread: one that sets less would take it from one that is about to launch.
    int most = 0;
    Error error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.clusters * shape.cluster));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared);
  config.stream = static_cast<cudaStream_t>(queue.stream);
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace fd
#endif
