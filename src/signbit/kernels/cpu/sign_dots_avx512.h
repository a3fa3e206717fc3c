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

    void add(const SideBySide<rows>& row, __m512* parts) const {
        for (int64_t plane = 0; plane < w.planes; plane++) add_plane(plane, row, parts);
        if (w.means.of.data) add_means(row, parts);
    }

   private:
    void add_plane(int64_t plane, const SideBySide<rows>& row, __m512* parts) const {
        const RowsOfBits<rows> signs(w.signs[plane], row);
        RowsCoefficients<rows> scales(w.scales[plane], row);
        const __m512 minus_two = _mm512_set1_ps(-2.0f);
        // Grouped: with scales and T; otherwise S alone.
        __m512 product[rows] = {}, all = _mm512_setzero_ps();
        for (int64_t chunk = row.from; chunk < row.upto; chunk++) {
            __m512i bits[rows];
            signs.load(chunk, bits);
            if (Grouped) scales.load(chunk);
            BitDots<1> negative[rows];
#pragma GCC unroll 4
            for (int i = 0; i < 8; i += 2) {
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    negative[r].add(bits[r], x[chunk].x[i], x[chunk].x[i + 1]);
                    bits[r] = next(bits[r], 2);
                }
            }
            const __m512 step = Grouped ? _mm512_mul_ps(x[chunk].step, minus_two) : x[chunk].step;
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const __m512 sum = negative[r].sum();
                if (Grouped) {
                    product[r] = _mm512_fmadd_ps(scales.at(r, 0), _mm512_fmadd_ps(sum, step, x[chunk].total), product[r]);
                } else {
                    product[r] = _mm512_fmadd_ps(sum, step, product[r]);
                }
            }
            if (!Grouped) all = _mm512_add_ps(all, x[chunk].total);
        }
        if (!Grouped) scales.load(row.from);
        for (int r = 0; r < rows; r++) {
            parts[r] = Grouped ? _mm512_add_ps(parts[r], product[r])
                               : _mm512_fmadd_ps(scales.at(r, 0), _mm512_fmadd_ps(product[r], minus_two, all), parts[r]);
        }
    }
    void add_means(const SideBySide<rows>& row, __m512* parts) const {
        RowsCoefficients<rows> means(w.means, row);
        for (int64_t chunk = row.from; chunk < row.upto; chunk++) {
            means.load(chunk);
            for (int r = 0; r < rows; r++) parts[r] = _mm512_fmadd_ps(means.at(r, 0), x[chunk].total, parts[r]);
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
