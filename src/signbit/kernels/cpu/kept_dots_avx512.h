// Structured rows, 1 to 7 of 8 kept or as many of 4 or 2, times few tokens, with AVX-512: the activations of kept weights
// are brought together, and multiplied by signs and regions as they are stored.
//
// Where half is kept, 128 columns have 64 kept weights: a register of activations of 8 bits, which one vpermi2b brings
// together, and 64 bits of each plane, masks of AVX-512. So nothing is put into the order of the columns, and weights
// that are zero are no work at all. Where fewer are kept the register is not full, where more are there are two. With
// x' = s x:
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

// How many of 8 columns are kept: what is known at compile time.
enum class Kept { half, fewer, more };
constexpr int registers_of(Kept kept) { return kept == Kept::more ? 2 : 1; }

// Which of 128 columns are kept, for each of 4 steps: the places of kept weights, in the order of the columns.
template <Kept Many>
class KeptColumns {
   public:
    static constexpr int registers = registers_of(Many);

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
        // Four of each cell, and then four more, to as many as are kept.
        for (int64_t r = 0; r < registers; r++) {
            for (int64_t i = 0; i < 64; i++) {
                const int64_t cell = (64 * r + i) / w.kept % 16, number = (64 * r + i) % w.kept;
                bytes[i] = static_cast<uint8_t>(number / 4 * 64 + 4 * cell + number % 4);
            }
            order_[r] = _mm512_load_si512(bytes);
        }
    }
    // Of a row's ranks, of which ``left`` bytes are left.
    [[gnu::always_inline]] void load(const uint8_t* ranks, int64_t left, __m512i (*columns)[registers]) const {
        const __mmask64 there = _bzhi_u64(~0ull, static_cast<unsigned>(least(left, 64)));
        const __m512i packed = _mm512_permutexvar_epi8(bytes_, _mm512_maskz_loadu_epi8(there, ranks));
        const __m512i rank = _mm512_multishift_epi64_epi8(places_, packed);
        __m512i firsts[kChunkSteps], others[kChunkSteps];
        fours(w_.pairs, rank, firsts);
        if (Many == Kept::more) fours(w_.pairs + 256, rank, others);
#pragma GCC unroll 4
        for (int64_t step = 0; step < kChunkSteps; step++) {
            if (Many == Kept::half) columns[step][0] = firsts[step];
            if (Many == Kept::fewer) columns[step][0] = _mm512_permutexvar_epi8(order_[0], firsts[step]);
            if (Many == Kept::more) {
                for (int64_t r = 0; r < registers; r++) {
                    columns[step][r] = _mm512_permutex2var_epi8(firsts[step], order_[r], others[step]);
                }
            }
        }
    }

   private:
    // Four places of each cell, of four steps.
    [[gnu::always_inline]] static void fours(const uint8_t* pairs, __m512i rank, __m512i* columns) {
        const __m512i first = look_up(pairs, rank), second = look_up(pairs + 128, rank);
        spread(_mm512_unpacklo_epi8(first, second), columns);
        spread(_mm512_unpackhi_epi8(first, second), columns + 2);
    }
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
    __m512i bytes_, places_, order_[registers];
};

// A row's signs and regions, two bytes a step for each that is kept of 8.
class KeptPlanes {
   public:
    // Where half is kept and rows end with a chunk, nothing behind them is read: they are not copied.
    void load(const Structured& w, bool in_place, int64_t row) {
        signs = whole(w.signs, in_place, row, signs_);
        if (w.regions_count < 2) return;
        if (w.regions_count == 2) {
            ones = whole(w.regions, in_place, row, trits_[0]);
            return;
        }
        const uint8_t* regions = w.regions.data + row * w.regions.row_bytes;
        StructuredOperations<Avx512>::trits(w, regions, w.regions.row_bytes, trits_[0], trits_[1]);
        ones = trits_[0];
    }

    const uint8_t *signs = nullptr, *ones = nullptr;
    static constexpr int64_t room = kMostDotColumns / 8 + 128, twos = room;  // twos: behind the ones of the same step

   private:
    static const uint8_t* whole(const Plane& plane, bool in_place, int64_t row, uint8_t* copy) {
        const uint8_t* own = plane.data + row * plane.row_bytes;
        if (in_place && plane.row_bytes % (8 * kChunkSteps) == 0) return own;
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
        Avx512::prefetch_far(reinterpret_cast<const void*>(at));
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
template <int Digits, int Regions, bool Means, Kept Many>
class KeptRow {
   public:
    static constexpr int registers = registers_of(Many);
    const float *scales, *salient_scales, *means, *salient_means;
    __m512 ordinary{}, salient{};

    // there: of the weights that registers have room for.
    [[gnu::always_inline]] void add(const KeptStep<Digits>& x, const __m512i* columns, const __mmask64* there,
                                    const uint8_t* sign_bits, const uint8_t* ones_bits, const KeptDots::Groups& group) {
        const __m512i one = _mm512_set1_epi8(1);
        __mmask64 negative[registers];
        __m512i ones[registers] = {}, twos[registers] = {}, rest[registers], as_is[registers][Digits],
                own[registers][Digits];
#pragma GCC unroll 2
        for (int r = 0; r < registers; r++) {
            negative[r] = mask_at(sign_bits + 8 * r);
            if (Regions > 1) ones[r] = _mm512_maskz_mov_epi8(mask_at(ones_bits + 8 * r), one);
            if (Regions > 2) twos[r] = _mm512_maskz_mov_epi8(mask_at(ones_bits + KeptPlanes::twos + 8 * r), one);
            rest[r] = _mm512_ternarylogic_epi64(one, ones[r], twos[r], 0x10);  // one & ~(ones | twos)
        }
        bring(x.digit[0], columns, there, negative, as_is, own);
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

        bring(x.digit[1], columns, there, negative, as_is, own);
        const float* salient_scale = salient_scales + group.salient;
        __m512i all[registers], other[registers];
#pragma GCC unroll 2
        for (int r = 0; r < registers; r++) {
            const __m512i residual = _mm512_or_si512(ones[r], twos[r]);
            all[r] = one;
            other[r] = _mm512_xor_si512(residual, _mm512_maskz_mov_epi8(negative[r], one));
        }
        of_step = _mm512_mul_ps(times(own, all), _mm512_set1_ps(salient_scale[0]));
        of_step = _mm512_fmadd_ps(times(own, other), _mm512_set1_ps(salient_scale[1]), of_step);
        if (Means) {
            const __m512 mean = _mm512_set1_ps(salient_means[group.salient / 2]);
            of_step = _mm512_fmadd_ps(times(as_is, all), mean, of_step);
        }
        salient = _mm512_fmadd_ps(of_step, _mm512_set1_ps(x.worth[1]), salient);
    }

   private:
    // Activations of kept weights, and with their signs.
    [[gnu::always_inline]] static void bring(const __m512i (*x)[2], const __m512i* columns, const __mmask64* there,
                                             const __mmask64* negative, __m512i (*as_is)[Digits],
                                             __m512i (*out)[Digits]) {
#pragma GCC unroll 2
        for (int r = 0; r < registers; r++) {
#pragma GCC unroll 3
            for (int d = 0; d < Digits; d++) {
                as_is[r][d] = Many == Kept::half
                                  ? _mm512_permutex2var_epi8(x[d][0], columns[r], x[d][1])
                                  : _mm512_maskz_permutex2var_epi8(there[r], x[d][0], columns[r], x[d][1]);
                out[r][d] = _mm512_mask_sub_epi8(as_is[r][d], negative[r], _mm512_setzero_si512(), as_is[r][d]);
            }
        }
    }
    // x times bytes of 0 and 1; the middle digit times 128 right away.
    [[gnu::always_inline]] static __m512 times(const __m512i (*x)[Digits], const __m512i* bytes) {
        __m512i sum = _mm512_setzero_si512(), high = sum;
#pragma GCC unroll 2
        for (int r = 0; r < registers; r++) {
            sum = _mm512_dpbusd_epi32(sum, bytes[r], x[r][Digits - 1]);
            if (Digits < 3) continue;
            high = _mm512_dpbusd_epi32(high, bytes[r], x[r][0]);
            sum = _mm512_dpbusd_epi32(sum, _mm512_slli_epi16(bytes[r], 7), x[r][Digits / 2]);
        }
        if (Digits == 3) sum = _mm512_add_epi32(sum, _mm512_slli_epi32(high, 14));
        return floats(sum);
    }
    static __mmask64 mask_at(const uint8_t* bits) {
        __mmask64 mask;
        __builtin_memcpy(&mask, bits, 8);
        return mask;
    }
};

template <int Digits, int Regions, bool Means, Kept Many>
void kept_dots(const KeptDots& w, const Activations* kinds, int64_t first, int64_t last, float* y, int64_t stride) {
    constexpr int registers = registers_of(Many);
    const Structured& of = *w.of;
    const int64_t tokens = kinds[0].tokens, rank_bytes = 2 * kChunkSteps * w.rank_bits, plane_bytes = 2 * w.kept;
    const int64_t steps = (of.m + kStepColumns - 1) / kStepColumns;
    const bool salient = of.salient_scales.data;
    const KeptColumns<Many> kept(w);
    __mmask64 there[registers];
    for (int64_t r = 0; r < registers; r++) {
        there[r] = _bzhi_u64(~0ull, static_cast<unsigned>(least(16 * w.kept - 64 * r, 64)));
    }
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
            planes.load(of, Many == Kept::half, row + i);
            scales.load(of.scales, row + i);
            if (salient) salient_scales.load_pairs(of.salient_scales, row + i);
            if (Means) {
                means.load(of.means, row + i);
                salient_means.load(of.salient_means, row + i);
            }
            for (int64_t token = 0; token < tokens; token++) {
                KeptRow<Digits, Regions, Means, Many> product{scales.value, salient_scales.value, means.value,
                                                              salient_means.value};
                // Those of the next chunk are looked up while one is multiplied.
                __m512i next[kChunkSteps][registers], columns[kChunkSteps][registers];
                kept.load(ranks, of.ranks.row_bytes, next);
                for (int64_t chunk = 0; chunk < w.chunks; chunk++) {
                    const int64_t step = chunk * kChunkSteps, from = (chunk + 1) * rank_bytes;
                    for (int64_t s = 0; s < kChunkSteps; s++) {
                        for (int r = 0; r < registers; r++) columns[s][r] = next[s][r];
                    }
                    kept.load(ranks + from, greatest(of.ranks.row_bytes - from, 0), next);
#pragma GCC unroll 4
                    for (int64_t s = 0; s < kChunkSteps; s++) {
                        if (step + s >= steps) break;
                        product.add(x[token][step + s], columns[s], there, planes.signs + plane_bytes * (step + s),
                                    planes.ones + plane_bytes * (step + s), w.group[step + s]);
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

template <int Digits, Kept Many>
void kept_dots_of(const KeptDots& w, const Activations* kinds, int64_t first, int64_t last, float* y, int64_t stride) {
    using OfRows = void (*)(const KeptDots&, const Activations*, int64_t, int64_t, float*, int64_t);
    static constexpr OfRows all[2][kMaxRegions] = {
        {kept_dots<Digits, 1, false, Many>, kept_dots<Digits, 2, false, Many>, kept_dots<Digits, 3, false, Many>},
        {kept_dots<Digits, 1, true, Many>, kept_dots<Digits, 2, true, Many>, kept_dots<Digits, 3, true, Many>}};
    all[w.of->means.data != nullptr][w.of->regions_count - 1](w, kinds, first, last, y, stride);
}

template <int Digits>
void kept_dots_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                    int64_t stride) {
    const KeptDots& w = *static_cast<const KeptDots*>(matrix);
    const auto rows = w.kept == 4  ? kept_dots_of<Digits, Kept::half>
                      : w.kept < 4 ? kept_dots_of<Digits, Kept::fewer>
                                   : kept_dots_of<Digits, Kept::more>;
    rows(w, kinds, first, last, y, stride);
}

}  // namespace avx512
}  // namespace kernels
