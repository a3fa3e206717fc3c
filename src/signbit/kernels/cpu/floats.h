// 16-bit floats, converted without instructions that not every machine has.

#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace kernels {

inline size_t size_of(Scalar type) { return type == Scalar::f32 ? 4 : 2; }

void to_floats(const void* from, Scalar type, int64_t count, float* to);
// Rounds to nearest, ties to even; what is too large becomes infinite.
void from_floats(const float* from, int64_t count, Scalar type, void* to);

}  // namespace kernels
