#include "decoder.h"

#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "floats.h"
#include "threads.h"

namespace kernels {
namespace {

// Multiplications that are worth waking other threads for.
constexpr int64_t kWorthThreads = 1 << 15;

// As torch's layer_norm, without weights.
void normalize(float* y, int64_t count) {
    constexpr double epsilon = 1e-5;
    double sum = 0.0, squares = 0.0;
    for (int64_t i = 0; i < count; i++) sum += static_cast<double>(y[i]);
    const double mean = sum / static_cast<double>(count);
    for (int64_t i = 0; i < count; i++) squares += (static_cast<double>(y[i]) - mean) * (static_cast<double>(y[i]) - mean);
    const double size = 1.0 / std::sqrt(squares / static_cast<double>(count) + epsilon);
    for (int64_t i = 0; i < count; i++) y[i] = static_cast<float>((static_cast<double>(y[i]) - mean) * size);
}

void add(const float* x, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i++) to[i] += x[i];
}

// The first half of the features is turned against the second, each pair by its angle.
void rotate(float* x, const float* cosines, const float* sines, int64_t features) {
    const int64_t half = features / 2;
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i], second = x[half + i];
        x[i] = first * cosines[i] - second * sines[i];
        x[half + i] = second * cosines[half + i] + first * sines[half + i];
    }
}

}  // namespace

void Linear::multiply(const float* x, float* y, int threads) const {
    static thread_local std::vector<float> between[2], part;
    const int64_t n = outputs();
    for (size_t c = 0; c < chains.size(); c++) {
        const float* from = x;
        if (c) part.resize(static_cast<size_t>(n));
        for (size_t i = 0; i < chains[c].size(); i++) {
            const Matrix& matrix = *chains[c][i];
            const bool last = i + 1 == chains[c].size();
            if (!last) between[i % 2].resize(static_cast<size_t>(matrix.n));
            float* to = !last ? between[i % 2].data() : c ? part.data() : y;
            kernels::multiply(matrix, active(), from, to, Scalar::f32, 1, int8, threads);
            from = to;
        }
        if (c) add(part.data(), n, y);
    }
    if (norm) normalize(y, n);
    for (const Coefficients& bias : biases) {
        part.resize(static_cast<size_t>(n));
        to_floats(bias.data, bias.type, n, part.data());
        add(part.data(), n, y);
    }
}

void DecoderLayer::step(const float* x, float* y, const float* cosines, const float* sines, const KeysAndValues& cache,
                        int threads) const {
    const DecoderSteps& steps = active().decoder;
    const int64_t width = o.outputs(), inner = gate.outputs(), tokens = cache.tokens + 1, own_keys = key_heads * features;
    static thread_local std::vector<float> room;
    room.resize(static_cast<size_t>(width + 2 * heads * features + 2 * own_keys + 2 * inner + heads * tokens));
    float* const normed = room.data();
    float* const queries = normed + width;
    float* const found = queries + heads * features;
    float* const new_keys = found + heads * features;
    float* const new_values = new_keys + own_keys;
    float* const gates = new_values + own_keys;
    float* const ups = gates + inner;
    float* const weights = ups + inner;

    steps.rms_norm(x, before_attention, width, normed);
    q.multiply(normed, queries, threads);
    k.multiply(normed, new_keys, threads);
    v.multiply(normed, new_values, threads);
    for (int64_t head = 0; head < heads; head++) {
        float* const own = queries + head * features;
        if (of_queries.weight) steps.rms_norm(own, of_queries, features, own);
        rotate(own, cosines, sines, features);
    }
    for (int64_t head = 0; head < key_heads; head++) {
        float* const own = new_keys + head * features;
        if (of_keys.weight) steps.rms_norm(own, of_keys, features, own);
        rotate(own, cosines, sines, features);
        const int64_t at = head * cache.stride + cache.tokens * features;
        std::copy(own, own + features, cache.keys + at);
        std::copy(new_values + head * features, new_values + (head + 1) * features, cache.values + at);
    }
    parallel_for(heads, heads * tokens * features < kWorthThreads ? 1 : threads, [&](int64_t head) {
        const int64_t at = head / (heads / key_heads) * cache.stride;
        steps.attend(queries + head * features, cache.keys + at, cache.values + at, tokens, features, scaling,
                     weights + head * tokens, found + head * features);
    });
    o.multiply(found, y, threads);
    add(x, width, y);

    steps.rms_norm(y, before_mlp, width, normed);
    gate.multiply(normed, gates, threads);
    up.multiply(normed, ups, threads);
    steps.silu_times(gates, ups, inner);
    down.multiply(gates, normed, threads);
    add(normed, width, y);
}

}  // namespace kernels
