// Partial binarization: sign planes, and a code of a few bits for each salient weight.
//
//     y = ordinary  +  sum over salient weights of  x_j (s (code_scale (q + 1/2) - scale) + code_offset - mean)
//
// The signs are multiplied as if no weight were salient (sign_planes.h), and then the salient ones, about a tenth, are
// put right one by one: their activations are gathered. They are stored by strips of 16 rows. Of a few at a time,
// places are decoded from the gaps between them (layouts/positions.py) or from a bitmap, and codes from their bit
// planes, and both serve all tokens.

#pragma once

#include "kernels.h"
#include "sign_planes.h"
#ifdef SIGNBIT_ISA
#include "floats.h"
#include "lookup.h"
#include "prepare.h"
#endif

namespace kernels {

constexpr int64_t kStripRows = 16;

// What few tokens are multiplied with from end to end of a row (partial_dots_avx512.h): so many columns at a time.
constexpr int64_t kDotWindow = 64;

// Integers as bit planes, [bits][width] bytes.
struct BitPlanes {
    const uint8_t* data;
    int64_t width, bits;
};

struct Partial {
    SignPlanes ordinary;
    int64_t m, group_size;  // group_size: of columns, never 0
    BitPlanes gaps, codes;  // gaps of no bits: positions are a bitmap
    Plane bitmap;
    const int32_t* ends;    // of each strip: where its codes end, and, unless there is a bitmap, its gaps
    Coefficients code_scales, code_offsets;

    // Whether rows are whole windows, groups whole steps of activations, and gaps shorter than a window.
    bool regular() const {
        return m % kDotWindow == 0 && m <= kMostDotColumns && gaps.bits >= 2 && gaps.bits <= 6 &&
               (group_size % kStepColumns == 0 || group_size >= m);
    }
};

#ifdef SIGNBIT_ISA
namespace SIGNBIT_ISA {

// Salient weights that are decoded at a time; a read of 64 bits has so many of a plane, whatever bit it begins at.
constexpr int64_t kSalientBatch = 48;

inline uint64_t bits_of_plane(const BitPlanes& planes, int64_t plane, int64_t bit) {
    const uint8_t* bytes = planes.data + plane * planes.width + bit / 8;
    uint64_t word = 0;
    const int64_t left = planes.width - bit / 8;
    if (left >= 8) __builtin_memcpy(&word, bytes, 8);
    else if (left > 0) __builtin_memcpy(&word, bytes, static_cast<size_t>(left));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word >> bit % 8;
}

// value = s (slope q + middle) + offset is what a salient weight has more than an ordinary one.
struct Correction {
    float slope, middle, offset;
};

// The salient weights of a row that are at hand, and what they are multiplied by.
struct SalientRow {
    const Partial& w;
    int64_t row;
    const uint32_t* column;
    const uint8_t* code;
    int64_t count;

    float coefficient(const Coefficients& of, int64_t group) const {
        if (!of.data) return 0.0f;
        float value;
        const int64_t width = of.type == Scalar::f32 ? 4 : 2, index = of.per_row == 1 ? 0 : group;
        to_floats(static_cast<const char*>(of.data) + (row * of.per_row + index) * width, of.type, 1, &value);
        return value;
    }
    Correction correction(int64_t group) const {
        const float slope = coefficient(w.code_scales, group);
        return {slope, 0.5f * slope - coefficient(w.ordinary.scales[0], group),
                coefficient(w.code_offsets, group) - coefficient(w.ordinary.means, group)};
    }
};

// The bits of a byte as eight bytes of 0 and 1.
struct SpreadBits {
    uint8_t of[256][8] = {};

    constexpr SpreadBits() {
        for (int byte = 0; byte < 256; byte++) {
            for (int i = 0; i < 8; i++) of[byte][i] = static_cast<uint8_t>(byte >> i & 1);
        }
    }
};
inline constexpr SpreadBits kSpreadBits{};

// What an instruction set may do in a way of its own; this is for any.
template <class I>
struct PartialOperations {
    // Eight bits, from plane ``first`` on, of ``count`` integers; eight at a time, so that bytes behind the last are
    // written too.
    static void bytes(const BitPlanes& planes, int64_t at, int64_t count, int64_t first, uint8_t* bytes) {
        uint64_t eights[kSalientBatch / 8] = {};
        for (int64_t i = 0; i < 8 && first + i < planes.bits; i++) {
            uint64_t bits = bits_of_plane(planes, first + i, at);
            for (int64_t k = 0; 8 * k < count; k++, bits >>= 8) {
                uint64_t spread;
                __builtin_memcpy(&spread, kSpreadBits.of[bits & 255], 8);
                eights[k] |= spread << i;  // within each byte
            }
        }
        __builtin_memcpy(bytes, eights, sizeof eights);
    }
    // Of ``count`` gaps the places of the weights they lead to, from ``place`` on, which is moved behind the last.
    static int64_t places(const BitPlanes& gaps, int64_t at, int64_t count, uint32_t& place, uint32_t* places) {
        uint8_t low[kSalientBatch], high[kSalientBatch] = {};
        bytes(gaps, at, count, 0, low);
        if (gaps.bits > 8) bytes(gaps, at, count, 8, high);
        const uint32_t escape = (1u << gaps.bits) - 1;
        int64_t found = 0;
        uint32_t at_hand = place;
        for (int64_t i = 0; i < count; i++) {
            const uint32_t gap = low[i] | static_cast<uint32_t>(high[i]) << 8, marks = gap != escape;
            at_hand += gap;
            places[found] = at_hand;  // anything but a branch: escapes are not rare enough
            found += marks;
            at_hand += marks;
        }
        place = at_hand;
        return found;
    }
    static void codes(const BitPlanes& planes, int64_t at, int64_t count, uint8_t* codes) {
        bytes(planes, at, count, 0, codes);
    }

    // The sums of a row, for each token.
    class Sums {
       public:
        Sums(const Partial& w, const Activations& x) : w_(w), x_(x) {}

        void begin(int64_t) {
            group_end_ = 0;
            for (int64_t token = 0; token < x_.tokens; token++) sum_[token] = 0.0f;
        }
        // Signs are as good as random: they must not be branches.
        void add(const SalientRow& salient) {
            const Plane& signs = w_.ordinary.signs[0];
            const uint8_t* negative = signs.data + salient.row * signs.row_bytes;
            float values[kSalientBatch];
            for (int64_t i = 0; i < salient.count; i++) {
                const uint32_t column = salient.column[i];
                if (column >= group_end_) {
                    const int64_t group = column / w_.group_size;
                    group_end_ = (group + 1) * w_.group_size;
                    correction_ = salient.correction(group);
                }
                const float sign = static_cast<float>(1 - 2 * (negative[column / 8] >> column % 8 & 1));
                const float size = correction_.slope * static_cast<float>(salient.code[i]) + correction_.middle;
                values[i] = sign * size + correction_.offset;
            }
            for (int64_t token = 0; token < x_.tokens; token++) {
                const float* x = numbers(x_, token);
                float lanes[4] = {};
                int64_t i = 0;
                for (; i + 4 <= salient.count; i += 4) {
                    for (int64_t k = 0; k < 4; k++) lanes[k] += values[i + k] * x[salient.column[i + k]];
                }
                for (; i < salient.count; i++) lanes[i % 4] += values[i] * x[salient.column[i]];
                sum_[token] += (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
            }
        }
        float total(int64_t token) const { return sum_[token]; }

       private:
        const Partial& w_;
        const Activations& x_;
        int64_t group_end_ = 0;  // of the row's columns, which come in order
        Correction correction_{};
        float sum_[kTokens];
    };
};

// The salient weights of a strip, a batch after the other.
template <class I>
class StripOfSalient {
   public:
    uint32_t place[kSalientBatch + 16];  // row of the strip * m + column
    uint8_t code[64];
    int64_t count = 0;

    StripOfSalient(const Partial& w, int64_t strip) : w_(w), strip_(strip) {
        const int64_t each = w.gaps.bits ? 2 : 1;
        code_ = strip ? w.ends[(strip - 1) * each] : 0;
        if (w.gaps.bits) {
            gap_ = strip ? w.ends[(strip - 1) * each + 1] : 0;
            end_ = w.ends[strip * each + 1];
        }
    }
    // False when there are no more.
    bool next() {
        if (w_.gaps.bits) {
            do {
                const int64_t gaps = least(kSalientBatch, end_ - gap_);
                if (gaps <= 0) return false;
                count = PartialOperations<I>::places(w_.gaps, gap_, gaps, place_, place);
                gap_ += gaps;
            } while (count == 0);
        } else if (!next_of_bitmap()) {
            return false;
        }
        PartialOperations<I>::codes(w_.codes, code_, count, code);
        code_ += count;
        return true;
    }

   private:
    bool next_of_bitmap() {
        const int64_t rows = least(kStripRows, w_.ordinary.n - strip_ * kStripRows);
        const uint8_t* bitmap = w_.bitmap.data + strip_ * kStripRows * w_.bitmap.row_bytes;
        for (count = 0; count < kSalientBatch;) {
            while (!word_bits_) {
                if (4 * word_ == w_.bitmap.row_bytes) {
                    row_++;
                    word_ = 0;
                }
                if (row_ >= rows) return count > 0;
                const uint8_t* b = bitmap + row_ * w_.bitmap.row_bytes + 4 * word_++;
                word_bits_ = b[0] | b[1] << 8 | b[2] << 16 | static_cast<uint32_t>(b[3]) << 24;
                // What is behind the columns marks nothing.
                if (32 * word_ > w_.m) word_bits_ &= ~0u >> (32 * word_ - w_.m);
            }
            const int bit = __builtin_ctz(word_bits_);
            word_bits_ &= word_bits_ - 1;
            place[count++] = static_cast<uint32_t>(row_ * w_.m + word_ * 32 - 32 + bit);
        }
        return true;
    }

    const Partial& w_;
    int64_t strip_, code_ = 0, gap_ = 0, end_ = 0, row_ = 0, word_ = 0;
    uint32_t place_ = 0, word_bits_ = 0;
};

template <class I>
void add_salient(const Partial& w, const Activations& x, int64_t strip, float* y, int64_t stride) {
    typename PartialOperations<I>::Sums sums(w, x);
    int64_t row = 0, end = w.m;  // of the strip; where its places end
    const auto finish = [&] {
        for (int64_t token = 0; token < x.tokens; token++) {
            y[token * stride + strip * kStripRows + row] += sums.total(token);
        }
    };
    sums.begin(strip * kStripRows);
    StripOfSalient<I> salient(w, strip);
    while (salient.next()) {
        for (int64_t i = 0; i < salient.count;) {
            if (salient.place[i] >= end) {
                finish();
                row = salient.place[i] / w.m;
                end = (row + 1) * w.m;
                sums.begin(strip * kStripRows + row);
            }
            int64_t stop = salient.count;
            while (salient.place[stop - 1] >= end) stop--;
            const uint32_t start = static_cast<uint32_t>(end - w.m);
            for (int64_t k = i; k < stop; k++) salient.place[k] -= start;
            sums.add({w, strip * kStripRows + row, salient.place + i, salient.code + i, stop - i});
            i = stop;
        }
    }
    finish();
}

// Tasks begin at whole strips: they are four tiles.
template <class I, bool Int8>
void partial_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y, int64_t stride) {
    static_assert(4 * Tile<I>::rows % kStripRows == 0, "a task has whole strips");
    const Partial& w = *static_cast<const Partial*>(matrix);
    sign_planes_rows<I, Int8>(&w.ordinary, kinds, first, last, y, stride);
    for (int64_t row = first; row < last; row += kStripRows) add_salient<I>(w, kinds[1], row / kStripRows, y, stride);
}

}  // namespace SIGNBIT_ISA
#endif

}  // namespace kernels
