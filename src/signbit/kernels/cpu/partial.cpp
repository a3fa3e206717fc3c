#include "partial.h"

#include "matrices.h"

namespace kernels {
namespace {

struct PartialMatrix : Matrix {
    Partial partial{};

    using Matrix::Matrix;

    int64_t kinds() const override { return 2; }
    Form form(int64_t kind) const override { return kind ? Form::numbers : Form::tables; }
    Rows rows(const Isa& isa, bool int8) const override { return isa.partial[int8]; }
    const void* self() const override { return &partial; }
};

struct PartialDotsMatrix : Matrix {
    Partial partial;

    PartialDotsMatrix(const PartialMatrix& from, int64_t group_size)
        : Matrix(from.n, from.m, group_size), partial(from.partial) {
        most_tokens = kFewTokens;
    }

    Form form(int64_t) const override { return Form::numbers; }
    Rows rows(const Isa& isa, bool int8) const override { return isa.partial_dots[int8]; }
    const void* self() const override { return &partial; }
};

}  // namespace

std::unique_ptr<Matrix> partial(int64_t n, int64_t m, int64_t group_size, const PartialTensors& from) {
    auto matrix = std::make_unique<PartialMatrix>(n, m, group_size);
    Partial& to = matrix->partial;
    to.ordinary.n = n;
    to.ordinary.planes = 1;
    to.ordinary.signs[0] = from.signs;
    to.ordinary.scales[0] = from.scales;
    to.ordinary.means = from.means;
    to.m = m;
    to.group_size = group_size ? group_size : m;
    to.gaps = {from.positions.data, from.positions.row_bytes, from.gap_bits};
    to.bitmap = from.positions;
    to.codes = {from.codes.data, from.codes.row_bytes, from.code_bits - 1};
    to.ends = from.ends;
    to.code_scales = from.code_scales;
    to.code_offsets = from.code_offsets;
    if (to.regular()) matrix->better.push_back(std::make_unique<PartialDotsMatrix>(*matrix, group_size));
    return matrix;
}

}  // namespace kernels
