// What Python sees of the kernels over tokens.  Tensors come as addresses; fastdiv/backends/cuda/tokens.py
// makes them, and says what they are.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "bind_rows.h"  // check
#include "launch_tokens.h"

inline void bind_tokens(pybind11::module_& cuda) {
  namespace py = pybind11;
  using Address = uintptr_t;
  using Release = py::call_guard<py::gil_scoped_release>;
  const auto queue = [](int device, Address stream) {
    return fd::Queue{device, reinterpret_cast<void*>(stream)};
  };
  const auto of_tokens = [](const char* kernel, int64_t count) {
    return std::string(kernel) + " of " + std::to_string(count) + " tokens";
  };

  // Local, as two modules of a process may have them.
  py::class_<fd::Pairs>(cuda, "Pairs", py::module_local())
      .def(py::init([](Address x, int32_t x_dtype, Address y, int32_t y_dtype, Address mask, int64_t count) {
        return fd::Pairs{{reinterpret_cast<const void*>(x), x_dtype},
                         {reinterpret_cast<const void*>(y), y_dtype},
                         reinterpret_cast<const uint8_t*>(mask),
                         count};
      }));

  cuda.def(
      "moments",
      [=](const fd::Pairs& tokens, Address parts, Address arrived, Address total, int device,
          Address stream) {
        fd::Moments args;
        args.tokens = tokens;
        args.parts = reinterpret_cast<fd::PairSums*>(parts);
        args.arrived = reinterpret_cast<uint32_t*>(arrived);
        args.total = reinterpret_cast<fd::PairSums*>(total);
        fd::check(fd::moments(args, queue(device, stream)), of_tokens("moments", tokens.count));
      },
      Release());

  cuda.def(
      "centre",
      [=](const fd::Pairs& tokens, Address total, int32_t dtype, Address per_token, Address scalars,
          Address valid, int device, Address stream) {
        const fd::Centre args{tokens,
                              reinterpret_cast<const fd::PairSums*>(total),
                              dtype,
                              reinterpret_cast<void*>(per_token),
                              reinterpret_cast<void*>(scalars),
                              reinterpret_cast<int64_t*>(valid)};
        fd::check(fd::centre(args, queue(device, stream)), of_tokens("centre", tokens.count));
      },
      Release());

  py::class_<fd::Candidates>(cuda, "Candidates", py::module_local())
      .def(py::init([](Address scores, int32_t dtype, bool largest, uint64_t drawn, Address mask,
                       Address index, Address offset, int64_t count) {
        return fd::Candidates{{reinterpret_cast<const void*>(scores), dtype},
                              largest,
                              drawn,
                              reinterpret_cast<const uint8_t*>(mask),
                              reinterpret_cast<const int64_t*>(index),
                              reinterpret_cast<const int64_t*>(offset),
                              count};
      }));

  py::class_<fd::Quota>(cuda, "Quota", py::module_local())
      .def(py::init([](Address on_device, double ratio, int64_t k) {
        return fd::Quota{reinterpret_cast<const int64_t*>(on_device), ratio, k};
      }));

  py::class_<fd::Counted>(cuda, "Counted", py::module_local())
      .def(py::init([](Address counts, Address found, int32_t shift, bool of_number, bool first) {
        return fd::Counted{reinterpret_cast<const int64_t*>(counts),
                           reinterpret_cast<const fd::Found*>(found), shift, of_number, first};
      }));

  cuda.def(
      "count_digits",
      [=](const fd::Candidates& tokens, const fd::Quota& quota, const fd::Counted& before, int32_t shift,
          bool of_number, Address counts, Address found, int device, Address stream) {
        fd::CountDigits args;
        args.tokens = tokens;
        args.quota = quota;
        args.before = before;
        args.shift = shift;
        args.of_number = of_number;
        args.counts = reinterpret_cast<int64_t*>(counts);
        args.found = reinterpret_cast<fd::Found*>(found);
        fd::check(fd::count_digits(args, queue(device, stream)),
                  of_tokens("count_digits", tokens.count) + ", from bit " + std::to_string(shift));
      },
      Release());

  cuda.def(
      "choose",
      [=](const fd::Candidates& tokens, const fd::Quota& quota, const fd::Counted& last, Address chosen,
          int device, Address stream) {
        const fd::Choose args{tokens, quota, last, reinterpret_cast<bool*>(chosen)};
        fd::check(fd::choose(args, queue(device, stream)), of_tokens("choose", tokens.count));
      },
      Release());

  cuda.attr("pair_sums") = fd::kPairSums;
  cuda.attr("most_parts") = fd::kMostParts;
  cuda.attr("found_fields") = fd::kFoundFields;
  cuda.attr("digit_bits") = fd::kDigitBits;
}
