// What Python sees of the CUDA row kernels; fastdiv/backends/cuda says what the addresses are.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch_rows.h"

namespace fd {

const char* error_text(int error);  // of a cudaError_t
void set_schedule(int64_t seed);    // of threads in lock-step

inline void check(int error, const std::string& what) {
  if (error == 0) return;
  if (error == kNotHere) throw std::invalid_argument(what + ": no CUDA kernel was built for this");
  throw std::runtime_error("CUDA kernel " + what + ": " + error_text(error) +
                           " (this build has code for " FD_CUDA_ARCHITECTURES ")");
}

inline std::string named(const char* kernel, const Tile& tile) {
  static const char* const dtypes[] = {"float32", "float16", "bfloat16"};
  return std::string(kernel) + " on " + std::to_string(tile.rows) + " x " + std::to_string(tile.columns) +
         " " + dtypes[tile.student.dtype] + (tile.teacher.data ? ", two models" : "");
}

inline void bind_rows(pybind11::module_& cuda) {
  namespace py = pybind11;
  using Address = uintptr_t;
  using Release = py::call_guard<py::gil_scoped_release>;
  const auto at = [](Address address) { return reinterpret_cast<void*>(address); };

  cuda.def(
      "statistics",
      [at](const Tile& tile, int32_t wanted, int32_t divergence, float parameter, bool fresh, bool known,
           Address state, Address label_logits, Address sums, int64_t sums_per_row, int device,
           Address stream) {
        const Statistics args{tile,
                              wanted,
                              divergence,
                              parameter,
                              fresh,
                              known,
                              static_cast<RowState*>(at(state)),
                              static_cast<float*>(at(label_logits)),
                              static_cast<double*>(at(sums)),
                              sums_per_row};
        check(statistics(args, {device, at(stream)}), named("statistics", tile));
      },
      Release());

  cuda.def(
      "rank",
      [at](const Tile& tile, Address label_logits, Address rank_, int device, Address stream) {
        const Rank args{tile, static_cast<const float*>(at(label_logits)), static_cast<int64_t*>(at(rank_))};
        check(rank(args, {device, at(stream)}), named("rank", tile));
      },
      Release());

  cuda.def(
      "gradient",
      [at](const Tile& tile, const std::vector<int32_t>& divergences, const std::vector<float>& parameters,
           Address state, Address coefficients, Address gain_labels, Address label_gains,
           int64_t gains_per_row, const Target& student, const Target& teacher, int device, Address stream) {
        RowGradient args;
        args.tile = tile;
        args.terms = static_cast<int32_t>(divergences.size());
        if (args.terms > kMostTerms) throw std::invalid_argument("gradient: too many divergences");
        std::copy(divergences.begin(), divergences.end(), args.divergences);
        std::copy(parameters.begin(), parameters.end(), args.parameters);
        args.state = static_cast<const RowState*>(at(state));
        args.coefficients = static_cast<const float*>(at(coefficients));
        args.gain_labels = static_cast<const int64_t*>(at(gain_labels));
        args.gains_per_row = gains_per_row;
        args.label_gains = static_cast<const float*>(at(label_gains));
        args.student = student;
        args.teacher = teacher;
        check(gradient(args, {device, at(stream)}), named("gradient", tile));
      },
      Release());

  cuda.def(
      "value_and_gradient",
      [at](const Tile& tile, Address state, Address label_logits, Address of_log_prob, Address of_entropy,
           Address of_logsumexp, const Target& gradient, int device, Address stream) {
        const ValueAndGradient args{tile,
                                    static_cast<RowState*>(at(state)),
                                    static_cast<float*>(at(label_logits)),
                                    static_cast<const float*>(at(of_log_prob)),
                                    static_cast<const float*>(at(of_entropy)),
                                    static_cast<const float*>(at(of_logsumexp)),
                                    gradient};
        const int error = value_and_gradient(args, {device, at(stream)});
        if (error != kNotHere) check(error, named("value_and_gradient", tile));
        return error != kNotHere;
      },
      Release());

  cuda.attr("architectures") = FD_CUDA_ARCHITECTURES;
#if defined(FD_LOCKSTEP)
  cuda.def("schedule", &set_schedule);
#endif
}

}  // namespace fd
