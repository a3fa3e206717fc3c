// The kernels as a Python module. Tensors come as addresses: nothing here knows torch.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "decoder.h"
#include "dispatch.h"
#include "matrices.h"
#include "rounding.h"
#include "sign_planes.h"
#include "stream.h"
#include "threads.h"

namespace nb = nanobind;
using namespace kernels;

namespace {

void multiply_at(const Matrix& matrix, uintptr_t x, uintptr_t y, int type, int64_t tokens, bool int8, int threads) {
    multiply(matrix, active(), reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), static_cast<Scalar>(type),
             tokens, int8, threads);
}

void step_at(const DecoderLayer& layer, uintptr_t x, uintptr_t y, uintptr_t cosines, uintptr_t sines, uintptr_t keys,
             uintptr_t values, int64_t stride, int64_t tokens, int threads) {
    layer.step(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), reinterpret_cast<const float*>(cosines),
               reinterpret_cast<const float*>(sines),
               {reinterpret_cast<float*>(keys), reinterpret_cast<float*>(values), stride, tokens}, threads);
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void round_at(int64_t n, int64_t k, uintptr_t targets, uintptr_t shares, uintptr_t before, uintptr_t tables,
              uintptr_t counts, int64_t levels, bool even, uintptr_t which, int64_t which_columns, int64_t which_rows,
              uintptr_t places, uintptr_t changes, int threads) {
    if (k > kRoundingTurns) throw nb::value_error("too many columns");
    round_in_turn({n, k, at<const float>(targets), at<const float>(shares), at<const float>(before),
                   at<const float>(tables), at<const int32_t>(counts), levels, even, at<const int32_t>(which),
                   which_columns, which_rows, at<uint8_t>(places), at<float>(changes)},
                  active(), threads);
}

uint64_t stream_at(uintptr_t data, int64_t bytes, int threads) {
    return stream(reinterpret_cast<const void*>(data), bytes, threads);
}

std::vector<std::string> names() {
    std::vector<std::string> names;
    for (const Isa* isa : instruction_sets()) names.emplace_back(isa->name);
    return names;
}

void choose_by_name(const std::string& name) {
    for (const Isa* isa : instruction_sets()) {
        if (isa->name == name) return choose(*isa);
    }
    throw nb::value_error(name.c_str());
}

}  // namespace

NB_MODULE(_native, module) {
    nb::class_<Plane>(module, "Plane")
        .def(nb::init<>())
        .def("__init__", [](Plane* self, uintptr_t data, int64_t row_bytes) {
            new (self) Plane{reinterpret_cast<const uint8_t*>(data), row_bytes};
        });
    nb::class_<Coefficients>(module, "Coefficients")
        .def(nb::init<>())
        .def("__init__", [](Coefficients* self, uintptr_t data, int64_t per_row, int type) {
            new (self) Coefficients{reinterpret_cast<const void*>(data), per_row, static_cast<Scalar>(type)};
        });
    nb::class_<Matrix>(module, "Matrix")
        .def("multiply", multiply_at, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<Norm>(module, "Norm").def(nb::init<>()).def("__init__", [](Norm* self, uintptr_t weight, float epsilon) {
        new (self) Norm{reinterpret_cast<const float*>(weight), epsilon};
    });
    nb::class_<Linear>(module, "Linear")
        .def("__init__", [](Linear* self, std::vector<std::vector<const Matrix*>> chains, bool int8, bool norm,
                            std::vector<Coefficients> biases) {
            new (self) Linear{std::move(chains), int8, norm, std::move(biases)};
        });
    nb::class_<DecoderLayer>(module, "DecoderLayer")
        .def(nb::init<int64_t, int64_t, int64_t, float, Norm, Norm, Norm, Norm, Linear, Linear, Linear, Linear, Linear,
                      Linear, Linear>())
        .def("step", step_at, nb::call_guard<nb::gil_scoped_release>());

    module.def("dense", [](int64_t n, int64_t m, uintptr_t weights) {
        return dense(n, m, reinterpret_cast<const float*>(weights));
    });
    module.def("sign_planes", sign_planes);
    module.def("integers", integers);
    module.def("partial", [](int64_t n, int64_t m, int64_t group_size, int64_t gap_bits, int64_t code_bits, Plane signs,
                             Plane positions, Plane codes, uintptr_t ends, Coefficients scales, Coefficients means,
                             Coefficients code_scales, Coefficients code_offsets) {
        return partial(n, m, group_size,
                       {signs, positions, codes, gap_bits, code_bits, reinterpret_cast<const int32_t*>(ends), scales,
                        means, code_scales, code_offsets});
    });
    module.def("structured", [](int64_t n, int64_t m, int64_t group_size, int64_t keep, int64_t of, int64_t regions,
                                Plane signs, Plane ranks, Plane region_map, Plane salient, Coefficients scales,
                                Coefficients means, Coefficients salient_scales, Coefficients salient_means) {
        return structured(n, m, group_size, keep, of, regions,
                          {signs, ranks, region_map, salient, scales, means, salient_scales, salient_means});
    });

    module.def("split_planes", [](int64_t n, int64_t m, int64_t group_size, Plane signs, Plane second, Plane residual,
                                  Plane salient, Coefficients scales, Coefficients means, Coefficients salient_scales,
                                  Coefficients salient_means, Coefficients column_scales,
                                  Coefficients salient_column_scales) {
        return split_planes(n, m, group_size,
                            {signs, second, residual, salient, scales, means, salient_scales, salient_means,
                             column_scales, salient_column_scales});
    });
    module.def("haar_planes", [](int64_t n, int64_t m, int64_t group_size, bool along_rows, int64_t means_each,
                                 Plane signs, Plane second, Plane salient, Plane salient_signs, Plane salient_second,
                                 Coefficients scales, Coefficients means, Coefficients salient_scales,
                                 Coefficients salient_means) {
        return haar_planes(n, m, group_size, along_rows,
                           {signs, second, salient, salient_signs, salient_second, scales, means, salient_scales,
                            salient_means, means_each});
    });

    module.attr("MAX_PLANES") = kMaxPlanes;
    module.def("instruction_sets", names);
    module.def("instruction_set", [] { return active().name; });
    module.def("choose", choose_by_name);
    module.def("thread_pool", thread_pool);
    module.def("round_in_turn", round_at, nb::call_guard<nb::gil_scoped_release>());
    module.def("stream", stream_at, nb::call_guard<nb::gil_scoped_release>());
}
