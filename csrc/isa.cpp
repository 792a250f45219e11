#include "isa.h"

#include <stdexcept>

namespace fd {
namespace {

std::vector<Isa> found() {
  std::vector<Isa> all{{"base", base::kernels}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v3")) all.push_back({"avx2", avx2::kernels});
  if (__builtin_cpu_supports("x86-64-v4")) all.push_back({"avx512", avx512::kernels});
#endif
  return all;
}

const Isa*& chosen() {
  static const Isa* isa = &isas().back();
  return isa;
}

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = found();
  return all;
}

const Isa& isa() { return *chosen(); }

void choose_isa(const std::string& name) {
  std::string names;
  for (const Isa& isa : isas()) {
    if (isa.name == name) {
      chosen() = &isa;
      return;
    }
    names += (names.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("FASTDIV_ISA: this machine and build have " + names + ", got '" + name + "'");
}

}  // namespace fd
