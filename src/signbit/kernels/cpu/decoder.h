// One token through one layer of a decoder of the Llama kind:
//
//     h = x + O attention(rotated Q n(x), K n(x), V n(x))        y = h + D (silu(G m(h)) * U m(h))
//
// n, m: root mean square norms. Between products of one token there is little to compute, but in torch each of the small
// steps is an operator, some 40 a layer, which take half as long as products with packed weights. Here they are loops.

#pragma once

#include <vector>

#include "kernels.h"

namespace kernels {

// y = x / sqrt(mean(x^2) + epsilon) * weight; without a weight there is no norm.
struct Norm {
    const float* weight = nullptr;
    float epsilon = 0.0f;
};

// A packed linear: the sum of chains of matrices (Layout.chains), normalised if it is, then whatever biases [n] there are.
struct Linear {
    std::vector<std::vector<const Matrix*>> chains;
    bool int8, norm;
    std::vector<Coefficients> biases;

    void multiply(const float* x, float* y, int threads) const;
    int64_t outputs() const { return chains[0].back()->n; }
};

// Keys and values of the tokens before and room for more, [heads, tokens, features] each, ``stride`` between heads.
struct KeysAndValues {
    float *keys, *values;
    int64_t stride, tokens;
};

struct DecoderLayer {
    int64_t heads, key_heads, features;
    float scaling;
    Norm before_attention, before_mlp, of_queries, of_keys;
    Linear q, k, v, o, gate, up, down;

    // x, y [width]; cosines and sines [features] of the token's position. Its own key and value are put behind the others.
    void step(const float* x, float* y, const float* cosines, const float* sines, const KeysAndValues& cache,
              int threads) const;
};

}  // namespace kernels
