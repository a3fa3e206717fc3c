// Integers: W = (q - z) scale, codes q of 2 to 8 bits, zero points z and scales of each row and group.
//
//     y = sum over groups of  scale (sum q x - z T)
//
// T: the sum of a group's activations. A row is a run of bytes, and long, so this is a plain product of each row with
// the activations as they are: codes are unpacked a word of columns at a time and multiplied, a few rows and tokens
// together, which share what is read. Looking up plane by plane would read the activations' tables once a bit.
//
// A code of 3, 5, 6 or 7 bits is in parts of 4, 2 and 1 bits, which lie one behind the other in the row.

#pragma once

#include "kernels.h"
#ifdef SIGNBIT_ISA
#include "floats.h"
#include "lookup.h"
#include "prepare.h"
#endif

namespace kernels {

struct Integers {
    int64_t n, m, bits;
    Plane codes, zeros;  // zeros without data: the middle code everywhere
    Coefficients scales;
};

#ifdef SIGNBIT_ISA
namespace SIGNBIT_ISA {

// The parts of a row of ``count`` codes: their widths, lowest bits first, and where they begin.
template <int Bits>
struct Fields {
    static constexpr int count = Bits == 8 ? 1 : (Bits >> 2 & 1) + (Bits >> 1 & 1) + (Bits & 1);
    static constexpr int width(int part) {
        for (int width = 8; width; width /= 2) {
            if (Bits & width && part-- == 0) return width;
        }
        return 0;
    }
    static constexpr int shift(int part) {
        int shift = 0;
        for (int before = 0; before < part; before++) shift += width(before);
        return shift;
    }
    int64_t begin[count + 1];

    explicit Fields(int64_t codes) {
        begin[0] = 0;
        for (int part = 0; part < count; part++) begin[part + 1] = begin[part] + (codes * width(part) + 31) / 32 * 4;
    }
};

// What an instruction set may do in a way of its own; this is for any.
template <class I>
struct IntegerOperations {
    using F = typename I::F;
    static constexpr bool dots = false;  // integer products of codes and 8-bit activations

    // 32 codes, whose parts' bytes are at ``parts``.
    template <int Bits>
    static void codes(const uint8_t* const* parts, F* q) {
        alignas(64) float values[32] = {};
        for (int part = 0; part < Fields<Bits>::count; part++) {
            const int width = Fields<Bits>::width(part), per_byte = 8 / width;
            const float unit = static_cast<float>(1 << Fields<Bits>::shift(part));
            for (int i = 0; i < 32; i++) {
                const int field = parts[part][i / per_byte] >> (i % per_byte * width) & ((1 << width) - 1);
                values[i] += unit * static_cast<float>(field);
            }
        }
        for (int i = 0; i < 32 / I::lanes; i++) q[i] = I::load(values + i * I::lanes);
    }
    static float sum(const F& vector) {
        alignas(64) float lanes[I::lanes];
        I::store(lanes, vector, I::lanes);
        float sum = 0.0f;
        for (float lane : lanes) sum += lane;
        return sum;
    }
    static void floats(const void* from, Scalar type, int64_t count, float* to) { to_floats(from, type, count, to); }
};

// The 32 codes of a word of columns, of a row of ``fields``. Whole: all are there; the last word of a row may have
// fewer.
template <class I, int Bits, bool Whole>
inline void word_of_codes(const uint8_t* row, const Fields<Bits>& fields, int64_t word, typename I::F* q) {
    const uint8_t* parts[Fields<Bits>::count];
    uint8_t padded[Whole ? 1 : Fields<Bits>::count][32];
    for (int part = 0; part < Fields<Bits>::count; part++) {
        const int64_t bytes = 4 * Fields<Bits>::width(part), at = fields.begin[part] + word * bytes;
        parts[part] = row + at;
        if (!Whole && at + bytes > fields.begin[part + 1]) {
            for (int64_t i = 0; i < bytes; i++) padded[part][i] = at + i < fields.begin[part + 1] ? row[at + i] : 0;
            parts[part] = padded[part];
        }
    }
    IntegerOperations<I>::template codes<Bits>(parts, q);
}

// Rows and tokens whose products are computed together.
constexpr int kRowsTogether = 4, kTokensTogether = 4;
// Groups whose coefficients are unpacked at a time.
constexpr int64_t kGroupBlock = 64;

// Scales, and scales times zero points, of a few rows in runs [from, from + count).
template <class I>
struct IntegerCoefficients {
    static constexpr int64_t padded = kGroupBlock + 32;
    alignas(64) float scale[kRowsTogether][kGroupBlock];
    alignas(64) float shift[kRowsTogether][padded];

    template <int Bits>
    void load(const Integers& w, const Fields<Bits>& zero_fields, const int64_t* rows, int64_t from, int64_t count) {
        const int64_t width = w.scales.type == Scalar::f32 ? 4 : 2;
        for (int r = 0; r < kRowsTogether; r++) {
            const char* scales = static_cast<const char*>(w.scales.data) + (rows[r] * w.scales.per_row + from) * width;
            IntegerOperations<I>::floats(scales, w.scales.type, count, scale[r]);
            for (int64_t i = 0; i < count; i += 32) {
                typename I::F zeros[32 / I::lanes];
                if (w.zeros.data) {
                    const uint8_t* row = w.zeros.data + rows[r] * w.zeros.row_bytes;
                    word_of_codes<I, Bits, false>(row, zero_fields, (from + i) / 32, zeros);
                } else {
                    for (auto& lanes : zeros) lanes = I::set(static_cast<float>(1 << (Bits - 1)));
                }
                for (int v = 0; v < 32 / I::lanes; v++) I::store(shift[r] + i + v * I::lanes, zeros[v], I::lanes);
            }
            for (int64_t i = 0; i < count; i++) shift[r][i] *= scale[r][i];
        }
    }
};

// Products of a few rows and tokens.
template <class I, int Bits, int T>
struct IntegerProduct {
    using F = typename I::F;
    using Operations = IntegerOperations<I>;

    const Activations& x;
    int64_t token;
    const float* floats[T];
    const uint8_t* row[kRowsTogether];
    const Fields<Bits>& fields;
    const uint8_t* ahead;  // the rows that come next, which are fetched line after line, in no other order (docs/kernels.md)
    F sum[kRowsTogether][T];
    float constant[kRowsTogether][T];

    void exact(const Run& run, int64_t index, const IntegerCoefficients<I>& coefficients) {
        F part[kRowsTogether][T];
#pragma GCC unroll 4
        for (int r = 0; r < kRowsTogether; r++) {
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) part[r][t] = I::set(0.0f);
        }
        const bool edges = run.first != ~0u || run.last != ~0u;
        const int64_t plain = edges ? run.word : least(run.end, x.words - 1);
        for (int64_t word = run.word; word < plain; word++) {
            const float* activations[T];
            for (int t = 0; t < T; t++) activations[t] = floats[t] + 32 * word;
            add_word<true>(word, activations, part);
        }
        for (int64_t word = plain; word < run.end; word++) {
            alignas(64) float masked[T][32];
            const float* activations[T];
            const uint32_t mask = mask_of(run, word);
            for (int t = 0; t < T; t++) {
                for (int i = 0; i < 32; i++) masked[t][i] = mask >> i & 1 ? floats[t][32 * word + i] : 0.0f;
                activations[t] = masked[t];
            }
            add_word<false>(word, activations, part);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRowsTogether; r++) {
            const F scale = I::set(coefficients.scale[r][index]);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) sum[r][t] = I::fma(part[r][t], scale, sum[r][t]);
        }
    }

    void rounded(const Run& run, int64_t index, const IntegerCoefficients<I>& coefficients) {
        for (int64_t word = run.word; word < run.end;) {
            const int64_t stop = least(run.end, (word / kStepWords + 1) * kStepWords);
            typename Operations::Dots part[kRowsTogether][T];
            for (int64_t pair = word / 2; 2 * pair < stop; pair++) {
                const uint64_t mask = mask_of(run, 2 * pair) | static_cast<uint64_t>(mask_of(run, 2 * pair + 1)) << 32;
                Operations::template dot<Bits, T>(row, fields, pair, mask, x, token, part);
                fetch_ahead(pair * Bits / 2, (pair + 1) * Bits / 2);
            }
            for (int t = 0; t < T; t++) {
                const float step = x.steps[(token + t) * x.words + word];
                for (int r = 0; r < kRowsTogether; r++) {
                    sum[r][t] = I::fma(part[r][t].floats(), I::set(step * coefficients.scale[r][index]), sum[r][t]);
                }
            }
            word = stop;
        }
    }

   private:
    void fetch_ahead(int64_t line, int64_t end) const {
        for (; line < end; line++) I::prefetch_far(ahead + 64 * line);
    }
    template <bool Whole>
    void add_word(int64_t word, const float* const* activations, F (*part)[T]) {
        fetch_ahead(word * Bits / 4, (word + 1) * Bits / 4);
#pragma GCC unroll 4
        for (int r = 0; r < kRowsTogether; r++) {
            F q[32 / I::lanes];
            word_of_codes<I, Bits, Whole>(row[r], fields, word, q);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
#pragma GCC unroll 8
                for (int v = 0; v < 32 / I::lanes; v++) {
                    part[r][t] = I::fma(q[v], I::load(activations[t] + v * I::lanes), part[r][t]);
                }
            }
        }
    }
};

template <class I, bool Int8, int Bits, int T>
inline void integers_few(const Integers& w, const Activations& x, int64_t token, int64_t first, int64_t count, float* y,
                         int64_t stride) {
    using Operations = IntegerOperations<I>;
    const Fields<Bits> fields(w.m), zero_fields(x.runs);
    int64_t rows[kRowsTogether];
    for (int r = 0; r < kRowsTogether; r++) rows[r] = least(first + r, w.n - 1);
    IntegerProduct<I, Bits, T> product{
        x, token, {}, {}, fields, w.codes.data + (first + kRowsTogether) * w.codes.row_bytes, {}, {}};
    for (int t = 0; t < T; t++) product.floats[t] = numbers(x, token + t);
    for (int r = 0; r < kRowsTogether; r++) {
        product.row[r] = w.codes.data + rows[r] * w.codes.row_bytes;
        for (int t = 0; t < T; t++) {
            product.sum[r][t] = I::set(0.0f);
            product.constant[r][t] = 0.0f;
        }
    }
    IntegerCoefficients<I> coefficients;
    for (int64_t from = 0; from < x.runs; from += kGroupBlock) {
        const int64_t runs = least(kGroupBlock, x.runs - from);
        coefficients.load(w, zero_fields, rows, from, runs);
        for (int t = 0; t < T; t++) {
            const float* sums = x.sums + (token + t) * x.runs + from;
            for (int r = 0; r < kRowsTogether; r++) {
                for (int64_t i = 0; i < runs; i++) product.constant[r][t] -= coefficients.shift[r][i] * sums[i];
            }
        }
        for (int64_t i = 0; i < runs; i++) {
            if constexpr (Int8 && Operations::dots) product.rounded(x.run[from + i], i, coefficients);
            else product.exact(x.run[from + i], i, coefficients);
        }
    }
    for (int r = 0; r < count; r++) {
        for (int t = 0; t < T; t++) {
            y[(token + t) * stride + first + r] = Operations::sum(product.sum[r][t]) + product.constant[r][t];
        }
    }
}

template <class I, bool Int8, int Bits>
void integers_of(const Integers& w, const Activations& x, int64_t first, int64_t last, float* y, int64_t stride) {
    for (int64_t row = first; row < last; row += kRowsTogether) {
        const int64_t count = least(kRowsTogether, last - row);
        int64_t token = 0;
        for (; token + kTokensTogether <= x.tokens; token += kTokensTogether) {
            integers_few<I, Int8, Bits, kTokensTogether>(w, x, token, row, count, y, stride);
        }
        for (; token < x.tokens; token++) integers_few<I, Int8, Bits, 1>(w, x, token, row, count, y, stride);
    }
}

template <class I, bool Int8>
void integers_rows(const void* matrix, const Activations* kinds, int64_t first, int64_t last, float* y,
                   int64_t stride) {
    const Integers& w = *static_cast<const Integers*>(matrix);
    switch (w.bits) {
        case 2: return integers_of<I, Int8, 2>(w, kinds[0], first, last, y, stride);
        case 3: return integers_of<I, Int8, 3>(w, kinds[0], first, last, y, stride);
        case 4: return integers_of<I, Int8, 4>(w, kinds[0], first, last, y, stride);
        case 5: return integers_of<I, Int8, 5>(w, kinds[0], first, last, y, stride);
        case 6: return integers_of<I, Int8, 6>(w, kinds[0], first, last, y, stride);
        case 7: return integers_of<I, Int8, 7>(w, kinds[0], first, last, y, stride);
        default: return integers_of<I, Int8, 8>(w, kinds[0], first, last, y, stride);
    }
}

}  // namespace SIGNBIT_ISA
#endif

}  // namespace kernels
