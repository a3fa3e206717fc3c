#include "dispatch.h"

#include <atomic>

namespace kernels {
namespace {

constexpr const Isa* kAll[] = {
#if defined(__x86_64__)
    &kAvx512, &kAvx2,
#elif defined(__aarch64__)
    &kNeon,
#endif
    &kPortable,
};

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

std::vector<const Isa*> instruction_sets() {
    std::vector<const Isa*> found;
    for (const Isa* isa : kAll) {
        if (isa->supported()) found.push_back(isa);
    }
    return found;
}

const Isa& active() {
    const Isa* isa = chosen.load(std::memory_order_relaxed);
    if (!isa) chosen.store(isa = instruction_sets().front(), std::memory_order_relaxed);
    return *isa;
}

void choose(const Isa& isa) { chosen.store(&isa, std::memory_order_relaxed); }

}  // namespace kernels
