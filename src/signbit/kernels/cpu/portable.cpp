// Any machine: vectors are arrays, and lookups go one by one.

#define SIGNBIT_ISA portable

#include <cstring>

#include "float_sums.h"
#include "floats.h"
#include "layouts.h"
#include "prepare.h"

namespace kernels {
namespace portable {

struct Portable {
    static constexpr int lanes = 8, strips = 1;
    struct F {
        float lane[lanes];
    };
    struct U {
        uint32_t lane[lanes];
    };

    template <bool Int8>
    using Sum = FloatSums<Portable, Int8>;

    static F set(float value) {
        F result;
        for (float& lane : result.lane) lane = value;
        return result;
    }
    static U bits(uint32_t value) {
        U result;
        for (uint32_t& lane : result.lane) lane = value;
        return result;
    }
    static F load(const float* from) {
        F result;
        std::memcpy(result.lane, from, sizeof result.lane);
        return result;
    }
    static F add(F a, const F& b) {
        for (int i = 0; i < lanes; i++) a.lane[i] += b.lane[i];
        return a;
    }
    static F mul(F a, const F& b) {
        for (int i = 0; i < lanes; i++) a.lane[i] *= b.lane[i];
        return a;
    }
    static F fma(const F& a, const F& b, F c) {
        for (int i = 0; i < lanes; i++) c.lane[i] += a.lane[i] * b.lane[i];
        return c;
    }
    static U both(U a, const U& b) {
        for (int i = 0; i < lanes; i++) a.lane[i] &= b.lane[i];
        return a;
    }
    static U either(U a, const U& b) {
        for (int i = 0; i < lanes; i++) a.lane[i] |= b.lane[i];
        return a;
    }
    static U different(U a, const U& b) {
        for (int i = 0; i < lanes; i++) a.lane[i] ^= b.lane[i];
        return a;
    }
    static U without(U a, const U& b) {
        for (int i = 0; i < lanes; i++) a.lane[i] &= ~b.lane[i];
        return a;
    }
    static U left(U a, int by) {
        for (uint32_t& lane : a.lane) lane <<= by;
        return a;
    }
    static U right(U a, int by) {
        for (uint32_t& lane : a.lane) lane >>= by;
        return a;
    }
    static void prefetch(const void* at) { __builtin_prefetch(at); }
    static void prefetch_far(const void* at) { __builtin_prefetch(at, 0, 2); }
    static void store(float* to, const F& value, int64_t count) {
        std::memcpy(to, value.lane, static_cast<size_t>(count) * 4);
    }

    static U nibble(U w, int c) {
        for (uint32_t& lane : w.lane) lane = lane >> 4 * c & 15;
        return w;
    }
    static F lookup(const U& nibble, const float* table) {
        F result;
        for (int i = 0; i < lanes; i++) result.lane[i] = table[nibble.lane[i]];
        return result;
    }

    // Words are little-endian in the file, whatever the machine is.
    static void load_words(const uint8_t* const* rows, int64_t count, U* out, int64_t stride) {
        for (int64_t word = 0; word < count; word++) {
            for (int lane = 0; lane < lanes; lane++) {
                const uint8_t* b = rows[lane] + 4 * word;
                out[word * stride].lane[lane] = b[0] | b[1] << 8 | b[2] << 16 | static_cast<uint32_t>(b[3]) << 24;
            }
        }
    }
    static void load_coefficients(const char* const* rows, Scalar type, int64_t count, float (*out)[lanes]) {
        for (int lane = 0; lane < lanes; lane++) {
            float row[lanes];
            to_floats(rows[lane], type, count, row);
            for (int64_t i = 0; i < count; i++) out[i][lane] = row[i];
        }
    }
};

bool supported() { return true; }

}  // namespace portable

const Isa kPortable = portable::isa_of<portable::Portable>("portable", portable::supported);

}  // namespace kernels
