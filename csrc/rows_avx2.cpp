// The row kernels for x86-64-v3: AVX2.
#if defined(__x86_64__)
#define FD_ISA avx2
#define FD_CHUNK 1024
#define FD_TARGET __attribute__((target("arch=x86-64-v3")))
#include "rows_cpu.cpp"
#endif
