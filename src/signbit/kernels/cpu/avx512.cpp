// AVX-512: 16 rows a vector; lookups are vpermps in tables of 16 floats and vpermw in tables of 2 * 16 integers.

#define SIGNBIT_ISA avx512

#include <immintrin.h>

#include "layouts.h"
#include "prepare.h"

namespace kernels {
namespace avx512 {

struct Avx512 {
    using F = __m512;
    using U = __m512i;
    static constexpr int lanes = 16, strips = 2;

    static F set(float value) { return _mm512_set1_ps(value); }
    static U bits(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
    static F load(const float* from) { return _mm512_load_ps(from); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static U both(U a, U b) { return _mm512_and_si512(a, b); }
    static U either(U a, U b) { return _mm512_or_si512(a, b); }
    static U different(U a, U b) { return _mm512_xor_si512(a, b); }
    static U without(U a, U b) { return _mm512_andnot_si512(b, a); }
    static U left(U a, int by) { return _mm512_sllv_epi32(a, _mm512_set1_epi32(by)); }
    static U right(U a, int by) { return _mm512_srlv_epi32(a, _mm512_set1_epi32(by)); }
    // Not _mm_prefetch: GCC takes what only fetches ahead for something without effects, and leaves much of it out.
    static void prefetch(const void* at) { asm volatile("prefetcht0 (%0)" : : "r"(at)); }
    static void prefetch_far(const void* at) { asm volatile("prefetcht1 (%0)" : : "r"(at)); }

    static void store(float* to, F value, int64_t count) {
        _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), value);
    }

    // Words [count] of 16 rows to vectors of one word each, ``stride`` apart; those behind count, up to a whole 16, are
    // 0.
    static void load_words(const uint8_t* const* rows, int64_t count, U* out, int64_t stride) {
        for (int64_t word = 0; word < count; word += 16) {
            const __mmask16 present = static_cast<__mmask16>((1ull << least(count - word, 16)) - 1);
            U r[16];
            for (int lane = 0; lane < 16; lane++) r[lane] = _mm512_maskz_loadu_epi32(present, rows[lane] + 4 * word);
            transpose(r);
            for (int i = 0; i < 16; i++) out[(word + i) * stride] = r[i];
        }
    }

    [[gnu::always_inline]] static void transpose(U* r) {
        U t[16], q[16];
        for (int i = 0; i < 8; i++) {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            q[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            q[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            q[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            q[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for (int j = 0; j < 4; j++) {
            const U even_low = _mm512_shuffle_i32x4(q[j], q[4 + j], 0x88);
            const U even_high = _mm512_shuffle_i32x4(q[8 + j], q[12 + j], 0x88);
            const U odd_low = _mm512_shuffle_i32x4(q[j], q[4 + j], 0xdd);
            const U odd_high = _mm512_shuffle_i32x4(q[8 + j], q[12 + j], 0xdd);
            r[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
            r[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
            r[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
            r[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
        }
    }

    template <bool Int8>
    struct Sum;
};

// The 16 sums of four numbers: lane i has those whose bit is set in i.
inline __m512 sums_of_four(const float* x) {
    __m512 sums = _mm512_maskz_mov_ps(0xaaaa, _mm512_set1_ps(x[0]));
    sums = _mm512_mask_add_ps(sums, 0xcccc, sums, _mm512_set1_ps(x[1]));
    sums = _mm512_mask_add_ps(sums, 0xf0f0, sums, _mm512_set1_ps(x[2]));
    return _mm512_mask_add_ps(sums, 0xff00, sums, _mm512_set1_ps(x[3]));
}

template <>
struct Avx512::Sum<false> {
    static constexpr size_t table_bytes = 8 * 16 * sizeof(float);
    static constexpr bool needs_flush = false;
    static constexpr int nibbles = 1;
    F sum[strips] = {};

    static void tabulate(const float* x, char* table) {
        for (int c = 0; c < 8; c++) _mm512_store_ps(table + 64 * c, sums_of_four(x + 4 * c));
    }
    struct Index {
        U nibble[8][strips];  // in the lowest bits; vpermps ignores the others
    };
    static Index index(const U* w) {
        Index index;
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
            for (int s = 0; s < strips; s++) index.nibble[c][s] = _mm512_srli_epi32(w[s], 4 * c);
        }
        return index;
    }
    void add(const Index& index, const char* table) {
        F odd[strips];
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
            const F sums = _mm512_load_ps(table + 64 * c);
            for (int s = 0; s < strips; s++) {
                // Two chains of additions, so that none waits for the one before.
                const F found = _mm512_permutexvar_ps(index.nibble[c][s], sums);
                if (c % 2 == 0) sum[s] = _mm512_add_ps(sum[s], found);
                else odd[s] = c == 1 ? found : _mm512_add_ps(odd[s], found);
            }
        }
        for (int s = 0; s < strips; s++) sum[s] = _mm512_add_ps(sum[s], odd[s]);
    }
    void add_one(const U* w, int nibble, uint32_t mask, const char* table) {
        const F sums = _mm512_load_ps(table);
        for (int s = 0; s < strips; s++) {
            const U index = both(right(w[s], 4 * nibble), bits(mask));
            sum[s] = _mm512_add_ps(sum[s], _mm512_permutexvar_ps(index, sums));
        }
    }
    void flush(float) {}
    Column<Avx512> total() const {
        Column<Avx512> column;
        for (int s = 0; s < strips; s++) column.strip[s] = sum[s];
        return column;
    }
};

template <>
struct Avx512::Sum<true> {
    static constexpr size_t table_bytes = 4 * 32 * sizeof(int16_t);
    static constexpr bool needs_flush = true;
    static constexpr int nibbles = 2;
    F sum[strips] = {};
    U part[strips] = {};

    static void tabulate(const float* x, char* table) {
        for (int c = 0; c < 4; c++) {
            const __m512i low = _mm512_cvtps_epi32(sums_of_four(x + 4 * c));
            const __m512i high = _mm512_cvtps_epi32(sums_of_four(x + 4 * c + 16));
            _mm256_store_si256(reinterpret_cast<__m256i*>(table + 64 * c), _mm512_cvtepi32_epi16(low));
            _mm256_store_si256(reinterpret_cast<__m256i*>(table + 64 * c + 32), _mm512_cvtepi32_epi16(high));
        }
    }
    struct Index {
        U nibbles[4][strips];
    };
    static Index index(const U* w) {
        const U nibbles = bits(0x000f000f), upper = bits(0x00100000);
        Index index;
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            for (int s = 0; s < strips; s++) {
                // (w >> 4c & nibbles) | upper: the second half of a word looks into the second half of the table.
                index.nibbles[c][s] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(w[s], 4 * c), nibbles, upper, 0xea);
            }
        }
        return index;
    }
    void add(const Index& index, const char* table) {
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            const U sums = _mm512_load_si512(table + 64 * c);
            for (int s = 0; s < strips; s++) {
                part[s] = _mm512_add_epi16(part[s], _mm512_permutexvar_epi16(index.nibbles[c][s], sums));
            }
        }
    }
    void add_one(const U* w, int nibble, uint32_t mask, const char* table) {
        const U sums = _mm512_load_si512(table), upper = bits(0x00100000);
        for (int s = 0; s < strips; s++) {
            const U index = _mm512_ternarylogic_epi32(right(w[s], 4 * nibble), bits(mask), upper, 0xea);
            part[s] = _mm512_add_epi16(part[s], _mm512_permutexvar_epi16(index, sums));
        }
    }
    void flush(float step) {
        for (int s = 0; s < strips; s++) {
            const U whole = _mm512_madd_epi16(part[s], _mm512_set1_epi16(1));
            sum[s] = fma(_mm512_cvtepi32_ps(whole), set(step), sum[s]);
            part[s] = _mm512_setzero_si512();
        }
    }
    Column<Avx512> total() const {
        Column<Avx512> column;
        for (int s = 0; s < strips; s++) column.strip[s] = sum[s];
        return column;
    }
};

bool supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("gfni") && __builtin_cpu_supports("bmi2");
}

}  // namespace avx512
}  // namespace kernels

#include "coefficients_avx512.h"
#include "integers_avx512.h"
#include "partial_avx512.h"
#include "partial_dots_avx512.h"
#include "sign_dots_avx512.h"
#include "sign_halfwords_avx512.h"
#include "coded_halfwords_avx512.h"
#include "haar_dots_avx512.h"
#include "structured_avx512.h"
#include "structured_dots_avx512.h"
#include "kept_dots_avx512.h"

namespace kernels {

namespace avx512 {

constexpr Isa with_dots_and_halfwords() {
    Isa isa = isa_of<Avx512>("avx512", supported);
    isa.prepare[static_cast<int>(Form::digits)] = prepare_digits;
    isa.prepare[static_cast<int>(Form::halfwords)] = prepare_halfwords;
    isa.sign_dots = sign_dots_rows;
    isa.sign_halfwords[0] = sign_halfwords_rows<false>;
    isa.sign_halfwords[1] = sign_halfwords_rows<true>;
    isa.coded_halfwords[0] = coded_halfwords_rows<false>;
    isa.coded_halfwords[1] = coded_halfwords_rows<true>;
    isa.kept_dots[0] = kept_dots_rows<kDigits[0]>;
    isa.kept_dots[1] = kept_dots_rows<kDigits[1]>;
    isa.haar_dots = haar_dots_rows;
    isa.structured_dots[0] = structured_dots_rows<kDigits[0]>;
    isa.structured_dots[1] = structured_dots_rows<kDigits[1]>;
    isa.partial_dots[0] = partial_dots_rows<false>;
    isa.partial_dots[1] = partial_dots_rows<true>;
    return isa;
}

}  // namespace avx512

const Isa kAvx512 = avx512::with_dots_and_halfwords();

}  // namespace kernels
