// Dot products of bits and digits, row by row: how one or two tokens are multiplied, where there is AVX-512.
//
// Lookups (lookup.h) share what they do between rows, and want words of 32 rows side by side. With few tokens it is
// faster to go through a row from end to end, 512 columns of it at a time: a *chunk*. vgf2p8affineqb moves one bit of
// each of 64 bytes to where a number has its lowest, and vpdpbusd adds products of 64 such bytes and as many activations:
// two instructions for 64 weights, whose bits can be made of those of several planes, 512 at a time, beforehand.
//
// Activations are digits: one of 8 bits (int8), or in exact products three to the base 128, each with its own dot
// product, and a step for every 128 columns. That is 22 bits of the largest of them; one far below it keeps fewer. They
// are in the order in which the bits come: vector i of a chunk has columns i, i + 8, i + 16 ...
//
// A sum of 32 columns, one word of bits, comes out in each of 16 lanes. Coefficients are spread over the lanes of their
// group's words, and a row is one vector until its end; the lanes of 16 rows are added up together.

#pragma once

#include <deque>
#include <vector>

#include "kernels.h"
#include "sign_planes.h"

namespace kernels {

constexpr int64_t kChunkWords = 16;
// What digits of a chunk take: exact, int8 (Chunk in dots_avx512.h).
constexpr int64_t kChunkBytes[2] = {64 * (8 * 3 + 3), 64 * (8 + 3)};
constexpr int kDigits[2] = {3, 1};

// Where the words of a chunk find their group's first coefficient in a row of them, counted from the first.
struct alignas(64) ChunkGroups {
    int32_t place[kChunkWords], first;
};

// Coefficients, some for each group, and where words find them.
struct GroupCoefficients {
    Coefficients of;
    const ChunkGroups* chunks;
};

// What GroupCoefficients point to.
class ChunkGroupLists {
   public:
    // ``each`` coefficients for a group; group: of each word, -1 where any will do. False if groups are so small that a
    // chunk has more coefficients than a vector has room for.
    bool assign(GroupCoefficients& to, Coefficients from, int64_t each, const std::vector<int32_t>& group);

   private:
    std::deque<std::vector<ChunkGroups>> lists_;
};

// The group of each word, for groups of ``group_size`` columns (0: one); empty if some word has several.
std::vector<int32_t> groups_of_words(int64_t columns, int64_t group_size);

struct SignDots {
    int64_t planes;
    Plane signs[kMaxPlanes];
    GroupCoefficients scales[kMaxPlanes], means;
};

}  // namespace kernels
