// Integers with AVX-512: codes are unpacked in their order by multishifts, which move any eight bits of 64 to a byte.

#pragma once

#include "integers.h"

namespace kernels {
namespace avx512 {

// To byte i, bits from ``width * i`` on of its 64.
inline __m512i fields_of(__m512i words, int width) {
    const __m512i places = _mm512_set1_epi64(0x0706050403020100ll * width);
    return _mm512_multishift_epi64_epi8(places, words);
}

template <>
struct IntegerOperations<Avx512> {
    using F = __m512;
    static constexpr bool dots = true;

    // i % 2^width * unit, for i = 0 .. 15: a table that needs no more than a field's own bits.
    static F multiples(int width, float unit) {
        const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i field = _mm512_and_si512(i, _mm512_set1_epi32((1 << width) - 1));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(field), _mm512_set1_ps(unit));
    }
    // To the lowest bits of lane i, field i of 16.
    static __m512i sixteen(const uint8_t* bytes, int width) {
        const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i at = _mm512_mullo_epi32(i, _mm512_set1_epi32(width));
        long long word = 0;
        __builtin_memcpy(&word, bytes, static_cast<size_t>(2 * width));
        return _mm512_multishift_epi64_epi8(at, _mm512_set1_epi64(word));
    }

    template <int Bits>
    static void codes(const uint8_t* const* parts, F* q) {
        for (int half = 0; half < 2; half++) {
            F values;
#pragma GCC unroll 3
            for (int part = 0; part < Fields<Bits>::count; part++) {
                const int width = Fields<Bits>::width(part);
                const uint8_t* bytes = parts[part] + 2 * width * half;
                const float unit = static_cast<float>(1 << Fields<Bits>::shift(part));
                if (width == 8) {
                    const __m128i sixteen_bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
                    values = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen_bytes));
                } else if (width == 1) {
                    uint16_t bits;
                    __builtin_memcpy(&bits, bytes, 2);
                    values = _mm512_mask_add_ps(values, bits, values, _mm512_set1_ps(unit));
                } else {
                    const F field = _mm512_permutexvar_ps(sixteen(bytes, width), multiples(width, unit));
                    values = part ? _mm512_add_ps(values, field) : field;
                }
            }
            q[half] = values;
        }
    }
    static float sum(F vector) { return _mm512_reduce_add_ps(vector); }
    static void floats(const void* from, Scalar type, int64_t count, float* to) {
        for (int64_t i = 0; i < count; i += 16) {
            const __mmask16 present = static_cast<__mmask16>((1u << least(count - i, 16)) - 1);
            __m512 values;
            if (type == Scalar::f32) {
                values = _mm512_maskz_loadu_ps(present, static_cast<const float*>(from) + i);
            } else {
                const __m256i shorts = _mm256_maskz_loadu_epi16(present, static_cast<const uint16_t*>(from) + i);
                const __m512i upper_halves = _mm512_slli_epi32(_mm512_cvtepu16_epi32(shorts), 16);
                values = type == Scalar::f16 ? _mm512_cvtph_ps(shorts) : _mm512_castsi512_ps(upper_halves);
            }
            _mm512_mask_storeu_ps(to + i, present, values);
        }
    }

    struct Dots {
        __m512i sum = _mm512_setzero_si512();
        F floats() const { return _mm512_cvtepi32_ps(sum); }
    };

    // 64 codes as bytes. Whole: all bytes are there to be read.
    template <int Bits, bool Whole>
    static __m512i bytes(const uint8_t* row, const Fields<Bits>& fields, int64_t pair) {
        __m512i codes = _mm512_setzero_si512();
#pragma GCC unroll 3
        for (int part = 0; part < Fields<Bits>::count; part++) {
            const int width = Fields<Bits>::width(part), shift = Fields<Bits>::shift(part);
            const int64_t at = fields.begin[part] + 8 * width * pair;
            const int64_t there = Whole ? 64 : least(64, fields.begin[part + 1] - at);
            const __mmask64 present = there >= 64 ? ~0ull : (1ull << (there > 0 ? there : 0)) - 1;
            const uint8_t* from = row + at;
            __m512i field;
            if (width == 8) {
                field = Whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(present, from);
            } else if (width == 4) {
                const __m256i packed = Whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                                             : _mm256_maskz_loadu_epi8(static_cast<__mmask32>(present), from);
                field = _mm512_and_si512(fields_of(_mm512_cvtepu32_epi64(packed), 4), _mm512_set1_epi8(15));
            } else if (width == 2) {
                const __m128i packed = Whole ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))
                                             : _mm_maskz_loadu_epi8(static_cast<__mmask16>(present), from);
                field = _mm512_and_si512(fields_of(_mm512_cvtepu16_epi64(packed), 2), _mm512_set1_epi8(3));
            } else {
                uint64_t bits;
                if (Whole) {
                    __builtin_memcpy(&bits, from, 8);
                } else {
                    bits = static_cast<uint64_t>(_mm_cvtsi128_si64(
                        _mm_maskz_loadu_epi8(static_cast<__mmask16>(present & 255), from)));
                }
                field = _mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(1));
            }
            // Fields with something below them have room above in their bytes.
            codes = part ? _mm512_or_si512(codes, _mm512_slli_epi16(field, static_cast<unsigned>(shift))) : field;
        }
        return codes;
    }

    template <int Bits, int T>
    static void dot(const uint8_t* const* rows, const Fields<Bits>& fields, int64_t pair, uint64_t mask,
                    const Activations& x, int64_t token, Dots (*part)[T]) {
        __m512i activations[T];
        for (int t = 0; t < T; t++) {
            activations[t] = _mm512_maskz_loadu_epi8(mask, rounded_numbers(x, token + t) + 64 * pair);
        }
        const bool whole = 2 * pair + 2 < x.words;
        for (int r = 0; r < kRowsTogether; r++) {
            const __m512i codes = whole ? bytes<Bits, true>(rows[r], fields, pair)
                                        : bytes<Bits, false>(rows[r], fields, pair);
            for (int t = 0; t < T; t++) part[r][t].sum = _mm512_dpbusd_epi32(part[r][t].sum, codes, activations[t]);
        }
    }
};

}  // namespace avx512
}  // namespace kernels
