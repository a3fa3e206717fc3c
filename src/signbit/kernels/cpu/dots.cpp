#include "dots.h"

#include <algorithm>

namespace kernels {

bool ChunkGroupLists::assign(GroupCoefficients& to, Coefficients from, int64_t each,
                             const std::vector<int32_t>& group) {
    const int64_t words = static_cast<int64_t>(group.size());
    std::vector<ChunkGroups>& chunks = lists_.emplace_back();
    int32_t last = 0;
    for (int64_t start = 0; from.data && start < words; start += kChunkWords) {
        const auto begin = group.begin() + start, end = group.begin() + std::min(start + kChunkWords, words);
        const auto known = std::find_if(begin, end, [](int32_t one) { return one >= 0; });
        if (known != end) last = *known;
        ChunkGroups chunk{{}, last * static_cast<int32_t>(each)};
        for (auto one = begin; one != end; one++) {
            if (*one >= 0) last = *one;
            const int64_t place = last * each - chunk.first;
            if (place + each > kChunkWords) return false;
            chunk.place[one - begin] = static_cast<int32_t>(place);
        }
        chunks.push_back(chunk);
    }
    to = {from, chunks.data()};
    return true;
}

std::vector<int32_t> groups_of_words(int64_t columns, int64_t group_size) {
    const int64_t size = group_size ? group_size : columns, words = (columns + 31) / 32;
    if (size % 32 && size < columns) return {};
    std::vector<int32_t> groups;
    for (int64_t word = 0; word < words; word++) groups.push_back(static_cast<int32_t>(32 * word / size));
    return groups;
}

}  // namespace kernels
