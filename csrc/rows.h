// The seam between kernels and binding: plain structs, and functions over one row.  No torch, no Python, no
// threads.
#pragma once
#include <cstdint>

#include "language.h"

namespace fd {

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// One model's logits: rows of a tensor of any strides, unit stride along the vocabulary.  Kernels read
// t = softcap * tanh(scale * x / softcap), or scale * x where softcap is 0.
struct Logits {
  const void* data = nullptr;        // null: there is no such model
  const int64_t* offsets = nullptr;  // [rows] first element of each row, or null:
  int64_t stride = 0;                // elements from a row to the next
  int32_t dtype = kFloat32;
  float scale = 1.0f, softcap = 0.0f;
};

// Where a gradient goes: rows as those of logits.
struct Target {
  void* data = nullptr;  // null: nobody wants it
  const int64_t* offsets = nullptr;
  int64_t stride = 0;
  int32_t dtype = kFloat32;
};

// The first element of a row.
template <typename Rows>
FD_INLINE int64_t first_of(const Rows& side, int64_t row) {
  return side.offsets ? side.offsets[row] : row * side.stride;
}

// A tile: columns [first_column, first_column + columns) of some rows of the vocabulary.
struct Tile {
  Logits student, teacher;
  int64_t rows = 0, columns = 0, first_column = 0;
  const float* inverse_temperature = nullptr;  // [rows]
  const int64_t* labels = nullptr;             // [rows, labels_per_row]; outside the tile: nothing happens
  int64_t labels_per_row = 0;
  // Rows that do not take part: masked, or with labels that are all ignored.  The CPU's kernels never see
  // one.
  const uint8_t* mask = nullptr;  // [rows] 0: masked; or null
  int64_t ignore_index = 0;
};

// What `accumulate` sums beside the normalisers, as bits.
enum Wanted : int32_t {
  kFirst = 1,
  kSecond = 2,
  kSquares = 4,
  kSum = 8,
  kArgmax = 16,
  kForward = 32,
  kReverse = 64
};

// Row statistics so far.  All fields are double and their order is fastdiv/statistics.py's STATE.  With
// z = (t - max) / temperature and e = exp(z): `tail` = sum e - 1, the sum over every entry but one maximum,
// so that log(sum e) = log1p(tail) keeps its digits when one entry has nearly all the mass.
struct Normaliser {
  double max, tail;
};
struct RowState {
  Normaliser student;
  double first, second;  // sum e z, sum e z^2
  double squares;        // sum e^2 - 1
  double sum;            // sum t
  double argmax;
  Normaliser teacher;
  double forward, reverse;  // sum of forward_kl_value and reverse_kl_value on the unnormalised e
};

struct Accumulate {
  Tile tile;
  int32_t wanted = 0;
  RowState* state = nullptr;      // [rows]
  float* label_logits = nullptr;  // [rows, labels_per_row] t at each label
};

// Divergences that need the normalisers first, by number (FD_DIVERGENCES), with their parameter.
struct Terms {
  const int32_t* divergence = nullptr;
  const float* parameter = nullptr;
  int64_t count = 0;
};

struct Compare {
  Tile tile;
  Terms terms;
  const RowState* state = nullptr;
  const float* label_logits = nullptr;  // with `rank`
  double* sums = nullptr;               // [rows, terms.count, 3] sum of value, dlp, dlq
  int64_t* rank = nullptr;              // [rows, labels_per_row] entries above the label, or null
};

// Student gradient with respect to the logits x, z = t / temperature, lp = log p:
//   dL/dz = p (c0 + c1 lp + c2 lp^2 + c3 p) + c4 + sum_i gain_i dlp_i + sum_k label_gain_k ([v = label_k] -
//   p)
// Teacher: dL/dz = e0 q + sum_i gain_i dlq_i.
struct Gradient {
  Tile tile;
  Terms terms;
  const RowState* state = nullptr;
  const float* coefficients = nullptr;  // [rows, 6 + terms.count]: c0 c1 c2 c3 c4 e0 gain...
  const float* label_gains = nullptr;   // [rows, labels_per_row]
  Target student, teacher;              // may be the logits themselves, in the logits' dtype
};

// The kernels, compiled for one instruction set.
struct RowKernels {
  void (*accumulate)(const Accumulate& args, int64_t row);
  void (*compare)(const Compare& args, int64_t row);
  void (*gradient)(const Gradient& args, int64_t row);
};
namespace base {
extern const RowKernels kernels;
}
namespace avx2 {  // on x86-64
extern const RowKernels kernels;
}
namespace avx512 {  // on x86-64
extern const RowKernels kernels;
}

}  // namespace fd
