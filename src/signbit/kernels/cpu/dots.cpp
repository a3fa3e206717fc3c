#include "dots.h"

#include <algorithm>

#include "coded_matrix.h"

namespace kernels {

bool ChunkGroupLists::assign(GroupCoefficients& to, Coefficients from, int64_t each,
                             const std::vector<int32_t>& group, int64_t vectors) {
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
            if (place + each > vectors * kChunkWords) return false;
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

void SalientLists::pick(const SalientColumns& salient, int64_t m, int64_t group_size) {
    if (salient.columns.empty()) return;
    const int64_t windows = (m + 63) / 64, chunks = (windows + 7) / 8;
    std::vector<int64_t> in_window(windows, 0);
    for (int32_t column : salient.columns) in_window[column / 64]++;
    const int64_t most = *std::max_element(in_window.begin(), in_window.end());
    const bool one_group = group_size == 0 || group_size >= m;
    SalientPick& pick = blocks.pick;
    pick.sets = most <= 16 && (one_group || group_size % 128 == 0) ? 2 : 4;
    pick.used = (most + 7) / 8;
    pick.chunks = chunks;
    blocks.count = (windows * pick.sets + 63) / 64;
    possible = most <= 32 && (one_group || group_size % 64 == 0) && blocks.count <= kMostBlocks;
    if (!possible) return;
    columns.assign(32 * kChunkWords * blocks.count, -1);
    groups.assign(kChunkWords * blocks.count, -1);
    select_.assign(64 * chunks * pick.used, 0);
    std::fill(in_window.begin(), in_window.end(), 0);
    for (size_t i = 0; i < salient.columns.size(); i++) {
        const int32_t column = salient.columns[i];
        const int64_t window = column / 64, set = in_window[window] / 8, place = in_window[window]++ % 8;
        select_[64 * (window / 8 * pick.used + set) + 8 * (window % 8) + place] = static_cast<uint8_t>(column % 64);
        // A word's bytes: set by set, of each its windows.
        const int64_t each = 4 / pick.sets, word = window / each, byte = set * each + window % each;
        columns[32 * word + 8 * byte + place] = column;
        groups[word] = salient.groups[i];
    }
    pick.select = select_.data();
}

void SalientLists::cut(const SalientColumns& salient) {
    for (size_t i = 0, in_word = 0; i < salient.columns.size(); i++, in_word++) {
        if (in_word == 32 || groups.empty() || salient.groups[i] != groups.back()) {
            const size_t lane = groups.size() % kChunkWords;
            if (lane == 0) cut_.push_back({{}, {}, {}, static_cast<int32_t>(i / 32)});
            CompactBlock& block = cut_.back();
            block.word[lane] = static_cast<uint32_t>(i / 32) - static_cast<uint32_t>(block.first);
            block.shift[lane] = i % 32;
            groups.push_back(salient.groups[i]);
            columns.resize(32 * groups.size(), -1);
            in_word = 0;
        }
        cut_.back().mask[(groups.size() - 1) % kChunkWords] |= 1u << in_word;
        columns[32 * (groups.size() - 1) + in_word] = salient.columns[i];
    }
    blocks.count = static_cast<int64_t>(cut_.size());
    blocks.cut = cut_.data();
    groups.resize(kChunkWords * cut_.size(), -1);
    columns.resize(32 * groups.size(), -1);
    possible = blocks.count <= kMostBlocks;
}

}  // namespace kernels
