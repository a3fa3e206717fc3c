// Sign planes times few tokens in 8 bits, with AVX-512: nearer to the speed of memory than lookups (sign_planes.h).
//
// vpdpbusd adds products of unsigned bytes, here 0 and 1, and signed ones, the activations. vgf2p8affineqb multiplies
// every byte by a matrix of bits, and so moves one of its bits, the same in all 64, to where a number has its lowest:
// bit i of 64 bytes of signs is that of columns i, i + 8, i + 16 ... So activations are put in that order, once a task,
// and then 64 weights take two instructions, rows are read one after the other from end to end, and nothing is
// transposed. The four sums of 32 bits in a quarter of a vector are those of 128 columns, which have one step and, if
// groups are whole quarters, one scale.

#pragma once

#include "sign_planes.h"

namespace kernels {
namespace avx512 {

// Columns of a vector of signs, and how many of these are worked on before the next rows.
constexpr int64_t kChunk = 512, kMostChunks = 32;
// How far ahead of its use memory is fetched. Rows follow each other, so this is often in another row.
constexpr int64_t kAheadBytes = 8192;

struct Chunks {
    __m512i x[kMostChunks][8];   // bit by bit
    __m512 step[kMostChunks];    // of each quarter, four times
    __m512 sum[kMostChunks];     // of each quarter, where it is a group: once, in its first lane
    int64_t count;

    // Columns from word ``word`` on of a token's numbers (prepare.h); sums: of its groups, if they are quarters.
    Chunks(const Activations& of, int64_t token, int64_t word, const float* sums) {
        const int8_t* integers = rounded_numbers(of, token) + 32 * word;
        const float* steps = of.steps + token * of.words + word;
        const int64_t words = least(of.words - word, kMostChunks * 16);
        count = (words + 15) / 16;
        for (int64_t chunk = 0; chunk < count; chunk++) {
            const int64_t rest = words - 16 * chunk;
            step[chunk] = _mm512_maskz_loadu_ps(first_of_16(rest), steps + 16 * chunk);
            for (int i = 0; i < 8; i++) {
                const __mmask16 present = first_of_16(8 * (rest - 2 * i));
                x[chunk][i] = _mm512_maskz_loadu_epi32(present, integers + 512 * chunk + 64 * i);
            }
            bit_by_bit(x[chunk]);
            if (sums) {
                const int64_t group = word / kStepWords + 4 * chunk;
                const __m512 four = _mm512_maskz_loadu_ps(first_of_16(least(of.runs - group, 4)), sums + group);
                sum[chunk] = _mm512_maskz_expand_ps(0x1111, four);
            }
        }
    }

    static __mmask16 first_of_16(int64_t count) {
        return static_cast<__mmask16>((1u << greatest(least(count, 16), 0)) - 1);
    }

    // Byte 8b + i of 512 to byte b of vector i: bytes within vectors first, then their 64-bit words between vectors.
    static void bit_by_bit(__m512i* x) {
        const __m512i row = _mm512_set1_epi64(0x3830282018100800);
        const __m512i column = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
        const __m512i order = _mm512_add_epi8(row, _mm512_mullo_epi64(column, _mm512_set1_epi64(0x0101010101010101)));
        __m512i even[4], odd[4];
        for (int i = 0; i < 4; i++) {
            const __m512i a = _mm512_permutexvar_epi8(order, x[2 * i]);
            const __m512i b = _mm512_permutexvar_epi8(order, x[2 * i + 1]);
            even[i] = _mm512_unpacklo_epi64(a, b);
            odd[i] = _mm512_unpackhi_epi64(a, b);
        }
        lanes_to_vectors(even, x);
        lanes_to_vectors(odd, x + 1);
    }

    // Quarter i of four vectors to out[2 * i].
    static void lanes_to_vectors(const __m512i* from, __m512i* out) {
        const __m512i even_low = _mm512_shuffle_i32x4(from[0], from[1], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(from[2], from[3], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(from[0], from[1], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(from[2], from[3], 0xdd);
        out[0] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        out[2] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        out[4] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        out[6] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
};

// The sums, each of 32 columns and in their steps, of activations with a set bit.
inline __m512 dot(__m512i bits, const __m512i* x, __m512 step) {
    __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __m512i bit = _mm512_gf2p8affine_epi64_epi8(bits, _mm512_set1_epi64(1ll << (56 + i)), 0);
        __m512i& sum = i % 2 ? odd : even;  // two chains, so that none waits for the one before
        sum = _mm512_dpbusd_epi32(sum, bit, x[i]);
    }
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)), step);
}

// Coefficients at [index, index + count), count up to 16, of all rows' one after the other; zeros behind them.
inline __m512 load_coefficients(const Coefficients& from, int64_t index, int64_t count) {
    const __mmask16 present = Chunks::first_of_16(count);
    if (from.type == Scalar::f32) return _mm512_maskz_loadu_ps(present, static_cast<const float*>(from.data) + index);
    const __m256i shorts = _mm256_maskz_loadu_epi16(present, static_cast<const uint16_t*>(from.data) + index);
    if (from.type == Scalar::f16) return _mm512_cvtph_ps(shorts);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(shorts), 16));
}

// What a row of signs adds up to where they are negative, in 16 parts.
inline __m512 negative_of(const uint8_t* signs, const Chunks& chunks, int64_t words) {
    __m512 negative = _mm512_setzero_ps();
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
        const __m512i bits = _mm512_maskz_loadu_epi32(Chunks::first_of_16(words - 16 * chunk), signs + 64 * chunk);
        Avx512::prefetch(signs + 64 * chunk + kAheadBytes);
        negative = _mm512_add_ps(negative, dot(bits, chunks.x[chunk], chunks.step[chunk]));
    }
    return negative;
}

// What a row of signs is, times the scales of its groups, each a quarter of a chunk; ``group`` is the first. In 16
// parts.
inline __m512 grouped_product(const uint8_t* signs, const Chunks& chunks, int64_t words, const Coefficients& scales,
                              int64_t row, int64_t group) {
    const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    __m512 product = _mm512_setzero_ps(), of_groups = product;
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
        const int64_t next = group + 4 * chunk;
        if (chunk % 4 == 0) of_groups = load_coefficients(scales, row * scales.per_row + next, scales.per_row - next);
        const __m512i places = _mm512_add_epi32(quarters, _mm512_set1_epi32(static_cast<int>(chunk % 4 * 4)));
        const __m512 scale = _mm512_permutexvar_ps(places, of_groups);
        const __m512i bits = _mm512_maskz_loadu_epi32(Chunks::first_of_16(words - 16 * chunk), signs + 64 * chunk);
        Avx512::prefetch(signs + 64 * chunk + kAheadBytes);
        const __m512 negative = dot(bits, chunks.x[chunk], chunks.step[chunk]);
        const __m512 sum = _mm512_fnmadd_ps(_mm512_set1_ps(2.0f), negative, chunks.sum[chunk]);
        product = _mm512_fmadd_ps(scale, sum, product);
    }
    return product;
}

// The sums of 16 vectors' lanes.
inline __m512 sums_of(__m512* parts) {
    __m512i* lanes = reinterpret_cast<__m512i*>(parts);
    Avx512::transpose(lanes);
    for (int half = 8; half; half /= 2) {
        for (int i = 0; i < half; i++) parts[i] = _mm512_add_ps(parts[i], parts[i + half]);
    }
    return parts[0];
}

// A row's means times the sums of its groups, in 16 parts: of the groups in the chunks from ``word`` on.
inline __m512 means_product(const Coefficients& means, int64_t row, const float* sums, int64_t word) {
    __m512 product = _mm512_setzero_ps();
    const int64_t first = word / kStepWords, end = least(means.per_row, first + 4 * kMostChunks);
    for (int64_t group = first; group < end; group += 16) {
        const __m512 mean = load_coefficients(means, row * means.per_row + group, end - group);
        const __m512 sum = _mm512_maskz_loadu_ps(Chunks::first_of_16(end - group), sums + group);
        product = _mm512_fmadd_ps(mean, sum, product);
    }
    return product;
}

// Rows of matrices whose groups are rows, or 128 columns, 16 at a time.
inline void sign_dots_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                           int64_t stride) {
    const SignPlanes& w = *static_cast<const SignPlanes*>(matrix);
    const Activations& x = kinds[0];
    const bool grouped = x.runs > 1;
    for (int64_t token = 0; token < x.tokens; token++) {
        const float* sums = x.sums + token * x.runs;
        for (int64_t word = 0; word < x.words; word += 16 * kMostChunks) {
            const Chunks chunks(x, token, word, grouped ? sums : nullptr);
            const int64_t words = x.words - word, group = word / kStepWords;
            for (int64_t row = first; row < last; row += 16) {
                const int64_t count = least(last - row, 16);
                float* out = y + token * stride + row;
                __m512 total = word ? _mm512_maskz_loadu_ps(Chunks::first_of_16(count), out) : _mm512_setzero_ps();
                __m512 parts[16];
                for (int64_t plane = 0; plane < w.planes; plane++) {
                    for (int64_t i = 0; i < 16; i++) {
                        const int64_t at = row + least(i, count - 1);
                        const uint8_t* signs = w.signs[plane].data + at * w.signs[plane].row_bytes + 4 * word;
                        parts[i] = grouped ? grouped_product(signs, chunks, words, w.scales[plane], at, group)
                                           : negative_of(signs, chunks, words);
                    }
                    if (grouped) {
                        total = _mm512_add_ps(total, sums_of(parts));
                    } else {
                        const __m512 whole = _mm512_set1_ps(word ? 0.0f : sums[0]);
                        const __m512 sum = _mm512_fnmadd_ps(_mm512_set1_ps(2.0f), sums_of(parts), whole);
                        total = _mm512_fmadd_ps(load_coefficients(w.scales[plane], row, count), sum, total);
                    }
                }
                if (w.means.data) {
                    for (int64_t i = 0; i < 16; i++) {
                        parts[i] = means_product(w.means, row + least(i, count - 1), sums, word);
                    }
                    total = _mm512_add_ps(total, sums_of(parts));
                }
                Avx512::store(out, total, count);
            }
        }
    }
}

}  // namespace avx512
}  // namespace kernels
