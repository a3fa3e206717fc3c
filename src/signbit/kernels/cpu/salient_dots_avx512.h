// Salient columns times few tokens, with AVX-512: brought together in words of their own (SalientBlocks).

#pragma once

#include "dots_avx512.h"

namespace kernels {
namespace avx512 {

// Bits of the salient columns of 16 rows, from as many planes.
template <int Planes>
class SalientBits {
   public:
    Plane plane[Planes];

    // From rows [row, row + count) of a plane to those from ``at`` on. Of lanes without salient columns, whose activations
    // are zero, bits are whatever they are.
    void load(int which, const SalientBlocks& blocks, const Plane& from, int64_t row, int64_t count, int64_t at = 0) {
        plane[which] = {bits_[which], 64 * blocks.count};
        uint8_t* to = bits_[which] + 64 * blocks.count * at;
        const uint8_t* bytes = from.data + row * from.row_bytes;
        if (blocks.cut) {
            for (int64_t i = 0; i < count; i++) {
                cut(blocks, bytes + i * from.row_bytes, from.row_bytes / 4, to + 64 * blocks.count * i);
            }
            return;
        }
        pick(blocks, bytes, from.row_bytes, count, to);
        for (int64_t i = 0; i < count * blocks.count; i++) {
            const __m512i block = _mm512_load_si512(to + 64 * i);
            _mm512_store_si512(to + 64 * i, blocks.pick.sets == 2 ? words_of_two(block) : words_of_four(block));
        }
    }

   private:
    // A block gets 64 bytes, set by set those of its windows. Chunk by chunk: what is picked is the same for all rows.
    static void pick(const SalientBlocks& blocks, const uint8_t* rows, int64_t row_bytes, int64_t count, uint8_t* to) {
        const SalientPick& pick = blocks.pick;
        const int64_t in_set = 64 / pick.sets, in_row = 64 * blocks.count;
        const uint8_t* select = pick.select;
        for (int64_t chunk = 0; chunk < pick.chunks; chunk++) {
            const __mmask16 there = first_of_16(row_bytes / 4 - kChunkWords * chunk);
            uint8_t* of_block = to + 8 * chunk / in_set * 64 + 8 * chunk % in_set;
            for (int64_t set = 0; set < pick.used; set++, select += 64) {
                const __m512i picked = _mm512_loadu_si512(select);
                uint8_t* of_set = of_block + set * in_set;
#pragma GCC unroll 4
                for (int64_t i = 0; i < count; i++) {
                    const __m512i bits = _mm512_maskz_loadu_epi32(there, rows + i * row_bytes + 64 * chunk);
                    const __mmask64 found = _mm512_bitshuffle_epi64_mask(bits, picked);
                    __builtin_memcpy(of_set + i * in_row, &found, 8);
                }
            }
        }
    }
    // Bytes 2 l and 2 l + 1 of each of two sets, byte l of each of four, to word l.
    static __m512i words_of_two(__m512i bytes) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i both = _mm512_or_si512(lane, _mm512_slli_epi32(lane, 16));
        return _mm512_permutexvar_epi16(_mm512_add_epi32(both, _mm512_set1_epi32(16 << 16)), bytes);
    }
    static __m512i words_of_four(__m512i bytes) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i all = _mm512_mullo_epi32(lane, _mm512_set1_epi32(0x01010101));
        return _mm512_permutexvar_epi8(_mm512_add_epi32(all, _mm512_set1_epi32(0x30201000)), bytes);
    }
    static void cut(const SalientBlocks& blocks, const uint8_t* row, int64_t words, uint8_t* to) {
        for (int64_t i = 0; i < blocks.count; i++) {
            const CompactBlock& block = blocks.cut[i];
            const int64_t left = words - block.first;
            const __m512i low = _mm512_maskz_loadu_epi32(first_of_16(left), row + 4 * block.first);
            const __m512i high = _mm512_maskz_loadu_epi32(first_of_16(left - 16), row + 4 * block.first + 64);
            const __m512i word = _mm512_loadu_si512(block.word), next = _mm512_add_epi32(word, _mm512_set1_epi32(1));
            const __m512i bits = _mm512_shrdv_epi32(_mm512_permutex2var_epi32(low, word, high),
                                                    _mm512_permutex2var_epi32(low, next, high),
                                                    _mm512_loadu_si512(block.shift));
            _mm512_store_si512(to + 64 * i, _mm512_and_si512(bits, _mm512_loadu_si512(block.mask)));
        }
    }

    alignas(64) uint8_t bits_[Planes][64 * kDotRows * kMostBlocks];
};

// A sign and a residual sign, each with a scale:
//
//     y = sum over words of  scale_o (K - 2 N) + scale_r (K - 2 Z) + mean K
//
// K: of the weights that are there at all; N and Z: of the negative ones, and those whose residual is.
template <int Digits>
struct ResidualProduct {
    static constexpr int rows = Digits == 1 ? 2 : 1;
    const Plane &kept, &negative, &residual;
    const GroupCoefficients &scales, &means;
    const Chunk<Digits>* x;
    int64_t base;  // the planes' first row

    void add(const SideBySide<rows>& row, __m512* parts) const {
        const RowsOfBits<rows> K(kept, row, base), N(negative, row, base), Z(residual, row, base);
        RowsCoefficients<rows, 2> scale(scales, row), mean(means, row);
        for (int64_t chunk = row.from; chunk < row.upto; chunk++) {
            __m512i k[rows], n[rows], z[rows];
            K.load(chunk, k);
            N.load(chunk, n);
            Z.load(chunk, z);
            scale.load(chunk);
            if (means.of.data) mean.load(chunk);
            BitDots<Digits> of_k[rows], of_n[rows], of_z[rows];
#pragma GCC unroll 4
            for (int i = 0; i < 8; i += 2) {
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++) {
                    of_k[r].add(k[r], x[chunk].x[i], x[chunk].x[i + 1]);
                    of_n[r].add(n[r], x[chunk].x[i], x[chunk].x[i + 1]);
                    of_z[r].add(z[r], x[chunk].x[i], x[chunk].x[i + 1]);
                    k[r] = next(k[r], 2);
                    n[r] = next(n[r], 2);
                    z[r] = next(z[r], 2);
                }
            }
            const __m512 minus_two = _mm512_set1_ps(-2.0f);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
                const __m512 there = of_k[r].sum();
                const __m512 by_sign = _mm512_fmadd_ps(of_n[r].sum(), minus_two, there);
                const __m512 by_residual = _mm512_fmadd_ps(of_z[r].sum(), minus_two, there);
                __m512 of_chunk = _mm512_mul_ps(scale.at(r, 0), by_sign);
                of_chunk = _mm512_fmadd_ps(scale.at(r, 1), by_residual, of_chunk);
                if (means.of.data) of_chunk = _mm512_fmadd_ps(mean.at(r, 0), there, of_chunk);
                parts[r] = _mm512_fmadd_ps(of_chunk, x[chunk].step, parts[r]);
            }
        }
    }
};

}  // namespace avx512
}  // namespace kernels
