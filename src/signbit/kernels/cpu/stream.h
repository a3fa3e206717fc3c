// Reading memory as fast as it can be read: what the time of a product is compared with.

#pragma once

#include <cstdint>

namespace kernels {

// Reads every whole cache line, but for the few that do not make up a round. What it returns is there only so that the
// compiler cannot leave the reading out.
uint64_t stream(const void* data, int64_t bytes, int threads);

}  // namespace kernels
