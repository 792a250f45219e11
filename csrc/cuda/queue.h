// Where a launch goes.  No CUDA header: binding.cpp is compiled without one.
#pragma once

namespace fd {

struct Queue {
  int device = 0;
  void* stream = nullptr;
};

}  // namespace fd
