// Structured N:M times few tokens, with AVX-512 (dots.h): rows are decoded to bits in the order of the columns
// (structured.h), and each region is a dot product with numbers of two bits: 2 for its positive weights, 0 for its
// negative ones, 1 for all others. That is T + P_r - N_r, and two bits come out of a byte as easily as one. A mean is
// multiplied by P_r + N_r, a dot product with the region's bits.

#pragma once

#include "salient_dots_avx512.h"
#include "structured_avx512.h"

namespace kernels {
namespace avx512 {

// Bits i and i + 4 of every byte, as a number.
[[gnu::always_inline]] inline __m512i two_bits(__m512i bytes, int i) {
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(1ll << (56 + i) | 1ll << (48 + i + 4)), 0);
}

template <int Digits, bool Means>
struct StructuredProduct {
    static constexpr int rows = (Digits == 1 ? 4 : 2) / (Means ? 2 : 1);
    const Plane &kept, &negative, &ones, &twos;
    const GroupCoefficients &scales, &means;
    int regions;
    const Chunk<Digits>* x;
    int64_t base;  // the planes' first row

    // The numbers of a region's columns 0 .. 3 of every eight, and of 4 .. 7.
    struct Numbers {
        __m512i low, high;

        [[gnu::always_inline]] void set(__m512i region, __m512i signs) {
            const __m512i lower = _mm512_set1_epi8(0x0f), positive = _mm512_andnot_si512(signs, region);
            // lower ? ~region : positive
            low = _mm512_ternarylogic_epi64(lower, region, _mm512_slli_epi16(positive, 4), 0x3a);
            high = _mm512_ternarylogic_epi64(lower, _mm512_srli_epi16(region, 4), positive, 0x3a);
        }
    };

    void add(const SideBySide<rows>& row, __m512* parts) const {
        const RowsOfBits<rows> K(kept, row, base), N(negative, row, base), R1(ones, row, base), R2(twos, row, base);
        RowsCoefficients<rows> scale(scales, row), mean(means, row);
        __m512 product[rows] = {};
        for (int64_t chunk = row.from; chunk < row.upto; chunk++) {
            __m512i n[rows], bits[kMaxRegions][rows];
            K.load(chunk, bits[0]);
            N.load(chunk, n);
            R1.load(chunk, bits[1]);
            R2.load(chunk, bits[2]);
            scale.load(chunk);
            if (Means) mean.load(chunk);
            Numbers numbers[rows][kMaxRegions];
            Dots<Digits> sums[rows][kMaxRegions], sizes[rows][kMaxRegions];
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                // k & ~(r1 | r2)
                bits[0][r] = _mm512_ternarylogic_epi64(bits[0][r], bits[1][r], bits[2][r], 0x10);
                for (int region = 0; region < kMaxRegions; region++) numbers[r][region].set(bits[region][r], n[r]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
#pragma GCC unroll 3
                    for (int region = 0; region < kMaxRegions; region++) {
                        const Numbers& own = numbers[r][region];
                        sums[r][region].add(two_bits(i < 4 ? own.low : own.high, i % 4), x[chunk].x[i]);
                        if (Means) sizes[r][region].add(bit(bits[region][r], i), x[chunk].x[i]);
                    }
                }
            }
            const __m512i all = _mm512_add_epi32(x[chunk].sum[0], x[chunk].sum[1]);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                __m512 of_chunk = _mm512_setzero_ps();
#pragma GCC unroll 3
                for (int region = 0; region < kMaxRegions; region++) {
                    if (region >= regions) break;
                    const __m512i sum = _mm512_sub_epi32(sums[r][region].total(), all);
                    of_chunk = _mm512_fmadd_ps(scale.at(r, region), floats(sum), of_chunk);
                    if (!Means) continue;
                    of_chunk = _mm512_fmadd_ps(mean.at(r, region), floats(sizes[r][region].total()), of_chunk);
                }
                product[r] = _mm512_fmadd_ps(of_chunk, x[chunk].step, product[r]);
            }
        }
        for (int r = 0; r < rows; r++) parts[r] = _mm512_add_ps(parts[r], product[r]);
    }
};

// Rows that are decoded together.
constexpr int64_t kDecodedRows = 4;

template <int Digits, bool Means>
void structured_dots(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y, int64_t stride) {
    using Decoded = DecodedRows<Avx512, kDecodedRows, kMostStructuredWords>;
    using Product = StructuredProduct<Digits, Means>;
    const StructuredDots& w = *static_cast<const StructuredDots*>(matrix);
    const int regions = static_cast<int>(w.of->regions_count);
    Decoded decoded(*w.of);
    decoded.clear();
    const Plane kept = decoded.plane(Decoded::kept), negative = decoded.plane(Decoded::negative);
    const Plane ones = decoded.plane(Decoded::ones), twos = decoded.plane(Decoded::twos);
    for (int64_t row = first; row < last; row += kDotRows) {
        const int64_t count = least(last - row, kDotRows);
        __m512 parts[kFewTokens][kDotRows] = {};
        SalientBits<3> bits;
        for (int64_t i = 0; i < count; i += kDecodedRows) {
            const int64_t some = least(count - i, kDecodedRows);
            decoded.decode(row + i, some, 0, kinds[0].words);
            for (int64_t token = 0; token < kinds[0].tokens; token++) {
                const Product product{kept, negative, ones, twos, w.scales, w.means, regions,
                                      chunks_of<Digits>(kinds[0], token), row + i};
                for (int64_t j = 0; j < some; j += Product::rows) {
                    SideBySide<Product::rows> rows{{}, row, 0, chunks_in(kinds[0])};
                    for (int r = 0; r < Product::rows; r++) rows.row[r] = row + i + least(j + r, some - 1);
                    product.add(rows, parts[token] + i + j);
                }
            }
            if (!w.salient.count) continue;
            decoded.bring_ones_and_twos_together(some, kinds[0].words);
            bits.load(0, w.salient, kept, 0, some, i);
            bits.load(1, w.salient, negative, 0, some, i);
            bits.load(2, w.salient, ones, 0, some, i);
        }
        for (int64_t token = 0; token < kinds[0].tokens; token++) {
            __m512 sum = sums_of(parts[token]);
            if (w.salient.count) {
                const ResidualProduct<Digits> salient{bits.plane[0], bits.plane[1], bits.plane[2],
                                                      w.salient_scales, w.salient_means,
                                                      chunks_of<Digits>(kinds[1], token), row};
                sum = _mm512_add_ps(sum, rows_product(salient, row, count, chunks_in(kinds[1])));
            }
            Avx512::store(y + token * stride + row, sum, count);
        }
    }
}

template <int Digits>
void structured_dots_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                          int64_t stride) {
    const bool means = static_cast<const StructuredDots*>(matrix)->means.of.data;
    const Rows rows = means ? structured_dots<Digits, true> : structured_dots<Digits, false>;
    rows(matrix, kinds, first, last, y, stride);
}

}  // namespace avx512
}  // namespace kernels
