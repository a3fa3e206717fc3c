#include "structured.h"

#include <algorithm>

#include "coded_matrix.h"
#include "dots.h"
#include "matrices.h"

namespace kernels {
namespace {

int bit_count(uint32_t bits) {
    int count = 0;
    for (; bits; bits &= bits - 1) count++;
    return count;
}

class StructuredMatrix : public Matrix {
   public:
    StructuredMatrix(int64_t n, int64_t m, int64_t group_size, int64_t keep, int64_t of, int64_t regions,
                     const StructuredTensors& from)
        : Matrix(n, m, group_size) {
        structured_.n = n;
        structured_.m = m;
        structured_.keep = keep;
        structured_.of = of;
        structured_.regions_count = regions;
        structured_.signs = from.signs;
        structured_.ranks = from.ranks;
        structured_.regions = from.regions;
        structured_.scales = from.scales;
        structured_.means = from.means;
        structured_.salient_scales = from.salient_scales;
        structured_.salient_means = from.salient_means;
        tabulate_choices();
        tabulate_trits();
        if (from.salient.data) find_salient(from.salient, group_size ? group_size : m);
    }

    int64_t kinds() const override { return salient_.empty() ? 1 : 2; }
    void columns(int64_t kind, const float* x, float* out) const override {
        if (kind == 0) Matrix::columns(kind, x, out);
        else std::fill(out, out + 32 * words, 0.0f);
        for (int32_t column : salient_columns_) out[column] = kind ? x[column] : 0.0f;
    }
    Rows rows(const Isa& isa, bool int8) const override { return isa.structured[int8]; }
    const void* self() const override { return &structured_; }

   private:
    // As in layouts/ranks.py: of all ways to keep so many, in the order of the integers whose bits are the columns.
    void tabulate_choices() {
        for (uint32_t bits = 0; bits < 1u << structured_.of; bits++) {
            if (bit_count(bits) == structured_.keep) choices_.push_back(static_cast<uint16_t>(bits));
        }
        while (1ull << structured_.rank_bits < choices_.size()) structured_.rank_bits++;
        choices_.resize(size_t{1} << structured_.rank_bits);
        if (structured_.of == 8) {
            for (size_t i = 0; i < 128; i++) {
                choices_of_8_.push_back(static_cast<uint8_t>(choices_[i % choices_.size()]));
            }
        }
        if (64 % structured_.of == 0) {
            structured_.cells = 64 / structured_.of;
            structured_.kept = structured_.cells * structured_.keep;
        }
        for (int64_t i = 0; i < 64; i++) {
            structured_.ranks_of_8[i] = static_cast<uint8_t>(i / 8 * structured_.rank_bits + i % 8);
        }
        structured_.choices = choices_.data();
        structured_.choices_of_8 = choices_of_8_.data();
    }

    void tabulate_trits() {
        trits_.assign(512, 0);
        for (int byte = 0; byte < 256; byte++) {
            for (int trit = 0, rest = byte; trit < kTritsPerByte; trit++, rest /= 3) {
                if (rest % 3) trits_[256 * (rest % 3 - 1) + byte] |= 1 << trit;
            }
        }
        structured_.trits = trits_.data();
    }

    void find_salient(const Plane& map, int64_t group_size) {
        constexpr int64_t step = 128;
        for (int32_t column = 0; column < m; column++) {
            salient_.push_back(map.data[column / 8] >> column % 8 & 1);
            if (salient_.back()) salient_columns_.push_back(column);
        }
        int32_t group = -1;
        int64_t last_group = -1;
        const int64_t block_columns = 32 * kBlockWords;
        for (int64_t block = 0; block < m; block += block_columns) {
            const int64_t block_end = std::min(block + block_columns, m);
            for (int64_t start = block; start < block_end;) {
                const int64_t own = start / group_size;
                const int64_t end = std::min({block_end, (own + 1) * group_size, (start / step + 1) * step});
                if (std::find(salient_.begin() + start, salient_.begin() + end, true) != salient_.begin() + end) {
                    group += own != last_group;
                    last_group = own;
                    add_piece(start, end, block, group);
                }
                start = end;
            }
            pieces_end_.push_back(static_cast<int64_t>(pieces_.size()));
        }
        structured_.pieces = pieces_.data();
        structured_.pieces_end = pieces_end_.data();
        for (int wide = 0; wide < 2; wide++) structured_.lookups[wide] = lookups_[wide].data();
    }

    void add_piece(int64_t start, int64_t end, int64_t block, int32_t group) {
        SalientPiece piece{static_cast<int32_t>((start - block) / 32), group, {}, {}};
        for (int wide = 0; wide < 2; wide++) {
            const uint32_t found = wide ? 0x000f000f : 0xf;
            piece.from[wide] = static_cast<int64_t>(lookups_[wide].size());
            for (int64_t word = start / 32; 32 * word < end; word++) {
                uint32_t mask = 0;
                for (int64_t column = std::max(start, 32 * word); column < std::min(end, 32 * word + 32); column++) {
                    mask |= static_cast<uint32_t>(salient_[column]) << column % 32;
                }
                for (int32_t nibble = 0; nibble < (wide ? 4 : 8); nibble++) {
                    const uint32_t own = mask >> 4 * nibble & found;
                    if (own) lookups_[wide].push_back({static_cast<int32_t>(word - block / 32), nibble, own});
                }
            }
            piece.upto[wide] = static_cast<int64_t>(lookups_[wide].size());
        }
        pieces_.push_back(piece);
    }

    Structured structured_{};
    std::vector<uint16_t> choices_;
    std::vector<uint8_t> choices_of_8_, trits_;
    std::vector<bool> salient_;
    std::vector<int32_t> salient_columns_;
    std::vector<SalientPiece> pieces_;
    std::vector<int64_t> pieces_end_;
    std::vector<Lookup> lookups_[2];
};

class StructuredDotsMatrix : public CodedMatrix {
   public:
    StructuredDotsMatrix(int64_t n, int64_t m, int64_t group_size, const Structured& of, const Plane& map)
        : CodedMatrix(n, m, group_size, Form::digits), salient_(map, m, group_size) {
        most_tokens = kFewTokens;
        const std::vector<int32_t> groups = groups_of_words(m, group_size);
        brought_together_.pick(salient_, m, group_size);
        possible_ = of.regular() && words <= kMostStructuredWords && !groups.empty() && brought_together_.possible &&
                    lists_.assign(dots_.scales, of.scales, of.regions_count, groups) &&
                    lists_.assign(dots_.means, of.means, of.regions_count, groups) &&
                    lists_.assign(dots_.salient_scales, of.salient_scales, 2, brought_together_.groups, 2) &&
                    lists_.assign(dots_.salient_means, of.salient_means, 1, brought_together_.groups, 2);
        dots_.of = &of;
        dots_.salient = brought_together_.blocks;
        ordinary_kind(salient_);
        if (dots_.salient.count) {
            add_kind({brought_together_.columns, {}, false, kChunkWords * dots_.salient.count, &runs});
        }
    }
    bool possible() const { return possible_; }
    Rows rows(const Isa& isa, bool int8) const override { return isa.structured_dots[int8]; }
    const void* self() const override { return &dots_; }

   private:
    SalientColumns salient_;
    SalientLists brought_together_;
    ChunkGroupLists lists_;
    StructuredDots dots_{};
    bool possible_;
};

// The same where some of 8 columns are kept, but not all.
class KeptDotsMatrix : public Matrix {
   public:
    KeptDotsMatrix(const StructuredMatrix& all, int64_t group_size, const Plane& map)
        : Matrix(all.n, all.m, group_size), all_(all) {
        most_tokens = kFewTokens;
        const Structured& of = *static_cast<const Structured*>(all.self());
        const int64_t size = group_size ? group_size : m, cells = 8 / std::max<int64_t>(of.of, 1);
        possible_ = cells * of.of == 8 && of.keep < of.of && m <= kMostDotColumns &&
                    (size % kStepColumns == 0 || size >= m);
        if (!possible_) return;
        tabulate_pairs(of, cells);
        const SalientColumns salient(map, m, group_size);
        const int64_t chunks = (words + kChunkWords - 1) / kChunkWords;
        for (int64_t step = 0; step < chunks * kChunkSteps; step++) {
            const int64_t column = std::min(step * kStepColumns, m - 1);
            groups_.push_back({static_cast<int32_t>(column / size * of.regions_count), -1});
        }
        for (size_t i = 0; i < salient.columns.size(); i++) {
            groups_[salient.columns[i] / kStepColumns].salient = 2 * salient.groups[i];
        }
        dots_ = {&of, of.rank_bits * cells, of.keep * cells, pairs_, groups_.data(), chunks};
    }
    bool possible() const { return possible_; }
    int64_t kinds() const override { return all_.kinds(); }
    void columns(int64_t kind, const float* x, float* out) const override { all_.columns(kind, x, out); }
    Form form(int64_t) const override { return Form::numbers; }
    Rows rows(const Isa& isa, bool int8) const override { return isa.kept_dots[int8]; }
    const void* self() const override { return &dots_; }

   private:
    void tabulate_pairs(const Structured& of, int64_t cells) {
        const uint32_t ranks = (1u << of.rank_bits) - 1;
        for (uint32_t i = 0; i < 128; i++) {
            uint32_t kept = 0;
            for (int64_t cell = 0; cell < cells; cell++) {
                kept |= static_cast<uint32_t>(of.choices[i >> of.rank_bits * cell & ranks]) << of.of * cell;
            }
            for (int number = 0; kept; kept &= kept - 1, number++) {
                pairs_[number / 2 * 128 + i] |= bit_count((kept & -kept) - 1) << 4 * (number % 2);
            }
        }
    }

    const StructuredMatrix& all_;
    uint8_t pairs_[512] = {};
    std::vector<KeptDots::Groups> groups_;
    KeptDots dots_{};
    bool possible_;
};

}  // namespace

std::unique_ptr<Matrix> structured(int64_t n, int64_t m, int64_t group_size, int64_t keep, int64_t of, int64_t regions,
                                   const StructuredTensors& from) {
    auto matrix = std::make_unique<StructuredMatrix>(n, m, group_size, keep, of, regions, from);
    const auto* own = static_cast<const Structured*>(matrix->self());
    auto kept = std::make_unique<KeptDotsMatrix>(*matrix, group_size, from.salient);
    if (kept->possible()) {
        matrix->better.push_back(std::move(kept));
        return matrix;
    }
    auto dots = std::make_unique<StructuredDotsMatrix>(n, m, group_size, *own, from.salient);
    if (dots->possible()) matrix->better.push_back(std::move(dots));
    return matrix;
}

}  // namespace kernels
