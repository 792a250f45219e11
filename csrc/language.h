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

// exp(x) for x <= 88: exactly 0 below -87.3 (so also for -inf; subnormal results are flushed), NaN stays NaN.
// 2^n exp(r), |r| <= ln2 / 2; n is read from the mantissa of x log2(e) + 1.5 * 2^23.  Error below 1.1 ulp.
FD_INLINE float exp(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const float power = from_bits((to_bits(shifted) + 127u) << 23);
  return x < -87.3f ? 0.0f : p * power;
}

// log(x) for normal positive x: x = 2^e m, m in [sqrt(1/2), sqrt(2)), log(m) = 2 atanh(s), s = (m - 1) / (m +
// 1).
FD_INLINE float log(float x) {
  const int32_t biased = static_cast<int32_t>(to_bits(x)) - 0x3f3504f3;
  const float e = static_cast<float>(biased >> 23);
  const float m = from_bits(to_bits(x) - (static_cast<uint32_t>(biased >> 23) << 23));
  const float s = (m - 1.0f) / (m + 1.0f);
  const float t = s * s;
  float p = 1.0f / 9.0f;
  p = p * t + 1.0f / 7.0f;
  p = p * t + 1.0f / 5.0f;
  p = p * t + 1.0f / 3.0f;
  return e * 0.693147181f + (2.0f * s + 2.0f * s * t * p);
}

// exp(d) - 1 - d for |d| <= 0.5.
FD_INLINE float phi(float d) {
  float p = 1.0f / 362880.0f;
  p = p * d + 1.0f / 40320.0f;
  p = p * d + 1.0f / 5040.0f;
  p = p * d + 1.0f / 720.0f;
  p = p * d + 1.0f / 120.0f;
  p = p * d + 1.0f / 24.0f;
  p = p * d + 1.0f / 6.0f;
  p = p * d + 0.5f;
  return d * d * p;
}

// u - log(1 + u) for |u| <= 0.5, by log(1 + u) = 2 atanh(s), s = u / (2 + u).
FD_INLINE float psi(float u) {
  const float s = u / (2.0f + u);
  const float t = s * s;
  float p = 1.0f / 15.0f;
  p = p * t + 1.0f / 13.0f;
  p = p * t + 1.0f / 11.0f;
  p = p * t + 1.0f / 9.0f;
  p = p * t + 1.0f / 7.0f;
  p = p * t + 1.0f / 5.0f;
  p = p * t + 1.0f / 3.0f;
  return s * (u - 2.0f * t * p);
}

}  // namespace fd
