// Sums of a row's exponentials in one look: a thread's, then those of all threads.
#pragma once
#include "elements.h"
#include "reduce.h"

namespace fd {

constexpr float kLog2E = 1.44269504f;

// What is summed beside the normaliser: sum e z; or everything that RowState has of one model.
enum class Moments { kNone, kFirst, kAll };

// A thread's sums over the logits it has seen.  Its largest stays out of them: of each pack the smaller ones
// are added, so the state's `tail` needs no search for the maximum.  Exponents are in units of log 2,
// relative to `from`, which follows the maximum in steps: while it is at most `slack` below, nothing is
// scaled again.
template <Moments kMoments>
struct Online {
  static constexpr bool kFirst = kMoments != Moments::kNone, kAll = kMoments == Moments::kAll;
  float max = -INFINITY, from = -3.4e38f;
  Sum<true> tail, first, second, squares;
  Sum<false> sum;
  int argmax = 0;

  // 2^-200 is 0, and 0 times -200 is 0; NaN stays NaN.
  FD_DEVICE static float bounded(float z) { return z < -200.0f ? -200.0f : z; }

  // Exponents are relative to `to` from here on.
  FD_DEVICE void move(float to, float it2) {
    const float d = bounded((from - to) * it2), f = exp2(d);
    if (kAll) {
      second.add(2.0f * d * first.value);
      second.add(d * d * tail.value);
      second.scale(f);
      squares.scale(f * f);
    }
    if (kFirst) {
      first.add(d * tail.value);
      first.scale(f);
    }
    tail.scale(f);
    from = to;
  }

  template <bool kWhole, int N>
  FD_DEVICE void add(const float (&x)[N], float it2, float slack, int column, int columns) {
    float low[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (kAll) argmax = x[i] > max ? column + i : argmax;
      low[i] = min_nan(x[i], max);
      max = max_nan(x[i], max);
    }
    if (!(max <= from + slack) && max != -INFINITY) move(max, it2);
    float e_sum = 0.0f, ez_sum = 0.0f, ezz_sum = 0.0f, ee_sum = 0.0f, x_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float z = bounded((low[i] - from) * it2), e = exp2(z);
      e_sum += e;
      if (kFirst) ez_sum += e * z;
      if (kAll) {
        ezz_sum += e * z * z;
        ee_sum += e * e;
        x_sum += kWhole || column + i < columns ? x[i] : 0.0f;
      }
    }
    tail.add(e_sum);
    if (kFirst) first.add(ez_sum);
    if (kAll) {
      second.add(ezz_sum);
      squares.add(ee_sum);
      sum.add(x_sum);
    }
  }

  // How many numbers of a thread are summed: tail, how many largest; first; second, squares, sum.
  static constexpr int kSums = kAll ? 6 : kFirst ? 3 : 2;

  // A thread's numbers, where `top` is the largest logit of all threads.
  FD_DEVICE void tell(float top, float it2, double* sums) {
    if (max != -INFINITY) move(max, it2);
    const bool any = max != -INFINITY, has_top = any && max == top;
    const double d = any ? bounded((max - top) * it2) : -200.0f, f = any ? exp2(static_cast<float>(d)) : 0.0f;
    const double held = has_top ? 0.0 : f;  // the thread's largest, unless it is the row's
    const double own = tail.total();
    sums[0] = f * own + held;
    sums[1] = has_top ? 1.0 : 0.0;
    if (kFirst) sums[2] = f * (first.total() + d * own) + held * d;
    if (kAll) {
      sums[3] = f * (second.total() + 2.0 * d * first.total() + d * d * own) + held * d * d;
      sums[4] = f * f * squares.total() + held * held;
      sums[5] = sum.total();
    }
  }

  // The lowest column with the largest logit, in each thread.  A float has no room for it, so in two steps.
  FD_DEVICE double lowest_top(float top, int begin) const {
    const int column = argmax + begin;
    bool may = max != -INFINITY && max == top;
    float high[1] = {may ? -static_cast<float>(column / 4096) : -INFINITY};
    const float own = high[0];
    cluster_max<kColumnsHigh>(high);
    may = may && own == high[0];
    float low[1] = {may ? -static_cast<float>(column % 4096) : -INFINITY};
    cluster_max<kColumnsLow>(low);
    return high[0] > -INFINITY ? -4096.0 * high[0] - low[0] : 0.0;
  }

  // The sums of all threads, as fields of a state.
  FD_DEVICE static void hand_in(float top, const double* sums, Normaliser& normaliser, RowState* moments) {
    constexpr double kLn2 = 0.6931471805599453;
    const double others = sums[1] > 1.0 ? sums[1] - 1.0 : 0.0;  // more logits like the largest
    normaliser = {top, top == INFINITY ? NAN : sums[0] + others};
    if (kFirst) moments->first = sums[2] * kLn2;
    if (kAll) {
      moments->second = sums[3] * kLn2 * kLn2;
      moments->squares = sums[4] + others;
      moments->sum = sums[5];
    }
  }
};

}  // namespace fd
