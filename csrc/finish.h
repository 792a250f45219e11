// What is done once a row: from its sums to an output, by the formulas of rowwise.h.
#pragma once
#include "rows.h"
#include "rowwise.h"

namespace fd {

// An output of one model, by its number (FD_OUTPUTS), or a divergence, where that is -1.
struct Output {
  int32_t number = -1;
  // Of a divergence: its place among those compared, or -1 for forward KL(q || p) + reverse KL(p || q).
  int64_t compared = -1;
  double forward = 0.0, reverse = 0.0;
};

// Rows whose sums are complete.
struct FinishedRows {
  int64_t rows = 0, labels_per_row = 0, compared_per_row = 0, ignore_index = 0;
  double vocabulary = 0.0;
  const float* inverse_temperature = nullptr;  // [rows]
  const int64_t* labels = nullptr;             // [rows, labels_per_row]
  const RowState* state = nullptr;             // [rows]
  const float* label_logits = nullptr;         // [rows, labels_per_row]
  const double* compared = nullptr;            // [rows, compared_per_row, 3]
  const int64_t* rank = nullptr;               // [rows, labels_per_row]
};

inline double divergence_of(const Output& output, const RowState& s, const double* compared) {
  if (output.compared >= 0) return compared[3 * output.compared];
  const double norm = rowwise::log_norm(s.student.max, s.student.tail);
  const double teacher_norm = rowwise::log_norm(s.teacher.max, s.teacher.tail);
  // A part that does not belong is left out, not multiplied by 0: it may be infinite.
  double value = 0.0;
  if (output.forward != 0.0)
    value += output.forward * rowwise::kl(s.forward, s.teacher.tail, norm - teacher_norm);
  if (output.reverse != 0.0)
    value += output.reverse * rowwise::kl(s.reverse, s.student.tail, teacher_norm - norm);
  return value;
}

// An output that is one number a row.
inline double of_row(const FinishedRows& args, const Output& output, int64_t row) {
  using namespace rowwise;
  const RowState& s = args.state[row];
  const double max = s.student.max, tail = s.student.tail, it = args.inverse_temperature[row];
  switch (output.number) {
    case k_entropy:
      return entropy(max, tail, s.first);
    case k_logsumexp:
      return logsumexp(max, tail, it);
    case k_log_sum_sq_probs:
      return log_sum_sq_probs(max, tail, s.squares);
    case k_varentropy:
      return varentropy(max, tail, s.first, s.second);
    case k_max_log_prob:
      return -log_norm(max, tail);
    case k_mean_logit:
      return s.sum / args.vocabulary * it;
    default:
      return divergence_of(output, s, args.compared + row * args.compared_per_row * 3);
  }
}

// An output of all rows to `to`, [rows] or [rows, labels_per_row]; 0 at ignored labels.
inline void finish(const FinishedRows& args, const Output& output, void* to, int threads) {
  const int64_t count = args.labels_per_row;
#pragma omp parallel for num_threads(threads) if (args.rows * (1 + count) > (1 << 13))
  for (int64_t row = 0; row < args.rows; ++row) {
    const RowState& s = args.state[row];
    const int64_t* labels = args.labels + row * count;
    const auto each_label = [&](auto* out, auto value) {
      for (int64_t k = 0; k < count; ++k)
        out[row * count + k] = labels[k] == args.ignore_index ? decltype(value(k)){} : value(k);
    };
    switch (output.number) {
      case rowwise::k_log_prob: {
        const double it = args.inverse_temperature[row];
        const float* logits = args.label_logits + row * count;
        each_label(static_cast<float*>(to), [&](int64_t k) {
          return static_cast<float>(rowwise::log_prob(s.student.max, s.student.tail, it, logits[k]));
        });
        break;
      }
      case rowwise::k_is_top1:
        each_label(static_cast<bool*>(to), [&](int64_t k) { return labels[k] == s.argmax; });
        break;
      case rowwise::k_rank:
        each_label(static_cast<int64_t*>(to), [&](int64_t k) { return args.rank[row * count + k]; });
        break;
      case rowwise::k_argmax:
        static_cast<int64_t*>(to)[row] = static_cast<int64_t>(s.argmax);
        break;
      default:
        static_cast<float*>(to)[row] = static_cast<float>(of_row(args, output, row));
    }
  }
}

}  // namespace fd
