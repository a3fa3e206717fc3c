// Rounding the columns of a matrix in turn, to values that each weight may have (methods/rounding.py).

#pragma once

#include <cstdint>

namespace kernels {

struct Isa;

// Rows that go through the columns together, and the most columns.
constexpr int64_t kRoundingRows = 32, kRoundingTurns = 128;

// Columns first: [k, n] for k columns and n rows. Views of tensors that somebody else keeps.
struct Rounding {
    int64_t n, k;
    const float* targets;  // [k, n]
    const float* shares;   // [k, k], or null
    const float* before;   // [k, n], or null
    const float* tables;   // [Z, levels, n]; even: [Z, 2, n], first value and step
    const int32_t* counts;  // [Z], none 0
    int64_t levels;
    bool even;
    const int32_t* which;  // the table of column j and row i: which[j * which_columns + i * which_rows]
    int64_t which_columns, which_rows;
    uint8_t* places;  // [k, n]
    float* changes;   // [k, n]
};

void round_in_turn(const Rounding& rounding, const Isa& isa, int threads);

}  // namespace kernels
