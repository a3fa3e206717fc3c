// Which instruction set does the work.

#pragma once

#include <vector>

#include "kernels.h"

namespace kernels {

// Those that this machine has, the best first; the last is portable.
std::vector<const Isa*> instruction_sets();

// The best, unless another was chosen.
const Isa& active();
void choose(const Isa& isa);

}  // namespace kernels
