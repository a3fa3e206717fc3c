// Split planes and Haar planes times few tokens, with AVX-512 (dots.h): signs A and zones C of codebooks.h.
//
//     y = sum over words of  scale0 (T - C - 2 (A - B)) + scale1 (C - 2 B) + mean0 (T - C) + mean1 C       B: of both
//
// and of salient columns, which are brought together (salient_dots_avx512.h), by their own codebooks.

#pragma once

#include "salient_dots_avx512.h"

namespace kernels {
namespace avx512 {

// Where ``Bands`` is 2, even and odd columns have codebooks of their own, one behind the other.
template <int Digits, int Bands, int Vectors = 1>
struct ZonedProduct {
    static constexpr int rows = (Digits == 1 ? 4 : 2) / Bands;
    const Plane &signs, &zones;
    const ZonedSet& set;
    const Chunk<Digits>* x;
    int64_t base;  // the first row in buffers of salient columns; -1: planes in memory

    using Numbers = RowsCoefficients<rows, Vectors>;
    struct Sums {
        Dots<Digits> negative, zone, both;
    };

    void add(const SideBySide<rows>& row, __m512* parts) const {
        const RowsOfBits<rows> A = bits_of(signs, row), C = bits_of(zones, row);
        Numbers scales(set.scales, row), means(set.means, row);
        __m512 product[rows] = {};
        for (int64_t chunk = row.from; chunk < row.upto; chunk++) {
            __m512i a[rows], c[rows];
            A.load(chunk, a);
            C.load(chunk, c);
            scales.load(chunk);
            if (set.means_each) means.load(chunk);
            Sums sums[rows][Bands];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    Sums& own = sums[r][i % Bands];
                    const __m512i negative = bit(a[r], i), zone = bit(c[r], i);
                    own.negative.add(negative, x[chunk].x[i]);
                    own.zone.add(zone, x[chunk].x[i]);
                    own.both.add(_mm512_and_si512(negative, zone), x[chunk].x[i]);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                __m512 of_chunk = _mm512_setzero_ps();
#pragma GCC unroll 2
                for (int band = 0; band < Bands; band++) {
                    const __m512i all = Bands == 2 ? x[chunk].sum[band]
                                                   : _mm512_add_epi32(x[chunk].sum[0], x[chunk].sum[1]);
                    of_chunk = add_band(sums[r][band], all, scales, means, r, band, of_chunk);
                }
                product[r] = _mm512_fmadd_ps(of_chunk, x[chunk].step, product[r]);
            }
        }
        for (int r = 0; r < rows; r++) parts[r] = _mm512_add_ps(parts[r], product[r]);
    }

   private:
    RowsOfBits<rows> bits_of(const Plane& plane, const SideBySide<rows>& row) const {
        return base < 0 ? RowsOfBits<rows>(plane, row) : RowsOfBits<rows>(plane, row, base);
    }
    [[gnu::always_inline]] __m512 add_band(const Sums& sums, __m512i all, const Numbers& scales, const Numbers& means,
                                           int row, int band,
                                           __m512 to) const {
        const __m512i zone1 = sums.zone.total(), both = sums.both.total(), zone0 = _mm512_sub_epi32(all, zone1);
        const __m512i only = _mm512_sub_epi32(sums.negative.total(), both);
        const __m512i signed0 = _mm512_sub_epi32(zone0, _mm512_slli_epi32(only, 1));
        const __m512i signed1 = _mm512_sub_epi32(zone1, _mm512_slli_epi32(both, 1));
        to = _mm512_fmadd_ps(scales.at(row, 2 * band), floats(signed0), to);
        to = _mm512_fmadd_ps(scales.at(row, 2 * band + 1), floats(signed1), to);
        if (!set.means_each) return to;
        const int mean0 = static_cast<int>(set.means_each) * band, mean1 = mean0 + static_cast<int>(set.means_each) - 1;
        to = _mm512_fmadd_ps(means.at(row, mean0), floats(zone0), to);
        return _mm512_fmadd_ps(means.at(row, mean1), floats(zone1), to);
    }
};

template <int Digits>
void split_dots_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                     int64_t stride) {
    const SplitDots& w = *static_cast<const SplitDots*>(matrix);
    for (int64_t token = 0; token < kinds[0].tokens; token++) {
        const ZonedProduct<Digits, 1> ordinary{w.signs, w.zones, w.ordinary, chunks_of<Digits>(kinds[0], token), -1};
        for (int64_t row = first; row < last; row += kDotRows) {
            const int64_t count = least(last - row, kDotRows);
            __m512 sum = rows_product(ordinary, row, count, chunks_in(kinds[0]));
            if (w.salient.count) {
                SalientBits<2> bits;
                bits.load(0, w.salient, w.signs, row, count);
                bits.load(1, w.salient, w.zones, row, count);
                const ResidualProduct<Digits, false> salient{
                    {}, bits.plane[0], bits.plane[1], w.salient_scales, w.salient_means,
                    chunks_of<Digits>(kinds[1], token), row};
                sum = _mm512_add_ps(sum, rows_product(salient, row, count, chunks_in(kinds[1])));
            }
            Avx512::store(y + token * stride + row, sum, count);
        }
    }
}

// The Haar transform over pairs of rows; a last row without a partner stays as it is.
inline __m512 over_pairs(__m512 y, int64_t count) {
    const __m512 other = _mm512_permute_ps(y, 0xb1), root_half = _mm512_set1_ps(0.70710678118654752f);
    const __m512 low = _mm512_mul_ps(_mm512_add_ps(y, other), root_half);
    const __m512 both = _mm512_mask_mul_ps(low, 0xaaaa, _mm512_sub_ps(other, y), root_half);
    return count % 2 ? _mm512_mask_mov_ps(both, static_cast<__mmask16>(1 << (count - 1)), y) : both;
}

template <int Digits>
void haar_dots_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                    int64_t stride) {
    const HaarDots& w = *static_cast<const HaarDots*>(matrix);
    for (int64_t token = 0; token < kinds[0].tokens; token++) {
        const Chunk<Digits>* x = chunks_of<Digits>(kinds[0], token);
        const ZonedProduct<Digits, 2> bands{w.signs, w.zones, w.ordinary, x, -1};
        const ZonedProduct<Digits, 1> whole{w.signs, w.zones, w.ordinary, x, -1};
        for (int64_t row = first; row < last; row += kDotRows) {
            const int64_t count = least(last - row, kDotRows), chunks = chunks_in(kinds[0]);
            __m512 plain = _mm512_setzero_ps(), paired = plain;
            if (w.along_rows) plain = rows_product(bands, row, count, chunks);
            else paired = rows_product(whole, row, count, chunks);
            if (w.salient.count) {
                SalientBits<2> bits;
                bits.load(0, w.salient, w.along_rows ? w.salient_signs : w.signs, row, count);
                bits.load(1, w.salient, w.along_rows ? w.salient_zones : w.zones, row, count);
                const ZonedProduct<Digits, 1, 2> salient{bits.plane[0], bits.plane[1], w.of_salient,
                                                      chunks_of<Digits>(kinds[1], token), row};
                paired = _mm512_add_ps(paired, rows_product(salient, row, count, chunks_in(kinds[1])));
            }
            Avx512::store(y + token * stride + row, _mm512_add_ps(plain, over_pairs(paired, count)), count);
        }
    }
}

}  // namespace avx512
}  // namespace kernels
