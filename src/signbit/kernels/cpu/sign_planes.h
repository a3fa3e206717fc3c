// Sign planes: W = mean + sum over planes of scale * sign, times scales of the columns (in the activations).
//
//     y = sum over groups of  mean T  +  sum over planes of  scale (T - 2 S)
//
// T: the sum of a group's activations; S: of those with a negative weight.

#pragma once

#include "kernels.h"
#ifdef SIGNBIT_ISA
#include "lookup.h"
#endif

namespace kernels {

constexpr int64_t kMaxPlanes = 8;

struct SignPlanes {
    int64_t n, planes;
    Plane signs[kMaxPlanes];
    Coefficients scales[kMaxPlanes], means;
};

#ifdef SIGNBIT_ISA
namespace SIGNBIT_ISA {

template <class I, bool Int8>
void sign_planes_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                      int64_t stride) {
    const SignPlanes& w = *static_cast<const SignPlanes*>(matrix);
    const Activations& x = kinds[0];
    for (int64_t row = first; row < last; row += Tile<I>::rows) {
        const Tile<I> tile(row, w.n);
        Outputs<I> out(x.tokens);
        CoefficientTile<I> means(w.means, tile);
        for (int64_t plane = 0; plane < w.planes; plane++) {
            CoefficientTile<I> scales(w.scales[plane], tile);
            const bool once = x.tokens <= kFewTokens;
            Ahead<I> ahead(w.signs[plane].data, w.signs[plane].row_bytes, tile, x.words, once);
            for (Blocks<I> block(x); block; ++block) {
                Words<I> signs;
                signs.load(w.signs[plane], tile, block.word, block.count, false);
                for (RunsOf run(x, block.word, block.count); run; ++run) {
                    const Column<I> scale = scales.at(run.index), minus_twice = scale * -2.0f;
                    const Column<I> constant = plane || !w.means.data ? scale : scale + means.at(run.index);
                    Column<I> sums[kTokens];
                    look_up<I, Int8>(signs, run, x, sums, &ahead);
                    for (int64_t token = 0; token < x.tokens; token++) {
                        if (run.begins) out.add(token, constant, x.sums[token * x.runs + run.index]);
                        out.add(token, minus_twice, sums[token]);
                    }
                }
            }
        }
        out.store(tile, x.tokens, y, stride);
    }
}

}  // namespace SIGNBIT_ISA
#endif

}  // namespace kernels
