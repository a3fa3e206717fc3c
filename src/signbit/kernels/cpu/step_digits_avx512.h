// Activations for products that go by steps of 128 columns, with AVX-512: digits in the order of the
// columns, the highest first.

#pragma once

#include "dots_avx512.h"

namespace kernels {
namespace avx512 {

constexpr int64_t kMostSteps = kMostDotColumns / kStepColumns;

// Zeros behind the last column; and for every 128 columns what a unit of the lowest digit is worth.
template <int Digits>
struct DigitsOf {
    alignas(64) int8_t digit[Digits][kMostDotColumns];
    alignas(64) float step[kMostSteps];

    void take(const Activations& x, int64_t token, int64_t m) {
        for (int64_t i = 0; i < m; i += kStepColumns) {
            const int64_t columns = least(m - i, kStepColumns);
            float& own = step[i / kStepColumns];
            if (Digits == 1) {
                own = x.steps[token * x.words + i / 32];
                __builtin_memset(digit[0] + i, 0, kStepColumns);
                __builtin_memcpy(digit[0] + i, rounded_numbers(x, token) + i, static_cast<size_t>(columns));
            } else {
                own = to_digits<Digits>(numbers(x, token) + i, columns, digit[0] + i, kMostDotColumns);
            }
        }
    }
};

// What digits' sums are together.
template <int Digits>
[[gnu::always_inline]] inline __m256 together(const __m256i* sum) {
    if (Digits == 1) return _mm256_cvtepi32_ps(sum[0]);
    const __m256i high = _mm256_add_epi32(_mm256_slli_epi32(sum[0], 7), sum[1]);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(128.0f), _mm256_cvtepi32_ps(sum[2]));
}

}  // namespace avx512
}  // namespace kernels
