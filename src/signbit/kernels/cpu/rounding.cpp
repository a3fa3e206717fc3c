#include "rounding.h"

#include "kernels.h"
#include "threads.h"

namespace kernels {

void round_in_turn(const Rounding& rounding, const Isa& isa, int threads) {
    parallel_for((rounding.n + kRoundingRows - 1) / kRoundingRows, threads,
                 [&](int64_t tile) { isa.round_in_turn(rounding, tile * kRoundingRows); });
}

}  // namespace kernels
