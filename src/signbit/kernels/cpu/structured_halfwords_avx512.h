// Structured N:M with AVX-512, where groups are whole words: rows are decoded to bits in the order of the columns
// (structured.h), which are then multiplied as split planes are (coded_halfwords_avx512.h).

#pragma once

#include "coded_halfwords_avx512.h"
#include "structured_avx512.h"

namespace kernels {
namespace avx512 {

template <int Vectors>
class StructuredBlock {
   public:
    static constexpr int vectors = Vectors;
    using Source = Structured;

    explicit StructuredBlock(const Structured& w) : decoded_(w) { decoded_.clear(); }

    template <class Fetch>
    void load(int64_t row, int64_t n, int64_t block, int64_t count, Fetch* ahead) {
        const int64_t rows = least(kHalfwordRows * Vectors, n - row);
        decoded_.decode(row, rows, block, count);
        for (int plane = 0; plane < Decoded::count_of; plane++) {
            const Plane bits = decoded_.plane(static_cast<typename Decoded::Bits>(plane));
            plane_[plane].load(bits, 0, rows, 0, count, ahead);
        }
    }
    [[gnu::always_inline]] __m512i chosen(Bits bits, int64_t word, int half, int v) const {
        if (bits == Bits::kept) return of(Decoded::kept, word, half, v);
        if (bits == Bits::negative) return of(Decoded::negative, word, half, v);
        if (bits == Bits::residual) {
            return _mm512_or_si512(of(Decoded::ones, word, half, v), of(Decoded::twos, word, half, v));
        }
        const int number = static_cast<int>(bits) - static_cast<int>(Bits::positive_in0);
        const __m512i own = region(number % kMaxRegions, word, half, v), negative = of(Decoded::negative, word, half, v);
        if (number >= 2 * kMaxRegions) return _mm512_xor_si512(own, negative);
        return number < kMaxRegions ? _mm512_andnot_si512(negative, own) : _mm512_and_si512(negative, own);
    }
    template <class Do>
    [[gnu::always_inline]] static void with(Bits bits, Do what) {
        switch (bits) {
            case Bits::kept: return what(KnownBits<Bits::kept>());
            case Bits::negative: return what(KnownBits<Bits::negative>());
            case Bits::residual: return what(KnownBits<Bits::residual>());
            case Bits::positive_in0: return what(KnownBits<Bits::positive_in0>());
            case Bits::positive_in1: return what(KnownBits<Bits::positive_in1>());
            case Bits::positive_in2: return what(KnownBits<Bits::positive_in2>());
            case Bits::negative_in0: return what(KnownBits<Bits::negative_in0>());
            case Bits::negative_in1: return what(KnownBits<Bits::negative_in1>());
            case Bits::negative_in2: return what(KnownBits<Bits::negative_in2>());
            case Bits::mixed0: return what(KnownBits<Bits::mixed0>());
            case Bits::mixed1: return what(KnownBits<Bits::mixed1>());
            default: return what(KnownBits<Bits::mixed2>());
        }
    }

   private:
    using Decoded = DecodedRows<Avx512, kHalfwordRows * Vectors, kChunkWords>;

    [[gnu::always_inline]] __m512i of(int plane, int64_t word, int half, int v) const {
        return halfwords_of(plane_[plane].word[word][v], half);
    }
    [[gnu::always_inline]] __m512i region(int number, int64_t word, int half, int v) const {
        const __m512i ones = of(Decoded::ones, word, half, v);
        if (number == 1) return ones;
        const __m512i twos = of(Decoded::twos, word, half, v);
        if (number == 2) return twos;
        constexpr int only_first = 0x10;  // kept and of neither
        return _mm512_ternarylogic_epi32(of(Decoded::kept, word, half, v), ones, twos, only_first);
    }

    Decoded decoded_;
    HalfwordBlock<Vectors> plane_[Decoded::count_of];
};

template <int Pieces, bool One>
void structured_halfwords(const Structured& w, const Activations* kinds, int64_t first, int64_t last, float* y,
                          int64_t stride) {
    const int64_t words = kinds[0].words, panel = panel_words<Pieces, One>(kinds[0]);
    for (int64_t word = 0; word < words; word += panel) {
        const int64_t end = least(word + panel, words);
        // Four planes of 128 rows would fill the first-level cache.
        for_each_tile<2>(first, last, [&](auto vectors, int64_t row) {
            using Block = StructuredBlock<decltype(vectors)::value>;
            CodedTile<Block, Pieces, One>(w, w.coded->part[0], kinds, row, w.n, y + row, stride).add(word, end);
        });
    }
}

template <bool Int8>
void structured_halfwords_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                               int64_t stride) {
    const Structured& w = *static_cast<const Structured*>(matrix);
    clear_outputs(kinds[0].tokens, first, last, y, stride);
    if (kinds[0].tokens == 1) structured_halfwords<kPieces[Int8], true>(w, kinds, first, last, y, stride);
    else structured_halfwords<kPieces[Int8], false>(w, kinds, first, last, y, stride);
}

}  // namespace avx512
}  // namespace kernels
