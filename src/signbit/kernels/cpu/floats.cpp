#include "floats.h"

namespace kernels {
namespace {

uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

float from_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // Shifted into place the exponent is 112 too small; the product puts that right, for denormal halves as well.
    return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

uint16_t to_half(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
    if (size < 0x38800000) {  // denormal: adding 0.5 leaves the rounded multiple of 2^-24 in the lowest bits
        return static_cast<uint16_t>(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));
    }
    return static_cast<uint16_t>(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}

uint16_t to_bfloat(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

void to_floats(const void* from, Scalar type, int64_t count, float* to) {
    const uint16_t* shorts = static_cast<const uint16_t*>(from);
    if (type == Scalar::f32) {
        std::memcpy(to, from, static_cast<size_t>(count) * 4);
    } else if (type == Scalar::bf16) {
        for (int64_t i = 0; i < count; i++) to[i] = float_of(static_cast<uint32_t>(shorts[i]) << 16);
    } else {
        for (int64_t i = 0; i < count; i++) to[i] = from_half(shorts[i]);
    }
}

void from_floats(const float* from, int64_t count, Scalar type, void* to) {
    uint16_t* shorts = static_cast<uint16_t*>(to);
    if (type == Scalar::f32) {
        std::memcpy(to, from, static_cast<size_t>(count) * 4);
    } else if (type == Scalar::bf16) {
        for (int64_t i = 0; i < count; i++) shorts[i] = to_bfloat(from[i]);
    } else {
        for (int64_t i = 0; i < count; i++) shorts[i] = to_half(from[i]);
    }
}

}  // namespace kernels
