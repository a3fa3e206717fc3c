// Split planes (layouts/split_planes.py): ordinary columns in two zones, salient columns with a residual.
//
//     ordinary   y += scale0 (T - Z - 2 U) + scale1 (Z - 2 B) + mean0 (T - Z) + mean1 Z       (codebooks.h)
//     salient    y += scale_o (T - 2 A) + scale_r (T - 2 R) + mean T
//                with a bitmap the same as ordinary, twice: for signs with scale_o, and for residual signs with scale_r
//
// where A: the sum of activations with a negative weight, R: with a negative residual. Scales of columns make a kind of
// activations for each scale; means are not multiplied with them, and have one more.

#include "coded_matrix.h"
#include "dots.h"
#include "matrices.h"

namespace kernels {
namespace {

class SplitPlanesMatrix : public CodedMatrix {
   public:
    SplitPlanesMatrix(int64_t n, int64_t m, int64_t group_size, const SplitPlanes& from, Form form)
        : CodedMatrix(n, m, group_size, form), from_(from), salient_(from.salient, m, group_size) {
        CodedPlanes& part = add_part(from.signs, from.zones);
        add_ordinary(part);
        if (!salient_.columns.empty()) add_salient(part);
    }

   private:
    void add_ordinary(CodedPlanes& part) {
        Codebooks& set = add_set(part, from_.scales, from_.means, 2, 2);
        int32_t kinds[2];
        if (from_.column_scales.data) {
            for (int zone = 0; zone < 2; zone++) {
                kinds[zone] = ordinary_kind(salient_, floats_of(from_.column_scales, zone * m, m));
            }
        } else {
            kinds[0] = kinds[1] = ordinary_kind(salient_);
        }
        add_zones(set, Bits::negative0, Bits::negative1, 0, 1, kinds[0], kinds[1]);
        if (set.means_each) add_means(set, from_.column_scales.data ? ordinary_kind(salient_) : kinds[0]);
    }

    void add_salient(CodedPlanes& part) {
        const bool bitmap = from_.residual.data;
        const int zones = bitmap ? 2 : 1, count = static_cast<int>(salient_.columns.size());
        Codebooks& set = add_set(part, from_.salient_scales, from_.salient_means, 2 * zones, zones);
        Positions book(32 * words, -1);
        for (int i = 0; i < count; i++) book[salient_.columns[i]] = salient_.groups[i];
        const std::vector<Run>& runs = assign(set, book, kStepWords, true);

        // Scales are in the order: zone, and of each the first order and the residual.
        int32_t kinds[4];
        const bool scaled = from_.salient_column_scales.data;
        const int32_t plain = !scaled || set.means_each ? salient_kind(salient_, runs) : -1;
        for (int i = 0; i < 2 * zones; i++) {
            kinds[i] = scaled ? salient_kind(salient_, runs, floats_of(from_.salient_column_scales, i * count, count))
                              : plain;
        }
        if (bitmap) {
            add_zones(set, Bits::negative0, Bits::negative1, 0, 2, kinds[0], kinds[2]);
            add_zones(set, Bits::residual0, Bits::residual1, 1, 3, kinds[1], kinds[3]);
            add_residual(part);
        } else {
            add_signs(set, Bits::signs, 0, kinds[0]);
            add_signs(set, Bits::zones, 1, kinds[1]);
        }
        add_means(set, plain);
    }

    // Where the bits of residual signs belong.
    void add_residual(CodedPlanes& part) {
        part.residual = from_.residual;
        const int64_t blocks = (words + kBlockWords - 1) / kBlockWords;
        std::vector<Move> moves;
        std::vector<int64_t> ends(blocks, 0);
        for (int32_t i = 0; i < static_cast<int32_t>(salient_.columns.size()); i++) {
            const int32_t column = salient_.columns[i];
            const int64_t block = column / (32 * kBlockWords);
            Move move{i / 32, static_cast<int32_t>(column / 32 % kBlockWords), column % 32 - i % 32, 1u << column % 32};
            Move* last = ends[block] ? &moves.back() : nullptr;
            if (last && last->from == move.from && last->to == move.to && last->left == move.left) {
                last->mask |= move.mask;
            } else {
                moves.push_back(move);
            }
            ends[block] = static_cast<int64_t>(moves.size());
        }
        for (int64_t block = 1; block < blocks; block++) ends[block] = ends[block] ? ends[block] : ends[block - 1];
        part.moves = keep(moves_, std::move(moves));
        part.moves_end = keep(ends_, std::move(ends));
    }

    SplitPlanes from_;
    SalientColumns salient_;
};

}  // namespace

std::unique_ptr<Matrix> split_planes(int64_t n, int64_t m, int64_t group_size, const SplitPlanes& from) {
    auto matrix = std::make_unique<SplitPlanesMatrix>(n, m, group_size, from, Form::tables);
    if (!from.residual.data && !groups_of_words(m, group_size).empty()) {
        matrix->better.push_back(std::make_unique<SplitPlanesMatrix>(n, m, group_size, from, Form::halfwords));
    }
    return matrix;
}

}  // namespace kernels
