// Row kernels for CPUs.  A row is walked in chunks that stay in the first-level cache: float inside a chunk,
// double between chunks.  Every loop vectorises.
//
// This file is compiled once for each instruction set: by itself for the base one, by rows_avx2.cpp and
// rows_avx512.cpp for others.  FD_TARGET stands at the entry points alone and not among the compiler's flags.
// What is inlined into them is compiled for their instruction set.  What is not, such as a function of std::
// that the linker shares with other files, is compiled for the base one and runs on every machine.
#include <algorithm>
#include <vector>

#include "pointwise.h"
#include "row_state.h"

#if !defined(FD_ISA)
#define FD_ISA base
#define FD_TARGET
// A chunk's sums are floats, one for each lane of a vector.  The base instruction set has few lanes and
// rounds every product: a lane may add no more terms than this keeps within the tolerance rule.
#define FD_CHUNK 256
#endif

namespace fd::FD_ISA {
namespace {

constexpr int64_t kChunk = FD_CHUNK, kBlock = 512, kStrand = 128;

struct BFloat16 {
  uint16_t bits;
};
FD_INLINE float widen(float x) { return x; }
FD_INLINE float widen(_Float16 x) { return static_cast<float>(x); }
FD_INLINE float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
FD_INLINE void narrow(float x, float& out) { out = x; }
FD_INLINE void narrow(float x, _Float16& out) { out = static_cast<_Float16>(x); }
FD_INLINE void narrow(float x, BFloat16& out) {
  const uint32_t u = to_bits(x), rounded = u + 0x7fffu + ((u >> 16) & 1u);
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded >> 16);
}

template <typename T>
FD_INLINE void load(const T* from, int64_t n, float scale, float softcap, float* to) {
  if (softcap == 0.0f) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]) * scale;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = softcap * tanh(widen(from[i]) * scale / softcap);
  }
}

FD_INLINE int64_t width(const Logits& side) { return side.dtype == kFloat32 ? 4 : 2; }
FD_INLINE const char* address(const Logits& side, int64_t row, int64_t column) {
  return static_cast<const char*>(side.data) + (first_of(side, row) + column) * width(side);
}

FD_INLINE void prefetch(const char* from, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
}

// What a loop over a chunk fetches of the next one: `bytes` for each element it works on.  All loops together
// take the whole chunk, each a part, because a core has few fetches under way at a time.
struct Ahead {
  const char* from;
  int64_t bytes;
};
FD_INLINE void fetch(const Ahead& ahead, int64_t begin, int64_t end) {
  prefetch(ahead.from + begin * ahead.bytes, (end - begin) * ahead.bytes);
}

// Transformed logits of one chunk: the tensor's own memory where there is nothing to transform, else
// `buffer`.
FD_INLINE const float* chunk(const Logits& side, int64_t row, int64_t column, int64_t n, float* buffer) {
  const int64_t at = first_of(side, row) + column;
  switch (side.dtype) {
    case kFloat32: {
      const float* x = static_cast<const float*>(side.data) + at;
      if (side.scale == 1.0f && side.softcap == 0.0f) return x;
      load(x, n, side.scale, side.softcap, buffer);
      break;
    }
    case kFloat16:
      load(static_cast<const _Float16*>(side.data) + at, n, side.scale, side.softcap, buffer);
      break;
    default:
      load(static_cast<const BFloat16*>(side.data) + at, n, side.scale, side.softcap, buffer);
  }
  return buffer;
}

// Four strands: one would wait for itself at every step.
FD_INLINE float maximum(const float* x, int64_t n) {
  const int64_t quarter = n / 4;
  float a = -INFINITY, b = -INFINITY, c = -INFINITY, d = -INFINITY;
#pragma omp simd reduction(max : a, b, c, d)
  for (int64_t i = 0; i < quarter; ++i) {
    a = x[i] > a ? x[i] : a;
    b = x[i + quarter] > b ? x[i + quarter] : b;
    c = x[i + 2 * quarter] > c ? x[i + 2 * quarter] : c;
    d = x[i + 3 * quarter] > d ? x[i + 3 * quarter] : d;
  }
  for (int64_t i = 4 * quarter; i < n; ++i) a = x[i] > a ? x[i] : a;
  return std::max(std::max(a, b), std::max(c, d));
}

struct Moments {
  float sum = 0.0f, first = 0.0f;
};

// e = exp((x - max) / temperature), its sum and, if wanted, the sum of e times the exponent.
template <bool kWithFirst, bool kUnit>
FD_INLINE Moments exponentials(const float* x, int64_t n, float max, float it, float* e, Ahead ahead) {
  float sum = 0.0f, first = 0.0f;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    fetch(ahead, begin, end);
#pragma omp simd reduction(+ : sum, first)
    for (int64_t i = begin; i < end; ++i) {
      const float z = floored(kUnit ? x[i] - max : (x[i] - max) * it), p = exp_floored(z);
      e[i] = p;
      sum += p;
      first += kWithFirst ? p * z : 0.0f;
    }
  }
  return {sum, first};
}

// The same; a temperature of 1, the usual one, costs no multiplication.
template <bool kWithFirst>
FD_INLINE Moments exponentials(const float* x, int64_t n, float max, float it, float* e, Ahead ahead) {
  return it == 1.0f ? exponentials<kWithFirst, true>(x, n, max, it, e, ahead)
                    : exponentials<kWithFirst, false>(x, n, max, it, e, ahead);
}

// A pointwise function with its parameter fixed.
#define FD_BIND(function, parameter) \
  [a = parameter](float d, float p, float q) __attribute__((always_inline)) { return function(d, p, q, a); }

// z_x - z_y of two models, up to a constant `norm`.  Where the maxima are close, x - y keeps digits that x -
// x_max and y - y_max have each lost; where they are far apart it is the other way round.
// `apart` is x_max - y_max rounded like x - y, so that where both are at their maxima nothing is left of
// them.
struct Difference {
  float x_offset = 0.0f, y_offset = 0.0f, apart = 0.0f, rest, it;
  bool far;
  Difference(float x_max, float y_max, double norm, float it) : it(it) {
    const double shift = (static_cast<double>(x_max) - y_max) * it;
    far = shift < -8.0 || shift > 8.0;
    if (far) {
      x_offset = x_max;
      y_offset = y_max;
    } else {
      apart = x_max - y_max;
    }
    rest = static_cast<float>(norm);
  }
  float operator()(float x, float y) const { return (((x - x_offset) - (y - y_offset)) - apart) * it - rest; }
  float near(float x, float y) const { return ((x - y) - apart) * it - rest; }
};

struct PairSums {
  double forward = 0.0, reverse = 0.0;
};

// Sums of two functions of (d, k p, q) over a chunk.  In short strands: a thousand equal terms added to one
// large one would all be rounded the same way.
template <bool kFar, typename F, typename R>
FD_INLINE PairSums pair_sums(F forward_term, R reverse_term, const float* x, const float* y, const float* p,
                             const float* q, int64_t n, float k, Difference difference, Ahead x_ahead,
                             Ahead y_ahead) {
  PairSums total;
  for (int64_t begin = 0; begin < n; begin += kStrand) {
    const int64_t end = std::min(begin + kStrand, n);
    float forward = 0.0f, reverse = 0.0f;
    fetch(x_ahead, begin, end);
    fetch(y_ahead, begin, end);
#pragma omp simd reduction(+ : forward, reverse)
    for (int64_t i = begin; i < end; ++i) {
      const float pi = k * p[i], qi = q[i], d = kFar ? difference(x[i], y[i]) : difference.near(x[i], y[i]);
      forward += forward_term(d, pi, qi);
      reverse += reverse_term(d, pi, qi);
    }
    total.forward += forward;
    total.reverse += reverse;
  }
  return total;
}

// The sum of e^power over a chunk, without the one maximum that the state counts apart if it was `raised`
// here.
FD_INLINE double beside_maximum(const float* x, const float* e, int64_t n, float max, bool raised,
                                bool squared) {
  float sum = 0.0f, top = 0.0f;
#pragma omp simd reduction(+ : sum, top)
  for (int64_t i = 0; i < n; ++i) {
    const bool is_top = x[i] == max;
    top += is_top ? 1.0f : 0.0f;
    sum += is_top ? 0.0f : squared ? e[i] * e[i] : e[i];
  }
  return static_cast<double>(sum) + (static_cast<double>(top) - (raised ? 1.0 : 0.0));
}

// Log-probabilities against final normalisers.
struct Frame {
  float max, log_norm;
  explicit Frame(const Normaliser& n) : max(offset(n)), log_norm(static_cast<float>(log_sum(n))) {
    if (n.max == -INFINITY) log_norm = NAN;
  }
};

// The chunk with the row's maximum as the normaliser has it.  A product of hidden states that was formed once
// more, in another shape, may have rounded it otherwise; where one entry has most of the mass the digits of
// its gradient are in that difference.
FD_INLINE const float* settled(const float* x, int64_t n, const Normaliser& normaliser, float it,
                               float* buffer) {
  const float max = offset(normaliser), cut = above_others(normaliser, it);
  if (cut == INFINITY) return x;
  const float top = maximum(x, n);
  if (!(top > cut) || top == max) return x;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = x[i] > cut ? max : x[i];
  return buffer;
}

// p, q and d = log p - log q of one chunk.  d is formed from the difference of the logits.
FD_INLINE void compare(const float* x, const float* y, int64_t n, const RowState& s, float it, float* p,
                       float* q, float* d) {
  const Frame student(s.student), teacher(s.teacher);
  const float x_max = student.max, x_norm = student.log_norm, y_max = teacher.max, y_norm = teacher.log_norm;
  const bool nothing = s.student.max == -INFINITY || s.teacher.max == -INFINITY;
  const Difference difference(x_max, y_max, nothing ? NAN : log_sum(s.student) - log_sum(s.teacher), it);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    p[i] = exp((x[i] - x_max) * it - x_norm);
    q[i] = exp((y[i] - y_max) * it - y_norm);
    d[i] = difference(x[i], y[i]);
  }
}

template <typename V, typename P, typename Q>
FD_INLINE void add_sums_of(V value, P dlp, Q dlq, const float* d, const float* p, const float* q, int64_t n,
                           double* sums) {
  for (int64_t begin = 0; begin < n; begin += kStrand) {
    const int64_t end = std::min(begin + kStrand, n);
    float sum = 0.0f, sum_p = 0.0f, sum_q = 0.0f;
#pragma omp simd reduction(+ : sum, sum_p, sum_q)
    for (int64_t i = begin; i < end; ++i) {
      const float di = d[i], pi = p[i], qi = q[i];
      sum += value(di, pi, qi);
      sum_p += dlp(di, pi, qi);
      sum_q += dlq(di, pi, qi);
    }
    sums[0] += sum;
    sums[1] += sum_p;
    sums[2] += sum_q;
  }
}

template <typename F>
FD_INLINE void add_to(F f, float gain, const float* d, const float* p, const float* q, int64_t n,
                      float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float di = d[i], pi = p[i], qi = q[i];
    out[i] += gain * f(di, pi, qi);
  }
}

FD_INLINE void add_sums(int32_t number, float a, const float* d, const float* p, const float* q, int64_t n,
                        double* sums) {
  switch (number) {
#define FD_CASE(name)                                                                                        \
  case k_##name:                                                                                             \
    add_sums_of(FD_BIND(name##_value, a), FD_BIND(name##_dlp, a), FD_BIND(name##_dlq, a), d, p, q, n, sums); \
    break;
    FD_DIVERGENCES(FD_CASE)
#undef FD_CASE
  }
}

FD_INLINE void add_gradients(int32_t number, float a, float gain, const float* d, const float* p,
                             const float* q, int64_t n, float* student, float* teacher) {
  switch (number) {
#define FD_CASE(name)                                                       \
  case k_##name:                                                            \
    add_to(FD_BIND(name##_dlp, a), gain, d, p, q, n, student);              \
    if (teacher) add_to(FD_BIND(name##_dlq, a), gain, d, p, q, n, teacher); \
    break;
    FD_DIVERGENCES(FD_CASE)
#undef FD_CASE
  }
}

// What does not depend on the teacher: p (c0 + c1 lp + c2 lp^2 + c3 p) + c4, written, or added where `p` is
// given.
FD_INLINE void polynomial(const float* x, int64_t n, const Frame& frame, float it, float c0, const float* c,
                          const float* p, float* dx) {
  const float max = frame.max, norm = frame.log_norm, c1 = c[1], c2 = c[2], c3 = c[3], c4 = c[4];
  const bool flat = c1 == 0.0f && c2 == 0.0f && c3 == 0.0f && c4 == 0.0f;
  if (p && flat) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dx[i] += c0 * p[i];
  } else if (p) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float lp = floored((x[i] - max) * it - norm);
      dx[i] += p[i] * (c0 + lp * (c1 + lp * c2) + c3 * p[i]) + c4;
    }
  } else if (flat) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dx[i] = c0 * exp((x[i] - max) * it - norm);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float lp = floored((x[i] - max) * it - norm), pi = exp_floored(lp);
      dx[i] = pi * (c0 + lp * (c1 + lp * c2) + c3 * pi) + c4;
    }
  }
}

// Back through t(x): out = g * dt/dx / temperature, and exactly 0 where the logit is -inf.  The softcap's
// slope 1 / cosh^2 comes from its argument: near saturation 1 - tanh^2 has no digits.  `out` may be `raw`.
template <typename T>
FD_INLINE void store(const float* g, const float* t, const T* raw, int64_t n, float it, float scale,
                     float softcap, T* out) {
  const float factor = it * scale;
  if (softcap == 0.0f) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow(t[i] == -INFINITY ? 0.0f : g[i] * factor, out[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float e = exp(-2.0f * abs(widen(raw[i]) * scale / softcap)), whole = 1.0f + e;
      narrow(g[i] * (factor * (4.0f * e / (whole * whole))), out[i]);
    }
  }
}

FD_INLINE void store(const Logits& side, const float* g, const float* t, int64_t n, float it,
                     const Target& target, int64_t row, int64_t column) {
  const int64_t from = first_of(side, row) + column, at = first_of(target, row) + column;
  const auto as = [&](auto kind) __attribute__((always_inline)) {
    using T = decltype(kind);
    store(g, t, static_cast<const T*>(side.data) + from, n, it, side.scale, side.softcap,
          static_cast<T*>(target.data) + at);
  };
  switch (side.dtype) {
    case kFloat32:
      return as(float{});
    case kFloat16:
      return as(_Float16{});
    default:
      return as(BFloat16{});
  }
}

}  // namespace

FD_TARGET void accumulate_row(const Accumulate& args, int64_t row) {
  const Tile& tile = args.tile;
  const bool pair = tile.teacher.data != nullptr;
  const float it = tile.inverse_temperature[row];
  RowState s = args.state[row];
  const int32_t which = pair ? args.wanted & (kForward | kReverse) : 0;
  const int64_t parts = which ? 2 : 1;  // loops over a model's chunk that fetch
  alignas(64) float x_buffer[kChunk], y_buffer[kChunk], p[kChunk], q[kChunk];

  for (int64_t c = 0; c < tile.columns; c += kChunk) {
    const int64_t n = std::min(kChunk, tile.columns - c);
    const float* x = chunk(tile.student, row, c, n, x_buffer);
    const float* y = pair ? chunk(tile.teacher, row, c, n, y_buffer) : nullptr;
    const float x_top = maximum(x, n), y_top = pair ? maximum(y, n) : -INFINITY;
    const bool x_raised = x_top > s.student.max, y_raised = y_top > s.teacher.max;
    if (x_raised && (args.wanted & kArgmax))
      s.argmax = static_cast<double>(tile.first_column + c + (std::find(x, x + n, x_top) - x));
    if (x_raised || y_raised)
      raise(s, std::max<double>(x_top, s.student.max), std::max<double>(y_top, s.teacher.max), it);

    // Only a chunk that holds the maximum needs the careful sum.
    const float x_max = offset(s.student);
    const Ahead ahead{address(tile.student, row, c + n), width(tile.student) / parts};
    const Moments moments = args.wanted & kFirst ? exponentials<true>(x, n, x_max, it, p, ahead)
                                                 : exponentials<false>(x, n, x_max, it, p, ahead);
    const double x_tail = x_top == x_max ? beside_maximum(x, p, n, x_max, x_raised, false) : moments.sum;
    s.student.tail += x_tail;
    s.first += moments.first;
    if (args.wanted & kSecond) {
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) {
        const float z = floored((x[i] - x_max) * it);
        sum += p[i] * z * z;
      }
      s.second += sum;
    }
    if (args.wanted & kSquares) s.squares += beside_maximum(x, p, n, x_max, x_raised, true);
    if (args.wanted & kSum) {
      for (int64_t begin = 0; begin < n; begin += kStrand) {
        const int64_t end = std::min(begin + kStrand, n);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = begin; i < end; ++i) sum += x[i];
        s.sum += sum;
      }
    }
    if (pair) {
      const float y_max = offset(s.teacher);
      const Ahead y_ahead{address(tile.teacher, row, c + n), width(tile.teacher) / parts};
      const Moments taught = exponentials<false>(y, n, y_max, it, q, y_ahead);
      const double y_tail = y_top == y_max ? beside_maximum(y, q, n, y_max, y_raised, false) : taught.sum;
      s.teacher.tail += y_tail;
      const double own_p = x_tail + (x_raised ? 1.0 : 0.0), own_q = y_tail + (y_raised ? 1.0 : 0.0);
      const double all_p = total(s.student), all_q = total(s.teacher);
      if (which && (all_p == 0.0 || all_q == 0.0)) {
        // A model without any probability so far: the terms are the other's exponentials, or infinite.  The
        // normaliser's own sum, so that it leaves without a rest when that is taken off.
        s.forward += all_q == 0.0 ? own_p : own_q > 0.0 ? INFINITY : 0.0;
        s.reverse += all_p == 0.0 ? own_q : own_p > 0.0 ? INFINITY : 0.0;
      } else if (which) {
        // Summed with p scaled by k, so that both models weigh about the same and no large terms cancel. Then
        // d is off by log k, which is put right in double.
        const double ratio = all_q / all_p;
        const float k = ratio > 1e-30 && ratio < 1e30 ? static_cast<float>(ratio) : 1.0f;
        const double log_k = std::log(static_cast<double>(k));
        const Difference difference(x_max, y_max, -log_k, it);
        const Ahead x_rest{ahead.from + n * ahead.bytes, ahead.bytes};
        const Ahead y_rest{y_ahead.from + n * y_ahead.bytes, y_ahead.bytes};
        const auto sums = [&](auto forward, auto reverse) __attribute__((always_inline)) {
          return difference.far
                     ? pair_sums<true>(forward, reverse, x, y, p, q, n, k, difference, x_rest, y_rest)
                     : pair_sums<false>(forward, reverse, x, y, p, q, n, k, difference, x_rest, y_rest);
        };
        const auto none = [](float, float, float) __attribute__((always_inline)) { return 0.0f; };
        const auto forward = FD_BIND(forward_kl_value, 0.0f);
        const auto reverse = FD_BIND(reverse_kl_value, 0.0f);
        const PairSums t = which == kForward   ? sums(forward, none)
                           : which == kReverse ? sums(none, reverse)
                                               : sums(forward, reverse);
        s.forward += shift_kl(t.forward, log_k, 0.0, k * own_p, own_q);
        s.reverse += shift_kl(t.reverse, 0.0, log_k, own_q, k * own_p);
      }
    }
    for (int64_t k = 0; k < tile.labels_per_row; ++k) {
      const int64_t at = tile.labels[row * tile.labels_per_row + k] - tile.first_column - c;
      if (at >= 0 && at < n) args.label_logits[row * tile.labels_per_row + k] = x[at];
    }
  }
  args.state[row] = s;
}

FD_TARGET void compare_row(const Compare& args, int64_t row) {
  const Tile& tile = args.tile;
  const RowState& s = args.state[row];
  const float it = tile.inverse_temperature[row];
  const int64_t k_end = args.rank ? tile.labels_per_row : 0;
  double* sums = args.sums + row * args.terms.count * 3;
  alignas(64) float x_buffer[kChunk], y_buffer[kChunk], p[kChunk], q[kChunk], d[kChunk];

  for (int64_t c = 0; c < tile.columns; c += kChunk) {
    const int64_t n = std::min(kChunk, tile.columns - c);
    const float* x = chunk(tile.student, row, c, n, x_buffer);
    if (args.terms.count) {
      const float* y = chunk(tile.teacher, row, c, n, y_buffer);
      compare(x, y, n, s, it, p, q, d);
      for (int64_t i = 0; i < args.terms.count; ++i)
        add_sums(args.terms.divergence[i], args.terms.parameter[i], d, p, q, n, sums + 3 * i);
    }
    for (int64_t k = 0; k < k_end; ++k) {
      const float label = args.label_logits[row * tile.labels_per_row + k];
      int32_t above = 0;
#pragma omp simd reduction(+ : above)
      for (int64_t i = 0; i < n; ++i) above += x[i] > label ? 1 : 0;
      args.rank[row * tile.labels_per_row + k] += above;
    }
  }
}

FD_TARGET void gradient_row(const Gradient& args, int64_t row) {
  const Tile& tile = args.tile;
  const RowState& s = args.state[row];
  const bool pair = args.terms.count > 0 || args.teacher.data;
  const float it = tile.inverse_temperature[row];
  const float* c_ = args.coefficients + row * (6 + args.terms.count);
  const float *gains = c_ + 6, c1 = c_[1], c2 = c_[2], c3 = c_[3], c4 = c_[4], e0 = c_[5];
  const int64_t* labels = tile.labels + row * tile.labels_per_row;
  const float* label_gains = args.label_gains + row * tile.labels_per_row;
  double label_total = 0.0;
  for (int64_t k = 0; k < tile.labels_per_row; ++k) label_total += label_gains[k];
  const float c0 = static_cast<float>(c_[0] - label_total);
  const Frame frame(s.student);
  const double log_norm = log_sum(s.student);
  alignas(64) float x_buffer[kChunk], y_buffer[kChunk], p[kChunk], q[kChunk], d[kChunk], dx[kChunk],
      dy[kChunk];

  for (int64_t c = 0; c < tile.columns; c += kChunk) {
    const int64_t n = std::min(kChunk, tile.columns - c);
    const float* x = settled(chunk(tile.student, row, c, n, x_buffer), n, s.student, it, x_buffer);
    const float* y =
        pair ? settled(chunk(tile.teacher, row, c, n, y_buffer), n, s.teacher, it, y_buffer) : nullptr;
    prefetch(address(tile.student, row, c + n), n * width(tile.student));
    if (pair) {
      prefetch(address(tile.teacher, row, c + n), n * width(tile.teacher));
      compare(x, y, n, s, it, p, q, d);
      std::fill(dx, dx + n, 0.0f);
      if (args.teacher.data) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) dy[i] = e0 == 0.0f ? 0.0f : e0 * q[i];
      }
      for (int64_t i = 0; i < args.terms.count; ++i)
        add_gradients(args.terms.divergence[i], args.terms.parameter[i], gains[i], d, p, q, n, dx,
                      args.teacher.data ? dy : nullptr);
      if (args.teacher.data) store(tile.teacher, dy, y, n, it, args.teacher, row, c);
    }
    if (!args.student.data) continue;
    // The label's entry has a factor 1 - p that float cannot hold when p is near 1: it is redone in double
    // below.
    struct Exact {
      int64_t at;
      float value;
    };
    static thread_local std::vector<Exact> exact;
    exact.clear();
    for (int64_t k = 0; k < tile.labels_per_row; ++k) {
      const int64_t at = labels[k] - tile.first_column - c;
      if (at < 0 || at >= n) continue;
      double same = 0.0;
      for (int64_t j = 0; j < tile.labels_per_row; ++j) same += labels[j] == labels[k] ? label_gains[j] : 0.0;
      const double lp = (static_cast<double>(x[at]) - s.student.max) * it - log_norm, pd = std::exp(lp);
      const double poly = pd == 0.0 ? 0.0 : pd * (c_[0] + lp * (c1 + lp * c2) + c3 * pd);
      exact.push_back({at, static_cast<float>((pair ? dx[at] : 0.0f) + poly + c4 - same * std::expm1(lp) -
                                              (label_total - same) * pd)});
    }
    polynomial(x, n, frame, it, c0, c_, pair ? p : nullptr, dx);
    for (const Exact& e : exact) dx[e.at] = e.value;
    store(tile.student, dx, x, n, it, args.student, row, c);
  }
}

const RowKernels kernels{accumulate_row, compare_row, gradient_row};

}  // namespace fd::FD_ISA
