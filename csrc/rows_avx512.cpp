// The row kernels for x86-64-v4: AVX-512.
#if defined(__x86_64__)
#define FD_ISA avx512
#define FD_CHUNK 1024
#define FD_TARGET __attribute__((target("arch=x86-64-v4")))
#include "rows_cpu.cpp"
#endif
