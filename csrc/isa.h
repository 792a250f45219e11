// Which instruction set the row kernels use.
#pragma once
#include <string>
#include <vector>

#include "rows.h"

namespace fd {

struct Isa {
  std::string name;
  RowKernels kernels;
};

// Those that this machine has, the best one last.
const std::vector<Isa>& isas();
// The chosen one: the best, unless `choose_isa` was called.
const Isa& isa();
// Throws std::invalid_argument if `name` is none of `isas()`.  Not while kernels run.
void choose_isa(const std::string& name);

}  // namespace fd
