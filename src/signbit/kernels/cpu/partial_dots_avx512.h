// Partial matrices times few tokens, with AVX-512: rows are read from end to end, in windows of 64 columns.
//
//     y = sum over groups of  scale (E - F) + mean (T - C)  +  sum over groups of codes of  code_scale G / 2 + offset C
//
// With x_j' = s_j x_j, activations with the weights' signs: E is the sum of all x', F of those at salient weights, G of
// (2 q + 1) x' and C of x there. A window's 64 activations of 8 bits are one register: a subtraction under the mask of
// the signs makes x'. One vpermi2b brings those at the salient weights of two windows together, wherever they are, and
// vpdpbusd multiplies them by their codes, as they are stored: nothing is gathered, and what a step of 128 columns
// takes hardly depends on how many of its weights are salient. Where they are: salient_gaps_avx512.h.
//
// Exact activations are three digits to the base 128, each times its own dot product, with a step for every 128 columns
// as those of 8 bits: 22 bits of the largest one.

#pragma once

#include "salient_gaps_avx512.h"
#include "step_digits_avx512.h"

namespace kernels {
namespace avx512 {

// A row's coefficients, for every 128 columns, times the activations' steps.
struct StepCoefficients {
    alignas(64) float ordinary[kMostSteps], code[kMostSteps], offset[kMostSteps];

    StepCoefficients(const Partial& w, int64_t row, const float* step) {
        for (int64_t i = 0; i * kStepColumns < w.m; i += 16) {
            const __m512 steps = _mm512_load_ps(step + i), half = _mm512_set1_ps(0.5f);
            const __m512 code_scale = of_steps(w, w.code_scales, row, i);
            _mm512_store_ps(ordinary + i, _mm512_mul_ps(of_steps(w, w.ordinary.scales[0], row, i), steps));
            _mm512_store_ps(code + i, _mm512_mul_ps(_mm512_mul_ps(code_scale, half), steps));
            if (!w.ordinary.means.data) continue;
            const __m512 more = _mm512_sub_ps(of_steps(w, w.code_offsets, row, i),
                                              of_steps(w, w.ordinary.means, row, i));
            _mm512_store_ps(offset + i, _mm512_mul_ps(more, steps));
        }
    }

   private:
    // Those of 16 steps.
    static __m512 of_steps(const Partial& w, const Coefficients& of, int64_t row, int64_t step) {
        if (of.per_row == 1) {
            return _mm512_permutexvar_ps(_mm512_setzero_si512(), load_coefficients(of, row, 1));
        }
        const int64_t each = w.group_size / kStepColumns, group = step / each;
        const __m512 groups = load_coefficients(of, row * of.per_row + group, of.per_row - group);
        if (each == 1) return groups;
        alignas(64) int32_t which[16];
        for (int64_t i = 0; i < 16; i++) which[i] = static_cast<int32_t>((step + i) / each - group);
        return _mm512_permutexvar_ps(_mm512_load_si512(which), groups);
    }
};

[[gnu::always_inline]] inline __m256i halves(__m512i sums) {
    return _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
}

// A row times activations, but for the means of all of its weights. A step of 128 columns has two windows, and its
// salient weights, hardly ever more than 32, are brought together at once: two registers are one table for vpermi2b.
template <int Digits, bool Means>
class RowProduct {
   public:
    RowProduct(const Partial& w, const DigitsOf<Digits>& x, const SalientGaps& gaps, int64_t row)
        : signs_(w.ordinary.signs[0].data + row * w.ordinary.signs[0].row_bytes),
          x_(x),
          gaps_(gaps),
          first_(gaps.first()),
          windows_(w.m / kDotWindow),
          odd_(_mm256_set1_epi8(static_cast<char>(row * windows_ % 2 * kDotWindow))) {}

    // In 8 parts; and where the row's gaps end.
    __m256 times(const StepCoefficients& of, int64_t& gaps_end) {
        int64_t step = 0;
        for (; 2 * step + 2 <= windows_; step++) add<2>(of, step);
        if (2 * step < windows_) add<1>(of, step);
        gaps_end = first_;
        __m256 sum = _mm256_add_ps(ordinary_, coded_);
        if (Means) sum = _mm256_add_ps(sum, plain_);
        return sum;
    }

   private:
    // The two lower digits' sums share a register where nothing but their worth multiplies them.
    static constexpr int parts = Digits == 1 ? 1 : 2;
    static constexpr int part(int digit) { return digit == 0 ? 0 : 1; }

    template <int Windows>
    [[gnu::always_inline]] void add(const StepCoefficients& of, int64_t step) {
        const uint8_t* begin = gaps_.begin() + 2 * step;
        __m512i plain[2][Digits] = {}, x[2][Digits] = {};
        __m256i all[parts], salient[parts] = {}, coded[Digits] = {}, unchanged[Digits] = {};
#pragma GCC unroll 2
        for (int i = 0; i < Windows; i++) {
            __mmask64 negative;
            __builtin_memcpy(&negative, signs_ + 8 * (2 * step + i), 8);
#pragma GCC unroll 3
            for (int d = 0; d < Digits; d++) {
                plain[i][d] = _mm512_load_si512(x_.digit[d] + kDotWindow * (2 * step + i));
                x[i][d] = _mm512_mask_sub_epi8(plain[i][d], negative, _mm512_setzero_si512(), plain[i][d]);
            }
        }
        __m512i sums[parts] = {};
#pragma GCC unroll 2
        for (int i = 0; i < Windows; i++) {
#pragma GCC unroll 3
            for (int d = 0; d < Digits; d++) {
                const __m512i worth = _mm512_set1_epi8(static_cast<char>(d == 1 ? 128 : 1));
                sums[part(d)] = _mm512_dpbusd_epi32(sums[part(d)], worth, x[i][d]);
            }
        }
        for (int p = 0; p < parts; p++) all[p] = halves(sums[p]);
        const int64_t count = static_cast<uint8_t>(begin[Windows] - begin[0]);
        int64_t done = 0;
        do {
            const SalientGaps::Some some = gaps_.at(first_ + done, count - done);
            const __m256i mark = _mm256_and_si256(some.code, _mm256_set1_epi8(1));
            const __m512i place = _mm512_castsi256_si512(_mm256_xor_si256(some.place, odd_));
#pragma GCC unroll 3
            for (int d = 0; d < Digits; d++) {
                const __m256i picked = _mm512_castsi512_si256(_mm512_permutex2var_epi8(x[0][d], place, x[1][d]));
                const __m256i worth = d == 1 ? _mm256_slli_epi16(mark, 7) : mark;
                salient[part(d)] = _mm256_dpbusd_epi32(salient[part(d)], worth, picked);
                coded[d] = _mm256_dpbusd_epi32(coded[d], some.code, picked);
                if (!Means) continue;
                const __m512i as_is = _mm512_permutex2var_epi8(plain[0][d], place, plain[1][d]);
                unchanged[d] = _mm256_dpbusd_epi32(unchanged[d], mark, _mm512_castsi512_si256(as_is));
            }
        } while ((done += 32) < count);
        first_ += count;
        for (int p = 0; p < parts; p++) all[p] = _mm256_sub_epi32(all[p], salient[p]);
        const __m256i sum = Digits == 1 ? all[0] : _mm256_add_epi32(_mm256_slli_epi32(all[0], 14), all[parts - 1]);
        ordinary_ = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(of.ordinary[step]), ordinary_);
        coded_ = _mm256_fmadd_ps(together<Digits>(coded), _mm256_set1_ps(of.code[step]), coded_);
        if (Means) plain_ = _mm256_fmadd_ps(together<Digits>(unchanged), _mm256_set1_ps(of.offset[step]), plain_);
    }

    const uint8_t* signs_;
    const DigitsOf<Digits>& x_;
    const SalientGaps& gaps_;
    int64_t first_;  // the next gap
    const int64_t windows_;
    // Places are counted from the strip's first column, which is half a step off where rows have odd windows.
    const __m256i odd_;
    __m256 ordinary_{}, coded_{}, plain_{};
};

// A row's means times the sums of its groups; in 16 parts.
inline __m512 means_product(const Coefficients& means, int64_t row, const float* sums) {
    __m512 product = _mm512_setzero_ps();
    for (int64_t group = 0; group < means.per_row; group += 16) {
        const __m512 mean = load_coefficients(means, row * means.per_row + group, means.per_row - group);
        const __mmask16 there = first_of_16(means.per_row - group);
        product = _mm512_fmadd_ps(mean, _mm512_maskz_loadu_ps(there, sums + group), product);
    }
    return product;
}

template <int Digits>
inline __m512 row_product(const Partial& w, const DigitsOf<Digits>& x, const SalientGaps& gaps, int64_t row,
                          const float* sums, int64_t& gaps_end) {
    const StepCoefficients of(w, row, x.step);
    if (!w.ordinary.means.data) {
        return _mm512_zextps256_ps512(RowProduct<Digits, false>(w, x, gaps, row).times(of, gaps_end));
    }
    const __m512 product = _mm512_zextps256_ps512(RowProduct<Digits, true>(w, x, gaps, row).times(of, gaps_end));
    return _mm512_add_ps(product, means_product(w.ordinary.means, row, sums));
}

// Tasks begin at whole strips.
template <bool Int8>
void partial_dots_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                       int64_t stride) {
    constexpr int digits = Int8 ? 1 : 3;
    const Partial& w = *static_cast<const Partial*>(matrix);
    const Activations& x = kinds[0];
    DigitsOf<digits> of[kFewTokens];
    for (int64_t token = 0; token < x.tokens; token++) of[token].take(x, token, w.m);
    for (int64_t strip = first; strip < last; strip += kStripRows) {
        SalientGaps gaps(w, strip / kStripRows);
        const int64_t count = least(last - strip, kStripRows);
        __m512 parts[kFewTokens][kStripRows] = {};
        for (int64_t i = 0, gaps_end = 0; i < count; i++) {
            gaps.next_row(gaps_end);
            for (int64_t token = 0; token < x.tokens; token++) {
                parts[token][i] = row_product(w, of[token], gaps, strip + i, x.sums + token * x.runs, gaps_end);
            }
        }
        for (int64_t token = 0; token < x.tokens; token++) {
            Avx512::store(y + token * stride + strip, sums_of(parts[token]), count);
        }
    }
}

}  // namespace avx512
}  // namespace kernels
