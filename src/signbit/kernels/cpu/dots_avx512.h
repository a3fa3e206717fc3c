// Rows of bits times digits of activations, with AVX-512 (dots.h): what all layouts share.

#pragma once

#include "dots.h"
#include "lookup.h"

namespace kernels {
namespace avx512 {

// Chunks that are worked on before the next rows: their digits stay in the first-level cache.
constexpr int64_t kPanel = 8;
// Rows whose lanes are added up together: a tile.
constexpr int64_t kDotRows = 16;

// The activations of 512 columns.
template <int Digits>
struct Chunk {
    __m512i x[8][Digits];  // the highest digit first
    __m512 step;           // what one unit of the lowest is worth
    __m512i sum[2];        // of each word: its even columns, its odd ones
    __m512 total;          // of each word, as a number

    // In units: of each word, or with two bands of the even or odd columns.
    [[gnu::always_inline]] __m512 all(int band, int bands) const {
        return _mm512_cvtepi32_ps(bands == 2 ? sum[band] : _mm512_add_epi32(sum[0], sum[1]));
    }
};
static_assert(sizeof(Chunk<3>) == kChunkBytes[0] && sizeof(Chunk<1>) == kChunkBytes[1], "as they are reserved");

inline __mmask16 first_of_16(int64_t count) {
    return static_cast<__mmask16>((1u << greatest(least(count, 16), 0)) - 1);
}

// Sums of 32 products in each lane.
template <int Digits>
struct Dots {
    __m512i digit[Digits] = {};

    // bits: 64 bytes, as a rule of 0 and 1.
    [[gnu::always_inline]] void add(__m512i bits, const __m512i* x) {
#pragma GCC unroll 3
        for (int d = 0; d < Digits; d++) digit[d] = _mm512_dpbusd_epi32(digit[d], bits, x[d]);
    }
    // In units of the lowest digit: 32 bits are enough for three digits and numbers up to 31 in the bytes.
    [[gnu::always_inline]] __m512i total() const {
        __m512i sum = digit[0];
#pragma GCC unroll 2
        for (int d = 1; d < Digits; d++) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 7), digit[d]);
        return sum;
    }
};

// The same of numbers of ``Bits`` bits, which stand side by side in bytes: the lowest as they are, and their neighbours
// where they are, worth 2^Bits as much, which is put right at the end. Bringing them to the right one by one would take
// shifts, or vgf2p8affineqb; on Zen 4 these compete with vpdpbusd, which vpandd does not.
template <int Digits, int Bits>
struct SideDots {
    Dots<Digits> right, left;

    [[gnu::always_inline]] void add(__m512i numbers, const __m512i* of_right, const __m512i* of_left) {
        constexpr char mask = (1 << Bits) - 1;
        right.add(_mm512_and_si512(numbers, _mm512_set1_epi8(mask)), of_right);
        left.add(_mm512_and_si512(numbers, _mm512_set1_epi8(mask << Bits)), of_left);
    }
    [[gnu::always_inline]] __m512 sum_right() const { return _mm512_cvtepi32_ps(right.total()); }
    [[gnu::always_inline]] __m512 sum_left() const {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(left.total()), _mm512_set1_ps(1.0f / (1 << Bits)));
    }
    [[gnu::always_inline]] __m512 sum() const {
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(left.total()), _mm512_set1_ps(1.0f / (1 << Bits)), sum_right());
    }
};

// Of bits: columns i and i + 1 of every eight and then, moved to the right by two, the next.
template <int Digits>
using BitDots = SideDots<Digits, 1>;

[[gnu::always_inline]] inline __m512i next(__m512i numbers, int by) {
    return _mm512_srli_epi16(numbers, static_cast<unsigned>(by));
}

// Bit i of every byte.
[[gnu::always_inline]] inline __m512i bit(__m512i bytes, int i) {
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(1ll << (56 + i)), 0);
}

[[gnu::always_inline]] inline __m512 floats(__m512i integers) { return _mm512_cvtepi32_ps(integers); }

// Byte 8b + i of 512 to byte b of vector i: bytes within vectors first, then their 64-bit words between vectors.
class ByBit {
   public:
    static void order(__m512i* x) {
        const __m512i row = _mm512_set1_epi64(0x3830282018100800);
        const __m512i column = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
        const __m512i order = _mm512_add_epi8(row, _mm512_mullo_epi64(column, _mm512_set1_epi64(0x0101010101010101)));
        __m512i even[4], odd[4];
        for (int i = 0; i < 4; i++) {
            const __m512i a = _mm512_permutexvar_epi8(order, x[2 * i]);
            const __m512i b = _mm512_permutexvar_epi8(order, x[2 * i + 1]);
            even[i] = _mm512_unpacklo_epi64(a, b);
            odd[i] = _mm512_unpackhi_epi64(a, b);
        }
        lanes_to_vectors(even, x);
        lanes_to_vectors(odd, x + 1);
    }

   private:
    // Quarter i of four vectors to out[2 * i].
    static void lanes_to_vectors(const __m512i* from, __m512i* out) {
        const __m512i even_low = _mm512_shuffle_i32x4(from[0], from[1], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(from[2], from[3], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(from[0], from[1], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(from[2], from[3], 0xdd);
        out[0] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        out[2] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        out[4] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        out[6] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
};

// Digits of up to 128 activations, [Digits][stride] bytes, zeros behind them; returns the step, which is no number if
// one of them is not finite. Sizes with no finite inverse are as good as zero.
template <int Digits>
float to_digits(const float* x, int64_t columns, int8_t* digits, int64_t stride) {
    constexpr float units = Digits == 1 ? 127.0f : 127.0f * 128 * 128;
    __m512 some[8], largest = _mm512_setzero_ps(), spoilt = largest;
    for (int i = 0; i < 8; i++) {
        some[i] = _mm512_maskz_loadu_ps(first_of_16(columns - 16 * i), x + 16 * i);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(some[i]));
        spoilt = _mm512_fmadd_ps(some[i], _mm512_setzero_ps(), spoilt);
    }
    const float size = _mm512_reduce_max_ps(largest), not_finite = _mm512_reduce_add_ps(spoilt);
    const bool any = size > 1e-36f && not_finite == 0.0f;
    const __m512 per_step = _mm512_set1_ps(units / size);
    for (int i = 0; i < 8; i++) {
        __m512i rest = any ? _mm512_cvtps_epi32(_mm512_mul_ps(some[i], per_step)) : _mm512_setzero_si512();
        for (int d = Digits - 1; d > 0; d--) {
            const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(rest, 25), 25);  // -64 .. 63
            _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + d * stride + 16 * i), _mm512_cvtepi32_epi8(low));
            rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, low), 7);
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + 16 * i), _mm512_cvtepi32_epi8(rest));
    }
    return size / units + not_finite;
}

template <int Digits>
void to_chunks(const float* x, int64_t words, Chunk<Digits>* chunks) {
    for (int64_t word = 0; word < words; word += kChunkWords, chunks++) {
        alignas(64) int8_t digits[Digits][512];
        alignas(64) float steps[16];
        for (int64_t i = 0; i < 4; i++) {
            const int64_t at = 32 * word + 128 * i, columns = greatest(least(32 * words - at, 128), 0);
            const float step = to_digits<Digits>(x + at, columns, digits[0] + 128 * i, 512);
            _mm_store_ps(steps + 4 * i, _mm_set1_ps(columns ? step : 0.0f));
        }
        chunks->step = _mm512_load_ps(steps);
        for (int d = 0; d < Digits; d++) {
            __m512i ordered[8];
            for (int i = 0; i < 8; i++) ordered[i] = _mm512_load_si512(digits[d] + 64 * i);
            ByBit::order(ordered);
            for (int i = 0; i < 8; i++) chunks->x[i][d] = ordered[i];
        }
        Dots<Digits> sums[2];
        for (int i = 0; i < 8; i++) sums[i % 2].add(_mm512_set1_epi8(1), chunks->x[i]);
        for (int odd = 0; odd < 2; odd++) chunks->sum[odd] = sums[odd].total();
        chunks->total = _mm512_mul_ps(floats(_mm512_add_epi32(chunks->sum[0], chunks->sum[1])), chunks->step);
    }
}

inline void prepare_digits(float* x, int64_t words, const Run*, int64_t, bool int8, void* chunks, float*,
                           float*) {
    if (int8) to_chunks(x, words, static_cast<Chunk<1>*>(chunks));
    else to_chunks(x, words, static_cast<Chunk<3>*>(chunks));
}

inline int64_t chunks_in(const Activations& x) { return (x.words + kChunkWords - 1) / kChunkWords; }

// The digits of a token.
template <int Digits>
const Chunk<Digits>* chunks_of(const Activations& x, int64_t token) {
    return reinterpret_cast<const Chunk<Digits>*>(x.tables) + token * chunks_in(x);
}

// A tile of a plane up to which the next one is fetched into the first-level cache, where it is read a tenth faster. Of
// longer rows it would drive out this tile and the activations (4096x11008 on a Zen 4: a quarter slower).
constexpr int64_t kNearBytes = 8192;

// Rows that are worked on side by side, of a tile of 16 that begins with row ``tile``, and their chunks [from, upto).
template <int Rows>
struct SideBySide {
    int64_t row[Rows], tile, from, upto;
};

// Their bits, which share what is read of activations and have chains of sums of their own.
template <int Rows>
struct RowsOfBits {
    const uint8_t* row[Rows];
    const uint8_t* ahead;
    int64_t words;
    bool near = false;

    // Of a plane in memory. Meanwhile the next tile is fetched, line after line: memory is slower, by a third here, at
    // anything but one sequence of addresses, and the order in which rows side by side are read is none.
    RowsOfBits(const Plane& plane, const SideBySide<Rows>& of) : RowsOfBits(plane, of, 0) {
        const int64_t lines = kDotRows * of.from + (of.row[0] - of.tile) * (of.upto - of.from);
        ahead = plane.data + (of.tile + kDotRows) * plane.row_bytes + 64 * (lines - Rows * of.from);
        near = kDotRows * plane.row_bytes <= kNearBytes;
    }
    // Of a buffer that begins with row ``base``.
    RowsOfBits(const Plane& plane, const SideBySide<Rows>& of, int64_t base)
        : ahead(plane.data), words(plane.row_bytes / 4) {
        for (int r = 0; r < Rows; r++) row[r] = plane.data + (of.row[r] - base) * plane.row_bytes;
    }
    // Words from 16 * chunk on, as many as there are: under a mask at the end only, since it takes longer.
    [[gnu::always_inline]] void load(int64_t chunk, __m512i* bits) const {
        const int64_t left = words - kChunkWords * chunk;
        if (near) {
#pragma GCC unroll 4
            for (int r = 0; r < Rows; r++) Avx512::prefetch(ahead + 64 * (Rows * chunk + r));
        } else {
#pragma GCC unroll 4
            for (int r = 0; r < Rows; r++) Avx512::prefetch_far(ahead + 64 * (Rows * chunk + r));
        }
        if (left >= kChunkWords) {
#pragma GCC unroll 4
            for (int r = 0; r < Rows; r++) bits[r] = _mm512_loadu_si512(row[r] + 64 * chunk);
        } else {
#pragma GCC unroll 4
            for (int r = 0; r < Rows; r++) bits[r] = _mm512_maskz_loadu_epi32(first_of_16(left), row[r] + 64 * chunk);
        }
    }
};

// Coefficients at [index, index + count), count up to 16, of all rows' one after the other; zeros behind them.
[[gnu::always_inline]] inline __m512 load_coefficients(const Coefficients& from, int64_t index, int64_t count) {
    if (from.type == Scalar::f32) {
        return _mm512_maskz_loadu_ps(first_of_16(count), static_cast<const float*>(from.data) + index);
    }
    const uint16_t* at = static_cast<const uint16_t*>(from.data) + index;
    Avx512::prefetch_far(at + kDotRows * from.per_row);
    const __m256i shorts = count >= 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))
                                       : _mm256_maskz_loadu_epi16(first_of_16(count), at);
    if (from.type == Scalar::f16) return _mm512_cvtph_ps(shorts);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(shorts), 16));
}

// Coefficients of rows that are worked on side by side, those of a chunk's groups at a time.
template <int Rows, int Vectors = 1>
class RowsCoefficients {
   public:
    // Without data there are none.
    RowsCoefficients(const GroupCoefficients& of, const SideBySide<Rows>& rows) : of_(of) {
        for (int r = 0; r < Rows; r++) start_[r] = rows.row[r] * of.of.per_row;
    }
    [[gnu::always_inline]] void load(int64_t chunk) {
        const ChunkGroups& groups = of_.chunks[chunk];
        place_ = _mm512_load_si512(groups.place);
        if (groups.first == first_) return;
        first_ = groups.first;
#pragma GCC unroll 4
        for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
            for (int v = 0; v < Vectors; v++) {
                const int64_t at = groups.first + 16 * v;
                some_[r][v] = load_coefficients(of_.of, start_[r] + at, of_.of.per_row - at);
            }
        }
    }
    // The number-th coefficient of each word's group.
    [[gnu::always_inline]] __m512 at(int row, int number) const {
        const __m512i place = _mm512_add_epi32(place_, _mm512_set1_epi32(number));
        if (Vectors == 1) return _mm512_permutexvar_ps(place, some_[row][0]);
        return _mm512_permutex2var_ps(some_[row][0], place, some_[row][Vectors - 1]);
    }

   private:
    const GroupCoefficients& of_;
    int64_t start_[Rows];
    int64_t first_ = -1;
    __m512i place_;
    __m512 some_[Rows][Vectors];
};

// The sums of 16 vectors' lanes.
inline __m512 sums_of(__m512* parts) {
    Avx512::transpose(reinterpret_cast<__m512i*>(parts));
    for (int half = 8; half; half /= 2) {
        for (int i = 0; i < half; i++) parts[i] = _mm512_add_ps(parts[i], parts[i + half]);
    }
    return parts[0];
}

// Of rows [row, row + count), at most 16: what Product makes of them and of all chunks.
template <class Product>
inline __m512 rows_product(const Product& of, int64_t row, int64_t count, int64_t chunks) {
    __m512 parts[kDotRows] = {};
    for (int64_t from = 0; from < chunks; from += kPanel) {
        SideBySide<Product::rows> rows{{}, row, from, least(from + kPanel, chunks)};
        for (int64_t i = 0; i < count; i += Product::rows) {
            for (int r = 0; r < Product::rows; r++) rows.row[r] = row + least(i + r, count - 1);
            of.add(rows, parts + i);
        }
    }
    return sums_of(parts);
}

template <class Product>
inline void dot_rows(const Product& of, int64_t first, int64_t last, int64_t chunks, float* y) {
    for (int64_t row = first; row < last; row += kDotRows) {
        const int64_t count = least(last - row, kDotRows);
        Avx512::store(y + row, rows_product(of, row, count, chunks), count);
    }
}

}  // namespace avx512
}  // namespace kernels
