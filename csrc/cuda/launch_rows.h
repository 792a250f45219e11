// The row kernels on a GPU: what a launch takes, and the launches.  Each returns a CUDA error, 0 for none,
// and kNotHere for a set of outputs that has no kernel.
#pragma once
#include "../rows.h"
#include "queue.h"

namespace fd {

constexpr int kNotHere = -1;
constexpr int64_t kMostColumns = 1 << 30;  // a row's columns are counted in 32 bits

// One launch: sums of a tile (`accumulate`), with them the sums of one divergence that needs finished
// normalisers
// (`divergence`), or those alone (`known`).
struct Statistics {
  Tile tile;
  int32_t wanted = 0;       // as in Accumulate
  int32_t divergence = -1;  // a number of FD_DIVERGENCES, or none
  float parameter = 0.0f;
  bool fresh = false;             // the tile is its rows' first: the state is written, not read
  bool known = false;             // the state is finished
  RowState* state = nullptr;      // [rows]
  float* label_logits = nullptr;  // [rows, labels_per_row]
  double* sums = nullptr;         // [rows, sums_per_row], 3 of each are added to: value, dlp, dlq
  int64_t sums_per_row = 0;
};

struct Rank {
  Tile tile;
  const float* label_logits = nullptr;  // [rows, labels_per_row]
  int64_t* rank = nullptr;              // [rows, labels_per_row] entries above the label, added to
};

// Statistics of one model and the gradient of the weighted sum of its outputs, at once.
struct ValueAndGradient {
  Tile tile;
  RowState* state = nullptr;            // [rows], written
  float* label_logits = nullptr;        // [rows, labels_per_row]
  const float* of_log_prob = nullptr;   // [rows, labels_per_row] weights
  const float* of_entropy = nullptr;    // [rows]
  const float* of_logsumexp = nullptr;  // [rows]
  Target gradient;                      // may be the logits, in their dtype
};

constexpr int kMostTerms = 8;

// As Gradient, with the divergences in place.  The tile's labels say which rows take part, others have the
// gains.
struct RowGradient {
  Tile tile;
  int32_t divergences[kMostTerms] = {};
  float parameters[kMostTerms] = {};
  int32_t terms = 0;
  const RowState* state = nullptr;
  const float* coefficients = nullptr;   // [rows, 6 + terms]
  const int64_t* gain_labels = nullptr;  // [rows, gains_per_row]
  const float* label_gains = nullptr;    // [rows, gains_per_row]
  int64_t gains_per_row = 0;
  Target student, teacher;
};

int statistics(const Statistics& args, const Queue& queue);
int rank(const Rank& args, const Queue& queue);
int gradient(const RowGradient& args, const Queue& queue);
int value_and_gradient(const ValueAndGradient& args, const Queue& queue);  // kNotHere: the row does not fit

}  // namespace fd
