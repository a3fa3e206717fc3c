// Sign planes times few tokens in 8 bits, with AVX-512 (dots.h).
//
//     y = sum over words of 32 columns of  mean T  +  sum over planes of  scale (T - 2 S)

#pragma once

#include "dots_avx512.h"

namespace kernels {
namespace avx512 {

template <bool Grouped>
struct SignProduct {
    static constexpr int rows = 4;
    const SignDots& w;
    const Chunk<1>* x;

    void add(const int64_t* row, int64_t from, int64_t upto, __m512* parts) const {
        for (int64_t plane = 0; plane < w.planes; plane++) {
            const RowsOfBits<rows> signs(w.signs[plane], row);
            RowsCoefficients<rows> scales(w.scales[plane], row);
            __m512 product[rows] = {};
            for (int64_t chunk = from; chunk < upto; chunk++) {
                __m512i bits[rows];
                signs.load(chunk, bits);
                if (Grouped) scales.load(chunk);
                Dots<1> negative[rows];
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
#pragma GCC unroll 4
                    for (int r = 0; r < rows; r++) negative[r].add(bit(bits[r], i), x[chunk].x[i]);
                }
                const __m512i sum = _mm512_add_epi32(x[chunk].sum[0], x[chunk].sum[1]);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    const __m512i own = _mm512_sub_epi32(sum, _mm512_slli_epi32(negative[r].total(), 1));
                    const __m512 scale = Grouped ? _mm512_mul_ps(scales.at(r, 0), x[chunk].step) : x[chunk].step;
                    product[r] = _mm512_fmadd_ps(scale, floats(own), product[r]);
                }
            }
            if (!Grouped) scales.load(from);
            for (int r = 0; r < rows; r++) {
                parts[r] = Grouped ? _mm512_add_ps(parts[r], product[r])
                                   : _mm512_fmadd_ps(scales.at(r, 0), product[r], parts[r]);
            }
        }
        if (w.means.of.data) add_means(row, from, upto, parts);
    }
    void add_means(const int64_t* row, int64_t from, int64_t upto, __m512* parts) const {
        RowsCoefficients<rows> means(w.means, row);
        for (int64_t chunk = from; chunk < upto; chunk++) {
            means.load(chunk);
            const __m512 sum = floats(_mm512_add_epi32(x[chunk].sum[0], x[chunk].sum[1]));
            const __m512 product = _mm512_mul_ps(sum, x[chunk].step);
            for (int r = 0; r < rows; r++) parts[r] = _mm512_fmadd_ps(means.at(r, 0), product, parts[r]);
        }
    }
};

inline void sign_dots_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                           int64_t stride) {
    const SignDots& w = *static_cast<const SignDots*>(matrix);
    const int64_t chunks = chunks_in(kinds[0]);
    for (int64_t token = 0; token < kinds[0].tokens; token++) {
        const Chunk<1>* x = chunks_of<1>(kinds[0], token);
        float* out = y + token * stride;
        if (kinds[0].runs > 1) dot_rows(SignProduct<true>{w, x}, first, last, chunks, out);
        else dot_rows(SignProduct<false>{w, x}, first, last, chunks, out);
    }
}

}  // namespace avx512
}  // namespace kernels
