// Sign planes with AVX-512, where groups are whole words: halfwords.h.
//
//     y = sum over groups of  mean T  +  sum over planes of  scale (T - 2 S)

#pragma once

#include "halfwords_avx512.h"
#include "sign_planes.h"

namespace kernels {
namespace avx512 {

// Coefficients of the rows of a tile of halfwords, those of one run at a time.
template <int Vectors>
class HalfwordCoefficients {
   public:
    HalfwordCoefficients(const Coefficients& of, int64_t row, int64_t n) {
        for (int v = 0; v < Vectors; v++) tile_[v].take(of, Tile<Avx512>(row + kHalfwordRows * v, n));
    }
    void find(int64_t index) {
        index_ = index;
        for (CoefficientTile<Avx512>& tile : tile_) tile.find(index);
    }
    [[gnu::always_inline]] __m512 at(int v, int half) const { return tile_[v].found(index_, half); }

   private:
    CoefficientTile<Avx512> tile_[Vectors];
    int64_t index_ = 0;
};

// Rows [row, row + 32 * Vectors), as many of them as there are; One: times one token.
template <int Vectors, int Pieces, bool One>
class SignTile {
   public:
    SignTile(const SignPlanes& w, const Activations& x, int64_t row, float* y, int64_t stride)
        : w_(w), x_(x), row_(row), y_(y + row), stride_(stride) {}

    // Adds the words [word, end); ``word`` is the first of a block.
    void add(int64_t word, int64_t end) {
        for (int64_t plane = 0; plane < w_.planes; plane++) add_plane(plane, word, end);
    }

   private:
    using Scales = HalfwordCoefficients<Vectors>;

    void add_plane(int64_t plane, int64_t word, int64_t end) {
        const Plane& signs = w_.signs[plane];
        const bool with_means = plane == 0 && w_.means.data;
        Scales scales(w_.scales[plane], row_, w_.n), means(w_.means, row_, w_.n);
        constexpr int64_t rows = kHalfwordRows * Vectors;
        Ahead<Avx512> ahead;
        if (One) {
            const int64_t steps = 2 * x_.words + x_.words / kChunkWords * HalfwordBlock<Vectors>::kSteps;
            ahead = {signs.data, signs.row_bytes, row_, w_.n, rows, steps, true};
        }
        for (int64_t block = word; block < end; block += kChunkWords) {
            const int64_t count = least(kChunkWords, end - block);
            HalfwordBlock<Vectors> bits;
            bits.load(signs, row_, w_.n, block, count, One ? &ahead : nullptr);
            for (RunsOf run(x_, block, count); run; ++run) {
                scales.find(run.index);
                if (run.begins) {
                    add_constant(run.index, scales);
                    if (with_means) {
                        means.find(run.index);
                        add_constant(run.index, means);
                    }
                }
                for (int64_t from = run.from, upto; from < run.upto; from = upto) {
                    upto = least(run.upto, (from / kStepWords + 1) * kStepWords);
                    if constexpr (One) add_step(bits.word + from, block + from, upto - from, scales, ahead);
                    else add_step(bits.word + from, block + from, upto - from, scales);
                }
            }
        }
    }

    void add_constant(int64_t run, const Scales& of) {
        for (int64_t token = 0; token < x_.tokens; token++) {
            const __m512 sum = _mm512_set1_ps(x_.sums[token * x_.runs + run]);
            add_to_rows<Vectors>(
                y_ + token * stride_, [&](int v, int half) { return of.at(v, half); }, [sum](int, int) { return sum; });
        }
    }

    // Minus two scales of each row: doubled sums may be no floats where products are.
    struct MinusTwoScales {
        __m512 of[Vectors][2];

        [[gnu::always_inline]] explicit MinusTwoScales(const Scales& scales) {
            for (int v = 0; v < Vectors; v++) {
                for (int half = 0; half < 2; half++) {
                    of[v][half] = _mm512_mul_ps(scales.at(v, half), _mm512_set1_ps(-2.0f));
                }
            }
        }
    };

    // Words of one step.
    [[gnu::always_inline]] void add_step(const __m512i (*words)[Vectors][2], int64_t word, int64_t count,
                                         const Scales& scales) {
        const MinusTwoScales coefficients(scales);
        HalfwordFields<Vectors> fields[2 * kStepWords];
        for (int64_t i = 0; i < 2 * count; i++) fields[i] = {words[i / 2], static_cast<int>(i % 2)};
        for_tokens<kTogether<Pieces>>(0, x_.tokens, [&](auto tokens, int64_t token) {
            HalfwordSums<Vectors, Pieces, decltype(tokens)::value> sums;
            const HalfwordTable<Pieces>* table = tables_of(token, word);
#pragma GCC unroll 1
            for (int64_t i = 0; i < 2 * count; i++) sums.add(table + i, 2 * x_.words, fields[i]);
            add_sums(sums, token, word, coefficients);
        });
    }
    // The same for one token.
    [[gnu::always_inline]] void add_step(const __m512i (*words)[Vectors][2], int64_t word, int64_t count,
                                         const Scales& scales, Ahead<Avx512>& ahead) {
        HalfwordSums<Vectors, Pieces> sums;
        const HalfwordTable<Pieces>* table = tables_of(0, word);
#pragma GCC unroll 1
        for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                ahead.step();
                sums.add(table++, 0, HalfwordFields<Vectors>(words[i], half));
            }
        }
        add_sums(sums, 0, word, MinusTwoScales(scales));
    }

    // Sums of one step and of tokens from one on.
    template <int Tokens>
    [[gnu::always_inline]] void add_sums(const HalfwordSums<Vectors, Pieces, Tokens>& sums, int64_t token, int64_t word,
                                         const MinusTwoScales& coefficients) {
        unrolled<Tokens>([&](auto t) __attribute__((always_inline)) {
            const int64_t own = token + t.value;
            const __m512 unit = _mm512_set1_ps(x_.steps[own * x_.words + word]);
            add_to_rows<Vectors>(
                y_ + own * stride_, [&](int v, int half) { return coefficients.of[v][half]; },
                [&](int v, int half) { return _mm512_mul_ps(sums.total(t.value, v, half), unit); });
        });
    }

    const HalfwordTable<Pieces>* tables_of(int64_t token, int64_t word) const {
        return reinterpret_cast<const HalfwordTable<Pieces>*>(x_.tables) + 2 * (token * x_.words + word);
    }

    const SignPlanes& w_;
    const Activations& x_;
    int64_t row_;
    float* y_;
    int64_t stride_;
};

template <int Pieces, bool One>
void sign_halfwords(const SignPlanes& w, const Activations& x, int64_t first, int64_t last, float* y, int64_t stride) {
    const int64_t panel = panel_words<Pieces, One>(x);
    for (int64_t word = 0; word < x.words; word += panel) {
        const int64_t end = least(word + panel, x.words);
        for_each_tile(first, last, [&](auto vectors, int64_t row) {
            SignTile<decltype(vectors)::value, Pieces, One>(w, x, row, y, stride).add(word, end);
        });
    }
}

template <bool Int8>
void sign_halfwords_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                         int64_t stride) {
    const SignPlanes& w = *static_cast<const SignPlanes*>(matrix);
    clear_outputs(kinds[0].tokens, first, last, y, stride);
    if (kinds[0].tokens == 1) sign_halfwords<kPieces[Int8], true>(w, kinds[0], first, last, y, stride);
    else sign_halfwords<kPieces[Int8], false>(w, kinds[0], first, last, y, stride);
}

}  // namespace avx512
}  // namespace kernels
