// What lies between the products of a decoder layer (decoder.h), and products with rows of plain floats.

#pragma once

#include <cmath>
#include <cstring>

#include "decoder.h"
#include "prepare.h"

namespace kernels {
namespace SIGNBIT_ISA {

// Compilers make of it whatever vectors there are.
using Lanes = float __attribute__((vector_size(4 * kLanes)));

inline Lanes lanes_at(const float* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

inline float dot(const float* a, const float* b, int64_t count) {
    constexpr int streams = 4;
    Lanes sums[streams] = {};
    int64_t i = 0;
    for (; i + streams * kLanes <= count; i += streams * kLanes) {
        for (int s = 0; s < streams; s++) sums[s] += lanes_at(a + i + s * kLanes) * lanes_at(b + i + s * kLanes);
    }
    for (; i + kLanes <= count; i += kLanes) sums[0] += lanes_at(a + i) * lanes_at(b + i);
    const Lanes all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; lane++) sum += all[lane];
    for (; i < count; i++) sum += a[i] * b[i];
    return sum;
}

inline void rms_norm(const float* x, const Norm& norm, int64_t count, float* y) {
    const float size = 1.0f / std::sqrt(dot(x, x, count) / static_cast<float>(count) + norm.epsilon);
    for (int64_t i = 0; i < count; i++) y[i] = x[i] * size * norm.weight[i];
}

// e^x to one or two units in the last place; what would be less than a normal float or more than the largest is bounded.
inline float exponential(float x) {
    const float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    // Adding 1.5 * 2^23 rounds to an integer n, which is then in the lowest bits; e^x = 2^n e^r.
    const float shifted = bounded * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const float r = (bounded - n * 0.693145752f) - n * 1.42860677e-6f;
    float series = 1.0f / 5040;
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    uint32_t bits, exponent;
    std::memcpy(&bits, &series, 4);
    std::memcpy(&exponent, &shifted, 4);
    bits += exponent << 23;
    float result;
    std::memcpy(&result, &bits, 4);
    return x != x ? x : result;
}

// gate = gate / (1 + e^-gate) * up
inline void silu_times(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; i++) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

// y [columns] = sum over rows of weights[row] values[row], ``Vectors`` vectors wide.
template <int Vectors>
inline void weigh(const float* weights, const float* values, int64_t rows, int64_t stride, float* y) {
    Lanes sums[Vectors] = {};
    for (int64_t row = 0; row < rows; row++) {
        for (int v = 0; v < Vectors; v++) sums[v] += weights[row] * lanes_at(values + row * stride + v * kLanes);
    }
    std::memcpy(y, sums, sizeof sums);
}

// One head: y [features] = softmax(scaling K q) V; weights: room for a float of each token.
inline void attend(const float* q, const float* keys, const float* values, int64_t tokens, int64_t features,
                   float scaling, float* weights, float* y) {
    float largest = -INFINITY, total = 0.0f;
    for (int64_t t = 0; t < tokens; t++) {
        weights[t] = scaling * dot(q, keys + t * features, features);
        largest = weights[t] > largest ? weights[t] : largest;
    }
    for (int64_t t = 0; t < tokens; t++) weights[t] = exponential(weights[t] - largest);
    for (int64_t t = 0; t < tokens; t++) total += weights[t];
    for (int64_t t = 0; t < tokens; t++) weights[t] /= total;
    int64_t from = 0;
    for (; from + 4 * kLanes <= features; from += 4 * kLanes) weigh<4>(weights, values + from, tokens, features, y + from);
    for (; from + kLanes <= features; from += kLanes) weigh<1>(weights, values + from, tokens, features, y + from);
    for (; from < features; from++) {
        y[from] = 0.0f;
        for (int64_t t = 0; t < tokens; t++) y[from] += weights[t] * values[t * features + from];
    }
}

// A row of W, from its beginning to its end, times each token.
inline void dense_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                       int64_t stride) {
    const Dense& w = *static_cast<const Dense*>(matrix);
    for (int64_t row = first; row < last; row++) {
        for (int64_t token = 0; token < kinds->tokens; token++) {
            y[token * stride + row] = dot(numbers(*kinds, token), w.weights + row * w.m, w.m);
        }
    }
}

constexpr DecoderSteps kDecoderSteps = {rms_norm, silu_times, attend};

}  // namespace SIGNBIT_ISA
}  // namespace kernels
