#include "sign_planes.h"

#include <algorithm>

#include "floats.h"
#include "matrices.h"

namespace kernels {
namespace {

struct SignPlanesMatrix : Matrix {
    SignPlanes planes{};
    Coefficients column_scales;

    using Matrix::Matrix;

    void columns(int64_t kind, const float* x, float* out) const override {
        Matrix::columns(kind, x, out);
        if (!column_scales.data) return;
        to_floats(column_scales.data, column_scales.type, m, out);
        for (int64_t i = 0; i < m; i++) out[i] *= x[i];
    }
    Rows rows(const Isa& isa, bool int8) const override { return isa.sign_planes[int8]; }
    // Dot products want 8 bits, and groups of whole rows, or of 128 columns.
    Rows few(const Isa& isa, bool int8) const override {
        const bool quarters = runs[0].end == kStepWords && runs[0].last == ~0u;
        return int8 && (runs.size() == 1 || quarters) ? isa.sign_dots : nullptr;
    }
    const void* self() const override { return &planes; }
};

}  // namespace

std::unique_ptr<Matrix> sign_planes(int64_t n, int64_t m, int64_t group_size, const std::vector<Plane>& signs,
                                    const std::vector<Coefficients>& scales, Coefficients means,
                                    Coefficients column_scales) {
    auto matrix = std::make_unique<SignPlanesMatrix>(n, m, group_size);
    matrix->planes.n = n;
    matrix->planes.planes = static_cast<int64_t>(signs.size());
    std::copy(signs.begin(), signs.end(), matrix->planes.signs);
    std::copy(scales.begin(), scales.end(), matrix->planes.scales);
    matrix->planes.means = means;
    matrix->column_scales = column_scales;
    return matrix;
}

}  // namespace kernels
