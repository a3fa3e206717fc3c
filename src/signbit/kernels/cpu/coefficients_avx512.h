// Coefficients of a tile's rows with AVX-512: those of 16 bits are transposed as they are, 16 of 32 rows in 64 shuffles,
// and become floats when they are asked for. Half of the shuffles, and half of the first-level cache.

#pragma once

#include "lookup.h"

namespace kernels {
namespace avx512 {

template <>
class CoefficientBlock<Avx512> {
   public:
    static constexpr int64_t count = 16;

    void load(const char* first, int64_t row_bytes, int64_t last, Scalar type, int64_t there) {
        const Rows rows{first, row_bytes, last};
        type_ = type;
        if (type == Scalar::f32) load_singles(rows, static_cast<__mmask16>((1u << there) - 1));
        else load_halves(rows, static_cast<__mmask16>((1u << there) - 1));
    }
    [[gnu::always_inline]] __m512 at(int64_t index, int strip) const {
        if (type_ == Scalar::f32) return _mm512_load_ps(single_[strip][index]);
        const __m256i halves = _mm256_load_si256(reinterpret_cast<const __m256i*>(half_[index] + 16 * strip));
        if (type_ == Scalar::f16) return _mm512_cvtph_ps(halves);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }

   private:
    struct Rows {
        const char* first;
        int64_t row_bytes, last;
        const char* operator[](int64_t row) const { return first + least(row, last) * row_bytes; }
    };

    void load_singles(const Rows& rows, __mmask16 there) {
        for (int strip = 0; strip < 2; strip++) {
            __m512i r[16];
            for (int lane = 0; lane < 16; lane++) r[lane] = _mm512_maskz_loadu_epi32(there, rows[16 * strip + lane]);
            Avx512::transpose(r);
            for (int i = 0; i < 16; i++) _mm512_store_si512(single_[strip][i], r[i]);
        }
    }
    void load_halves(const Rows& rows, __mmask16 there) {
        __m512i first[8], second[8];  // of rows 0 .. 15, 16 .. 31
        for (int i = 0; i < 8; i++) {
            first[i] = side_by_side(rows[i], rows[8 + i], there);
            second[i] = side_by_side(rows[16 + i], rows[24 + i], there);
        }
        transpose_quarters(first);
        transpose_quarters(second);
        for (int i = 0; i < 8; i++) {
            _mm512_store_si512(half_[i], _mm512_shuffle_i64x2(first[i], second[i], 0x88));
            _mm512_store_si512(half_[8 + i], _mm512_shuffle_i64x2(first[i], second[i], 0xdd));
        }
    }
    static __m512i side_by_side(const char* low, const char* high, __mmask16 there) {
        const __m256i a = _mm256_maskz_loadu_epi16(there, low), b = _mm256_maskz_loadu_epi16(there, high);
        return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    }
    // Every quarter of eight vectors is a square of numbers of 16 bits.
    static void transpose_quarters(__m512i* x) {
        __m512i twos[8], fours[8];
        for (int i = 0; i < 8; i += 2) {
            twos[i] = _mm512_unpacklo_epi16(x[i], x[i + 1]);
            twos[i + 1] = _mm512_unpackhi_epi16(x[i], x[i + 1]);
        }
        for (int half = 0; half < 8; half += 4) {
            for (int i = 0; i < 2; i++) {
                fours[half + 2 * i] = _mm512_unpacklo_epi32(twos[half + i], twos[half + 2 + i]);
                fours[half + 2 * i + 1] = _mm512_unpackhi_epi32(twos[half + i], twos[half + 2 + i]);
            }
        }
        for (int i = 0; i < 4; i++) {
            x[2 * i] = _mm512_unpacklo_epi64(fours[i], fours[4 + i]);
            x[2 * i + 1] = _mm512_unpackhi_epi64(fours[i], fours[4 + i]);
        }
    }

    Scalar type_ = Scalar::f32;
    union {
        alignas(64) float single_[2][count][16];
        alignas(64) uint16_t half_[count][32];
    };
};

}  // namespace avx512
}  // namespace kernels
