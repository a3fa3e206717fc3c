#include "sign_planes.h"

#include <algorithm>

#include "dots.h"
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
    const void* self() const override { return &planes; }
};

struct SignDotsMatrix : SignPlanesMatrix {
    SignDots dots{};
    ChunkGroupLists lists;

    using SignPlanesMatrix::SignPlanesMatrix;

    bool assign(int64_t group_size) {
        most_tokens = kFewTokens;
        const std::vector<int32_t> groups = groups_of_words(m, group_size);
        dots.planes = planes.planes;
        std::copy(planes.signs, planes.signs + kMaxPlanes, dots.signs);
        bool possible = !groups.empty() && lists.assign(dots.means, planes.means, 1, groups);
        for (int64_t plane = 0; possible && plane < dots.planes; plane++) {
            possible = lists.assign(dots.scales[plane], planes.scales[plane], 1, groups);
        }
        return possible;
    }
    Form form(int64_t) const override { return Form::digits; }
    // Exact, three digits take longer than lookups.
    Rows rows(const Isa& isa, bool int8) const override { return int8 ? isa.sign_dots : nullptr; }
    const void* self() const override { return &dots; }
};

// Of groups that are whole words: halfwords.h.
struct SignHalfwordsMatrix : SignPlanesMatrix {
    using SignPlanesMatrix::SignPlanesMatrix;

    Form form(int64_t) const override { return Form::halfwords; }
    Rows rows(const Isa& isa, bool int8) const override { return isa.sign_halfwords[int8]; }
};

template <class Made>
std::unique_ptr<Made> make(int64_t n, int64_t m, int64_t group_size, const std::vector<Plane>& signs,
                           const std::vector<Coefficients>& scales, Coefficients means, Coefficients column_scales) {
    auto matrix = std::make_unique<Made>(n, m, group_size);
    matrix->planes.n = n;
    matrix->planes.planes = static_cast<int64_t>(signs.size());
    std::copy(signs.begin(), signs.end(), matrix->planes.signs);
    std::copy(scales.begin(), scales.end(), matrix->planes.scales);
    matrix->planes.means = means;
    matrix->column_scales = column_scales;
    return matrix;
}

}  // namespace

std::unique_ptr<Matrix> sign_planes(int64_t n, int64_t m, int64_t group_size, const std::vector<Plane>& signs,
                                    const std::vector<Coefficients>& scales, Coefficients means,
                                    Coefficients column_scales) {
    auto matrix = make<SignPlanesMatrix>(n, m, group_size, signs, scales, means, column_scales);
    auto halfwords = make<SignHalfwordsMatrix>(n, m, group_size, signs, scales, means, column_scales);
    auto dots = make<SignDotsMatrix>(n, m, group_size, signs, scales, means, column_scales);
    if (dots->assign(group_size)) {
        matrix->better.push_back(std::move(halfwords));
        matrix->better.push_back(std::move(dots));
    }
    return matrix;
}

}  // namespace kernels
