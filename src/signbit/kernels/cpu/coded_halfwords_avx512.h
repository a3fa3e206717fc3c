// Split planes and Haar planes with AVX-512 (codebooks.h), where no word has ordinary columns of two codebooks, by
// halfwords (halfwords.h). Of salient columns only those fields are looked up that have some.

#pragma once

#include "codebooks.h"
#include "halfwords_avx512.h"
#include "haar_dots_avx512.h"

namespace kernels {
namespace avx512 {

// Blocks of the two planes of a part.
template <int Vectors>
struct CodedBlock {
    HalfwordBlock<Vectors> signs, zones;

    // Words of even columns first and then those of odd ones, in every window (CodedPlanes::window).
    void order(int64_t window, int64_t count) {
        for (HalfwordBlock<Vectors>* plane : {&signs, &zones}) {
            for (int64_t start = 0; start < count; start += window) {
                order(plane->word + start, least(window, count - start));
            }
        }
    }
    // The halfwords that choose activations.
    [[gnu::always_inline]] HalfwordFields<Vectors> fields(Bits bits, int64_t word, int half) const {
        HalfwordFields<Vectors> fields;
        for (int v = 0; v < Vectors; v++) fields.set(v, chosen(bits, word, half, v));
        return fields;
    }
    [[gnu::always_inline]] __m512i chosen(Bits bits, int64_t word, int half, int v) const {
        if (bits == Bits::zones) return halfwords_of(zones.word[word][v], half);
        const __m512i negative = halfwords_of(signs.word[word][v], half);
        if (bits == Bits::signs) return negative;
        const __m512i zone = halfwords_of(zones.word[word][v], half);
        return bits == Bits::negative1 ? _mm512_and_si512(negative, zone) : _mm512_andnot_si512(zone, negative);
    }

   private:
    static void order(__m512i (*words)[Vectors][2], int64_t count) {
        constexpr int most = kChunkWords;
        const __m512i even = _mm512_set1_epi32(0x55555555);
        constexpr int choose = 0xca;  // even ? ... : ...
        for (int v = 0; v < Vectors; v++) {
            for (int half = 0; half < 2; half++) {
                __m512i ordered[most];
                for (int64_t i = 0; 2 * i < count; i++) {
                    const __m512i a = words[2 * i][v][half];
                    const __m512i b = 2 * i + 1 < count ? words[2 * i + 1][v][half] : _mm512_setzero_si512();
                    ordered[i] = _mm512_ternarylogic_epi32(even, a, _mm512_slli_epi32(b, 1), choose);
                    ordered[(count + 1) / 2 + i] = _mm512_ternarylogic_epi32(even, _mm512_srli_epi32(a, 1), b, choose);
                }
                for (int64_t i = 0; i < count; i++) words[i][v][half] = ordered[i];
            }
        }
    }
};

// Rows [row, row + 32 * Vectors) of a part, as many of them as there are; One: times one token.
template <int Vectors, int Pieces, bool One>
class CodedTile {
   public:
    CodedTile(const CodedPlanes& part, const Activations* kinds, int64_t row, int64_t n, float* y, int64_t stride)
        : part_(part), kinds_(kinds), row_(row), n_(n), y_(y), stride_(stride) {
        for (int64_t set = 0; set < part.sets; set++) books_[set].take(part.set[set], row, n);
    }

    // Adds the words [word, end); ``word`` is the first of a block.
    void add(int64_t word, int64_t end) {
        constexpr int64_t rows = kHalfwordRows * Vectors;
        PartAhead<Avx512> ahead;
        if (One) ahead = {part_, row_, n_, rows, steps_of(part_.set[0]), true};
        for (int64_t block = word; block < end; block += kChunkWords) {
            const int64_t count = least(kChunkWords, end - block);
            CodedBlock<Vectors> bits;
            load(part_.signs, block, count, bits.signs);
            load(part_.zones, block, count, bits.zones);
            if (part_.window) bits.order(part_.window, count);
            for (int64_t set = 0; set < part_.sets; set++) add_set(set, bits, block, count, ahead);
        }
    }

   private:
    using Books = CodebookTile<Avx512, Vectors>;
    using Coefficients = typename Books::Coefficients;

    void load(const Plane& plane, int64_t block, int64_t count, HalfwordBlock<Vectors>& bits) const {
        // The last words of odd columns may have no word of the plane.
        const int64_t there = least(count, plane.row_bytes / 4 - block);
        NothingAhead later;
        bits.load(plane, row_, n_, block, there, One ? &later : nullptr);
    }
    // Loads take little of the time: what comes next is fetched while the sums of the first set are made.
    struct NothingAhead {
        void step() {}
    };
    int64_t steps_of(const Codebooks& set) const {
        const Activations& x = kinds_[set.term[0].kind];
        if (looks_up_some(set)) return x.runs;
        int64_t chosen = 0;
        for (int64_t t = 0; t < set.terms; t++) chosen += set.term[t].bits != Bits::all;
        return chosen * x.words;
    }
    static bool looks_up_some(const Codebooks& set) { return set.lookups[kLookupSizes - 1]; }

    void add_set(int64_t number, const CodedBlock<Vectors>& bits, int64_t block, int64_t count,
                 PartAhead<Avx512>& ahead) {
        const Codebooks& set = part_.set[number];
        for (RunsOf run(kinds_[set.term[0].kind], block, count); run; ++run) {
            Coefficients coefficients;
            books_[number].at(run.index, coefficients);
            for (int64_t t = 0; run.begins && t < set.terms; t++) {
                if (set.term[t].bits == Bits::all) add_constant(kinds_[set.term[t].kind], run.index, coefficients[t]);
            }
            if (looks_up_some(set)) {
                if (One && number == 0) ahead.step();
                add_some(set, run.index, bits, block, coefficients);
                continue;
            }
            for (int64_t from = run.from, upto; from < run.upto; from = upto) {
                upto = least(run.upto, (from / kStepWords + 1) * kStepWords);
                add_step(set, bits, block, from, upto, coefficients, ahead);
            }
        }
    }

    void add_constant(const Activations& x, int64_t run, const Column<Avx512>* coefficients) {
        for (int64_t token = 0; token < x.tokens; token++) {
            const __m512 sum = _mm512_set1_ps(x.sums[token * x.runs + run]);
            add_to(token, coefficients, [sum](int, int) { return sum; });
        }
    }

    // Words [from, upto) of a block, of one step.
    void add_step(const Codebooks& set, const CodedBlock<Vectors>& bits, int64_t block, int64_t from, int64_t upto,
                  const Coefficients& coefficients, PartAhead<Avx512>& ahead) {
        const int64_t word = block + from;
        HalfwordFields<Vectors> fields[One ? 1 : 2 * kStepWords];
        for (int64_t t = 0; t < set.terms; t++) {
            const Term& term = set.term[t];
            if (term.bits == Bits::all) continue;
            if constexpr (One) {
                add_sums(chosen_sums(bits, term.bits, from, upto, tables_of(term, 0, word), ahead), term, 0, word,
                         coefficients[t]);
            } else {
                const int64_t count = 2 * (upto - from);
                for (int64_t i = 0; i < count; i++) {
                    fields[i] = bits.fields(term.bits, from + i / 2, static_cast<int>(i % 2));
                }
                for_tokens<kTogether<Pieces>>(0, kinds_[0].tokens, [&](auto tokens, int64_t token) {
                    HalfwordSums<Vectors, Pieces, decltype(tokens)::value> sums;
                    const HalfwordTable<Pieces>* table = tables_of(term, token, word);
#pragma GCC unroll 1
                    for (int64_t i = 0; i < count; i++) sums.add(table + i, tables_of_token(term), fields[i]);
                    add_sums(sums, term, token, word, coefficients[t]);
                });
            }
        }
    }

    // A run of a few fields, of one step.
    void add_some(const Codebooks& set, int64_t run, const CodedBlock<Vectors>& bits, int64_t block,
                  const Coefficients& coefficients) {
        const int64_t* ends = set.lookups_end[kLookupSizes - 1] + run;
        const Lookup *all = set.lookups[kLookupSizes - 1], *begin = all + (run ? ends[-1] : 0), *end = all + *ends;
        constexpr int most = One ? 1 : kTogether<Pieces>;
        for_tokens<most>(0, kinds_[0].tokens, [&](auto tokens, int64_t token) {
            for (int64_t t = 0; t < set.terms; t++) {
                const Term& term = set.term[t];
                if (term.bits == Bits::all) continue;
                const HalfwordTable<Pieces>* tables = tables_of(term, token, block);
                HalfwordSums<Vectors, Pieces, decltype(tokens)::value> sums;
                for (const Lookup* one = begin; one < end; one++) {
                    const int half = one->nibble / 3;
                    __m512i halfwords[Vectors];
                    for (int v = 0; v < Vectors; v++) halfwords[v] = bits.chosen(term.bits, one->word, half, v);
                    sums.add_some(tables + 2 * one->word + half, tables_of_token(term), one->nibble % 3, one->mask,
                                  halfwords);
                }
                add_sums(sums, term, token, block + begin->word, coefficients[t]);
            }
        });
    }

    // Sums of one step, the one of this word, and of tokens from one on.
    template <int Tokens>
    [[gnu::always_inline]] void add_sums(const HalfwordSums<Vectors, Pieces, Tokens>& sums, const Term& term,
                                         int64_t token, int64_t word, const Column<Avx512>* coefficients) {
        const Activations& x = kinds_[term.kind];
        unrolled<Tokens>([&](auto t) __attribute__((always_inline)) {
            const int64_t own = token + t.value;
            const __m512 unit = _mm512_set1_ps(x.steps[own * x.words + word]);
            add_to(own, coefficients,
                   [&](int v, int half) { return _mm512_mul_ps(sums.total(t.value, v, half), unit); });
        });
    }

    int64_t tables_of_token(const Term& term) const { return 2 * kinds_[term.kind].words; }
    const HalfwordTable<Pieces>* tables_of(const Term& term, int64_t token, int64_t word) const {
        const auto* tables = reinterpret_cast<const HalfwordTable<Pieces>*>(kinds_[term.kind].tables);
        return tables + token * tables_of_token(term) + 2 * word;
    }

    [[gnu::always_inline]] static HalfwordSums<Vectors, Pieces> chosen_sums(const CodedBlock<Vectors>& bits, Bits by,
                                                                           int64_t from, int64_t upto,
                                                                           const HalfwordTable<Pieces>* table,
                                                                           PartAhead<Avx512>& ahead) {
        switch (by) {
            case Bits::signs: return sums_by<Bits::signs>(bits, from, upto, table, ahead);
            case Bits::zones: return sums_by<Bits::zones>(bits, from, upto, table, ahead);
            case Bits::negative0: return sums_by<Bits::negative0>(bits, from, upto, table, ahead);
            default: return sums_by<Bits::negative1>(bits, from, upto, table, ahead);
        }
    }
    template <Bits By>
    [[gnu::always_inline]] static HalfwordSums<Vectors, Pieces> sums_by(const CodedBlock<Vectors>& bits, int64_t from,
                                                                       int64_t upto, const HalfwordTable<Pieces>* table,
                                                                       PartAhead<Avx512>& ahead) {
        HalfwordSums<Vectors, Pieces> sums;
#pragma GCC unroll 1
        for (int64_t word = from; word < upto; word++, table += 2) {
            ahead.step();
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) sums.add(table + half, 0, bits.fields(By, word, half));
        }
        return sums;
    }

    template <class Value>
    [[gnu::always_inline]] void add_to(int64_t token, const Column<Avx512>* coefficients, Value value) {
        add_to_rows<Vectors>(
            y_ + token * stride_, [&](int v, int half) { return coefficients[v].strip[half]; }, value);
    }

    const CodedPlanes& part_;
    const Activations* kinds_;
    int64_t row_, n_;
    float* y_;
    int64_t stride_;
    Books books_[2];
};

// Rows of a part whose outputs are transformed, which may be done panel by panel.
template <int Vectors, int Pieces, bool One>
void add_coded_pairs(const CodedPlanes& part, const Activations* kinds, int64_t row, int64_t n, int64_t word,
                     int64_t end, float* y, int64_t stride) {
    constexpr int64_t rows = kHalfwordRows * Vectors;
    alignas(64) float own[kHalfwordTokens * rows];
    const int64_t tokens = kinds[0].tokens;
    for (int64_t i = 0; i < tokens * rows; i++) own[i] = 0.0f;
    CodedTile<Vectors, Pieces, One>(part, kinds, row, n, own, rows).add(word, end);
    for (int64_t token = 0; token < tokens; token++) {
        for (int64_t i = 0; i < rows; i += 16) {
            const int64_t there = greatest(least(n - row - i, 16), 0);
            const __m512 sum = over_pairs(_mm512_load_ps(own + token * rows + i), there);
            float* to = y + token * stride + row + i;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum));
        }
    }
}

template <int Pieces, bool One>
void coded_halfwords(const Coded& w, const Activations* kinds, int64_t first, int64_t last, float* y, int64_t stride) {
    for (int64_t p = 0; p < w.parts; p++) {
        const CodedPlanes& part = w.part[p];
        const Activations& x = kinds[part.set[0].term[0].kind];
        const int64_t panel = panel_words<Pieces, One>(x, part.sets);
        for (int64_t word = 0; word < x.words; word += panel) {
            const int64_t end = least(word + panel, x.words);
            for_each_tile(first, last, [&](auto vectors, int64_t row) {
                constexpr int V = decltype(vectors)::value;
                if (part.pairs) add_coded_pairs<V, Pieces, One>(part, kinds, row, w.n, word, end, y, stride);
                else CodedTile<V, Pieces, One>(part, kinds, row, w.n, y + row, stride).add(word, end);
            });
        }
    }
}

template <bool Int8>
void coded_halfwords_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                          int64_t stride) {
    const Coded& w = *static_cast<const Coded*>(matrix);
    clear_outputs(kinds[0].tokens, first, last, y, stride);
    if (kinds[0].tokens == 1) coded_halfwords<kPieces[Int8], true>(w, kinds, first, last, y, stride);
    else coded_halfwords<kPieces[Int8], false>(w, kinds, first, last, y, stride);
}

}  // namespace avx512
}  // namespace kernels
