// Sums of looked-up floats, for instruction sets that have no lookup of 16-bit integers.
//
// With activations in 8 bits the tables hold integers all the same: float32 adds those exactly, so the sums are the
// same to the bit as those of integers, and only take longer.

#pragma once

#include "lookup.h"

namespace kernels {
namespace SIGNBIT_ISA {

// The 16 sums of four numbers: sums[i] adds those whose bit is set in i.
inline void sums_of_four(const float* x, float* sums) {
    sums[0] = 0.0f;
    for (int bit = 0; bit < 4; bit++) {
        for (int i = 0; i < 1 << bit; i++) sums[(1 << bit) + i] = sums[i] + x[bit];
    }
}

// I::nibble(w, c): nibble c of each word, in the lowest bits. I::lookup(nibble, table): the floats they ask for, of 16.
template <class I, bool Int8>
struct FloatSums {
    using F = typename I::F;
    using U = typename I::U;

    static constexpr size_t table_bytes = 8 * 16 * sizeof(float);
    static constexpr bool needs_flush = Int8;
    static constexpr int nibbles = 1;
    F sum[I::strips], part[I::strips];

    FloatSums() {
        for (int s = 0; s < I::strips; s++) sum[s] = part[s] = I::set(0.0f);
    }

    static void tabulate(const float* x, char* table) {
        float* sums = reinterpret_cast<float*>(table);
        for (int c = 0; c < 8; c++) sums_of_four(x + 4 * c, sums + 16 * c);
    }
    struct Index {
        U nibble[8][I::strips];
    };
    static Index index(const U* w) {
        Index index;
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
            for (int s = 0; s < I::strips; s++) index.nibble[c][s] = I::nibble(w[s], c);
        }
        return index;
    }
    void add(const Index& index, const char* table) {
        const float* sums = reinterpret_cast<const float*>(table);
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
            for (int s = 0; s < I::strips; s++) {
                part[s] = I::add(part[s], I::lookup(index.nibble[c][s], sums + 16 * c));
            }
        }
    }
    void add_one(const U* w, int nibble, uint32_t mask, const char* table) {
        for (int s = 0; s < I::strips; s++) {
            const U index = I::nibble(I::both(w[s], I::bits(mask << 4 * nibble)), nibble);
            part[s] = I::add(part[s], I::lookup(index, reinterpret_cast<const float*>(table)));
        }
    }
    void flush(float step) {
        for (int s = 0; s < I::strips; s++) {
            sum[s] = I::fma(part[s], I::set(step), sum[s]);
            part[s] = I::set(0.0f);
        }
    }
    Column<I> total() const {
        Column<I> column;
        for (int s = 0; s < I::strips; s++) column.strip[s] = Int8 ? sum[s] : part[s];
        return column;
    }
};

}  // namespace SIGNBIT_ISA
}  // namespace kernels
