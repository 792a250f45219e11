// Rows of logits and gradients as a thread meets them: in packs of 16 bytes, as floats, from any address.
#pragma once
#include "../language.h"
#include "../rows.h"
#include "device.h"

namespace fd {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T, typename U>
constexpr bool same_type = false;
template <typename T>
constexpr bool same_type<T, T> = true;

// Elements of 16 bytes.
template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

#if defined(FD_LOCKSTEP)
FD_DEVICE float widen(Float16 x) { return static_cast<float>(__builtin_bit_cast(_Float16, x)); }
FD_DEVICE uint32_t narrow(float x, Float16) { return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x)); }
FD_DEVICE uint32_t narrow(float x, BFloat16) {
  const uint32_t u = to_bits(x), rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return x != x ? 0x7fc0u : rounded >> 16;
}
template <typename T>
FD_DEVICE uint32_t narrow_pair(float low, float high, T kind) {
  return narrow(high, kind) << 16 | narrow(low, kind);
}
FD_DEVICE uint32_t funnel(uint32_t low, uint32_t high, int bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> bits);
}
#else
FD_DEVICE float widen(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
FD_DEVICE uint32_t narrow_pair(float low, float high, Float16) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
FD_DEVICE uint32_t narrow_pair(float low, float high, BFloat16) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
FD_DEVICE uint32_t funnel(uint32_t low, uint32_t high, int bits) { return __funnelshift_r(low, high, bits); }
#endif
FD_DEVICE float widen(float x) { return x; }
FD_DEVICE float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

FD_DEVICE void unpack(const uint4& raw, float (&x)[4], float) {
  x[0] = from_bits(raw.x), x[1] = from_bits(raw.y), x[2] = from_bits(raw.z), x[3] = from_bits(raw.w);
}
template <typename T>
FD_DEVICE void unpack(const uint4& raw, float (&x)[8], T) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = widen(T{static_cast<uint16_t>(words[i])});
    x[2 * i + 1] = widen(T{static_cast<uint16_t>(words[i] >> 16)});
  }
}
FD_DEVICE uint4 packed(const float (&x)[4], float) {
  return {to_bits(x[0]), to_bits(x[1]), to_bits(x[2]), to_bits(x[3])};
}
template <typename T>
FD_DEVICE uint4 packed(const float (&x)[8], T kind) {
  return {narrow_pair(x[0], x[1], kind), narrow_pair(x[2], x[3], kind), narrow_pair(x[4], x[5], kind),
          narrow_pair(x[6], x[7], kind)};
}

// The 16 bytes that begin `bytes` after the first of 32; bytes is even.
FD_DEVICE uint4 shifted(const uint4& low, const uint4& high, int bytes) {
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = bytes & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = bytes & 4 ? w[i + 1] : w[i];
  const int bits = (bytes & 2) * 8;
  return {funnel(w[0], w[1], bits), funnel(w[1], w[2], bits), funnel(w[2], w[3], bits),
          funnel(w[3], w[4], bits)};
}

// Four bytes, or two, go in above and the lowest fall out.
FD_DEVICE uint4 pushed(const uint4& raw, float x) { return {raw.y, raw.z, raw.w, to_bits(x)}; }
template <typename T>
FD_DEVICE uint4 pushed(const uint4& raw, T x) {
  return {funnel(raw.x, raw.y, 16), funnel(raw.y, raw.z, 16), funnel(raw.z, raw.w, 16),
          funnel(raw.w, x.bits, 16)};
}

FD_DEVICE int misalignment(const void* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) & 15);
}

// What rows of every dtype have: columns [0, columns), and the transform of their logits.
struct Columns {
  int columns = 0;
  float scale = 1.0f, softcap = 0.0f;

  template <int N>
  FD_DEVICE bool hold(int column) const {
    return column >= 0 && column + N <= columns;
  }
  FD_DEVICE float transformed(float x) const {
    return softcap == 0.0f ? x * scale : softcap * tanh(x * scale / softcap);
  }
  // The softcap's slope at a logit as it lies in memory, 1 / cosh^2: near saturation 1 - tanh^2 has no
  // digits.
  FD_DEVICE float cap_slope(float x) const {
    const float e = exp(-2.0f * abs(x * scale / softcap)), whole = 1.0f + e;
    return divided(4.0f * e, whole * whole);
  }
  // Transformed logits; -inf outside the row, where a pack is not known to be whole.
  template <bool kWhole, int N>
  FD_DEVICE void transform(int column, float (&t)[N]) const {
    if (softcap != 0.0f || scale != 1.0f) {
      // One after another through the first place: the code of a tanh once, not for each.
#pragma unroll 1
      for (int i = 0; i < N; ++i) {
        const float next = transformed(t[0]);
#pragma unroll
        for (int j = 1; j < N; ++j) t[j - 1] = t[j];
        t[N - 1] = next;
      }
    }
    if (!kWhole && !hold<N>(column)) {
#pragma unroll
      for (int i = 0; i < N; ++i) t[i] = column + i >= 0 && column + i < columns ? t[i] : -INFINITY;
    }
  }
};

// A row in packs of 16 bytes that all begin equally far from a multiple of 16.
template <typename T>
struct Row : Columns {
  const T* first = nullptr;
  int bytes = 0;  // from a multiple of 16 bytes to a pack

  FD_DEVICE Row() {}
  // Columns [begin, begin + count) of a row, from where a pack begins `column` further on.
  FD_DEVICE Row(const Logits& side, int64_t row, int begin, int count, int column)
      : Columns{count, side.scale, side.softcap},
        first(static_cast<const T*>(side.data) + first_of(side, row) + begin),
        bytes(misalignment(first + column)) {}

  FD_DEVICE bool holds(int column) const { return hold<kPack<T>>(column); }

  // How many columns from a pack's first one on a load may touch.
  FD_DEVICE int reach() const { return bytes == 0 ? kPack<T> : 2 * kPack<T>; }

  // Packs `step` apart, as they lie in memory, each with all that a load may touch inside the row.
  template <int N>
  FD_DEVICE void load(int column, int step, uint4 (&raw)[N]) const {
    const T* from = first + column;
    if (bytes == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) raw[i] = load_once(reinterpret_cast<const uint4*>(from + i * step));
    } else {
      // Two packs that are aligned; the next thread has one of them in the cache.  What lies before the row's
      // first column is within the 16 bytes of that.
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const char* at = reinterpret_cast<const char*>(from + i * step) - bytes;
        const uint4 low = *reinterpret_cast<const uint4*>(at),
                    high = *reinterpret_cast<const uint4*>(at + 16);
        raw[i] = shifted(low, high, bytes);
      }
    }
  }
  // A pack at an end of the row; what is outside is 0.
  FD_DEVICE uint4 load(int column) const {
    uint4 raw[1] = {};
    if (column >= 0 && column + reach() <= columns) {
      load(column, 0, raw);
      return raw[0];
    }
    // Values are pushed into the pack from above: an array would need an address.
#pragma unroll 1
    for (int i = 0; i < kPack<T>; ++i) {
      const int at = column + i;
      raw[0] = at >= 0 && at < columns ? pushed(raw[0], first[at]) : pushed(raw[0], T{});
    }
    return raw[0];
  }

  FD_DEVICE void unpacked(const uint4& raw, float (&x)[kPack<T>]) const { unpack(raw, x, T{}); }
  template <bool kWhole>
  FD_DEVICE void read(const uint4& raw, int column, float (&t)[kPack<T>]) const {
    unpacked(raw, t);
    transform<kWhole>(column, t);
  }
  FD_DEVICE float raw_at(int column) const { return widen(first[column]); }
  FD_DEVICE float at(int column) const { return transformed(raw_at(column)); }
};

// A dtype that is known when the kernel runs, for two models that differ; packs of 4.
struct Any {};
template <>
constexpr int kPack<Any> = 4;

template <>
struct Row<Any> : Columns {
  const char* first = nullptr;
  int32_t dtype = kFloat32;

  FD_DEVICE Row() {}
  FD_DEVICE Row(const Logits& side, int64_t row, int begin, int count, int)
      : Columns{count, side.scale, side.softcap}, dtype(side.dtype) {
    first = static_cast<const char*>(side.data) + (first_of(side, row) + begin) * width();
  }
  FD_DEVICE int width() const { return dtype == kFloat32 ? 4 : 2; }
  FD_DEVICE bool holds(int column) const { return hold<4>(column); }
  FD_DEVICE uint32_t bits(int column) const {
    return dtype == kFloat32 ? reinterpret_cast<const uint32_t*>(first)[column]
                             : reinterpret_cast<const uint16_t*>(first)[column];
  }

  FD_DEVICE int reach() const { return 4; }

  // The bits of each logit.
  FD_DEVICE uint4 load(int column) const {
    const char* from = first + static_cast<int64_t>(column) * width();
    if (holds(column) && dtype == kFloat32 && misalignment(from) == 0)
      return load_once(reinterpret_cast<const uint4*>(from));
    if (holds(column) && dtype != kFloat32 && misalignment(from) % 8 == 0) {
      const uint2 half = *reinterpret_cast<const uint2*>(from);
      return {half.x & 0xffffu, half.x >> 16, half.y & 0xffffu, half.y >> 16};
    }
    uint4 raw = {0, 0, 0, 0};
#pragma unroll 1
    for (int i = column; i < column + 4; ++i)
      raw = {raw.y, raw.z, raw.w, i >= 0 && i < columns ? bits(i) : 0u};
    return raw;
  }
  template <int N>
  FD_DEVICE void load(int column, int step, uint4 (&raw)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) raw[i] = load(column + i * step);
  }
  FD_DEVICE float widened(uint32_t x) const {
    if (dtype == kFloat32) return from_bits(x);
    return dtype == kFloat16 ? widen(Float16{static_cast<uint16_t>(x)}) : from_bits(x << 16);
  }
  FD_DEVICE void unpacked(const uint4& raw, float (&x)[4]) const {
    x[0] = widened(raw.x), x[1] = widened(raw.y), x[2] = widened(raw.z), x[3] = widened(raw.w);
  }
  template <bool kWhole>
  FD_DEVICE void read(const uint4& raw, int column, float (&t)[4]) const {
    unpacked(raw, t);
    transform<kWhole>(column, t);
  }
  FD_DEVICE float raw_at(int column) const { return widened(bits(column)); }
  FD_DEVICE float at(int column) const { return transformed(raw_at(column)); }
};

template <bool kValue>
struct Whole {
  static constexpr bool value = kValue;
};

// Gives body(column, x's pack, y's pack, Whole) the packs of this thread, `kFlight` loads of each row under
// way at a time; y only if `kPair`.  Packs begin at column `origin`, which may be before the row.  In
// ascending order, but for a pack that begins before the row.  `together`: all threads have loaded a pack
// before one is given to a body.
//
// The body's code stands here kFlight + 1 times, or once where that is 1: large bodies take long to compile.
template <int kFlight, bool kPair, typename T, typename Body>
FD_DEVICE void walk(const Row<T>& x, const Row<T>& y, int origin, bool together, const Body& body) {
  const int lane = thread() * kPack<T>, step = threads() * kPack<T>;
  int c = origin + lane, before = 0;
  if constexpr (kFlight > 1) {
    const int reach = kPair && y.reach() > x.reach() ? y.reach() : x.reach();
    if (together) {
      for (; c - lane + kFlight * step - kPack<T> + reach <= x.columns; c += kFlight * step) {
        uint4 x_raw[kFlight], y_raw[kFlight] = {};
        x.load(c, step, x_raw);
        if (kPair) y.load(c, step, y_raw);
        sync();
#pragma unroll
        for (int i = 0; i < kFlight; ++i) body(c + i * step, x_raw[i], y_raw[i], Whole<true>{});
      }
    } else {
      if (c < 0) {
        before = c;
        c += step;
      }
      for (; c + (kFlight - 1) * step + reach <= x.columns; c += kFlight * step) {
        uint4 x_raw[kFlight], y_raw[kFlight] = {};
        x.load(c, step, x_raw);
        if (kPair) y.load(c, step, y_raw);
#pragma unroll
        for (int i = 0; i < kFlight; ++i) body(c + i * step, x_raw[i], y_raw[i], Whole<true>{});
      }
    }
  }
#pragma unroll 1
  for (int base = c - lane; base < x.columns || before < 0; base += step) {
    int at = base + lane;
    if (at >= x.columns && before < 0) {
      at = before;
      before = 0;
    }
    const bool inside = at < x.columns;
    const uint4 x_raw = inside ? x.load(at) : uint4{}, y_raw = kPair && inside ? y.load(at) : uint4{};
    if (together) sync();
    if (inside) body(at, x_raw, y_raw, Whole<false>{});
  }
}

// Whether a row has anything to compute: it is not masked, and has a label that counts if it has labels.
FD_DEVICE bool takes_part(const Tile& tile, int64_t row) {
  if (tile.mask && !tile.mask[row]) return false;
  const int64_t* labels = tile.labels + row * tile.labels_per_row;
  bool counts = tile.labels_per_row == 0;
  for (int64_t k = 0; k < tile.labels_per_row; ++k) counts |= labels[k] != tile.ignore_index;
  return counts;
}

}  // namespace fd
