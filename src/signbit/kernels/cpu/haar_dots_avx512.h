// Haar planes times few tokens in 8 bits, with AVX-512 (dots.h): signs A and zones C of codebooks.h.
//
//     y = sum over words of  scale0 (T - C - 2 (A - B)) + scale1 (C - 2 B) + mean0 (T - C) + mean1 C       B: of both
//
// and of salient columns, which are brought together (salient_dots_avx512.h), by their own codebooks.

#pragma once

#include "salient_dots_avx512.h"

namespace kernels {
namespace avx512 {

// Numbers of two bits for the columns of a chunk: of the even ones, and of the odd ones.
struct TwoBits {
    __m512i even, odd;

    [[gnu::always_inline]] static TwoBits of(__m512i low, __m512i high) {
        const __m512i evens = _mm512_set1_epi8(0x55);
        // evens ? ... : ...
        return {_mm512_ternarylogic_epi64(evens, low, _mm512_slli_epi16(high, 1), 0xca),
                _mm512_ternarylogic_epi64(evens, _mm512_srli_epi16(low, 1), high, 0xca)};
    }
};

// T + the sum of the positive weights' activations - that of the negative ones', for each zone: 2 for a positive weight
// of the zone, 0 for a negative one, 1 for all others. Two dot products, where signs, zones and both would be three.
template <int Bands>
class SignedZones {
   public:
    [[gnu::always_inline]] void add(__m512i negative, __m512i zone, const Chunk<1>& x) {
        const __m512i ones = _mm512_set1_epi8(-1);
        const __m512i neither = _mm512_andnot_si512(zone, _mm512_xor_si512(negative, ones));
        TwoBits numbers[2] = {TwoBits::of(zone, neither),
                              TwoBits::of(_mm512_xor_si512(zone, ones), _mm512_andnot_si512(negative, zone))};
#pragma GCC unroll 2
        for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
            for (int z = 0; z < 2; z++) {
                dots_[z][0].add(numbers[z].even, x.x[i], x.x[i + 2]);
                dots_[z][Bands - 1].add(numbers[z].odd, x.x[i + 1], x.x[i + 3]);
                numbers[z] = {next(numbers[z].even, 4), next(numbers[z].odd, 4)};
            }
        }
    }
    // Times the scales, and a mean for both.
    template <class Numbers>
    [[gnu::always_inline]] __m512 product(const Chunk<1>& x, const Numbers& scales, const Numbers& means,
                                          int64_t means_each) const {
        __m512 product = _mm512_setzero_ps();
#pragma GCC unroll 2
        for (int band = 0; band < Bands; band++) {
            const __m512 all = x.all(band, Bands);
#pragma GCC unroll 2
            for (int z = 0; z < 2; z++) {
                const __m512 sum = _mm512_sub_ps(dots_[z][band].sum(), all);
                product = _mm512_fmadd_ps(scales.at(0, 2 * band + z), sum, product);
            }
            if (means_each) product = _mm512_fmadd_ps(means.at(0, band), all, product);
        }
        return product;
    }

   private:
    SideDots<1, 2> dots_[2][Bands];
};

// Signs A, zones C and both B, where each zone has a mean.
template <int Bands>
class MeanZones {
   public:
    [[gnu::always_inline]] void add(__m512i negative, __m512i zone, const Chunk<1>& x) {
        __m512i both = _mm512_and_si512(negative, zone);
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
            negative_.add(negative, x.x[i], x.x[i + 1]);
            zone_.add(zone, x.x[i], x.x[i + 1]);
            both_.add(both, x.x[i], x.x[i + 1]);
            negative = next(negative, 2);
            zone = next(zone, 2);
            both = next(both, 2);
        }
    }
    template <class Numbers>
    [[gnu::always_inline]] __m512 product(const Chunk<1>& x, const Numbers& scales, const Numbers& means,
                                          int64_t) const {
        const __m512 minus_two = _mm512_set1_ps(-2.0f);
        __m512 product = _mm512_setzero_ps();
#pragma GCC unroll 2
        for (int band = 0; band < Bands; band++) {
            const __m512 zone1 = of(zone_, band), both = of(both_, band), zone0 = _mm512_sub_ps(x.all(band, Bands), zone1);
            const __m512 only = _mm512_sub_ps(of(negative_, band), both);
            product = _mm512_fmadd_ps(scales.at(0, 2 * band), _mm512_fmadd_ps(only, minus_two, zone0), product);
            product = _mm512_fmadd_ps(scales.at(0, 2 * band + 1), _mm512_fmadd_ps(both, minus_two, zone1), product);
            product = _mm512_fmadd_ps(means.at(0, 2 * band), zone0, product);
            product = _mm512_fmadd_ps(means.at(0, 2 * band + 1), zone1, product);
        }
        return product;
    }

   private:
    using Sums = BitDots<1>;
    [[gnu::always_inline]] static __m512 of(const Sums& sums, int band) {
        if (Bands == 1) return sums.sum();
        return band ? sums.sum_left() : sums.sum_right();
    }
    Sums negative_, zone_, both_;
};

// Where ``Bands`` is 2, even and odd columns have codebooks of their own, one behind the other.
template <int Bands, int Vectors = 1>
struct ZonedProduct {
    static constexpr int rows = 1;
    const Plane &signs, &zones;
    const ZonedSet& set;
    const Chunk<1>* x;
    int64_t base;  // the first row in buffers of salient columns; -1: planes in memory

    void add(const SideBySide<rows>& row, __m512* parts) const {
        if (set.means_each == 2) add_as<MeanZones<Bands>>(row, parts);
        else add_as<SignedZones<Bands>>(row, parts);
    }

   private:
    template <class Zones>
    void add_as(const SideBySide<rows>& row, __m512* parts) const {
        const RowsOfBits<rows> A = bits_of(signs, row), C = bits_of(zones, row);
        RowsCoefficients<rows, Vectors> scales(set.scales, row), means(set.means, row);
        __m512 product = _mm512_setzero_ps();
        for (int64_t chunk = row.from; chunk < row.upto; chunk++) {
            __m512i a, c;
            A.load(chunk, &a);
            C.load(chunk, &c);
            scales.load(chunk);
            if (set.means_each) means.load(chunk);
            Zones sums;
            sums.add(a, c, x[chunk]);
            product = _mm512_fmadd_ps(sums.product(x[chunk], scales, means, set.means_each), x[chunk].step, product);
        }
        *parts = _mm512_add_ps(*parts, product);
    }
    RowsOfBits<rows> bits_of(const Plane& plane, const SideBySide<rows>& row) const {
        return base < 0 ? RowsOfBits<rows>(plane, row) : RowsOfBits<rows>(plane, row, base);
    }
};

// The Haar transform over pairs of rows; a last row without a partner stays as it is.
inline __m512 over_pairs(__m512 y, int64_t count) {
    const __m512 other = _mm512_permute_ps(y, 0xb1), root_half = _mm512_set1_ps(0.70710678118654752f);
    const __m512 low = _mm512_mul_ps(_mm512_add_ps(y, other), root_half);
    const __m512 both = _mm512_mask_mul_ps(low, 0xaaaa, _mm512_sub_ps(other, y), root_half);
    return count % 2 ? _mm512_mask_mov_ps(both, static_cast<__mmask16>(1 << (count - 1)), y) : both;
}

inline void haar_dots_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                           int64_t stride) {
    const HaarDots& w = *static_cast<const HaarDots*>(matrix);
    for (int64_t token = 0; token < kinds[0].tokens; token++) {
        const Chunk<1>* x = chunks_of<1>(kinds[0], token);
        const ZonedProduct<2> bands{w.signs, w.zones, w.ordinary, x, -1};
        const ZonedProduct<1> whole{w.signs, w.zones, w.ordinary, x, -1};
        for (int64_t row = first; row < last; row += kDotRows) {
            const int64_t count = least(last - row, kDotRows), chunks = chunks_in(kinds[0]);
            __m512 plain = _mm512_setzero_ps(), paired = plain;
            if (w.along_rows) plain = rows_product(bands, row, count, chunks);
            else paired = rows_product(whole, row, count, chunks);
            if (w.salient.count) {
                SalientBits<2> bits;
                bits.load(0, w.salient, w.along_rows ? w.salient_signs : w.signs, row, count);
                bits.load(1, w.salient, w.along_rows ? w.salient_zones : w.zones, row, count);
                const ZonedProduct<1, 2> salient{bits.plane[0], bits.plane[1], w.of_salient,
                                                 chunks_of<1>(kinds[1], token), row};
                paired = _mm512_add_ps(paired, rows_product(salient, row, count, chunks_in(kinds[1])));
            }
            Avx512::store(y + token * stride + row, _mm512_add_ps(plain, over_pairs(paired, count)), count);
        }
    }
}

}  // namespace avx512
}  // namespace kernels
