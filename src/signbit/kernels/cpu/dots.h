// Dot products of bits and digits, row by row: how one or two tokens are multiplied where there is AVX-512, but for
// exact products with sign, split and Haar planes, and split planes in 8 bits, which halfwords.h is faster at.
//
// Lookups (lookup.h) share what they do between rows, and want words of 32 rows side by side. With few tokens it may be
// faster to go through a row from end to end, 512 columns of it at a time: a *chunk*. A mask leaves one bit of each of 64
// bytes, and vpdpbusd adds products of 64 such bytes and as many activations: two instructions for 64 weights, whose bits
// can be made of those of several planes, 512 at a time, beforehand.
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
#include "structured.h"

namespace kernels {

constexpr int64_t kChunkWords = 16;
// What digits of a chunk take: exact, int8 (Chunk in dots_avx512.h).
constexpr int64_t kChunkBytes[2] = {64 * (8 * 3 + 4), 64 * (8 + 4)};
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
    // chunk has more coefficients than so many vectors have room for.
    bool assign(GroupCoefficients& to, Coefficients from, int64_t each, const std::vector<int32_t>& group,
                int64_t vectors = 1);

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

// Salient columns, brought together: words, 16 in a *block*, with up to 32 salient columns each of one group, so that
// their coefficients are found as others are. From planes of all columns they are picked by vpshufbitqmb, up to eight
// of every window of 64 columns at a time, in as many sets as that takes; from planes of salient columns they are cut.
struct SalientPick {
    int64_t sets;      // 2 sets of two windows make a word, or 4 of one
    int64_t used;      // of the sets
    int64_t chunks;    // of a row
    const uint8_t* select;  // [chunks][used][64]: of each window, which columns
};
struct CompactBlock {
    uint32_t word[kChunkWords], shift[kChunkWords], mask[kChunkWords];
    int32_t first;  // from which words are counted
};
struct SalientBlocks {
    int64_t count;              // 0: nothing is salient
    SalientPick pick;
    const CompactBlock* cut;    // null: they are picked
};
// Of so many blocks at most.
constexpr int64_t kMostBlocks = 32;

struct SalientColumns;

// What SalientBlocks point to, and what activations they are multiplied by.
struct SalientLists {
    std::vector<int32_t> columns;  // [32 * words], -1: none
    std::vector<int32_t> groups;   // [words], among those with salient columns; -1: none
    SalientBlocks blocks{};
    bool possible = true;

    // From planes of all columns, in groups of ``group_size`` (0: one).
    void pick(const SalientColumns& salient, int64_t m, int64_t group_size);
    // From planes of salient columns only.
    void cut(const SalientColumns& salient);

   private:
    std::vector<uint8_t> select_;
    std::vector<CompactBlock> cut_;
};

// Codebooks of a scale for each zone and one mean, two or none (codebooks.h).
struct ZonedSet {
    GroupCoefficients scales, means;
    int64_t means_each;
};

// Along rows a group has two codebooks, of its even and its odd columns, and salient columns planes of their own.
struct HaarDots {
    bool along_rows;
    Plane signs, zones, salient_signs, salient_zones;
    ZonedSet ordinary, of_salient;
    SalientBlocks salient;
};

// Rows are decoded as a whole.
constexpr int64_t kMostStructuredWords = 1024;
struct StructuredDots {
    const Structured* of;
    GroupCoefficients scales, means, salient_scales, salient_means;
    SalientBlocks salient;
};

// Structured rows of which half is kept (kept_dots_avx512.h): what there is for each step of 128 columns.
// Steps whose ranks are looked up together are a chunk again.
constexpr int64_t kChunkSteps = 4;
struct KeptDots {
    const Structured* of;
    int64_t rank_bits, kept;  // of 8 columns
    const uint8_t* pairs;     // [4][128]: those kept of 8 columns by rank, two in each, 4 bits each
    struct Groups {
        int32_t ordinary, salient;  // where the step's first scale is in a row of them; -1: none is salient
    };
    const Groups* group;  // [kChunkSteps * chunks]
    int64_t chunks;
};

}  // namespace kernels
