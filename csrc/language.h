// The vocabulary of pointwise.h in float: the names of fastdiv/language.py.  Branch-free, so that a loop over
// any of them vectorises; no libm, no -ffast-math.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FD_INLINE __host__ __device__ __forceinline__
#else
#define FD_INLINE static inline __attribute__((always_inline))
#endif

namespace fd {

FD_INLINE float abs(float x) { return __builtin_fabsf(x); }
FD_INLINE float from_bits(uint32_t u) { return __builtin_bit_cast(float, u); }
FD_INLINE uint32_t to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

// Where exp becomes exactly 0.  `floored` keeps NaN, and 0 * log 0 out of p * log p.
constexpr float kFloor = -88.0f;
FD_INLINE float floored(float x) { return x < kFloor ? kFloor : x; }

#if defined(__CUDA_ARCH__) || defined(FD_LOCKSTEP)
// 2^x, with what a GPU has for it: error 2 ulp, subnormal results are 0.
FD_INLINE float exp2(float x) {
#if defined(FD_LOCKSTEP)
  return x < -126.0f ? 0.0f : __builtin_exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
FD_INLINE float exp(float x) { return exp2(x * 1.44269504f); }
#else
// exp(x) for kFloor <= x <= 88: 2^n e^r, |r| <= ln2 / 2, n + 127 read from the mantissa of x log2(e) + 1.5 *
// 2^23 + 127. Exactly 0 where n = -127, so below -87.7; NaN stays NaN.  Error below 2 ulp.
FD_INLINE float exp_floored(float x) {
  constexpr float kShift = 12582912.0f + 127.0f;
  const float shifted = x * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // Degree 5, minimax with p(0) = 1: relative error below 0.8 ulp before rounding.
  float p = 8.290272e-3f;
  p = p * r + 4.18981597e-2f;
  p = p * r + 1.66676381e-1f;
  p = p * r + 4.99991478e-1f;
  p = p * r + 9.99999706e-1f;
  p = p * r + 1.0f;
  return p * from_bits(to_bits(shifted) << 23);
}
FD_INLINE float exp(float x) { return exp_floored(floored(x)); }
#endif

#if defined(__CUDA_ARCH__)
FD_INLINE float divided(float a, float b) {
  float y;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
#else
FD_INLINE float divided(float a, float b) { return a / b; }
#endif

// log(x) for normal positive x: x = 2^e m, m in [sqrt(1/2), sqrt(2)), log(m) = 2 atanh(s), s = (m - 1) / (m +
// 1).
FD_INLINE float log(float x) {
  const int32_t biased = static_cast<int32_t>(to_bits(x)) - 0x3f3504f3;
  const float e = static_cast<float>(biased >> 23);
  const float m = from_bits(to_bits(x) - (static_cast<uint32_t>(biased >> 23) << 23));
  const float s = divided(m - 1.0f, m + 1.0f);
  const float t = s * s;
  float p = 1.0f / 9.0f;
  p = p * t + 1.0f / 7.0f;
  p = p * t + 1.0f / 5.0f;
  p = p * t + 1.0f / 3.0f;
  return e * 0.693147181f + (2.0f * s + 2.0f * s * t * p);
}

// Both are formed: on a GPU cheaper than a branch that lanes take by different ways; on a CPU the compiler
// computes once what several choices share (js forward, AVX-512: 0.7 of its time with ?:).
#if defined(__CUDA_ARCH__)
FD_INLINE float chosen(bool yes, float a, float b) {
  float y;
  asm("{.reg .pred p; setp.ne.u32 p, %3, 0; selp.f32 %0, %1, %2, p;}"
      : "=f"(y)
      : "f"(a), "f"(b), "r"((unsigned)yes));
  return y;
}
#else
FD_INLINE float chosen(bool yes, float a, float b) { return yes ? a : b; }
#endif

// exp(d) - 1 - d for |d| <= 0.5: its series, the terms beyond d^7 folded back (Chebyshev); relative error
// below 1e-7.
FD_INLINE float phi(float d) {
  float p = 1.99618e-4f;
  p = p * d + 1.39818919e-3f;
  p = p * d + 8.33318263e-3f;
  p = p * d + 4.16657947e-2f;
  p = p * d + 1.6666667e-1f;
  p = p * d + 0.5f;
  return d * d * p;
}

// w (u - log(1 + u)) with u = e / w, for -0.5 <= u <= 0.65, by log(1 + u) = 2 atanh(s), s = u / (2 + u).
FD_INLINE float psi(float e, float w) {
  const float s = divided(e, 2.0f * w + e);
  const float t = s * s;
  float p = 1.0f / 15.0f;
  p = p * t + 1.0f / 13.0f;
  p = p * t + 1.0f / 11.0f;
  p = p * t + 1.0f / 9.0f;
  p = p * t + 1.0f / 7.0f;
  p = p * t + 1.0f / 5.0f;
  p = p * t + 1.0f / 3.0f;
  return s * (e - 2.0f * w * (t * p));
}

// Error below 2 ulp.  Near 0 x + x^3 p(x^2), p a fit by Chebyshev's nodes; beyond, 1 - 2 e / (1 + e), e =
// exp(-2x).
FD_INLINE float tanh(float x) {
  const float u = abs(x), z = x * x;
  float p = 2.249316449e-03f;
  p = p * z - 8.305100648e-03f;
  p = p * z + 2.175692685e-02f;
  p = p * z - 5.395777575e-02f;
  p = p * z + 1.333329729e-01f;
  p = p * z - 3.333333313e-01f;
  const float e = exp(-2.0f * u), near = u + u * (z * p), far = 1.0f - divided(2.0f * e, 1.0f + e);
  return __builtin_copysignf(u < 0.625f ? near : far, x);
}

}  // namespace fd
