// AVX2: 8 rows a vector; a lookup is vpermps in either half of a table, and the fourth bit of the nibble chooses.

#define SIGNBIT_ISA avx2

#include <immintrin.h>

#include <cstring>

#include "float_sums.h"
#include "layouts.h"
#include "prepare.h"

namespace kernels {
namespace avx2 {

struct Avx2 {
    using F = __m256;
    using U = __m256i;
    static constexpr int lanes = 8, strips = 4;

    template <bool Int8>
    using Sum = FloatSums<Avx2, Int8>;

    static F set(float value) { return _mm256_set1_ps(value); }
    static U bits(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
    static F load(const float* from) { return _mm256_load_ps(from); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static U both(U a, U b) { return _mm256_and_si256(a, b); }
    static U either(U a, U b) { return _mm256_or_si256(a, b); }
    static U different(U a, U b) { return _mm256_xor_si256(a, b); }
    static U without(U a, U b) { return _mm256_andnot_si256(b, a); }
    static U left(U a, int by) { return _mm256_slli_epi32(a, by); }
    static U right(U a, int by) { return _mm256_srli_epi32(a, by); }
    static void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }
    static void prefetch_far(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1); }

    // All ones in the first ``count`` lanes.
    static U first(int64_t count) {
        return _mm256_cmpgt_epi32(bits(static_cast<uint32_t>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static void store(float* to, F value, int64_t count) { _mm256_maskstore_ps(to, first(count), value); }

    static U nibble(U w, int c) { return _mm256_srli_epi32(w, 4 * c); }
    static F lookup(U nibble, const float* table) {
        const F low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), nibble);
        const F high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), nibble);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(nibble, 28)));
    }

    static void load_words(const uint8_t* const* rows, int64_t count, U* out, int64_t stride) {
        for (int64_t word = 0; word < count; word += 8) {
            const U present = first(least(count - word, 8));
            U r[8];
            for (int lane = 0; lane < 8; lane++) {
                r[lane] = _mm256_maskload_epi32(reinterpret_cast<const int*>(rows[lane] + 4 * word), present);
            }
            transpose(r);
            for (int i = 0; i < 8; i++) out[(word + i) * stride] = r[i];
        }
    }

    static void load_coefficients(const char* const* rows, Scalar type, int64_t count, float (*out)[lanes]) {
        U r[8];
        for (int lane = 0; lane < 8; lane++) {
            if (type == Scalar::f32) {
                r[lane] = _mm256_maskload_epi32(reinterpret_cast<const int*>(rows[lane]), first(count));
                continue;
            }
            alignas(16) char few[16] = {};
            std::memcpy(few, rows[lane], static_cast<size_t>(count) * 2);
            const __m128i shorts = _mm_load_si128(reinterpret_cast<const __m128i*>(few));
            r[lane] = type == Scalar::f16 ? _mm256_castps_si256(_mm256_cvtph_ps(shorts))
                                          : _mm256_slli_epi32(_mm256_cvtepu16_epi32(shorts), 16);
        }
        transpose(r);
        for (int i = 0; i < 8; i++) _mm256_store_si256(reinterpret_cast<U*>(out[i]), r[i]);
    }

    static void transpose(U* r) {
        U t[8], q[8];
        for (int i = 0; i < 4; i++) {
            t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            q[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
            q[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
            q[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
            q[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for (int j = 0; j < 4; j++) {
            r[j] = _mm256_permute2x128_si256(q[j], q[4 + j], 0x20);
            r[4 + j] = _mm256_permute2x128_si256(q[j], q[4 + j], 0x31);
        }
    }
};

// Every processor with AVX2 has F16C too.
bool supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

}  // namespace avx2

const Isa kAvx2 = avx2::isa_of<avx2::Avx2>("avx2", avx2::supported);

}  // namespace kernels
