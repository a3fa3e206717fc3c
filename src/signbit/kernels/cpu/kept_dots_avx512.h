// Structured rows of which half is kept, 4 of 8 or 2 of 4, times few tokens, with AVX-512: the activations of kept
// weights are brought together, and multiplied by signs and regions as they are stored.
//
// 128 columns have 64 kept weights: a register of activations of 8 bits, which one vpermi2b brings together, and 64 bits
// of each plane, masks of AVX-512. So nothing is put into the order of the columns, and half of the weights, those
// that are zero, are no work at all. With x' = s x:
//
//     y = sum over groups of  scale_r E_r   +   sum over groups with salient columns of  scale_o F + scale_s (F - 2 G)
//
// E_r: of x' in region r; F: of x' at salient columns, which have activations of their own; G: of those where the sign of
// the residual is another than the weight's. Means are multiplied by the same sums of x itself.

#pragma once

#include "step_digits_avx512.h"
#include "structured_avx512.h"

namespace kernels {
namespace avx512 {

// Which of 128 columns are kept, for each of 4 steps: the places of 64 kept weights, in the order of the columns.
class KeptColumns {
   public:
    explicit KeptColumns(const KeptDots& w) : w_(w), bits_(w.rank_bits) {
        // Ranks of 4 cells of each step, of two steps a word; words of even number have the first two steps.
        alignas(64) uint8_t bytes[64], places[64];
        for (int64_t i = 0; i < 64; i++) {
            const int64_t word = i / 8, lane = word / 2, step = word % 2 * 2 + i % 8 / 4, from = 4 * lane * bits_;
            bytes[i] = static_cast<uint8_t>((16 * step * bits_ + from) / 8 + i % 4);
            places[i] = static_cast<uint8_t>(i % 8 / 4 * 32 + from % 8 + i % 4 * bits_);
        }
        bytes_ = _mm512_load_si512(bytes);
        places_ = _mm512_load_si512(places);
    }
    // Of a row's ranks, of which ``left`` bytes are left.
    [[gnu::always_inline]] void load(const uint8_t* ranks, int64_t left, __m512i* columns) const {
        const __mmask64 there = _bzhi_u64(~0ull, static_cast<unsigned>(least(left, 64)));
        const __m512i packed = _mm512_permutexvar_epi8(bytes_, _mm512_maskz_loadu_epi8(there, ranks));
        const __m512i rank = _mm512_multishift_epi64_epi8(places_, packed);
        const __m512i first = look_up(w_.pairs, rank), second = look_up(w_.pairs + 128, rank);
        spread(_mm512_unpacklo_epi8(first, second), columns);
        spread(_mm512_unpackhi_epi8(first, second), columns + 2);
    }

   private:
    static __m512i look_up(const uint8_t* table, __m512i rank) {
        return _mm512_permutex2var_epi8(_mm512_loadu_si512(table), rank, _mm512_loadu_si512(table + 64));
    }
    // Two places in 8 columns a byte, to one in 128; four cells of 8 in each lane.
    [[gnu::always_inline]] static void spread(__m512i pairs, __m512i* columns) {
        const __m512i low = _mm512_and_si512(pairs, _mm512_set1_epi8(7));
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), _mm512_set1_epi8(7));
        const __m512i cell = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i base = _mm512_mullo_epi32(cell, _mm512_set1_epi32(0x08080808));
        columns[0] = _mm512_or_si512(_mm512_unpacklo_epi8(low, high), base);
        columns[1] = _mm512_or_si512(_mm512_unpackhi_epi8(low, high), base);
    }

    const KeptDots& w_;
    int64_t bits_;
    __m512i bytes_, places_;
};

// A row's signs and regions, 64 bits a step.
class KeptPlanes {
   public:
    static constexpr int64_t chunk_bytes = 8 * kChunkSteps;

    // What there is behind rows that do not end with a chunk is not read.
    void load(const Structured& w, int64_t row) {
        signs = whole(w.signs, row, signs_);
        if (w.regions_count < 2) return;
        if (w.regions_count == 2) {
            ones = whole(w.regions, row, trits_[0]);
            return;
        }
        const uint8_t* regions = w.regions.data + row * w.regions.row_bytes;
        StructuredOperations<Avx512>::trits(w, regions, w.regions.row_bytes, trits_[0], trits_[1]);
        ones = trits_[0];
    }

    const uint8_t *signs = nullptr, *ones = nullptr;
    static constexpr int64_t room = kMostDotColumns / 16 + 64, twos = room;  // twos: behind the ones of the same step

   private:
    static const uint8_t* whole(const Plane& plane, int64_t row, uint8_t* copy) {
        const uint8_t* own = plane.data + row * plane.row_bytes;
        if (plane.row_bytes % chunk_bytes == 0) return own;
        __builtin_memcpy(copy, own, static_cast<size_t>(plane.row_bytes));
        return copy;
    }

    uint8_t signs_[room], trits_[2][room];
};

// A row's coefficients as floats.
template <int64_t Most>
struct RowFloats {
    alignas(64) float value[Most + 16];

    void load(const Coefficients& from, int64_t row) {
        for (int64_t i = 0; i < from.per_row; i += 16) {
            _mm512_store_ps(value + i, load_coefficients(from, row * from.per_row + i, from.per_row - i));
        }
    }
    // Of pairs, scale_o and scale_s: scale_o + scale_s and -2 scale_s.
    void load_pairs(const Coefficients& from, int64_t row) {
        const __m512 second = _mm512_castsi512_ps(_mm512_set1_epi64(0xc000000000000000 | 0x3f800000));  // 1, -2
        for (int64_t i = 0; i < from.per_row; i += 16) {
            const __m512 pairs = load_coefficients(from, row * from.per_row + i, from.per_row - i);
            const __m512 firsts = _mm512_maskz_mov_ps(0x5555, pairs);
            _mm512_store_ps(value + i, _mm512_fmadd_ps(_mm512_movehdup_ps(pairs), second, firsts));
        }
    }
};

// Lines of memory that begin in a row, a while before it is read.
inline void fetch_ahead(const void* data, int64_t row_bytes, int64_t row) {
    constexpr int64_t ahead = 8;
    const auto begin = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>((row + ahead) * row_bytes);
    for (uintptr_t at = (begin + 63) / 64 * 64; at < begin + static_cast<uintptr_t>(row_bytes); at += 64) {
        Avx512::prefetch(reinterpret_cast<const void*>(at));
    }
}
inline void fetch_ahead(const Coefficients& of, int64_t row) {
    fetch_ahead(of.data, of.per_row * (of.type == Scalar::f32 ? 4 : 2), row);
}

// The activations of 128 columns, ordinary and salient: digits, and what a unit of the lowest is worth.
template <int Digits>
struct alignas(64) KeptStep {
    __m512i digit[2][Digits][2];
    float worth[2];
};

template <int Digits>
inline void take_steps(const Activations& x, int64_t token, int64_t m, int kind, KeptStep<Digits>* to) {
    for (int64_t i = 0; i < m; i += kStepColumns, to++) {
        const int64_t columns = least(m - i, kStepColumns);
        int8_t* own = reinterpret_cast<int8_t*>(to->digit[kind][0]);
        if (Digits == 1) {
            to->worth[kind] = x.steps[token * x.words + i / 32];
            __builtin_memcpy(own, rounded_numbers(x, token) + i, static_cast<size_t>(columns));
        } else {
            to->worth[kind] = to_digits<Digits>(numbers(x, token) + i, columns, own, kStepColumns);
        }
    }
}

// A row that is at hand.
template <int Digits, int Regions, bool Means>
struct KeptRow {
    const float *scales, *salient_scales, *means, *salient_means;
    __m512 ordinary{}, salient{};

    // Activations of kept weights, with their signs.
    [[gnu::always_inline]] static void bring(const __m512i (*x)[2], __m512i columns, __mmask64 negative,
                                             __m512i* as_is, __m512i* out) {
#pragma GCC unroll 3
        for (int d = 0; d < Digits; d++) {
            as_is[d] = _mm512_permutex2var_epi8(x[d][0], columns, x[d][1]);
            out[d] = _mm512_mask_sub_epi8(as_is[d], negative, _mm512_setzero_si512(), as_is[d]);
        }
    }
    // x times bytes of 0 and 1; the middle digit times 128 right away.
    [[gnu::always_inline]] static __m512 times(const __m512i* x, __m512i bytes) {
        __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), bytes, x[Digits - 1]);
        if (Digits == 3) {
            const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), bytes, x[0]);
            sum = _mm512_dpbusd_epi32(sum, _mm512_slli_epi16(bytes, 7), x[1]);
            sum = _mm512_add_epi32(sum, _mm512_slli_epi32(high, 14));
        }
        return floats(sum);
    }

    [[gnu::always_inline]] void add(const KeptStep<Digits>& x, __m512i columns, const uint8_t* sign_bits,
                                    const uint8_t* ones_bits, const KeptDots::Groups& group) {
        const __m512i one = _mm512_set1_epi8(1);
        const __mmask64 negative = mask_at(sign_bits);
        __m512i ones{}, twos{}, as_is[Digits], own[Digits];
        if (Regions > 1) ones = _mm512_maskz_mov_epi8(mask_at(ones_bits), one);
        if (Regions > 2) twos = _mm512_maskz_mov_epi8(mask_at(ones_bits + KeptPlanes::twos), one);
        const __m512i rest = _mm512_ternarylogic_epi64(one, ones, twos, 0x10);  // one & ~(ones | twos)
        bring(x.digit[0], columns, negative, as_is, own);
        const float* scale = scales + group.ordinary;
        __m512 of_step = _mm512_mul_ps(times(own, rest), _mm512_set1_ps(scale[0]));
        if (Regions > 1) of_step = _mm512_fmadd_ps(times(own, ones), _mm512_set1_ps(scale[1]), of_step);
        if (Regions > 2) of_step = _mm512_fmadd_ps(times(own, twos), _mm512_set1_ps(scale[2]), of_step);
        if (Means) {
            const float* mean = means + group.ordinary;
            of_step = _mm512_fmadd_ps(times(as_is, rest), _mm512_set1_ps(mean[0]), of_step);
            if (Regions > 1) of_step = _mm512_fmadd_ps(times(as_is, ones), _mm512_set1_ps(mean[1]), of_step);
            if (Regions > 2) of_step = _mm512_fmadd_ps(times(as_is, twos), _mm512_set1_ps(mean[2]), of_step);
        }
        ordinary = _mm512_fmadd_ps(of_step, _mm512_set1_ps(x.worth[0]), ordinary);
        if (group.salient < 0) return;

        bring(x.digit[1], columns, negative, as_is, own);
        const float* salient_scale = salient_scales + group.salient;
        const __m512i residual = _mm512_or_si512(ones, twos), signs = _mm512_maskz_mov_epi8(negative, one);
        const __m512 all = times(own, one), other = times(own, _mm512_xor_si512(residual, signs));
        of_step = _mm512_mul_ps(all, _mm512_set1_ps(salient_scale[0]));
        of_step = _mm512_fmadd_ps(other, _mm512_set1_ps(salient_scale[1]), of_step);
        if (Means) {
            const __m512 mean = _mm512_set1_ps(salient_means[group.salient / 2]);
            of_step = _mm512_fmadd_ps(times(as_is, one), mean, of_step);
        }
        salient = _mm512_fmadd_ps(of_step, _mm512_set1_ps(x.worth[1]), salient);
    }

   private:
    [[gnu::always_inline]] static __mmask64 mask_at(const uint8_t* bits) {
        __mmask64 mask;
        __builtin_memcpy(&mask, bits, 8);
        return mask;
    }
};

template <int Digits, int Regions, bool Means>
void kept_dots(const KeptDots& w, const Activations* kinds, int64_t first, int64_t last, float* y, int64_t stride) {
    const Structured& of = *w.of;
    const int64_t tokens = kinds[0].tokens, rank_bytes = 2 * kChunkSteps * w.rank_bits;
    const int64_t steps = (of.m + kStepColumns - 1) / kStepColumns;
    const bool salient = of.salient_scales.data;
    const KeptColumns kept(w);
    KeptStep<Digits> x[kFewTokens][kMostSteps];
    KeptPlanes planes;
    RowFloats<kMostSteps * kMaxRegions> scales, means;
    RowFloats<kMostSteps * 2> salient_scales, salient_means;
    for (int64_t token = 0; token < tokens; token++) {
        for (int64_t step = 0; step < w.chunks * kChunkSteps; step++) x[token][step] = {};
        for (int kind = 0; kind <= salient; kind++) take_steps(kinds[kind], token, of.m, kind, x[token]);
    }
    for (int64_t row = first; row < last; row += kDotRows) {
        const int64_t count = least(last - row, kDotRows);
        __m512 parts[kFewTokens][kDotRows] = {};
        for (int64_t i = 0; i < count; i++) {
            const uint8_t* ranks = of.ranks.data + (row + i) * of.ranks.row_bytes;
            for (const Plane& plane : {of.signs, of.ranks, of.regions}) {
                fetch_ahead(plane.data, plane.row_bytes, row + i);
            }
            for (const Coefficients* all : {&of.scales, &of.means, &of.salient_scales, &of.salient_means}) {
                fetch_ahead(*all, row + i);
            }
            planes.load(of, row + i);
            scales.load(of.scales, row + i);
            if (salient) salient_scales.load_pairs(of.salient_scales, row + i);
            if (Means) {
                means.load(of.means, row + i);
                salient_means.load(of.salient_means, row + i);
            }
            for (int64_t token = 0; token < tokens; token++) {
                KeptRow<Digits, Regions, Means> product{scales.value, salient_scales.value, means.value,
                                                        salient_means.value};
                // Those of the next chunk are looked up while one is multiplied.
                __m512i next[kChunkSteps], columns[kChunkSteps];
                kept.load(ranks, of.ranks.row_bytes, next);
                for (int64_t chunk = 0; chunk < w.chunks; chunk++) {
                    const int64_t step = chunk * kChunkSteps, from = (chunk + 1) * rank_bytes;
                    for (int64_t s = 0; s < kChunkSteps; s++) columns[s] = next[s];
                    kept.load(ranks + from, greatest(of.ranks.row_bytes - from, 0), next);
#pragma GCC unroll 4
                    for (int64_t s = 0; s < kChunkSteps; s++) {
                        if (step + s >= steps) break;
                        product.add(x[token][step + s], columns[s], planes.signs + 8 * (step + s),
                                    planes.ones + 8 * (step + s), w.group[step + s]);
                    }
                }
                parts[token][i] = _mm512_add_ps(product.ordinary, product.salient);
            }
        }
        for (int64_t token = 0; token < tokens; token++) {
            Avx512::store(y + token * stride + row, sums_of(parts[token]), count);
        }
    }
}

template <int Digits>
void kept_dots_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                    int64_t stride) {
    using OfRows = void (*)(const KeptDots&, const Activations*, int64_t, int64_t, float*, int64_t);
    static constexpr OfRows all[2][kMaxRegions] = {
        {kept_dots<Digits, 1, false>, kept_dots<Digits, 2, false>, kept_dots<Digits, 3, false>},
        {kept_dots<Digits, 1, true>, kept_dots<Digits, 2, true>, kept_dots<Digits, 3, true>}};
    const KeptDots& w = *static_cast<const KeptDots*>(matrix);
    all[w.of->means.data != nullptr][w.of->regions_count - 1](w, kinds, first, last, y, stride);
}

}  // namespace avx512
}  // namespace kernels
