// The device that a launch goes to.
#pragma once
#include "device.h"

namespace fd {

struct Machine {
  int cluster = 1;     // blocks, at most
  int64_t shared = 0;  // bytes of a block, at most
};

#if defined(FD_LOCKSTEP)
struct OnDevice {
  explicit OnDevice(int) {}
  Error error = cudaSuccess;
};
inline Machine machine_of(int) { return {2, lockstep::kMostShared}; }
#else
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

inline Machine machine_of(int device) {
  int major = 0, shared = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return {major >= 9 ? 8 : 1, shared};
}
#endif

}  // namespace fd
