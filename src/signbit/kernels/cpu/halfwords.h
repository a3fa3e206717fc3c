// Halfwords of bits: 16 columns in three lookups, 32 rows at a time; what there is beyond lookup.h on AVX-512.
//
// vpermw and vpermi2w find 32 numbers of 16 bits at once, in tables of 32 and 64. So a halfword of signs, 16 columns,
// is cut into fields of 5, 5 and 6 bits, and a vector of the halfwords of 32 rows is three permutations and three
// additions, for 512 weights. Tables in floats need eight of each, and as many shifts.
//
// Sums of activations in 8 bits fit into 16. Those of exact products do not: for the activations of 128 columns there is
// a unit, each sum in a table is rounded to a number of units, and that has two pieces of 16 bits, high * 2^11 + low with
// low in -1024 .. 1023. Each piece is looked up and added up by itself. 24 lookups later, behind 128 columns, the pieces
// meet in 32 bits and then in floats. Nothing overflows: 24 * 1024 < 2^15, and as whatever is chosen of the 128
// activations lies between the sum of the negative and that of the positive ones, the unit is chosen so that both fit
// 2^11 * 2^15. Of what is added up, that is 26 bits. Where activations are below 1e-34, a unit is a number that floats
// have with fewer digits.
//
// Runs are whole words, but for the last one, behind which activations are zero, and those that only some fields are
// looked up of. An activation that is not finite makes NaN of its 128 columns.

#pragma once

#include "kernels.h"

namespace kernels {

// Of the sums of one halfword's columns: exact, int8.
constexpr int kPieces[2] = {2, 1};

// Entry i of a table: the sum of those of its 5 or 6 activations whose bit is set in i.
template <int Pieces>
struct alignas(64) HalfwordTable {
    int16_t first[Pieces][32], second[Pieces][32], third[Pieces][64];  // columns 0 .. 4, 5 .. 9, 10 .. 15
};

// The most tokens that are multiplied at a time: they share what is loaded and transposed.
constexpr int64_t kHalfwordTokens = 32;

// What the tables of a word take: exact, int8.
constexpr int64_t kHalfwordBytes[2] = {2 * sizeof(HalfwordTable<2>), 2 * sizeof(HalfwordTable<1>)};

}  // namespace kernels
