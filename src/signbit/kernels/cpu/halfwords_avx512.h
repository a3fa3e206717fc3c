// Sums of activations that halfwords of bits choose, with AVX-512 (halfwords.h).

#pragma once

#include "halfwords.h"
#include "prepare.h"

namespace kernels {
namespace avx512 {

// A vector has a halfword of each of so many rows: even lanes of the first 16, odd lanes of the others.
constexpr int64_t kHalfwordRows = 32;
static_assert(kHalfwordRows == kOutputRows, "whole vectors of outputs are written");
// Low pieces have so many bits.
constexpr int kLowBits = 11;

// Sums in ascending order to a table, in pieces, 32 at a time.
template <int Pieces>
inline void store_pieces(__m512 low_half, __m512 high_half, int16_t* table, int64_t stride) {
    // The low 16 bits of each: lanes 0, 2, 4 ... of both vectors.
    const __m512i fourth = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
    const __m512i next = _mm512_add_epi32(fourth, _mm512_set1_epi32(2));
    const __m512i even = _mm512_or_si512(fourth, _mm512_slli_epi32(next, 16));
    const __m512i a = _mm512_cvtps_epi32(low_half), b = _mm512_cvtps_epi32(high_half);
    const __m512i all = _mm512_permutex2var_epi16(a, even, b);
    if (Pieces == 1) return _mm512_store_si512(table, all);
    const __m512i half = _mm512_set1_epi32(1 << (kLowBits - 1));
    const __m512i high = _mm512_permutex2var_epi16(_mm512_srai_epi32(_mm512_add_epi32(a, half), kLowBits), even,
                                                   _mm512_srai_epi32(_mm512_add_epi32(b, half), kLowBits));
    _mm512_store_si512(table, _mm512_sub_epi16(all, _mm512_slli_epi16(high, kLowBits)));
    _mm512_store_si512(table + stride, high);
}

// Of 16 activations in their unit.
template <int Pieces>
inline void tabulate_halfword(const float* x, HalfwordTable<Pieces>& table) {
    const auto with = [](__m512 sums, float one) { return _mm512_add_ps(sums, _mm512_set1_ps(one)); };
    const __m512 first = sums_of_four(x), second = sums_of_four(x + 5), third = sums_of_four(x + 10);
    store_pieces<Pieces>(first, with(first, x[4]), table.first[0], 32);
    store_pieces<Pieces>(second, with(second, x[9]), table.second[0], 32);
    const __m512 more = with(third, x[14]);
    store_pieces<Pieces>(third, more, table.third[0], 64);
    store_pieces<Pieces>(with(third, x[15]), with(more, x[15]), table.third[0] + 32, 64);
}

// The largest activation in units, or in two pieces the largest sum: 2^15 * 2^11, short of what low pieces and rounding
// may add.
template <int Pieces>
constexpr float kMostUnits = Pieces == 1 ? 127.0f : 32736.0f * (1 << kLowBits);

// Brings the activations of each step to units, in place, and says what one is worth. (In 8 bits what prepare.h does as
// well, in less than half of the time: tables of many tokens are made often.)
template <int Pieces>
inline void to_units(float* x, int64_t words, float* units) {
    for (int64_t word = 0; word < words; word += kStepWords) {
        const int64_t from = 32 * word, upto = 32 * least(word + kStepWords, words);
        __m512 largest = _mm512_setzero_ps(), up = largest, down = largest, spoilt = largest;
        for (int64_t i = from; i < upto; i += 16) {
            const __m512 some = _mm512_loadu_ps(x + i);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(some));
            up = _mm512_add_ps(up, _mm512_max_ps(some, _mm512_setzero_ps()));
            down = _mm512_sub_ps(down, _mm512_min_ps(some, _mm512_setzero_ps()));
            spoilt = _mm512_fmadd_ps(some, _mm512_setzero_ps(), spoilt);
        }
        const float sum_up = _mm512_reduce_add_ps(up), sum_down = _mm512_reduce_add_ps(down);
        const float size = Pieces == 1 ? _mm512_reduce_max_ps(largest) : sum_up > sum_down ? sum_up : sum_down;
        const float not_finite = _mm512_reduce_add_ps(spoilt) + size * 0.0f;
        const bool any = size > 0.0f && not_finite == 0.0f;
        constexpr float tiny = 0x1p-90f;  // what has no finite inverse is made larger first
        const __m512 lift = _mm512_set1_ps(size < tiny ? 1.0f / tiny : 1.0f);
        const __m512 per_size = _mm512_set1_ps(any ? kMostUnits<Pieces> / (size < tiny ? size / tiny : size) : 0.0f);
        for (int64_t i = from; i < upto; i += 16) {
            const __m512 own = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), lift), per_size);
            constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            const __m512 whole = Pieces == 1 ? _mm512_roundscale_ps(own, nearest) : own;
            _mm512_storeu_ps(x + i, any ? whole : _mm512_setzero_ps());
        }
        for (int64_t i = word; i < upto / 32; i++) units[i] = size / kMostUnits<Pieces> + not_finite;
    }
}

// What the activations of a run add up to; each word's times its unit, if there are any.
inline float sum_of_run(const float* x, const float* units, const Run& run) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t word = run.word; word < run.end; word++) {
        const uint32_t own = mask_of(run, word);
        const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(own), x + 32 * word);
        const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(own >> 16), x + 32 * word + 16);
        const __m512 both = _mm512_add_ps(low, high);
        sum = units ? _mm512_fmadd_ps(both, _mm512_set1_ps(units[word]), sum) : _mm512_add_ps(both, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

// sums: of the activations as they are looked up, which in 8 bits are not what they were.
template <int Pieces>
void prepare_in_pieces(float* x, int64_t words, const Run* run, int64_t runs, HalfwordTable<Pieces>* tables,
                       float* units, float* sums) {
    for (int64_t i = 0; Pieces > 1 && i < runs; i++) sums[i] = sum_of_run(x, nullptr, run[i]);
    to_units<Pieces>(x, words, units);
    for (int64_t i = 0; Pieces == 1 && i < runs; i++) sums[i] = sum_of_run(x, units, run[i]);
    for (int64_t i = 0; i < 2 * words; i++) tabulate_halfword(x + 16 * i, tables[i]);
}

inline void prepare_halfwords(float* x, int64_t words, const Run* run, int64_t runs, bool int8, void* tables,
                              float* units, float* sums) {
    if (int8) prepare_in_pieces(x, words, run, runs, static_cast<HalfwordTable<1>*>(tables), units, sums);
    else prepare_in_pieces(x, words, run, runs, static_cast<HalfwordTable<2>*>(tables), units, sums);
}

// A block of words of Vectors * 32 rows, those of 16 rows in a vector.
template <int Vectors>
struct HalfwordBlock {
    // Calls of Ahead::step() by load().
    static constexpr int64_t kSteps = 4 * Vectors;

    __m512i word[kChunkWords][Vectors][2];

    // Words [first, first + count) of rows [row, row + 32 * Vectors) of n; the last stands in for those that are not
    // there.
    // Unless ``ahead`` does, this fetches the same words of the next tile.
    template <class Fetch>
    void load(const Plane& plane, int64_t row, int64_t n, int64_t first, int64_t count, Fetch* ahead) {
        const __mmask16 present = first_of_16(count);
        for (int half = 0; half < 2 * Vectors; half++) {
            __m512i some[16];
            for (int i = 0; i < 16; i++) {
                const uint8_t* words = plane.data + least(row + 16 * half + i, n - 1) * plane.row_bytes + 4 * first;
                some[i] = _mm512_maskz_loadu_epi32(present, words);
                if (!ahead) Avx512::prefetch_far(words + kHalfwordRows * Vectors * plane.row_bytes);
            }
            if (ahead) ahead->step();
            Avx512::transpose(some);
            if (ahead) ahead->step();
            for (int i = 0; i < 16; i++) word[i][half / 2][half % 2] = some[i];
        }
    }
};

// One half of a word of 32 rows.
[[gnu::always_inline]] inline __m512i halfwords_of(const __m512i (&word)[2], int half) {
    const __m512i lane = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i low = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
    const __m512i order = half ? _mm512_add_epi16(low, _mm512_set1_epi16(1)) : low;
    return _mm512_permutex2var_epi16(word[0], order, word[1]);
}

// The fields of halfwords of all rows, where lookups want them: in the lowest bits.
template <int Vectors>
struct HalfwordFields {
    __m512i of[3][Vectors];

    HalfwordFields() = default;
    [[gnu::always_inline]] HalfwordFields(const __m512i (*word)[2], int half) {
        for (int v = 0; v < Vectors; v++) set(v, halfwords_of(word[v], half));
    }
    [[gnu::always_inline]] void set(int v, __m512i halfwords) {
        of[0][v] = halfwords;
        of[1][v] = _mm512_srli_epi16(halfwords, 5);
        of[2][v] = _mm512_srli_epi16(halfwords, 10);
    }
};

template <int Value>
struct Count {
    static constexpr int value = Value;
};

// f(Count<0>()), f(Count<1>()) ...: unrolled before arrays are brought into registers, as loops are not always.
template <int N, class F>
[[gnu::always_inline]] inline void unrolled(F f) {
    if constexpr (N > 0) {
        unrolled<N - 1>(f);
        f(Count<N - 1>());
    }
}

// What halfwords choose of the activations of 128 columns at most, of so many tokens.
template <int Vectors, int Pieces, int Tokens = 1>
struct HalfwordSums {
    __m512i sum[Tokens][Pieces][Vectors] = {};

    // Tables of one token are ``stride`` apart from those of the next. A field at a time: compilers would load all that
    // they are about to need, and have no registers for that.
    [[gnu::always_inline]] void add(const HalfwordTable<Pieces>* table, int64_t stride,
                                    const HalfwordFields<Vectors>& fields) {
        add_field<0>(table, stride, fields.of[0]);
        one_after_the_other();
        add_field<1>(table, stride, fields.of[1]);
        one_after_the_other();
        add_field<2>(table, stride, fields.of[2]);
        one_after_the_other();
    }
    // One field of the three, of halfwords.
    [[gnu::always_inline]] void add_some(const HalfwordTable<Pieces>* table, int64_t stride, int field, uint32_t mask,
                                         const __m512i* halfwords) {
        const __m512i bits = _mm512_set1_epi16(static_cast<short>(mask));
        __m512i index[Vectors];
        for (int v = 0; v < Vectors; v++) {
            index[v] = _mm512_and_si512(_mm512_srl_epi16(halfwords[v], _mm_cvtsi32_si128(5 * field)), bits);
        }
        if (field == 0) add_field<0>(table, stride, index);
        else if (field == 1) add_field<1>(table, stride, index);
        else add_field<2>(table, stride, index);
    }
    // Of the 16 rows of even or odd lanes, in units.
    [[gnu::always_inline]] __m512 total(int token, int v, bool odd) const {
        const auto lanes = [odd](int worth) { return _mm512_set1_epi32(odd ? worth << 16 : worth); };
        __m512i total = _mm512_madd_epi16(sum[token][0][v], lanes(1));
        if (Pieces == 2) total = _mm512_dpwssd_epi32(total, sum[token][Pieces - 1][v], lanes(1 << kLowBits));
        return _mm512_cvtepi32_ps(total);
    }

   private:
    [[gnu::always_inline]] static void one_after_the_other() { asm volatile("" : : : "memory"); }

    template <int Field>
    [[gnu::always_inline]] void add_field(const HalfwordTable<Pieces>* table, int64_t stride, const __m512i* index) {
        __m512i low[Tokens][Pieces], high[Tokens][Pieces];
        unrolled<Tokens>([&](auto t) __attribute__((always_inline)) {
            const HalfwordTable<Pieces>& own = table[t.value * stride];
            unrolled<Pieces>([&](auto p) __attribute__((always_inline)) {
                const int16_t* from =
                    Field == 0 ? own.first[p.value] : Field == 1 ? own.second[p.value] : own.third[p.value];
                low[t.value][p.value] = _mm512_load_si512(from);
                if (Field == 2) high[t.value][p.value] = _mm512_load_si512(from + 32);
            });
        });
        unrolled<Vectors>([&](auto v) __attribute__((always_inline)) {
            unrolled<Tokens>([&](auto t) __attribute__((always_inline)) {
                unrolled<Pieces>([&](auto p) __attribute__((always_inline)) {
                    const __m512i some = low[t.value][p.value], more = high[t.value][p.value], at = index[v.value];
                    const __m512i found =
                        Field == 2 ? _mm512_permutex2var_epi16(some, at, more) : _mm512_permutexvar_epi16(at, some);
                    __m512i own = _mm512_add_epi16(sum[t.value][p.value][v.value], found);
                    // Or compilers would add up what is found first, and have no registers for that.
                    asm("" : "+v"(own));
                    sum[t.value][p.value][v.value] = own;
                });
            });
        });
    }
};

// So many tokens share the halfwords that are read; their sums take half of the registers.
template <int Pieces>
constexpr int kTogether = 4 / Pieces;

// Calls add_tokens(Count<...>, token) for as many tokens at a time as may be, from one on.
template <int Most, class AddTokens>
[[gnu::always_inline]] inline void for_tokens(int64_t token, int64_t tokens, AddTokens add_tokens) {
    for (; token + Most <= tokens; token += Most) add_tokens(Count<Most>(), token);
    if constexpr (Most > 1) for_tokens<Most / 2>(token, tokens, add_tokens);
}

// y += coefficient(vector, half) * value(vector, half), of all rows of a tile.
template <int Vectors, class Coefficient, class Value>
[[gnu::always_inline]] inline void add_to_rows(float* y, Coefficient coefficient, Value value) {
    for (int v = 0; v < Vectors; v++) {
        for (int half = 0; half < 2; half++) {
            float* to = y + kHalfwordRows * v + 16 * half;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(coefficient(v, half), value(v, half), _mm512_loadu_ps(to)));
        }
    }
}

// Tables that are in use at a time. With many tokens rows take turns in a panel of columns, so that its tables stay in
// the second-level cache.
constexpr int64_t kPanelBytes = 1 << 19;

// Words of a panel, of so many kinds of activations: whole blocks. Rows times one token are read from end to end.
template <int Pieces, bool One>
int64_t panel_words(const Activations& x, int64_t kinds = 1) {
    constexpr int64_t block_bytes = 2 * sizeof(HalfwordTable<Pieces>) * kChunkWords;
    return One ? x.words : greatest(kPanelBytes / (x.tokens * kinds * block_bytes), 1) * kChunkWords;
}

// Calls do_tile(Count<vectors>, row) for tiles of 128 rows, and for those that are left of 64 and of 32.
template <class DoTile>
void for_each_tile(int64_t first, int64_t last, DoTile do_tile) {
    for (int64_t row = first; row < last;) {
        const int64_t left = last - row;
        if (left > 3 * kHalfwordRows) {
            do_tile(Count<4>(), row);
            row += 4 * kHalfwordRows;
        } else if (left > kHalfwordRows) {
            do_tile(Count<2>(), row);
            row += 2 * kHalfwordRows;
        } else {
            do_tile(Count<1>(), row);
            row += kHalfwordRows;
        }
    }
}

// Zeros for rows [first, last) and what is written beyond them (kOutputRows).
inline void clear_outputs(int64_t tokens, int64_t first, int64_t last, float* y, int64_t stride) {
    const int64_t end = (last + kHalfwordRows - 1) / kHalfwordRows * kHalfwordRows;
    for (int64_t token = 0; token < tokens; token++) {
        for (int64_t row = first; row < end; row += 16) _mm512_storeu_ps(y + token * stride + row, _mm512_setzero_ps());
    }
}

}  // namespace avx512
}  // namespace kernels
