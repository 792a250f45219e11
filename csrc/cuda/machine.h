// The device that a launch goes to.
#pragma once
#include "device.h"

namespace fd {

struct Machine {
  int cluster = 1;     // blocks, at most
  int64_t shared = 0;  // bytes of a block, at most
};

#if defined(FD_LOCKSTEP)
inline Machine machine_of(int) { return {2, lockstep::kMostShared}; }
#else
inline Machine machine_of(int device) {
  int major = 0, shared = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return {major >= 9 ? 8 : 1, shared};
}
#endif

}  // namespace fd
