// The one thing that C++ cannot say: going from a stack to another.
#if defined(FD_LOCKSTEP)
#include "device.h"

namespace fd {
const char* error_text(int error) { return cudaGetErrorString(static_cast<Error>(error)); }
void set_schedule(int64_t seed) { lockstep::schedule = seed; }
}  // namespace fd

asm(R"(
.text
.globl fd_switch_stack
.hidden fd_switch_stack
.type fd_switch_stack, @function
fd_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fd_switch_stack, .-fd_switch_stack
.section .note.GNU-stack,"",@progbits
.text
)");
#endif
