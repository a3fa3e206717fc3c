// Structured N:M with AVX-512 VBMI: tables of bytes in registers, 64 lookups an instruction.

#pragma once

#include "structured.h"

namespace kernels {
namespace avx512 {

template <>
struct StructuredOperations<Avx512> {
    // 8 times 8 cells at a time: the ranks of 8 cells, as many bytes as a rank has bits, are moved to 64 bits of their
    // own, each rank to a byte of them, and looked up by their lowest 7 bits.
    static void kept_of_8(const Structured& w, const uint8_t* ranks, int64_t count, uint64_t* kept) {
        const __m512i bytes = _mm512_loadu_si512(w.ranks_of_8);
        const __m512i places = _mm512_set1_epi64(0x0706050403020100ll * w.rank_bits);
        const __m512i low = _mm512_loadu_si512(w.choices_of_8), high = _mm512_loadu_si512(w.choices_of_8 + 64);
        for (int64_t i = 0; i < count; i += 8) {
            const __m512i packed = _mm512_permutexvar_epi8(bytes, _mm512_loadu_si512(ranks + i * w.rank_bits));
            const __m512i rank = _mm512_multishift_epi64_epi8(places, packed);
            _mm512_storeu_si512(kept + i, _mm512_permutex2var_epi8(low, rank, high));
        }
    }

    // Nothing behind the bytes is read: they may be the last of a plane (kept_dots_avx512.h).
    static void trits(const Structured& w, const uint8_t* bytes, int64_t count, uint8_t* ones, uint8_t* twos) {
        for (int64_t i = 0; i < count; i += 64) {
            const __mmask64 there = _bzhi_u64(~0ull, static_cast<unsigned>(least(count - i, 64)));
            const __m512i five = _mm512_maskz_loadu_epi8(there, bytes + i);
            _mm512_storeu_si512(ones + i * kTritsPerByte / 8, together(look_up(w.trits, five)));
            _mm512_storeu_si512(twos + i * kTritsPerByte / 8, together(look_up(w.trits + 256, five)));
        }
    }

   private:
    static __m512i look_up(const uint8_t* table, __m512i bytes) {
        const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), bytes, _mm512_loadu_si512(table + 64));
        const __m512i high =
            _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), bytes, _mm512_loadu_si512(table + 192));
        return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(bytes), high);
    }
    // The lowest 5 bits of 64 bytes, one behind the other: 40 bytes.
    static __m512i together(__m512i fives) {
        const __m512i tens = _mm512_maddubs_epi16(fives, _mm512_set1_epi16(1 | 32 << 8));
        const __m512i twenties = _mm512_madd_epi16(tens, _mm512_set1_epi32(1 | 1024 << 16));
        // mask ? a : b
        const __m512i forties = _mm512_ternarylogic_epi64(_mm512_set1_epi64(0xfffff), twenties,
                                                          _mm512_srli_epi64(twenties, 12), 0xca);
        alignas(64) static constexpr uint8_t order[64] = {0,  1,  2,  3,  4,  8,  9,  10, 11, 12, 16, 17, 18, 19,
                                                          20, 24, 25, 26, 27, 28, 32, 33, 34, 35, 36, 40, 41, 42,
                                                          43, 44, 48, 49, 50, 51, 52, 56, 57, 58, 59, 60};
        return _mm512_permutexvar_epi8(_mm512_load_si512(order), forties);
    }
};

}  // namespace avx512
}  // namespace kernels
