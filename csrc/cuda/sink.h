// Where gradients go.
#pragma once
#include "elements.h"

namespace fd {

// The other direction of Row: packs of gradients, from the same column on.
struct Sink {
  char* first = nullptr;
  int32_t dtype = kFloat32;
  FD_DEVICE Sink(const Target& target, int64_t row)
      : first(static_cast<char*>(target.data) + first_of(target, row) * (target.dtype == kFloat32 ? 4 : 2)),
        dtype(target.dtype) {}

  // A pack, or the part of it that lies in the row.
  template <bool kWhole, typename T>
  FD_DEVICE void store(const Row<T>& row, int column, const float (&g)[kPack<T>]) const {
    if constexpr (!same_type<T, Any>) {
      char* const to = first + static_cast<int64_t>(column) * static_cast<int64_t>(sizeof(T));
      if ((sizeof(T) == 2 || dtype == kFloat32) && (kWhole || row.holds(column)) && misalignment(to) == 0) {
        *reinterpret_cast<uint4*>(to) = packed(g, T{});
        return;
      }
    }
    if (dtype == kFloat32)
      each(row, column, g, float{});
    else if (dtype == kFloat16)
      each(row, column, g, Float16{});
    else
      each(row, column, g, BFloat16{});
  }

  template <int N, typename O>
  FD_DEVICE void each(const Columns& row, int column, const float (&g)[N], O kind) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (column + i >= 0 && column + i < row.columns) put(column + i, g[i], kind);
  }
  FD_DEVICE void put(int column, float g) const {
    if (dtype == kFloat32)
      put(column, g, float{});
    else if (dtype == kFloat16)
      put(column, g, Float16{});
    else
      put(column, g, BFloat16{});
  }
  FD_DEVICE void put(int column, float g, float) const { reinterpret_cast<float*>(first)[column] = g; }
  template <typename O>
  FD_DEVICE void put(int column, float g, O kind) const {
    reinterpret_cast<uint16_t*>(first)[column] = static_cast<uint16_t>(narrow_pair(g, 0.0f, kind));
  }
};

// Gradients times the slope of the softcap at a pack of logits.
template <typename Row, int N>
FD_DEVICE void through_softcap(const Row& row, const uint4& raw, float (&g)[N]) {
  if (row.softcap == 0.0f) return;
  float x[N];
  row.unpacked(raw, x);
#pragma unroll
  for (int i = 0; i < N; ++i) g[i] *= row.cap_slope(x[i]);
}

// Gradients with respect to z taken back through temperature and scale; 0 at -inf.
template <int N>
FD_DEVICE void taken_back(const Columns& row, float it, const float (&t)[N], float (&g)[N]) {
  const float slope = it * row.scale;
#pragma unroll
  for (int i = 0; i < N; ++i) g[i] = t[i] == -INFINITY ? 0.0f : g[i] * slope;
}

}  // namespace fd
