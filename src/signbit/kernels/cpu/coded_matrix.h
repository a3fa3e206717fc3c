// What split planes and Haar planes are made of: terms, kinds of activations, and lists of what is to be looked up.

#pragma once

#include <deque>

#include "codebooks.h"

namespace kernels {

// Where salient columns are, and to which of the groups with salient columns each belongs.
struct SalientColumns {
    std::vector<int32_t> columns, groups;

    // map: bit 1 = salient; without data there are none.
    SalientColumns(Plane map, int64_t m, int64_t group_size);
};

class CodedMatrix : public Matrix {
   public:
    // A kind of activations: out[i] = x[from[i]] * factor[i]; from -1: 0. One that is ``haar`` takes transformed x.
    struct Kind {
        std::vector<int32_t> from;
        std::vector<float> factor;  // empty: all 1
        bool haar;
        int64_t words;
        const std::vector<Run>* runs;
    };

    // form: that of all kinds; rows() is for tables and halfwords.
    CodedMatrix(int64_t n, int64_t m, int64_t group_size, Form form);

    Form form(int64_t) const override { return form_; }
    int64_t kinds() const override { return static_cast<int64_t>(kinds_.size()); }
    void columns(int64_t kind, const float* x, float* out) const override;
    int64_t kind_words(int64_t kind) const override { return kinds_[kind].words; }
    const std::vector<Run>& kind_runs(int64_t kind) const override { return *kinds_[kind].runs; }
    Rows rows(const Isa& isa, bool int8) const override {
        return form_ == Form::halfwords ? isa.coded_halfwords[int8] : isa.coded[int8];
    }
    const void* self() const override { return &coded_; }

   protected:
    using Positions = std::vector<int32_t>;

    // Each returns the number of the kind. The salient columns keep their place; kinds are zero elsewhere.
    int32_t ordinary_kind(const SalientColumns& without, const std::vector<float>& factor = {});
    int32_t salient_kind(const SalientColumns& salient, const std::vector<Run>& runs,
                         const std::vector<float>& factor = {});
    int32_t add_kind(Kind kind);

    CodedPlanes& add_part(Plane signs, Plane zones);
    Codebooks& add_set(CodedPlanes& part, Coefficients scales, Coefficients means, int64_t scales_each,
                       int64_t means_each);

    // The runs of positions with the same codebook [32 * words] (-1: none), none over a multiple of ``cut`` words; and
    // with ``sparse`` the lookups that find them.
    const std::vector<Run>& assign(Codebooks& set, const Positions& book, int64_t cut, bool sparse);

    int64_t group_size_;
    Form form_;
    Coded coded_{};

    // Terms. Numbers of a codebook are counted from its first scale; its first mean is number scales_each.
    static void add(Codebooks& set, Bits bits, int32_t kind, int64_t number, float weight);
    // A scale of weights in each zone, whose signs are (negative0, negative1); kinds may differ by zone.
    static void add_zones(Codebooks& set, Bits negative0, Bits negative1, int64_t scale0, int64_t scale1, int32_t kind0,
                          int32_t kind1);
    // A scale of all weights, with this plane of signs.
    static void add_signs(Codebooks& set, Bits signs, int64_t scale, int32_t kind);
    // One mean, or one of each zone.
    static void add_means(Codebooks& set, int32_t kind);

    // A list that stays where it is.
    template <class T>
    const T* keep(std::deque<std::vector<T>>& lists, std::vector<T> list) {
        lists.push_back(std::move(list));
        return lists.back().data();
    }
    std::deque<std::vector<int64_t>> ends_;
    std::deque<std::vector<int32_t>> books_;
    std::deque<std::vector<Lookup>> lookups_;
    std::deque<std::vector<Move>> moves_;
    std::deque<std::vector<Run>> runs_;

   private:
    void haar(const float* x, float* out) const;

    std::vector<Kind> kinds_;
};

// Coefficients as floats.
std::vector<float> floats_of(Coefficients coefficients, int64_t first, int64_t count);

}  // namespace kernels
