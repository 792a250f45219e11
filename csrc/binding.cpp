// The one place that knows Python.  Tensors come as addresses; what they mean is checked in
// fastdiv/backends/native.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "finish.h"
#include "isa.h"
#include "pointwise.h"
#include "rows.h"
#if defined(FD_CUDA)
#include "cuda/bind_rows.h"
#include "cuda/bind_tokens.h"
#endif

// The name of the module: another one has the CUDA kernels in lock-step on a CPU.
#if !defined(FD_MODULE)
#define FD_MODULE _C
#endif

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Rows are independent and each is one thread's: results do not depend on the number of threads.  A thread
// takes neighbours, because the end of a row fetches what follows it in memory.
template <typename Args>
void for_each_row(void (*kernel)(const Args&, int64_t), const Args& args, int threads) {
  const int64_t rows = args.tile.rows;
  const bool worthwhile = rows * args.tile.columns > (1 << 15);  // waking a thread costs some microseconds
  const int64_t share = std::clamp<int64_t>(rows / (8 * threads), 1, 16);
#pragma omp parallel for schedule(dynamic, share) num_threads(threads) if (worthwhile)
  for (int64_t row = 0; row < rows; ++row) kernel(args, row);
}

fd::Terms terms(const std::vector<int32_t>& divergences, const std::vector<float>& parameters) {
  return {divergences.data(), parameters.data(), static_cast<int64_t>(divergences.size())};
}

}  // namespace

PYBIND11_MODULE(FD_MODULE, m) {
  using Release = py::call_guard<py::gil_scoped_release>;

  // Local, as two modules of a process may have them.
  py::class_<fd::Logits>(m, "Logits", py::module_local())
      .def(py::init([](Address data, Address offsets, int64_t stride, int32_t dtype, float scale,
                       float softcap) {
        return fd::Logits{at<const void>(data), at<const int64_t>(offsets), stride, dtype, scale, softcap};
      }));

  py::class_<fd::Target>(m, "Target", py::module_local())
      .def(py::init([](Address data, Address offsets, int64_t stride, int32_t dtype) {
        return fd::Target{at<void>(data), at<const int64_t>(offsets), stride, dtype};
      }));

  py::class_<fd::Tile>(m, "Tile", py::module_local())
      .def(py::init([](const fd::Logits& student, const fd::Logits& teacher, int64_t rows, int64_t columns,
                       int64_t first_column, Address inverse_temperature, Address labels,
                       int64_t labels_per_row, Address mask, int64_t ignore_index) {
        return fd::Tile{student,
                        teacher,
                        rows,
                        columns,
                        first_column,
                        at<const float>(inverse_temperature),
                        at<const int64_t>(labels),
                        labels_per_row,
                        at<const uint8_t>(mask),
                        ignore_index};
      }));

  m.def(
      "accumulate",
      [](const fd::Tile& tile, int32_t wanted, Address state, Address label_logits, int threads) {
        for_each_row(fd::isa().kernels.accumulate,
                     fd::Accumulate{tile, wanted, at<fd::RowState>(state), at<float>(label_logits)}, threads);
      },
      Release());

  m.def(
      "compare",
      [](const fd::Tile& tile, const std::vector<int32_t>& divergences, const std::vector<float>& parameters,
         Address state, Address label_logits, Address sums, Address rank, int threads) {
        for_each_row(fd::isa().kernels.compare,
                     fd::Compare{tile, terms(divergences, parameters), at<const fd::RowState>(state),
                                 at<const float>(label_logits), at<double>(sums), at<int64_t>(rank)},
                     threads);
      },
      Release());

  m.def(
      "gradient",
      [](const fd::Tile& tile, const std::vector<int32_t>& divergences, const std::vector<float>& parameters,
         Address state, Address coefficients, Address label_gains, const fd::Target& student,
         const fd::Target& teacher, int threads) {
        for_each_row(
            fd::isa().kernels.gradient,
            fd::Gradient{tile, terms(divergences, parameters), at<const fd::RowState>(state),
                         at<const float>(coefficients), at<const float>(label_gains), student, teacher},
            threads);
      },
      Release());

  py::class_<fd::Output>(m, "Output", py::module_local())
      .def(py::init([](int32_t number, int64_t compared, double forward, double reverse) {
        return fd::Output{number, compared, forward, reverse};
      }));

  py::class_<fd::FinishedRows>(m, "FinishedRows", py::module_local())
      .def(py::init([](int64_t rows, int64_t labels_per_row, int64_t compared_per_row, int64_t ignore_index,
                       int64_t vocabulary, Address inverse_temperature, Address labels, Address state,
                       Address label_logits, Address compared, Address rank) {
        return fd::FinishedRows{rows,
                                labels_per_row,
                                compared_per_row,
                                ignore_index,
                                static_cast<double>(vocabulary),
                                at<const float>(inverse_temperature),
                                at<const int64_t>(labels),
                                at<const fd::RowState>(state),
                                at<const float>(label_logits),
                                at<const double>(compared),
                                at<const int64_t>(rank)};
      }));

  m.def(
      "finish",
      [](const fd::FinishedRows& rows, const fd::Output& output, Address to, int threads) {
        fd::finish(rows, output, at<void>(to), threads);
      },
      Release());

#if defined(FD_CUDA)
  auto cuda = m.def_submodule("cuda");
  fd::bind_rows(cuda);
  bind_tokens(cuda);
#endif

  m.def("isa", [] { return fd::isa().name; });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const fd::Isa& isa : fd::isas()) names.push_back(isa.name);
    return names;
  });
  m.def("choose_isa", &fd::choose_isa);
  m.attr("state_fields") = sizeof(fd::RowState) / sizeof(double);
#define FD_NAME(name) #name,
  m.attr("divergences") = std::vector<std::string>{FD_DIVERGENCES(FD_NAME)};
  m.attr("outputs") = std::vector<std::string>{FD_OUTPUTS(FD_NAME)};
#undef FD_NAME
}
