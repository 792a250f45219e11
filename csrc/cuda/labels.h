// Gradients at a row's labels, where 1 - p = -expm1(log p) keeps its digits.
#pragma once
#include "elements.h"
#include "sink.h"

namespace fd {

// Formed before the first gradient is written, as that may be over the logits, and written last.
struct Labels {
  const int64_t* labels = nullptr;  // [count]
  const float* gains = nullptr;     // [count]
  int64_t count = 0, first_column = 0;
  int columns = 0;         // from `first_column` on: other labels are somebody else's
  float* exact = nullptr;  // [count] in shared memory

  FD_DEVICE bool here(int64_t k) const {
    return labels[k] >= first_column && labels[k] < first_column + columns;
  }
  FD_DEVICE int place(int64_t k) const { return static_cast<int>(labels[k] - first_column); }

  // slope(column, t, same, g) gives log p, and in g what does not belong to the `same` gain of this label.
  template <typename Row, typename Slope>
  FD_DEVICE void form(const Row& x, float it, const Slope& slope) const {
#pragma unroll 1
    for (int64_t k = thread(); k < count; k += threads()) {
      if (!here(k)) continue;
      float t[1] = {x.at(place(k))}, g[1], same = 0.0f;
      for (int64_t l = 0; l < count; ++l) same += labels[l] == labels[k] ? gains[l] : 0.0f;
      const float lp = slope(place(k), t[0], same, g[0]);
      g[0] -= same == 0.0f ? 0.0f : same * expm1f(lp);
      if (x.softcap != 0.0f) g[0] *= x.cap_slope(x.raw_at(place(k)));
      taken_back(x, it, t, g);
      exact[k] = g[0];
    }
    if (count) sync();
  }

  FD_DEVICE void write(const Sink& to) const {
    if (count) sync();
    for (int64_t k = thread(); k < count; k += threads())
      if (here(k)) to.put(place(k), exact[k]);
  }
};

}  // namespace fd
