// Structured N:M: of every M columns of a row N are kept, each with a sign and one of up to three regions.
//
//     y = sum over groups and regions r of  scale_r (P_r - N_r) + mean_r (P_r + N_r)
//
// P_r, N_r: the sums of the activations of positive and negative weights of region r. Without means it is fewer lookups
// to take N, the sum of all negative ones, and B_r, that of the positive ones of region r and the negative ones of the
// others: P_r - N_r = B_r - N.
//
// Salient columns have zeros for activations there, and activations of their own, zero elsewhere, for
//
//     scale_o (K - 2 N) + scale_r (K - 2 Z) + mean K        K: of kept weights; Z: of those with a negative residual,
//                                                           which is a region other than the first
//
// Signs and regions are stored for kept weights only. So a block of columns is first decoded, row by row, to planes of
// bits in the order of the columns: kept ones from their ranks by a table, and then bits are deposited where weights
// are kept. 64 columns are so many cells, and so many kept weights, that all cursors are known beforehand.

#pragma once

#include "kernels.h"
#ifdef SIGNBIT_ISA
#include "lookup.h"
#endif
#if defined(SIGNBIT_ISA) && defined(__BMI2__)
#include <immintrin.h>
#endif

namespace kernels {

constexpr int kMaxRegions = 3;
constexpr int kTritsPerByte = 5;

// Salient columns of one group in words that share a step.
struct SalientPiece {
    int32_t word;        // where they begin, counted from the block's first
    int32_t group;       // among those with salient columns
    int64_t from[2], upto[2];  // lookups; of one nibble, and of two
};

struct Structured {
    int64_t n, m, keep, of, rank_bits, regions_count;
    int64_t cells, kept;          // of 64 columns, if cells of M columns fit them
    Plane signs, ranks, regions;  // regions: bits, or five trits a byte
    const uint16_t* choices;      // columns that are kept, by rank
    const uint8_t* choices_of_8;  // the same for cells of 8, for all numbers of 7 bits, the higher of which are ignored
    uint8_t ranks_of_8[64];       // of the ranks of 8 times 8 cells, the bytes that 64 bits begin with
    const uint8_t* trits;         // [2][256]: bits of those of a byte's five trits that are 1, and that are 2
    Coefficients scales, means, salient_scales, salient_means;
    const SalientPiece* pieces;   // of block i: [pieces_end[i - 1], pieces_end[i])
    const int64_t* pieces_end;
    const Lookup* lookups[2];

    // Whether cursors are known for every 64 columns, and what they read there fits one read of 64 bits at any bit.
    bool regular() const { return cells && kept <= 57; }
};

#ifdef SIGNBIT_ISA
namespace SIGNBIT_ISA {

inline uint64_t little_endian(uint64_t word) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap64(word);
#else
    return word;
#endif
}

// At least 57 bits from one on.
inline uint64_t bits_from(const uint8_t* bytes, int64_t bit) {
    uint64_t word;
    __builtin_memcpy(&word, bytes + (bit >> 3), 8);
    return little_endian(word) >> (bit & 7);
}

// The lowest bits, one to each set bit of the mask.
inline uint64_t deposit(uint64_t bits, uint64_t mask) {
#ifdef __BMI2__
    return _pdep_u64(bits, mask);
#else
    uint64_t out = 0;
    for (; mask; mask &= mask - 1, bits >>= 1) out |= bits & 1 ? mask & -mask : 0;
    return out;
#endif
}

// What an instruction set may do in a way of its own; this is for any. All may read 64 bytes too far.
template <class I>
struct StructuredOperations {
    // Which of 64 columns are kept, ``count`` times; the ranks of cells of 8 begin at a byte.
    static void kept_of_8(const Structured& w, const uint8_t* ranks, int64_t count, uint64_t* kept) {
        const uint64_t mask = (1ull << w.rank_bits) - 1;
        for (int64_t i = 0; i < count; i++) {
            kept[i] = 0;
            for (int64_t cell = 0; cell < 8; cell++) {
                const uint64_t rank = bits_from(ranks, (8 * i + cell) * w.rank_bits) & mask;
                kept[i] |= static_cast<uint64_t>(w.choices_of_8[rank]) << 8 * cell;
            }
        }
    }
    // Bits of the trits of ``count`` bytes that are 1, and that are 2.
    static void trits(const Structured& w, const uint8_t* bytes, int64_t count, uint8_t* ones, uint8_t* twos) {
        for (int64_t i = 0; i < count; i += 8) {
            uint64_t planes[2] = {0, 0};
            for (int64_t j = 0; j < 8 && i + j < count; j++) {
                for (int p = 0; p < 2; p++) {
                    planes[p] |= static_cast<uint64_t>(w.trits[256 * p + bytes[i + j]]) << kTritsPerByte * j;
                }
            }
            for (int p = 0; p < 2; p++) planes[p] = little_endian(planes[p]);
            __builtin_memcpy(ones + kTritsPerByte * (i / 8), planes, 8);
            __builtin_memcpy(twos + kTritsPerByte * (i / 8), planes + 1, 8);
        }
    }
};

// So many words of so many rows as bits in the order of the columns.
template <class I, int64_t Rows = Tile<I>::rows, int64_t MostWords = kBlockWords>
class DecodedRows {
   public:
    enum Bits { kept, negative, ones, twos, count_of };  // ones, twos: of the second and third region

    explicit DecodedRows(const Structured& w) : w_(w) {}

    // So that planes of regions that a matrix does not have are empty.
    void clear() {
        for (auto& plane : bits_) {
            for (auto& row : plane) {
                for (uint64_t& bits : row) bits = 0;
            }
        }
    }
    // Rows from ``first`` on.
    void decode(int64_t first, int64_t rows, int64_t word, int64_t count) {
        for (int64_t row = 0; row < rows; row++) {
            prefetch(first + row, word);
            if (w_.regular()) regular(first + row, row, word / 2, (count + 1) / 2);
            else any(first + row, row, word, count);
        }
    }
    void load(Bits which, int64_t count, Words<I>& words) const {
        words.load_from(reinterpret_cast<const uint8_t*>(bits_[which]), sizeof bits_[0][0], count);
    }
    // Both in the place of ones: the weights outside the first region.
    void bring_ones_and_twos_together(int64_t rows, int64_t words) {
        for (int64_t row = 0; row < rows && w_.regions_count > 1; row++) {
            for (int64_t i = 0; i < (words + 1) / 2; i++) bits_[ones][row][i] |= bits_[twos][row][i];
        }
    }
    Plane plane(Bits which) const { return {reinterpret_cast<const uint8_t*>(bits_[which]), sizeof bits_[0][0]}; }

   private:
    // What comes next: of this row, or at its end of the row in the same place of the next tile.
    void prefetch(int64_t row, int64_t word) const {
        const bool row_ends = 32 * (word + MostWords) >= w_.m;
        const int64_t next = row_ends ? row + Rows : row;
        const int64_t block = row_ends ? 0 : word / MostWords + 1;
        if (next >= w_.n) return;
        const int64_t kept = MostWords / 2 * w_.kept, ranks = MostWords / 2 * w_.cells * w_.rank_bits / 8;
        const int64_t regions = w_.regions_count == 3 ? kept / kTritsPerByte : kept / 8;
        touch(w_.signs, next, block * kept / 8, kept / 8);
        touch(w_.ranks, next, block * ranks, ranks);
        if (w_.regions_count > 1) touch(w_.regions, next, block * regions, regions);
    }
    static void touch(const Plane& plane, int64_t row, int64_t from, int64_t bytes) {
        const uint8_t* at = plane.data + row * plane.row_bytes + from;
        for (int64_t i = 0; i <= least(bytes, plane.row_bytes - from); i += 64) I::prefetch(at + i);
    }

    static constexpr int64_t ahead = 64;  // bytes that may be read behind what is asked for

    // So many bytes of a row, from one on. The last rows of a plane are copied, as there is nothing to read behind them.
    struct Source {
        const uint8_t* bytes;
        uint8_t copy[MostWords * 8 + 2 * ahead];

        Source(const Plane& plane, int64_t n, int64_t row, int64_t from, int64_t count) {
            bytes = plane.data + row * plane.row_bytes + from;
            const int64_t left = (n - row) * plane.row_bytes - from, needed = count + ahead;
            if (left >= needed) return;
            for (int64_t i = 0; i < needed; i++) copy[i] = i < left ? bytes[i] : 0;
            bytes = copy;
        }
    };

    // 64 columns at a time.
    void regular(int64_t row, int64_t at, int64_t first, int64_t count) {
        const int64_t each = w_.kept, cells = w_.cells, cursor = first * each;
        uint64_t columns[MostWords / 2];
        const int64_t rank_bit = first * cells * w_.rank_bits;
        const Source ranks(w_.ranks, w_.n, row, rank_bit / 8, (count * cells * w_.rank_bits + 7) / 8 + 1);
        if (w_.of == 8) {
            StructuredOperations<I>::kept_of_8(w_, ranks.bytes, count, columns);
        } else {
            const uint64_t mask = (1ull << w_.rank_bits) - 1;
            for (int64_t i = 0; i < count; i++) {
                columns[i] = 0;
                for (int64_t cell = 0; cell < cells; cell++) {
                    const uint64_t rank = bits_from(ranks.bytes, rank_bit % 8 + (i * cells + cell) * w_.rank_bits);
                    columns[i] |= static_cast<uint64_t>(w_.choices[rank & mask]) << w_.of * cell;
                }
            }
        }
        const int64_t kept_bytes = (count * each + 7) / 8 + 1;
        const Source signs(w_.signs, w_.n, row, cursor / 8, kept_bytes);
        for (int64_t i = 0; i < count; i++) bits_[kept][at][i] = little_endian(columns[i]);
        spread(signs.bytes, cursor % 8, each, count, columns, bits_[negative][at]);
        if (w_.regions_count == 2) {
            const Source regions(w_.regions, w_.n, row, cursor / 8, kept_bytes);
            spread(regions.bytes, cursor % 8, each, count, columns, bits_[ones][at]);
        } else if (w_.regions_count == 3) {
            uint8_t planes[2][MostWords * 4 + 2 * ahead];
            const int64_t skip = cursor % kTritsPerByte;
            const int64_t bytes = (skip + count * each + kTritsPerByte - 1) / kTritsPerByte;
            const Source regions(w_.regions, w_.n, row, cursor / kTritsPerByte, bytes);
            StructuredOperations<I>::trits(w_, regions.bytes, bytes, planes[0], planes[1]);
            spread(planes[0], skip, each, count, columns, bits_[ones][at]);
            spread(planes[1], skip, each, count, columns, bits_[twos][at]);
        }
    }

    static void spread(const uint8_t* bytes, int64_t cursor, int64_t each, int64_t count, const uint64_t* columns,
                       uint64_t* out) {
        if (each == 32) {  // where half of the weights is kept, the bit to begin at is always the same
            for (int64_t i = 0; i < count; i++) {
                out[i] = little_endian(deposit(bits_from(bytes + 4 * i, cursor), columns[i]));
            }
            return;
        }
        for (int64_t i = 0; i < count; i++) {
            out[i] = little_endian(deposit(bits_from(bytes, cursor + i * each), columns[i]));
        }
    }

    // Cell by cell: M that does not divide 64, or hardly anything pruned.
    void any(int64_t row, int64_t at, int64_t word, int64_t count) {
        for (auto& plane : bits_) {
            for (uint64_t& bits : plane[at]) bits = 0;
        }
        const int64_t start = 32 * word, end = least(start + 32 * count, (w_.m + w_.of - 1) / w_.of * w_.of);
        for (int64_t cell = start / w_.of; cell * w_.of < end; cell++) {
            const int64_t first = cell * w_.keep;
            uint64_t rank = 0, trits[2] = {0, 0};
            for (int64_t i = 0; i < w_.rank_bits; i++) {
                rank |= static_cast<uint64_t>(bit(w_.ranks, row, cell * w_.rank_bits + i)) << i;
            }
            const uint64_t mask = w_.choices[rank];
            uint64_t sign = 0;
            for (int64_t i = 0; i < w_.keep; i++) {
                sign |= static_cast<uint64_t>(bit(w_.signs, row, first + i)) << i;
                if (w_.regions_count == 2) {
                    trits[0] |= static_cast<uint64_t>(bit(w_.regions, row, first + i)) << i;
                } else if (w_.regions_count == 3) {
                    const int64_t trit = first + i;
                    const uint8_t byte = w_.regions.data[row * w_.regions.row_bytes + trit / kTritsPerByte];
                    for (int p = 0; p < 2; p++) {
                        const uint64_t own = w_.trits[256 * p + byte] >> trit % kTritsPerByte & 1;
                        trits[p] |= own << i;
                    }
                }
            }
            const int64_t column = cell * w_.of - start;
            put(mask, column, bits_[kept][at]);
            put(deposit(sign, mask), column, bits_[negative][at]);
            put(deposit(trits[0], mask), column, bits_[ones][at]);
            put(deposit(trits[1], mask), column, bits_[twos][at]);
        }
    }
    static int bit(const Plane& plane, int64_t row, int64_t at) {
        return plane.data[row * plane.row_bytes + at / 8] >> at % 8 & 1;
    }
    // A cell's bits to those of the block, whose first word it may begin before.
    void put(uint64_t bits, int64_t column, uint64_t* out) {
        for (int64_t i = column < 0 ? -column : 0; i < w_.of && column + i < 32 * MostWords; i++) {
            const uint64_t place = little_endian(1ull << (column + i) % 64);
            if (bits >> i & 1) out[(column + i) / 64] |= place;
        }
    }

    const Structured& w_;
    alignas(64) uint64_t bits_[count_of][Rows][MostWords / 2];
};

// A tile of a structured matrix.
template <class I, bool Int8>
class StructuredTile {
   public:
    StructuredTile(const Structured& w, const Tile<I>& tile, const Activations* kinds, Outputs<I>& out)
        : w_(w),
          tile_(tile),
          kinds_(kinds),
          out_(out),
          scales_(w.scales, tile),
          means_(w.means, tile),
          salient_scales_(w.salient_scales, tile),
          salient_means_(w.salient_means, tile),
          rows_(w) {
        const Coefficients* all[] = {&w.scales, &w.means, &w.salient_scales, &w.salient_means};
        for (int i = 0; i < 4; i++) {
            const int64_t row_bytes = all[i]->per_row * (all[i]->type == Scalar::f32 ? 4 : 2);
            if (all[i]->data) ahead_[i] = Ahead<I>(all[i]->data, row_bytes, tile, kinds[0].runs);
        }
    }

    void add(int64_t word, int64_t count) {
        rows_.decode(tile_.row, least(Tile<I>::rows, tile_.n - tile_.row), word, count);
        rows_.load(Rows::kept, count, plane_[0]);
        rows_.load(Rows::negative, count, plane_[1]);
        if (w_.regions_count > 1) rows_.load(Rows::ones, count, plane_[2]);
        if (w_.regions_count > 2) rows_.load(Rows::twos, count, plane_[3]);
        if (w_.pieces) salient(word, count);
        const int64_t planes = w_.means.data ? by_region_and_sign(count) : by_region(count);
        for (RunsOf run(kinds_[0], word, count); run; ++run) ordinary(run, planes);
    }

   private:
    using Rows = DecodedRows<I>;
    using U = typename I::U;

    // kept, negative, ones, twos -> negative, B_0, B_1, B_2.
    int64_t by_region(int64_t count) {
        for (int64_t i = 0; i < count; i++) {
            for (int s = 0; s < I::strips; s++) {
                const U negative = plane_[1].w[i][s];
                U rest = I::different(plane_[0].w[i][s], negative);
                for (int64_t r = 1; r < w_.regions_count; r++) {
                    U& bits = plane_[r + 1].w[i][s];
                    rest = I::different(rest, bits);
                    bits = I::different(bits, negative);
                }
                plane_[0].w[i][s] = negative;
                plane_[1].w[i][s] = rest;
            }
        }
        return w_.regions_count + 1;
    }

    // kept, negative, ones, twos -> P_0, N_0, P_1, N_1, P_2, N_2.
    int64_t by_region_and_sign(int64_t count) {
        for (int64_t i = 0; i < count; i++) {
            for (int s = 0; s < I::strips; s++) {
                const U negative = plane_[1].w[i][s];
                U region[kMaxRegions] = {plane_[0].w[i][s], plane_[2].w[i][s], plane_[3].w[i][s]};
                for (int64_t r = 1; r < w_.regions_count; r++) region[0] = I::different(region[0], region[r]);
                for (int64_t r = 0; r < w_.regions_count; r++) {
                    plane_[2 * r].w[i][s] = I::without(region[r], negative);
                    plane_[2 * r + 1].w[i][s] = I::both(region[r], negative);
                }
            }
        }
        return 2 * w_.regions_count;
    }

    void ordinary(const RunsOf& run, int64_t planes) {
        for (Ahead<I>& coefficients : ahead_) coefficients.step();
        Column<I> coefficients[2 * kMaxRegions];
        for (int64_t r = 0; r < w_.regions_count; r++) {
            const Column<I> scale = scales_.at(run.index * w_.regions_count + r);
            if (w_.means.data) {
                const Column<I> mean = means_.at(run.index * w_.regions_count + r);
                coefficients[2 * r] = mean + scale;
                coefficients[2 * r + 1] = mean - scale;
            } else {
                coefficients[r + 1] = scale;
                coefficients[0] = r ? coefficients[0] - scale : scale * -1.0f;
            }
        }
        for (int64_t p = 0; p < planes; p++) {
            Column<I> sums[kTokens];
            look_up<I, Int8>(plane_[p], run, kinds_[0], sums);
            add_all(coefficients[p], sums);
        }
    }

    void salient(int64_t word, int64_t count) {
        constexpr int width = I::template Sum<Int8>::nibbles - 1;
        const int64_t block = word / kBlockWords;
        if (w_.regions_count == 3) {
            for (int64_t i = 0; i < count; i++) {
                for (int s = 0; s < I::strips; s++) {
                    residual_.w[i][s] = I::either(plane_[2].w[i][s], plane_[3].w[i][s]);
                }
            }
        }
        RunsOf run(kinds_[1], word, count);
        for (int64_t i = block ? w_.pieces_end[block - 1] : 0; i < w_.pieces_end[block]; i++) {
            const SalientPiece& piece = w_.pieces[i];
            const Column<I> ordinary = salient_scales_.at(2 * piece.group);
            const Column<I> rest = salient_scales_.at(2 * piece.group + 1);
            Column<I> kept = ordinary + rest;
            if (w_.salient_means.data) kept = kept + salient_means_.at(piece.group);
            const Words<I>* words[] = {&plane_[0], &plane_[1], w_.regions_count == 3 ? &residual_ : &plane_[2]};
            const Column<I> coefficients[] = {kept, ordinary * -2.0f, rest * -2.0f};
            run.from = piece.word;
            for (int p = 0; p < 3; p++) {
                Column<I> sums[kTokens];
                look_up_some<I, Int8>(*words[p], w_.lookups[width] + piece.from[width],
                                      w_.lookups[width] + piece.upto[width], run, kinds_[1], sums);
                add_all(coefficients[p], sums);
            }
        }
    }

    void add_all(const Column<I>& coefficient, const Column<I>* sums) {
        for (int64_t token = 0; token < kinds_[0].tokens; token++) out_.add(token, coefficient, sums[token]);
    }

    const Structured& w_;
    const Tile<I>& tile_;
    const Activations* kinds_;
    Outputs<I>& out_;
    CoefficientTile<I> scales_, means_, salient_scales_, salient_means_;
    Ahead<I> ahead_[4];
    Words<I> plane_[2 * kMaxRegions], residual_;
    DecodedRows<I> rows_;
};

template <class I, bool Int8>
void structured_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                     int64_t stride) {
    const Structured& w = *static_cast<const Structured*>(matrix);
    for (int64_t row = first; row < last; row += Tile<I>::rows) {
        const Tile<I> tile(row, w.n);
        Outputs<I> out(kinds[0].tokens);
        StructuredTile<I, Int8> structured(w, tile, kinds, out);
        for (Blocks<I> block(kinds[0]); block; ++block) structured.add(block.word, block.count);
        out.store(tile, kinds[0].tokens, y, stride);
    }
}

}  // namespace SIGNBIT_ISA
#endif

}  // namespace kernels
