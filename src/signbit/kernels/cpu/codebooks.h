// Codebooks: a few bits a weight, and for every combination of bits the number it stands for.
//
// Split planes and Haar planes are both of this sort. A weight has a sign and a second bit, which is the *zone* that it
// lies in; a codebook (one for each row and group, or band of a group) has a scale and perhaps a mean for each zone.
// With T: the sum of a group's activations, Z: of those in zone 1, U and B: of the negative ones in zone 0 and 1,
//
//     y += scale0 (T - Z - 2 U)  +  scale1 (Z - 2 B)  +  mean0 (T - Z)  +  mean1 Z
//
// that is: a sum of terms, each the sum of the activations that some bits choose, times a weighted sum of the
// codebook's numbers. All that these layouts can be in different ways (scales of columns: activations of another kind;
// a residual sign; one mean, two or none) changes nothing but the list of terms, which is made once (coded_matrix.cpp).
//
// Salient columns have codebooks of their own. Their activations are of a kind that is zero everywhere else, and only
// the nibbles are looked up that have one of these columns.

#pragma once

#include "kernels.h"
#ifdef SIGNBIT_ISA
#include "lookup.h"
#endif

namespace kernels {

// Which bits choose activations: all of them, those of a plane, or of two: negative in zone 0, negative in zone 1.
enum class Bits : int32_t { all, signs, zones, negative0, negative1, residual0, residual1 };
constexpr int kBits = 7;

constexpr int kMaxNumbers = 6, kMaxTerms = 12;
constexpr int kLookupSizes = 3;

struct Term {
    Bits bits;
    int32_t kind;
    int64_t numbers;             // so many of the codebook's numbers, its scales and then its means, and their weights
    int64_t number[kMaxNumbers];
    float weight[kMaxNumbers];
};

// Bits of a plane in compact order that belong to ``mask`` in a word of the block, moved left (or right, if negative).
struct Move {
    int32_t from, to, left;
    uint32_t mask;
};

struct Codebooks {
    Coefficients scales, means;
    int64_t scales_each, means_each;  // numbers of one codebook
    const int32_t* of_run;            // each run's codebook; null: the run's own number
    int64_t terms;
    Term term[kMaxTerms];
    // Of lookups of one nibble, of two, and of fields of halfwords: those of run i are [lookups_end[i - 1],
    // lookups_end[i]). Null: whole words.
    const Lookup* lookups[kLookupSizes];
    const int64_t* lookups_end[kLookupSizes];
};

// Planes, and the one or two sets of codebooks that say what they mean.
struct CodedPlanes {
    Plane signs, zones, residual;
    // Where ``window`` is not 0, words of even columns come first and then words of odd ones, in every window of words.
    int64_t window;
    bool pairs;  // the outputs are still to be transformed (Haar) over pairs of rows
    const Move* moves;          // from the residual's compact words, if it has any: those of block i are
    const int64_t* moves_end;   // [moves_end[i - 1], moves_end[i])
    int64_t sets;
    Codebooks set[2];
};

struct Coded {
    int64_t n, parts;
    CodedPlanes part[2];
};

#ifdef SIGNBIT_ISA
namespace SIGNBIT_ISA {

// A block of words of everything that chooses activations.
template <class I>
struct CodeWords {
    Words<I> words[kBits];

    const Words<I>& operator[](Bits bits) const { return words[static_cast<int>(bits)]; }
    Words<I>& operator[](Bits bits) { return words[static_cast<int>(bits)]; }

    void load(const CodedPlanes& planes, const Tile<I>& tile, int64_t word, int64_t count) {
        load(planes.signs, planes.window, tile, word, count, (*this)[Bits::signs]);
        load(planes.zones, planes.window, tile, word, count, (*this)[Bits::zones]);
        split(Bits::signs, Bits::negative0, Bits::negative1, count);
        if (!planes.moves) return;
        expand(planes, tile, word, count, (*this)[Bits::residual0]);
        split(Bits::residual0, Bits::residual0, Bits::residual1, count);
    }

   private:
    // By zone.
    void split(Bits of, Bits zone0, Bits zone1, int64_t count) {
        for (int64_t i = 0; i < count; i++) {
            for (int s = 0; s < I::strips; s++) {
                const typename I::U bits = (*this)[of].w[i][s], zones = (*this)[Bits::zones].w[i][s];
                (*this)[zone1].w[i][s] = I::both(bits, zones);
                (*this)[zone0].w[i][s] = I::without(bits, zones);
            }
        }
    }

    static void load(const Plane& plane, int64_t window, const Tile<I>& tile, int64_t word, int64_t count,
                     Words<I>& out) {
        if (!window) return out.load(plane, tile, word, count, false);
        Words<I> as_stored;
        const int64_t there = least(count, plane.row_bytes / 4 - word);
        as_stored.load(plane, tile, word, there, false);
        if (there < count) {
            for (int s = 0; s < I::strips; s++) as_stored.w[there][s] = I::bits(0);
        }
        const typename I::U even = I::bits(0x55555555);
        for (int64_t start = 0; start < count; start += window) {
            const int64_t half = least(window, count - start) / 2;
            for (int64_t i = 0; i < half; i++) {
                for (int s = 0; s < I::strips; s++) {
                    const typename I::U a = as_stored.w[start + 2 * i][s], b = as_stored.w[start + 2 * i + 1][s];
                    out.w[start + i][s] = I::either(I::both(a, even), I::left(I::both(b, even), 1));
                    out.w[start + half + i][s] = I::either(I::both(I::right(a, 1), even), I::without(b, even));
                }
            }
        }
    }

    static void expand(const CodedPlanes& planes, const Tile<I>& tile, int64_t word, int64_t count, Words<I>& out) {
        for (int64_t i = 0; i < count; i++) {
            for (int s = 0; s < I::strips; s++) out.w[i][s] = I::bits(0);
        }
        const int64_t block = word / kBlockWords, compact_words = planes.residual.row_bytes / 4;
        const Move* move = planes.moves + (block ? planes.moves_end[block - 1] : 0);
        const Move* const end = planes.moves + planes.moves_end[block];
        while (move < end) {
            const int64_t base = move->from, loaded = least(kBlockWords, compact_words - base);
            Words<I> compact;
            compact.load(planes.residual, tile, base, loaded, false);
            for (; move < end && move->from < base + loaded; move++) {
                const typename I::U mask = I::bits(move->mask);
                for (int s = 0; s < I::strips; s++) {
                    const typename I::U from = compact.w[move->from - base][s];
                    const typename I::U bits = move->left > 0 ? I::left(from, move->left) : I::right(from, -move->left);
                    out.w[move->to][s] = I::either(out.w[move->to][s], I::both(bits, mask));
                }
            }
        }
    }
};

// The codebooks of the rows of so many tiles, as coefficients of their terms.
template <class I, int Tiles = 1>
class CodebookTile {
   public:
    using Coefficients = Column<I>[kMaxTerms][Tiles];

    void take(const Codebooks& set, int64_t row, int64_t n) {
        set_ = &set;
        for (int i = 0; i < Tiles; i++) {
            const Tile<I> tile(row + i * Tile<I>::rows, n);
            scales_[i].take(set.scales, tile);
            means_[i].take(set.means, tile);
        }
    }
    void at(int64_t run, Coefficients& coefficients) {
        const Codebooks& set = *set_;
        // A codebook has 1, 2 or 4 scales and means: those of one are found together.
        const int64_t book = set.of_run ? set.of_run[run] : run;
        const int64_t scale = book * set.scales_each, mean = book * set.means_each;
        for (int i = 0; i < Tiles; i++) {
            scales_[i].find(scale);
            if (set.means_each) means_[i].find(mean);
        }
        for (int64_t t = 0; t < set.terms; t++) {
            const Term& term = set.term[t];
            Column<I> sum[Tiles] = {};
            for (int64_t k = 0; k < term.numbers; k++) {
                const int64_t number = term.number[k] - set.scales_each;
                if (number < 0) add(scales_, scale + term.number[k], term.weight[k], sum);
                else add(means_, mean + number, term.weight[k], sum);
            }
            for (int i = 0; i < Tiles; i++) coefficients[t][i] = sum[i];
        }
    }

   private:
    static void add(const CoefficientTile<I>* from, int64_t index, float weight, Column<I>* sum) {
        for (int i = 0; i < Tiles; i++) {
            for (int s = 0; s < I::strips; s++) {
                sum[i].strip[s] = I::fma(from[i].found(index, s), I::set(weight), sum[i].strip[s]);
            }
        }
    }

    const Codebooks* set_ = nullptr;
    CoefficientTile<I> scales_[Tiles], means_[Tiles];
};

// Everything that the next tile of a part needs, in so many steps.
template <class I>
class PartAhead {
   public:
    PartAhead() = default;
    PartAhead(const CodedPlanes& part, int64_t row, int64_t n, int64_t rows, int64_t steps, bool far = false) {
        const auto add = [&](const void* data, int64_t row_bytes) {
            if (data) ahead_[count_++] = Ahead<I>(data, row_bytes, row, n, rows, steps, far);
        };
        for (const Plane* plane : {&part.signs, &part.zones, &part.residual}) add(plane->data, plane->row_bytes);
        for (int64_t set = 0; set < part.sets; set++) {
            for (const Coefficients* numbers : {&part.set[set].scales, &part.set[set].means}) {
                add(numbers->data, numbers->per_row * (numbers->type == Scalar::f32 ? 4 : 2));
            }
        }
    }
    void step() {
        for (int i = 0; i < count_; i++) ahead_[i].step();
    }

   private:
    Ahead<I> ahead_[7];
    int count_ = 0;
};

// Adds what a set of codebooks makes of a block's words.
template <class I, bool Int8>
void add_codes(const Codebooks& set, const CodeWords<I>& words, int64_t word, int64_t count, const Activations* kinds,
               CodebookTile<I>& books, PartAhead<I>& ahead, Outputs<I>& out) {
    constexpr int width = I::template Sum<Int8>::nibbles - 1;
    for (RunsOf run(kinds[set.term[0].kind], word, count); run; ++run) {
        ahead.step();
        typename CodebookTile<I>::Coefficients coefficients;
        books.at(run.index, coefficients);
        for (int64_t t = 0; t < set.terms; t++) {
            const Activations& x = kinds[set.term[t].kind];
            if (set.term[t].bits == Bits::all) {
                if (!run.begins) continue;
                for (int64_t token = 0; token < x.tokens; token++) {
                    out.add(token, coefficients[t][0], x.sums[token * x.runs + run.index]);
                }
                continue;
            }
            Column<I> sums[kTokens];
            if (set.lookups[width]) {
                const int64_t* end = set.lookups_end[width] + run.index;
                look_up_some<I, Int8>(words[set.term[t].bits], set.lookups[width] + (run.index ? end[-1] : 0),
                                      set.lookups[width] + *end, run, x, sums);
            } else {
                look_up<I, Int8>(words[set.term[t].bits], run, x, sums);
            }
            for (int64_t token = 0; token < x.tokens; token++) out.add(token, coefficients[t][0], sums[token]);
        }
    }
}

// y = out + Haar over pairs of rows (pairs); a last row without a partner stays as it is.
template <class I>
void store_pairs(const Tile<I>& tile, int64_t tokens, const Outputs<I>& out, const Outputs<I>& pairs, float* y,
                 int64_t stride) {
    static_assert(Tile<I>::rows % 2 == 0, "a pair of rows is in one tile");
    constexpr float root_half = 0.70710678118654752f;
    for (int64_t token = 0; token < tokens; token++) {
        alignas(64) float plain[Tile<I>::rows], paired[Tile<I>::rows];
        for (int s = 0; s < I::strips; s++) {
            I::store(plain + s * I::lanes, out.sum[token].strip[s], I::lanes);
            I::store(paired + s * I::lanes, pairs.sum[token].strip[s], I::lanes);
        }
        const int64_t rows = least(Tile<I>::rows, tile.n - tile.row);
        float* to = y + token * stride + tile.row;
        for (int64_t i = 0; i + 1 < rows; i += 2) {
            to[i] = plain[i] + (paired[i] + paired[i + 1]) * root_half;
            to[i + 1] = plain[i + 1] + (paired[i] - paired[i + 1]) * root_half;
        }
        if (rows % 2) to[rows - 1] = plain[rows - 1] + paired[rows - 1];
    }
}

template <class I, bool Int8>
void coded_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y, int64_t stride) {
    const Coded& w = *static_cast<const Coded*>(matrix);
    const int64_t tokens = kinds[0].tokens;
    for (int64_t row = first; row < last; row += Tile<I>::rows) {
        const Tile<I> tile(row, w.n);
        Outputs<I> out(tokens), pairs(tokens);
        bool any_pairs = false;
        for (int64_t p = 0; p < w.parts; p++) {
            const CodedPlanes& part = w.part[p];
            any_pairs |= part.pairs;
            int64_t runs = 0;
            for (int64_t set = 0; set < part.sets; set++) runs += kinds[part.set[set].term[0].kind].runs;
            PartAhead<I> ahead(part, tile.row, tile.n, Tile<I>::rows, runs);
            CodebookTile<I> books[2];
            for (int64_t set = 0; set < part.sets; set++) books[set].take(part.set[set], row, w.n);
            for (Blocks<I> block(kinds[part.set[0].term[0].kind]); block; ++block) {
                CodeWords<I> words;
                words.load(part, tile, block.word, block.count);
                for (int64_t set = 0; set < part.sets; set++) {
                    add_codes<I, Int8>(part.set[set], words, block.word, block.count, kinds,
                                       books[set], ahead, part.pairs ? pairs : out);
                }
            }
        }
        if (any_pairs) store_pairs(tile, tokens, out, pairs, y, stride);
        else out.store(tile, tokens, y, stride);
    }
}

}  // namespace SIGNBIT_ISA
#endif

}  // namespace kernels
