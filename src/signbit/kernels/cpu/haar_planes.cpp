// Haar planes (layouts/haar_planes.py): codes of Haar coefficients, of neighbouring columns or of neighbouring rows.
//
//     row       W = C H   ->  y = C (H x)      H: the transform within groups of columns; it is its own transpose
//     column    W = H C   ->  y = H (C x)      H: the transform over pairs of rows
//
// Along rows, even columns of a group are its low band and odd ones its high band, with a codebook each. So that every
// lookup serves one codebook, words are rearranged: in every window of words those of even columns come before those of
// odd ones, bit 2i from the first word of a pair, bit 2i + 1 from the second. A salient column adds codes S in compact
// planes, which are transformed over pairs of rows: y += H (S x). Along columns, salient columns only have codebooks of
// their own.

#include <algorithm>

#include "coded_matrix.h"
#include "dots.h"
#include "matrices.h"

namespace kernels {
namespace {

class HaarPlanesMatrix : public CodedMatrix {
   public:
    HaarPlanesMatrix(int64_t n, int64_t m, int64_t group_size, bool along_rows, const HaarPlanes& from, Form form)
        : CodedMatrix(n, m, group_size, form), from_(from), salient_(from.salient, m, group_size) {
        if (along_rows) {
            add_bands();
            if (!salient_.columns.empty()) add_compact();
        } else {
            add_over_rows();
        }
    }

   private:
    void add_terms(Codebooks& set, int32_t kind) {
        add_zones(set, Bits::negative0, Bits::negative1, 0, 1, kind, kind);
        add_means(set, kind);
    }

    void add_bands() {
        CodedPlanes& part = add_part(from_.signs, from_.zones);
        Codebooks& set = add_set(part, from_.scales, from_.means, 2, from_.means_each);
        const int64_t size = group_size_ ? group_size_ : m;
        // Two bands of a group in one window: so their codebooks, which lie side by side, are used one after the other.
        part.window = kStepWords;
        const int64_t most = form_ == Form::halfwords ? kChunkWords : kBlockWords;
        while (32 * part.window < size && part.window < most) part.window *= 2;
        words = (words + 1) / 2 * 2;
        Positions columns(32 * words, -1), book(32 * words, -1);
        for (int64_t column = 0; column < m; column++) {
            const int64_t word = column / 32, start = word / part.window * part.window;
            const int64_t half = std::min(part.window, words - start) / 2;
            const int64_t to = start + (word - start) / 2 + (column % 2 ? half : 0);
            const int64_t position = 32 * to + column % 32 / 2 * 2 + word % 2;
            columns[position] = static_cast<int32_t>(column);
            book[position] = static_cast<int32_t>(column / size * 2 + column % size % 2);
        }
        const std::vector<Run>& runs = assign(set, book, part.window, false);
        add_terms(set, add_kind({columns, {}, true, words, &runs}));
    }

    void add_compact() {
        CodedPlanes& part = add_part(from_.salient_signs, from_.salient_zones);
        part.pairs = true;
        Codebooks& set = add_set(part, from_.salient_scales, from_.salient_means, 2, 2);
        const int64_t count = static_cast<int64_t>(salient_.columns.size()), compact_words = (count + 31) / 32;
        Positions columns(32 * compact_words, -1), book(32 * compact_words, -1);
        std::copy(salient_.columns.begin(), salient_.columns.end(), columns.begin());
        std::copy(salient_.groups.begin(), salient_.groups.end(), book.begin());
        const std::vector<Run>& runs = assign(set, book, kStepWords, true);
        add_terms(set, add_kind({columns, {}, false, compact_words, &runs}));
    }

    void add_over_rows() {
        CodedPlanes& part = add_part(from_.signs, from_.zones);
        part.pairs = true;
        Codebooks& ordinary = add_set(part, from_.scales, from_.means, 2, from_.means_each);
        add_terms(ordinary, ordinary_kind(salient_));
        if (salient_.columns.empty()) return;
        Codebooks& set = add_set(part, from_.salient_scales, from_.salient_means, 2, 2);
        Positions book(32 * words, -1);
        for (size_t i = 0; i < salient_.columns.size(); i++) book[salient_.columns[i]] = salient_.groups[i];
        const std::vector<Run>& runs = assign(set, book, kStepWords, true);
        add_terms(set, salient_kind(salient_, runs));
    }

    HaarPlanes from_;
    SalientColumns salient_;
};

class HaarDotsMatrix : public CodedMatrix {
   public:
    HaarDotsMatrix(int64_t n, int64_t m, int64_t group_size, bool along_rows, const HaarPlanes& from)
        : CodedMatrix(n, m, group_size, Form::digits), salient_(from.salient, m, group_size) {
        most_tokens = kFewTokens;
        if (along_rows) brought_together_.cut(salient_);
        else brought_together_.pick(salient_, m, group_size);
        const std::vector<int32_t> groups = groups_of_words(m, group_size);
        const int64_t bands = along_rows ? 2 : 1;
        ZonedSet &ordinary = dots_.ordinary, &of_salient = dots_.of_salient;
        possible_ = !groups.empty() && brought_together_.possible && lists_.assign(ordinary.scales, from.scales, 2 * bands, groups) &&
                    lists_.assign(ordinary.means, from.means, from.means_each * bands, groups) &&
                    lists_.assign(of_salient.scales, from.salient_scales, 2, brought_together_.groups, 2) &&
                    lists_.assign(of_salient.means, from.salient_means, 2, brought_together_.groups, 2);
        ordinary.means_each = from.means.data ? from.means_each : 0;
        of_salient.means_each = from.salient_means.data ? 2 : 0;
        dots_.along_rows = along_rows;
        dots_.signs = from.signs;
        dots_.zones = from.zones;
        dots_.salient_signs = from.salient_signs;
        dots_.salient_zones = from.salient_zones;
        dots_.salient = brought_together_.blocks;
        // Along rows, a salient column adds to what all columns are coded as.
        if (along_rows) add_kind({{}, {}, true, words, &runs});
        else ordinary_kind(salient_);
        if (dots_.salient.count) {
            add_kind({brought_together_.columns, {}, false, kChunkWords * dots_.salient.count, &runs});
        }
    }
    bool possible() const { return possible_; }
    // Exact, three digits take longer than halfwords.
    Rows rows(const Isa& isa, bool int8) const override { return int8 ? isa.haar_dots : nullptr; }
    const void* self() const override { return &dots_; }

   private:
    SalientColumns salient_;
    SalientLists brought_together_;
    ChunkGroupLists lists_;
    HaarDots dots_{};
    bool possible_;
};

}  // namespace

std::unique_ptr<Matrix> haar_planes(int64_t n, int64_t m, int64_t group_size, bool along_rows, const HaarPlanes& from) {
    auto matrix = std::make_unique<HaarPlanesMatrix>(n, m, group_size, along_rows, from, Form::tables);
    // Words of even and of odd columns are made of two: each has to be of one group.
    if (group_size == 0 || group_size >= m || group_size % 64 == 0) {
        matrix->better.push_back(
            std::make_unique<HaarPlanesMatrix>(n, m, group_size, along_rows, from, Form::halfwords));
    }
    auto dots = std::make_unique<HaarDotsMatrix>(n, m, group_size, along_rows, from);
    if (dots->possible()) matrix->better.push_back(std::move(dots));
    return matrix;
}

}  // namespace kernels
