// Step 2 of a product: what the activations of one token add up to (lookup.h), and their rounding to 8 bits.

#pragma once

#include "lookup.h"

namespace kernels {
namespace SIGNBIT_ISA {

// Sums and maxima are kept in so many lanes, which a compiler makes vectors of.
constexpr int kLanes = 16;

// Rounds to integers of 8 bits, in place, with a step for every 128 columns: the largest size becomes 127. Where one is
// infinite or no number, none of the sums are; sizes with no finite inverse are as good as zero.
inline void round_to_8_bits(float* x, int64_t words, float* steps) {
    for (int64_t word = 0; word < words; word += kStepWords) {
        const int64_t end = least(word + kStepWords, words);
        float lanes[kLanes] = {}, not_finite[kLanes] = {}, largest = 0.0f, spoilt = 0.0f;
        for (int64_t i = 32 * word; i < 32 * end; i += kLanes) {
            for (int lane = 0; lane < kLanes; lane++) {
                const float size = x[i + lane] < 0 ? -x[i + lane] : x[i + lane];
                lanes[lane] = size > lanes[lane] ? size : lanes[lane];
                not_finite[lane] += x[i + lane] * 0.0f;  // NaN from there on
            }
        }
        for (int lane = 0; lane < kLanes; lane++) {
            largest = lanes[lane] > largest ? lanes[lane] : largest;
            spoilt += not_finite[lane];
        }
        if (largest > 1e-36f && spoilt == 0.0f) {
            const float per_step = 127.0f / largest;
            // Adding 1.5 * 2^23 and taking it away again rounds to nearest, ties to even.
            for (int64_t i = 32 * word; i < 32 * end; i++) x[i] = (x[i] * per_step + 12582912.0f) - 12582912.0f;
        } else {
            for (int64_t i = 32 * word; i < 32 * end; i++) x[i] = 0.0f;
        }
        for (int64_t i = word; i < end; i++) steps[i] = largest / 127.0f + spoilt;
    }
}

// The columns of a word that are in a run.
inline uint32_t mask_of(const Run& run, int64_t word) {
    if (word < run.word || word >= run.end) return 0;
    return (word == run.word ? run.first : ~0u) & (word == run.end - 1 ? run.last : ~0u);
}

// The numbers of a token: floats, and what they were rounded to.
inline const float* numbers(const Activations& x, int64_t token) {
    return reinterpret_cast<const float*>(x.tables + token * x.words * kNumberBytes);
}
inline const int8_t* rounded_numbers(const Activations& x, int64_t token) {
    return reinterpret_cast<const int8_t*>(numbers(x, token) + 32 * x.words);
}

// The sum of a run's activations, each times its word's step.
inline float sum_of(const float* x, const float* steps, const Run& run) {
    float lanes[kLanes] = {}, sum = 0.0f;
    for (int64_t word = run.word; word < run.end; word++) {
        const uint32_t mask = mask_of(run, word);
        const float* own = x + 32 * word;
        if (mask == ~0u) {
            for (int lane = 0; lane < kLanes; lane++) lanes[lane] += (own[lane] + own[kLanes + lane]) * steps[word];
        } else {
            for (int i = 0; i < 32; i++) lanes[i % kLanes] += mask >> i & 1 ? own[i] * steps[word] : 0.0f;
        }
    }
    for (float lane : lanes) sum += lane;
    return sum;
}

template <class I>
void prepare(float* x, int64_t words, const Run* run, int64_t runs, bool int8, void* tables, float* steps,
             float* sums) {
    if (int8) {
        round_to_8_bits(x, words, steps);
    } else {
        for (int64_t i = 0; i < words; i++) steps[i] = 1.0f;
    }
    char* out = static_cast<char*>(tables);
    for (int64_t word = 0; word < words; word++) {
        if (int8) {
            I::template Sum<true>::tabulate(x + 32 * word, out + word * I::template Sum<true>::table_bytes);
        } else {
            I::template Sum<false>::tabulate(x + 32 * word, out + word * I::template Sum<false>::table_bytes);
        }
    }
    for (int64_t i = 0; i < runs; i++) sums[i] = sum_of(x, steps, run[i]);
}

inline void prepare_numbers(float* x, int64_t words, const Run* run, int64_t runs, bool int8, void* numbers,
                            float* steps, float* sums) {
    float* floats = static_cast<float*>(numbers);
    int8_t* integers = reinterpret_cast<int8_t*>(floats + 32 * words);
    if (int8) {
        round_to_8_bits(x, words, steps);
        for (int64_t i = 0; i < 32 * words; i++) integers[i] = static_cast<int8_t>(x[i]);
    } else {
        for (int64_t i = 0; i < words; i++) steps[i] = 1.0f;
    }
    for (int64_t word = 0; word < words; word++) {
        for (int64_t i = 32 * word; i < 32 * word + 32; i++) floats[i] = x[i] * steps[word];
    }
    for (int64_t i = 0; i < runs; i++) sums[i] = sum_of(x, steps, run[i]);
}

}  // namespace SIGNBIT_ISA
}  // namespace kernels
