#include "coded_matrix.h"

#include <algorithm>

#include "dots.h"
#include "floats.h"

namespace kernels {

SalientColumns::SalientColumns(Plane map, int64_t m, int64_t group_size) {
    int64_t group = -1;
    int32_t place = -1;
    for (int64_t column = 0; map.data && column < m; column++) {
        if (!(map.data[column / 8] >> column % 8 & 1)) continue;
        const int64_t own = group_size ? column / group_size : 0;
        if (own != group) place++;
        group = own;
        columns.push_back(static_cast<int32_t>(column));
        groups.push_back(place);
    }
}

namespace {

// Those that find the bits of a mask: nibbles, pairs of nibbles, or fields of halfwords.
std::vector<Lookup> lookups_of(int size, int64_t word, uint32_t mask) {
    constexpr int counts[kLookupSizes] = {8, 4, 6};
    const int64_t block = size == 2 ? kChunkWords : kBlockWords;
    std::vector<Lookup> lookups;
    for (int32_t i = 0; i < counts[size]; i++) {
        const int shift = size == 2 ? 16 * (i / 3) + 5 * (i % 3) : 4 * i;
        const uint32_t found = size == 0 ? 0xf : size == 1 ? 0x000f000f : i % 3 == 2 ? 0x3f : 0x1f;
        if (const uint32_t own = mask >> shift & found) lookups.push_back({static_cast<int32_t>(word % block), i, own});
    }
    return lookups;
}

}  // namespace

CodedMatrix::CodedMatrix(int64_t n, int64_t m, int64_t group_size, Form form)
    : Matrix(n, m, group_size), group_size_(group_size), form_(form) {
    coded_.n = n;
}

void CodedMatrix::columns(int64_t kind, const float* x, float* out) const {
    const Kind& of = kinds_[kind];
    std::vector<float> transformed;
    if (of.haar) {
        transformed.resize(m);
        haar(x, transformed.data());
        x = transformed.data();
    }
    if (of.from.empty()) {
        Matrix::columns(kind, x, out);
    } else {
        for (int64_t i = 0; i < 32 * of.words; i++) out[i] = of.from[i] < 0 ? 0.0f : x[of.from[i]];
    }
    for (size_t i = 0; i < of.factor.size(); i++) out[i] *= of.factor[i];
}

// As haar.py: low = (a + b) / sqrt 2 and high = (a - b) / sqrt 2 in the places of a and b, in every group.
void CodedMatrix::haar(const float* x, float* out) const {
    constexpr float root_half = 0.70710678118654752f;
    const int64_t size = group_size_ ? group_size_ : m;
    for (int64_t start = 0; start < m; start += size) {
        const int64_t end = std::min(start + size, m);
        for (int64_t i = start; i + 1 < end; i += 2) {
            out[i] = (x[i] + x[i + 1]) * root_half;
            out[i + 1] = (x[i] - x[i + 1]) * root_half;
        }
        if ((end - start) % 2) out[end - 1] = x[end - 1];
    }
}

int32_t CodedMatrix::add_kind(Kind kind) {
    kinds_.push_back(std::move(kind));
    return static_cast<int32_t>(kinds_.size() - 1);
}

int32_t CodedMatrix::ordinary_kind(const SalientColumns& without, const std::vector<float>& factor) {
    std::vector<float> factors = factor;
    if (factors.empty() && !without.columns.empty()) factors.assign(m, 1.0f);
    for (int32_t column : without.columns) factors[column] = 0.0f;
    return add_kind({{}, factors, false, words, &runs});
}

int32_t CodedMatrix::salient_kind(const SalientColumns& salient, const std::vector<Run>& runs,
                                  const std::vector<float>& factor) {
    std::vector<float> factors(m, 0.0f);
    for (size_t i = 0; i < salient.columns.size(); i++) factors[salient.columns[i]] = factor.empty() ? 1.0f : factor[i];
    return add_kind({{}, factors, false, words, &runs});
}

CodedPlanes& CodedMatrix::add_part(Plane signs, Plane zones) {
    CodedPlanes& part = coded_.part[coded_.parts++];
    part.signs = signs;
    part.zones = zones;
    return part;
}

Codebooks& CodedMatrix::add_set(CodedPlanes& part, Coefficients scales, Coefficients means, int64_t scales_each,
                                int64_t means_each) {
    Codebooks& set = part.set[part.sets++];
    set.scales = scales;
    set.means = means;
    set.scales_each = scales_each;
    set.means_each = means.data ? means_each : 0;
    return set;
}

void CodedMatrix::add(Codebooks& set, Bits bits, int32_t kind, int64_t number, float weight) {
    int64_t t = 0;
    while (t < set.terms && (set.term[t].bits != bits || set.term[t].kind != kind)) t++;
    if (t == set.terms) set.term[set.terms++] = {bits, kind, 0, {}, {}};
    Term& term = set.term[t];
    int64_t i = 0;
    while (i < term.numbers && term.number[i] != number) i++;
    if (i == term.numbers) term.number[term.numbers++] = number;
    term.weight[i] += weight;
}

void CodedMatrix::add_zones(Codebooks& set, Bits negative0, Bits negative1, int64_t scale0, int64_t scale1,
                            int32_t kind0, int32_t kind1) {
    add(set, Bits::all, kind0, scale0, 1);
    add(set, Bits::zones, kind0, scale0, -1);
    add(set, negative0, kind0, scale0, -2);
    add(set, Bits::zones, kind1, scale1, 1);
    add(set, negative1, kind1, scale1, -2);
}

void CodedMatrix::add_signs(Codebooks& set, Bits signs, int64_t scale, int32_t kind) {
    add(set, Bits::all, kind, scale, 1);
    add(set, signs, kind, scale, -2);
}

void CodedMatrix::add_means(Codebooks& set, int32_t kind) {
    if (set.means_each == 0) return;
    add(set, Bits::all, kind, set.scales_each, 1);
    if (set.means_each == 1) return;
    add(set, Bits::zones, kind, set.scales_each, -1);
    add(set, Bits::zones, kind, set.scales_each + 1, 1);
}

const std::vector<Run>& CodedMatrix::assign(Codebooks& set, const Positions& book, int64_t cut, bool sparse) {
    struct Piece {
        int32_t book;
        Run run;
    };
    const int64_t words = static_cast<int64_t>(book.size()) / 32;
    const auto mask_of = [&](int64_t word, int32_t of) {
        uint32_t mask = 0;
        for (int bit = 0; bit < 32; bit++) mask |= static_cast<uint32_t>(book[32 * word + bit] == of) << bit;
        return mask;
    };
    std::vector<Piece> pieces;
    for (int64_t start = 0; start < words; start += cut) {
        const size_t first = pieces.size();
        for (int64_t word = start; word < std::min(start + cut, words); word++) {
            for (int bit = 0; bit < 32; bit++) {
                const int32_t own = book[32 * word + bit];
                if (own < 0) continue;
                auto piece = std::find_if(pieces.begin() + first, pieces.end(), [&](auto& p) { return p.book == own; });
                if (piece == pieces.end()) piece = pieces.insert(pieces.end(), {own, {word, word, 0, 0}});
                piece->run.end = word + 1;
            }
        }
    }
    std::vector<int32_t> books;
    std::vector<Run> runs;
    for (Piece& piece : pieces) {
        Run& run = piece.run;
        const bool one_word = run.end == run.word + 1;
        run.first = mask_of(run.word, piece.book);
        run.last = mask_of(run.end - 1, piece.book);
        if (one_word) run.last = run.first;
        books.push_back(piece.book);
        runs.push_back(run);
    }
    for (int size = 0; sparse && size < kLookupSizes; size++) {
        std::vector<Lookup> lookups;
        std::vector<int64_t> ends;
        for (const Piece& piece : pieces) {
            for (int64_t word = piece.run.word; word < piece.run.end; word++) {
                const std::vector<Lookup> own = lookups_of(size, word, mask_of(word, piece.book));
                lookups.insert(lookups.end(), own.begin(), own.end());
            }
            ends.push_back(static_cast<int64_t>(lookups.size()));
        }
        set.lookups[size] = keep(lookups_, std::move(lookups));
        set.lookups_end[size] = keep(ends_, std::move(ends));
    }
    set.of_run = keep(books_, std::move(books));
    keep(runs_, std::move(runs));
    return runs_.back();
}

std::vector<float> floats_of(Coefficients coefficients, int64_t first, int64_t count) {
    std::vector<float> floats(count);
    const int64_t start = first * static_cast<int64_t>(size_of(coefficients.type));
    to_floats(static_cast<const char*>(coefficients.data) + start, coefficients.type, count, floats.data());
    return floats;
}

}  // namespace kernels
