#include "integers.h"

#include "matrices.h"

namespace kernels {
namespace {

struct IntegersMatrix : Matrix {
    Integers integers{};

    using Matrix::Matrix;

    Form form(int64_t) const override { return Form::numbers; }
    Rows rows(const Isa& isa, bool int8) const override { return isa.integers[int8]; }
    const void* self() const override { return &integers; }
};

}  // namespace

std::unique_ptr<Matrix> integers(int64_t n, int64_t m, int64_t group_size, int64_t bits, Plane codes,
                                 Coefficients scales, Plane zeros) {
    auto matrix = std::make_unique<IntegersMatrix>(n, m, group_size);
    matrix->integers = {n, m, bits, codes, zeros, scales};
    return matrix;
}

}  // namespace kernels
