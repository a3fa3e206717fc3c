// Sums of activations by lookup: the engine under every layout.
//
// A nibble of a bit plane asks for one of the 16 sums that four activations can make. These are computed once, 16
// floats for every four columns, and then a vector permutation looks a nibble up for as many rows as a vector has
// lanes: shift, permute and add, for 4 weights of each row. Lanes are rows, so sums need no adding up across a vector,
// and the coefficients of rows and groups are vectors like everything else. What it takes is that words of different
// rows stand side by side: words are transposed as they are loaded, 16 words of 16 rows in 64 shuffles, which is a
// quarter of the lookups that follow.
//
// With activations in 8 bits the sums of four fit in 16 bits, and one permutation looks two nibbles up, that of columns
// 4c .. 4c+3 and that of 4c+16 .. 4c+19, for the same rows.
//
// This file is compiled once for each instruction set. I, the instruction set, has
//
//     F, U                    vectors of ``lanes`` floats, 32-bit words
//     strips                  vectors side by side, which share what is read from tables; a tile has
//                             lanes * strips rows
//     load_words              words of ``lanes`` rows, transposed
//     load_coefficients       coefficients of ``lanes`` rows, transposed, unless it has a CoefficientBlock of its own
//     Sum<Int8>               what the words of a run add up to, exact or of integers:
//         tabulate(x, table)      the tables of one word's 32 activations, ``table_bytes``
//         index(words)            what a lookup needs of a word, for all strips
//         add(index, table)       look all of a word's nibbles up
//         nibbles                 how many of them one lookup finds: nibble c, and c + 4 if there are two
//         add_one(words, nibble, mask, table)   look one nibble (or two) of the bits in a mask up, in its own table
//         flush(step)             integers to floats, each worth ``step``, if it ``needs_flush``
//         total()                 the sum
//     set, bits, load, store, add, mul, fma, both, either, different (xor), without, left, right, prefetch,
//     prefetch_far            the same into the second-level cache, for what is so much that it would drive out what is at hand
//
// Nothing here may come from std: a template compiled for one instruction set must not be linked into another.

#pragma once

#include "kernels.h"

namespace kernels {
namespace SIGNBIT_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// Vectors of the strips of a tile: one number a row.
template <class I>
struct Column {
    typename I::F strip[I::strips];

    friend Column operator+(Column a, const Column& b) {
        for (int s = 0; s < I::strips; s++) a.strip[s] = I::add(a.strip[s], b.strip[s]);
        return a;
    }
    friend Column operator-(Column a, const Column& b) { return a + b * -1.0f; }
    friend Column operator*(Column a, float b) {
        for (int s = 0; s < I::strips; s++) a.strip[s] = I::mul(a.strip[s], I::set(b));
        return a;
    }
};

// Rows [row, row + rows) of a matrix of n; where there are none any more, the last one stands in.
template <class I>
struct Tile {
    static constexpr int64_t rows = I::lanes * I::strips;
    int64_t row, n;

    Tile(int64_t first, int64_t count) : row(first), n(count) {}
    int64_t at(int64_t offset) const { return least(row + offset, n - 1); }
};

// Fetches the next tile's rows of a plane or of coefficients while this tile is worked on, a few cache lines at a time:
// all at once, they would keep what is needed now waiting.
template <class I>
class Ahead {
   public:
    Ahead() = default;
    // far: into the second-level cache, which is faster where the tile is used once; with 128 tokens it is 8% slower.
    Ahead(const void* data, int64_t row_bytes, const Tile<I>& tile, int64_t steps, bool far = false)
        : Ahead(data, row_bytes, tile.row, tile.n, Tile<I>::rows, steps, far) {}
    // Of a tile of so many rows, from ``row`` on, of n.
    Ahead(const void* data, int64_t row_bytes, int64_t row, int64_t n, int64_t rows, int64_t steps, bool far)
        : at_(static_cast<const char*>(data) + least(row + rows, n) * row_bytes),
          end_(static_cast<const char*>(data) + least(row + 2 * rows, n) * row_bytes),
          share_((rows * row_bytes / steps + 63) / 64 * 64),
          far_(far) {}

    void step() {
        const char* stop = end_ - at_ > share_ ? at_ + share_ : end_;
        if (far_) {
            for (; at_ < stop; at_ += 64) I::prefetch_far(at_);
        } else {
            for (; at_ < stop; at_ += 64) I::prefetch(at_);
        }
    }

   private:
    const char *at_ = nullptr, *end_ = nullptr;
    int64_t share_ = 0;
    bool far_ = false;
};

// Words [word, word + count) of a plane: w[i][s] has word i of the rows of strip s.
template <class I>
struct Words {
    alignas(64) typename I::U w[kBlockWords][I::strips];

    // Unless an Ahead does, this fetches the same words of the next tile.
    void load(const Plane& plane, const Tile<I>& tile, int64_t word, int64_t count, bool fetch = true) {
        for (int s = 0; s < I::strips; s++) {
            const uint8_t* rows[I::lanes];
            for (int lane = 0; lane < I::lanes; lane++) {
                rows[lane] = plane.data + tile.at(s * I::lanes + lane) * plane.row_bytes + 4 * word;
                // Too many streams for the hardware to foresee.
                if (!fetch) continue;
                I::prefetch(rows[lane] + Tile<I>::rows * plane.row_bytes);
                I::prefetch(rows[lane] + Tile<I>::rows * plane.row_bytes + 64);
            }
            I::load_words(rows, count, &w[0][s], I::strips);
        }
    }
    // The same from rows of a tile alone, ``row_bytes`` apart.
    void load_from(const uint8_t* tile, int64_t row_bytes, int64_t count) {
        for (int s = 0; s < I::strips; s++) {
            const uint8_t* rows[I::lanes];
            for (int lane = 0; lane < I::lanes; lane++) rows[lane] = tile + (s * I::lanes + lane) * row_bytes;
            I::load_words(rows, count, &w[0][s], I::strips);
        }
    }
};

// The words of a matrix in blocks: for (Blocks<I> block(x); block; ++block).
template <class I>
struct Blocks {
    int64_t words, word = 0, count;

    explicit Blocks(const Activations& x) : words(x.words), count(least(kBlockWords, words)) {}
    explicit operator bool() const { return word < words; }
    void operator++() {
        word += kBlockWords;
        count = least(kBlockWords, words - word);
    }
};

// The runs that have words in a block, each cut to it.
struct RunsOf {
    const Activations& x;
    int64_t block, end, index = 0;
    // Of the run's words in the block: where they begin and end, counted from the block's first, and their masks.
    int64_t from, upto;
    uint32_t first, last;
    bool begins;

    RunsOf(const Activations& activations, int64_t word, int64_t count)
        : x(activations), block(word), end(word + count) {
        int64_t low = 0, high = x.runs;  // the first run that ends behind the block's first word
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (x.run[middle].end > block) high = middle;
            else low = middle + 1;
        }
        index = low;
        cut();
    }
    explicit operator bool() const { return index < x.runs && x.run[index].word < end; }
    void operator++() {
        index++;
        cut();
    }

   private:
    void cut() {
        if (!*this) return;
        const Run& run = x.run[index];
        begins = run.word >= block;
        from = greatest(run.word, block) - block;
        upto = least(run.end, end) - block;
        first = begins ? run.first : ~0u;
        last = run.end <= end ? run.last : ~0u;
    }
};

// ``count`` coefficients of each of a tile's rows, transposed; instruction sets may have a way of their own.
template <class I>
class CoefficientBlock {
   public:
    static constexpr int64_t count = I::lanes;

    // So many of them; ``first`` is where those of a tile's first row begin, the others' are ``row_bytes`` apart. After
    // row ``last`` of the tile there are no rows, and it stands in.
    void load(const char* first, int64_t row_bytes, int64_t last, Scalar type, int64_t there) {
        const char* rows[Tile<I>::rows];
        for (int64_t i = 0; i < Tile<I>::rows; i++) rows[i] = first + least(i, last) * row_bytes;
        for (int s = 0; s < I::strips; s++) I::load_coefficients(rows + s * I::lanes, type, there, value_[s]);
    }
    typename I::F at(int64_t index, int strip) const { return I::load(value_[strip][index]); }

   private:
    alignas(64) float value_[I::strips][I::lanes][I::lanes];
};

// Coefficients of a tile's rows, a block of them at a time.
template <class I>
class CoefficientTile {
   public:
    CoefficientTile() = default;
    CoefficientTile(const Coefficients& coefficients, const Tile<I>& tile) { take(coefficients, tile); }

    void take(const Coefficients& coefficients, const Tile<I>& tile) {
        from_ = coefficients;
        tile_ = tile;
        start_ = -Block::count;
    }

    Column<I> at(int64_t index) {
        find(index);
        Column<I> column;
        for (int s = 0; s < I::strips; s++) column.strip[s] = found(index, s);
        return column;
    }

    // The same without a copy: find(index), and then found(index, strip) for as long as nothing else is to be found.
    void find(int64_t index) {
        if (index < start_ || index >= start_ + Block::count) load(index / Block::count * Block::count);
    }
    typename I::F found(int64_t index, int strip) const { return block_.at(index - start_, strip); }

   private:
    using Block = CoefficientBlock<I>;

    void load(int64_t start) {
        start_ = start;
        const int64_t width = from_.type == Scalar::f32 ? 4 : 2;
        const char* first = static_cast<const char*>(from_.data) + (tile_.at(0) * from_.per_row + start) * width;
        block_.load(first, from_.per_row * width, tile_.n - 1 - tile_.at(0), from_.type,
                    least(Block::count, from_.per_row - start));
    }

    Coefficients from_;
    Tile<I> tile_{0, 0};
    int64_t start_ = -Block::count;
    Block block_;
};

// What a tile adds up to, for every token.
template <class I>
struct Outputs {
    Column<I> sum[kTokens];

    explicit Outputs(int64_t tokens) {
        for (int64_t token = 0; token < tokens; token++) {
            for (int s = 0; s < I::strips; s++) sum[token].strip[s] = I::set(0.0f);
        }
    }
    void add(int64_t token, const Column<I>& coefficient, float value) {
        for (int s = 0; s < I::strips; s++) {
            sum[token].strip[s] = I::fma(coefficient.strip[s], I::set(value), sum[token].strip[s]);
        }
    }
    void add(int64_t token, const Column<I>& coefficient, const Column<I>& value) {
        for (int s = 0; s < I::strips; s++) {
            sum[token].strip[s] = I::fma(coefficient.strip[s], value.strip[s], sum[token].strip[s]);
        }
    }
    void store(const Tile<I>& tile, int64_t tokens, float* y, int64_t stride) const {
        for (int64_t token = 0; token < tokens; token++) {
            for (int s = 0; s < I::strips; s++) {
                const int64_t row = tile.row + s * I::lanes, count = least(I::lanes, tile.n - row);
                if (count > 0) I::store(y + token * stride + row, sum[token].strip[s], count);
            }
        }
    }
};

// What lookups need of the bits of a word that are in a mask.
template <class I, class Sum>
inline typename Sum::Index index_of(const typename I::U* words, uint32_t mask) {
    if (mask == ~0u) return Sum::index(words);
    typename I::U masked[I::strips];
    for (int s = 0; s < I::strips; s++) masked[s] = I::both(words[s], I::bits(mask));
    return Sum::index(masked);
}

// For each of at most Most tokens (one alone stays in registers) the sum of its activations where the words' bits are
// set, over the columns of one run. What a lookup needs of a word, its index, is computed once and serves all tokens.
template <class I, bool Int8, int64_t Most>
inline void look_up_tokens(const Words<I>& words, const RunsOf& run, const Activations& x, int64_t tokens,
                           Column<I>* sums, Ahead<I>* ahead) {
    using Sum = typename I::template Sum<Int8>;
    if (Most == 1) tokens = 1;
    Sum sum[Most];
    const int64_t table_stride = x.words * Sum::table_bytes;
    const char* tables = x.tables + run.block * Sum::table_bytes;
    const float* steps = x.steps + run.block;
    const int64_t last = run.upto - 1;
    for (int64_t i = run.from; i <= last; i++) {
        uint32_t mask = ~0u;
        if (i == run.from) mask &= run.first;
        if (i == last) mask &= run.last;
        const auto index = index_of<I, Sum>(words.w[i], mask);
        if (ahead) ahead->step();
        for (int64_t token = 0; token < tokens; token++) {
            sum[token].add(index, tables + token * table_stride + i * Sum::table_bytes);
        }
        if (Sum::needs_flush && ((i + 1) % kStepWords == 0 || i == last)) {
            for (int64_t token = 0; token < tokens; token++) sum[token].flush(steps[token * x.words + i]);
        }
    }
    for (int64_t token = 0; token < tokens; token++) sums[token] = sum[token].total();
}

// The same for a few nibbles only, all of them in words that share a step.
template <class I, bool Int8, int64_t Most>
inline void look_up_some_tokens(const Words<I>& words, const Lookup* begin, const Lookup* end, const RunsOf& run,
                                const Activations& x, int64_t tokens, Column<I>* sums) {
    using Sum = typename I::template Sum<Int8>;
    constexpr size_t nibble_bytes = Sum::table_bytes / 8 * Sum::nibbles;
    if (Most == 1) tokens = 1;
    Sum sum[Most];
    const int64_t table_stride = x.words * Sum::table_bytes;
    const char* tables = x.tables + run.block * Sum::table_bytes;
    for (const Lookup* one = begin; one < end; one++) {
        const char* table = tables + one->word * Sum::table_bytes + one->nibble * nibble_bytes;
        for (int64_t token = 0; token < tokens; token++) {
            sum[token].add_one(words.w[one->word], one->nibble, one->mask, table + token * table_stride);
        }
    }
    for (int64_t token = 0; token < tokens; token++) {
        if (Sum::needs_flush) sum[token].flush(x.steps[token * x.words + run.block + run.from]);
        sums[token] = sum[token].total();
    }
}

template <class I, bool Int8>
inline void look_up_some(const Words<I>& words, const Lookup* begin, const Lookup* end, const RunsOf& run,
                         const Activations& x, Column<I>* sums) {
    if (x.tokens == 1) {
        look_up_some_tokens<I, Int8, 1>(words, begin, end, run, x, 1, sums);
    } else {
        look_up_some_tokens<I, Int8, kTokens>(words, begin, end, run, x, x.tokens, sums);
    }
}

// All the words of a run, for however many tokens there are.
template <class I, bool Int8>
inline void look_up(const Words<I>& words, const RunsOf& run, const Activations& x, Column<I>* sums,
                    Ahead<I>* ahead = nullptr) {
    if (x.tokens == 1) {
        look_up_tokens<I, Int8, 1>(words, run, x, 1, sums, ahead);
    } else {
        look_up_tokens<I, Int8, kTokens>(words, run, x, x.tokens, sums, ahead);
    }
}

}  // namespace SIGNBIT_ISA
}  // namespace kernels
