// What a packed matrix is to the kernels, and what every instruction set has to offer.
//
// A product y = x W^T is made in three steps:
//
//   1. Matrix::columns   the activations as the layout wants them: float vectors in whole words of 32 columns
//   2. Isa::prepare      for every four columns the 16 sums that a nibble of bits can ask for (lookup.h), say
//   3. Matrix::rows      tile by tile of W's rows: look sums up, multiply them with the rows' coefficients, add
//
// There may be better ways, each a Matrix of its own (Matrix::better): sums of more columns (halfwords.h), or for one
// or two tokens digits instead of sums, and dot products instead of lookups (dots.h).
//
// Steps 2 and 3 are compiled once for each instruction set. A row of the result depends on its own row of W and on
// nothing else, so how rows are shared out between threads changes no result.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

// Not ``signbit``: math.h has a function of that name.
namespace kernels {

enum class Scalar : int32_t { f32, f16, bf16 };

// Coefficients [n, per_row] in the dtype that they are stored in; without data there are none.
struct Coefficients {
    const void* data = nullptr;
    int64_t per_row = 0;
    Scalar type = Scalar::f16;
};

// Bits [n, 8 * row_bytes], rows in whole 32-bit words.
struct Plane {
    const uint8_t* data = nullptr;
    int64_t row_bytes = 0;
};

// Words of a row that are worked on together: few enough to stay in the first-level cache.
constexpr int64_t kBlockWords = 32;
// Words that share a step where activations are rounded to 8 bits; sums of so many are certain to fit 16 bits.
constexpr int64_t kStepWords = 4, kStepColumns = 32 * kStepWords;
// What few tokens are multiplied with in such steps has room for the activations of so many columns.
constexpr int64_t kMostDotColumns = 32768;

// The columns of one group: words [word, end), of which the first and the last may be shared with its neighbours.
struct Run {
    int64_t word, end;
    uint32_t first, last;  // the group's own bits in them; where both are one word, first == last
};

// Runs of a matrix with groups of ``group_size`` columns, the last perhaps narrower; 0: one group of all.
std::vector<Run> runs_of(int64_t columns, int64_t group_size);

// One lookup: a nibble of a word (counted from the block's first), of which only the bits in a mask matter; the mask
// has the nibble in its lowest bits. If lookups find two nibbles at once, it is this one and the one 16 columns
// further. If they find fields of halfwords (halfwords.h), it is one of a word's six.
struct Lookup {
    int32_t word, nibble;
    uint32_t mask;
};

// What step 2 makes of activations: tables to look sums up in, by nibbles or by halfwords of bits; the numbers themselves,
// for what multiplies by them; or their digits, for dot products with bits.
enum class Form : int32_t { tables, halfwords, numbers, digits };
constexpr int kForms = 4;

// Bytes that the numbers of a word of columns take: 32 floats, and behind all floats of a token the integers of 8 bits
// that they were rounded to (int8), which floats times steps are again.
constexpr int64_t kNumberBytes = 192;

// One kind of activations of a few tokens.
struct Activations {
    int64_t tokens, words, runs;
    const Run* run;
    const char* tables;  // [tokens][words][bytes of one], for each form its own; digits: [tokens][chunks] (dots.h)
    const float* steps;  // [tokens][words]: what one unit of the tables is worth; 1 in exact mode
    const float* sums;   // [tokens][runs]: what a group's activations add up to
};

// So many tokens at most are few.
constexpr int64_t kFewTokens = 2;

// The most tokens that are multiplied at a time, but by halfwords.
constexpr int64_t kTokens = 16;

using Prepare = void (*)(float* x, int64_t words, const Run* run, int64_t runs, bool int8, void* tables,
                         float* steps, float* sums);
using Rows = void (*)(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                      int64_t stride);

// Plain floats [n, m], as the rows function knows them.
struct Dense {
    int64_t m;
    const float* weights;
};

struct Norm;
struct Rounding;

// What lies between the products of a decoder layer (decoder.h, decoder_steps.h).
struct DecoderSteps {
    void (*rms_norm)(const float* x, const Norm& norm, int64_t count, float* y);
    void (*silu_times)(float* gate, const float* up, int64_t count);
    void (*attend)(const float* q, const float* keys, const float* values, int64_t tokens, int64_t features,
                   float scaling, float* weights, float* y);
};

struct Isa {
    const char* name;
    bool (*supported)();
    int64_t tile;            // rows that are worked on together
    size_t table_bytes[2];   // of a word; exact, int8
    // x [32 * words] floats, which may be overwritten -> tables (or another form), steps and sums of one token; int8 rounds
    // x to 8 bits for every 128 columns.
    Prepare prepare[kForms];
    Rows sign_planes[2];     // exact, int8; each layout's rows [first, last): y[token * stride + row]
    // Null where there is none.
    Rows sign_halfwords[2], coded_halfwords[2];
    // Times few tokens.
    Rows sign_dots, haar_dots;  // in 8 bits
    Rows structured_dots[2], kept_dots[2], partial_dots[2];
    Rows coded[2];
    Rows integers[2];
    Rows structured[2];
    Rows partial[2];
    Rows dense;
    DecoderSteps decoder;
    void (*round_in_turn)(const Rounding& rounding, int64_t first);  // kRoundingRows rows (rounding.h)
};

extern const Isa kAvx512, kAvx2, kNeon, kPortable;

// A packed matrix [n, m]: views of tensors that somebody else keeps.
struct Matrix {
    int64_t n, m, words;
    std::vector<Run> runs;
    // The same matrix in ways that do better where an instruction set has them, the best at the end.
    std::vector<std::unique_ptr<const Matrix>> better;
    int64_t most_tokens = INT64_MAX;  // at a time, that it is good for

    Matrix(int64_t rows, int64_t columns, int64_t group_size)
        : n(rows), m(columns), words((columns + 31) / 32), runs(runs_of(columns, group_size)) {}
    virtual ~Matrix() = default;

    // How many kinds of activations the layout looks up, and what they are: x [m] -> out [32 * words], zeros behind m.
    virtual int64_t kinds() const { return 1; }
    virtual void columns(int64_t kind, const float* x, float* out) const;
    virtual Form form(int64_t) const { return Form::tables; }
    // The words and runs of a kind, where it has others than the matrix; no kind has more words.
    virtual int64_t kind_words(int64_t) const { return words; }
    virtual const std::vector<Run>& kind_runs(int64_t) const { return runs; }
    // Null if the instruction set has none, which is for what is ``better`` only.
    virtual Rows rows(const Isa& isa, bool int8) const = 0;
    // The layout's own struct, as its rows function knows it.
    virtual const void* self() const = 0;
};

// Rows of y that are written together, beyond the last one too.
constexpr int64_t kOutputRows = 32;

// y [tokens, n] = x [tokens, m] W^T; contiguous, both of the same type, in memory of their own: y may be written while x
// is still read.
void multiply(const Matrix& matrix, const Isa& isa, const void* x, void* y, Scalar type, int64_t tokens, bool int8,
              int threads);

}  // namespace kernels
