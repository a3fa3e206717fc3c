// Rounding columns in turn (methods/rounding.py): kRoundingRows rows, from the first column to the last.
//
// All that a row's columns take from those before them stays in the first-level cache. Sums are taken in one order, so
// all instruction sets make the same choices.

#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "rounding.h"

namespace kernels {
namespace SIGNBIT_ISA {

using RoundedColumn = float[kRoundingRows];

// target += sum over i < j of share[i] change[i], in two chains.
inline void take_shares(const float* share, const RoundedColumn* change, int64_t j, RoundedColumn& target) {
    RoundedColumn odd = {};
    int64_t i = 0;
    for (; i + 2 <= j; i += 2) {
        for (int64_t row = 0; row < kRoundingRows; row++) target[row] += share[i] * change[i][row];
        for (int64_t row = 0; row < kRoundingRows; row++) odd[row] += share[i + 1] * change[i + 1][row];
    }
    if (i < j) {
        for (int64_t row = 0; row < kRoundingRows; row++) target[row] += share[i] * change[i][row];
    }
    for (int64_t row = 0; row < kRoundingRows; row++) target[row] += odd[row];
}

// What a column of some rows came to.
struct Nearest {
    alignas(64) float value[kRoundingRows];
    alignas(64) int32_t place[kRoundingRows];
};

// Looks at all values of table z, for the rows that have it. A target that is no number gets the first value. Of values
// alike, a target below them gets the last.
template <class Count>
inline void search(const Rounding& r, int32_t z, const int32_t* which, int64_t first, const RoundedColumn& target,
                   Count count, Nearest& found) {
    alignas(64) float distance[kRoundingRows];
    const float* values = r.tables + z * r.levels * r.n + first;
    for (int64_t row = 0; row < count; row++) {
        const bool own = which[row] == z;
        distance[row] = std::fabs(target[row] - values[row]);
        found.value[row] = own ? values[row] : found.value[row];
        found.place[row] = own ? 0 : found.place[row];
    }
    for (int32_t level = 1; level < r.counts[z]; level++) {
        values += r.n;
        for (int64_t row = 0; row < count; row++) {
            const float other = std::fabs(target[row] - values[row]);
            const bool after = (values[row] == found.value[row]) & (target[row] < values[row]);
            const bool closer = (which[row] == z) & ((other < distance[row]) | after);
            distance[row] = closer ? other : distance[row];
            found.value[row] = closer ? values[row] : found.value[row];
            found.place[row] = closer ? level : found.place[row];
        }
    }
}

// The same for a first value and steps. Where the step is 0 it is one of the two values in the middle, by the side that
// the target is on.
template <class Count>
inline void divide(const Rounding& r, int32_t z, const int32_t* which, int64_t first, const RoundedColumn& target,
                   Count count, Nearest& found) {
    const float* lowest = r.tables + 2 * z * r.n + first;
    const float* step = lowest + r.n;
    const float last = static_cast<float>(r.counts[z] - 1);
    for (int64_t row = 0; row < count; row++) {
        const float side = target[row] < lowest[row] ? -0.5f : 0.5f;
        const float steps = step[row] > 0.0f ? (target[row] - lowest[row]) / step[row] : 0.5f * last + side;
        const float above = steps > 0.0f ? steps : 0.0f;  // not for what is no number
        const int32_t place = static_cast<int32_t>((above < last ? above : last) + 0.5f);
        const bool own = which[row] == z;
        found.place[row] = own ? place : found.place[row];
        found.value[row] = own ? lowest[row] + static_cast<float>(place) * step[row] : found.value[row];
    }
}

// Each row's nearest value, table by table of those that some row has.
template <class Count>
inline void find_nearest(const Rounding& r, const int32_t* which, int64_t first, const RoundedColumn& target,
                         Count count, Nearest& found) {
    for (int64_t row = 0; row < count; row++) found.place[row] = -1;
    for (int64_t row = 0; row < count; row++) {
        if (found.place[row] >= 0) continue;
        (r.even ? divide<Count> : search<Count>)(r, which[row], which, first, target, count, found);
    }
}

template <class Count>
inline void round_rows(const Rounding& r, int64_t first, Count count) {
    alignas(64) RoundedColumn change[kRoundingTurns];
    alignas(64) RoundedColumn target = {};
    int32_t which[kRoundingRows];
    Nearest nearest;
    for (int64_t j = 0; j < r.k; j++) {
        const int64_t at = j * r.n + first;
        std::memcpy(target, r.targets + at, static_cast<size_t>(count) * sizeof(float));
        if (r.shares) take_shares(r.shares + j * r.k, change, j, target);
        const int32_t* table = r.which + j * r.which_columns + first * r.which_rows;
        for (int64_t row = 0; row < count; row++) which[row] = table[row * r.which_rows];
        find_nearest(r, which, first, target, count, nearest);
        const float* was = r.before ? r.before + at : target;
        for (int64_t row = 0; row < kRoundingRows; row++) change[j][row] = 0.0f;
        for (int64_t row = 0; row < count; row++) {
            change[j][row] = nearest.value[row] - was[row];
            r.places[at + row] = static_cast<uint8_t>(nearest.place[row]);
        }
        std::memcpy(r.changes + at, change[j], static_cast<size_t>(count) * sizeof(float));
    }
}

inline void round_in_turn(const Rounding& r, int64_t first) {
    if (r.n - first >= kRoundingRows) {
        round_rows(r, first, std::integral_constant<int64_t, kRoundingRows>{});
    } else {
        round_rows(r, first, r.n - first);
    }
}

}  // namespace SIGNBIT_ISA
}  // namespace kernels
