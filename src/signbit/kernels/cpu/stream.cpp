#include "stream.h"

#include <algorithm>
#include <vector>

#include "threads.h"

namespace kernels {
namespace {

constexpr int64_t kPiece = 1 << 20;
constexpr int64_t kStreams = 4;  // places read from at a time, as products read several rows at a time
constexpr int64_t kLine = 64;

// One word of each cache line: memory delivers lines, and adding up more of them would be arithmetic.
uint64_t touch(const unsigned char* data, int64_t bytes) {
    const int64_t lines = bytes / kLine / kStreams;
    uint64_t sums[kStreams] = {};
    for (int64_t line = 0; line < lines; line++) {
        for (int64_t s = 0; s < kStreams; s++) sums[s] += data[(s * lines + line) * kLine];
    }
    uint64_t total = 0;
    for (const uint64_t part : sums) total += part;
    return total;
}

}  // namespace

uint64_t stream(const void* data, int64_t bytes, int threads) {
    const auto* start = static_cast<const unsigned char*>(data);
    std::vector<uint64_t> sums(static_cast<size_t>((bytes + kPiece - 1) / kPiece));
    parallel_for(static_cast<int64_t>(sums.size()), threads, [&](int64_t piece) {
        sums[static_cast<size_t>(piece)] = touch(start + piece * kPiece, std::min(kPiece, bytes - piece * kPiece));
    });
    uint64_t total = 0;
    for (const uint64_t part : sums) total += part;
    return total;
}

}  // namespace kernels
