// NEON (64-bit ARM): 4 rows a vector; a table of 16 floats, or of 2 * 16 integers, is 64 bytes, which is what one
// vqtbl4q looks up in.

#define SIGNBIT_ISA neon

#include <arm_neon.h>

#include "float_sums.h"
#include "floats.h"
#include "layouts.h"
#include "prepare.h"

namespace kernels {
namespace neon {

struct Neon {
    using F = float32x4_t;
    using U = uint32x4_t;
    static constexpr int lanes = 4, strips = 4;

    static F set(float value) { return vdupq_n_f32(value); }
    static U bits(uint32_t value) { return vdupq_n_u32(value); }
    static F load(const float* from) { return vld1q_f32(from); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static U both(U a, U b) { return vandq_u32(a, b); }
    static U either(U a, U b) { return vorrq_u32(a, b); }
    static U different(U a, U b) { return veorq_u32(a, b); }
    static U without(U a, U b) { return vbicq_u32(a, b); }
    static U left(U a, int by) { return vshlq_u32(a, vdupq_n_s32(by)); }
    static U right(U a, int by) { return vshlq_u32(a, vdupq_n_s32(-by)); }
    static void prefetch(const void* at) { __builtin_prefetch(at); }
    static void prefetch_far(const void* at) { __builtin_prefetch(at, 0, 2); }
    // Nibble c of every word (and of its upper half) comes to the lowest bits.
    static U shift(U w, int c) { return vshlq_u32(w, vdupq_n_s32(-4 * c)); }

    static void store(float* to, F value, int64_t count) {
        if (count == 4) return vst1q_f32(to, value);
        float lane[4];
        vst1q_f32(lane, value);
        for (int64_t i = 0; i < count; i++) to[i] = lane[i];
    }

    static void load_words(const uint8_t* const* rows, int64_t count, U* out, int64_t stride) {
        int64_t word = 0;
        for (; word + 4 <= count; word += 4) {
            U r[4];
            for (int lane = 0; lane < 4; lane++) r[lane] = vreinterpretq_u32_u8(vld1q_u8(rows[lane] + 4 * word));
            const uint32x4x2_t low = vtrnq_u32(r[0], r[1]), high = vtrnq_u32(r[2], r[3]);
            out[word * stride] = vcombine_u32(vget_low_u32(low.val[0]), vget_low_u32(high.val[0]));
            out[(word + 1) * stride] = vcombine_u32(vget_low_u32(low.val[1]), vget_low_u32(high.val[1]));
            out[(word + 2) * stride] = vcombine_u32(vget_high_u32(low.val[0]), vget_high_u32(high.val[0]));
            out[(word + 3) * stride] = vcombine_u32(vget_high_u32(low.val[1]), vget_high_u32(high.val[1]));
        }
        for (; word < count; word++) {
            uint32_t lane[4];
            for (int i = 0; i < 4; i++) std::memcpy(&lane[i], rows[i] + 4 * word, 4);
            out[word * stride] = vld1q_u32(lane);
        }
    }

    static void load_coefficients(const char* const* rows, Scalar type, int64_t count, float (*out)[lanes]) {
        for (int lane = 0; lane < lanes; lane++) {
            float row[lanes];
            to_floats(rows[lane], type, count, row);
            for (int64_t i = 0; i < count; i++) out[i][lane] = row[i];
        }
    }

    // Bytes 4i .. 4i + 3 of a table for nibble i.
    static U nibble(U w, int c) { return vmlaq_u32(bits(0x03020100), both(shift(w, c), bits(15)), bits(0x04040404)); }
    static F lookup(U nibble, const float* table) {
        const uint8x16x4_t sums = vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table));
        return vreinterpretq_f32_u8(vqtbl4q_u8(sums, vreinterpretq_u8_u32(nibble)));
    }

    template <bool Int8>
    struct Sum;
};

template <>
struct Neon::Sum<false> : FloatSums<Neon, false> {};

template <>
struct Neon::Sum<true> {
    static constexpr size_t table_bytes = 4 * 32 * sizeof(int16_t);
    static constexpr bool needs_flush = true;
    static constexpr int nibbles = 2;
    F sum[strips];
    int16x8_t part[strips];

    Sum() {
        for (int s = 0; s < strips; s++) {
            sum[s] = set(0.0f);
            part[s] = vdupq_n_s16(0);
        }
    }
    static void tabulate(const float* x, char* table) {
        for (int c = 0; c < 4; c++) {
            int16_t* out = reinterpret_cast<int16_t*>(table + 64 * c);
            float sums[32];
            sums_of_four(x + 4 * c, sums);
            sums_of_four(x + 4 * c + 16, sums + 16);
            for (int i = 0; i < 32; i++) out[i] = static_cast<int16_t>(sums[i]);
        }
    }
    // Bytes 2i and 2i + 1 of a table for nibble i of the lower half, 32 further for that of the upper.
    static uint8x16_t bytes_of(U w, int c) {
        const uint16x8_t nibble = vreinterpretq_u16_u32(both(shift(w, c), bits(0x000f000f)));
        const uint16x8_t first = vreinterpretq_u16_u32(bits(0x21200100));
        return vreinterpretq_u8_u16(vmlaq_u16(first, nibble, vdupq_n_u16(0x0202)));
    }
    struct Index {
        uint8x16_t bytes[4][strips];
    };
    static Index index(const U* w) {
        Index index;
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            for (int s = 0; s < strips; s++) {
                index.bytes[c][s] = bytes_of(w[s], c);
            }
        }
        return index;
    }
    void add(const Index& index, const char* table) {
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            const uint8x16x4_t sums = vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table + 64 * c));
            for (int s = 0; s < strips; s++) {
                part[s] = vaddq_s16(part[s], vreinterpretq_s16_u8(vqtbl4q_u8(sums, index.bytes[c][s])));
            }
        }
    }
    void add_one(const U* w, int nibble, uint32_t mask, const char* table) {
        const uint8x16x4_t sums = vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table));
        for (int s = 0; s < strips; s++) {
            const uint8x16_t bytes = bytes_of(both(w[s], bits(mask << 4 * nibble)), nibble);
            part[s] = vaddq_s16(part[s], vreinterpretq_s16_u8(vqtbl4q_u8(sums, bytes)));
        }
    }
    void flush(float step) {
        for (int s = 0; s < strips; s++) {
            sum[s] = fma(vcvtq_f32_s32(vpaddlq_s16(part[s])), set(step), sum[s]);
            part[s] = vdupq_n_s16(0);
        }
    }
    Column<Neon> total() const {
        Column<Neon> column;
        for (int s = 0; s < strips; s++) column.strip[s] = sum[s];
        return column;
    }
};

// Part of every 64-bit ARM.
bool supported() { return true; }

}  // namespace neon

const Isa kNeon = neon::isa_of<neon::Neon>("neon", neon::supported);

}  // namespace kernels
