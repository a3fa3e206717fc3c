// Packed matrices, one function a layout. What they are made of is only looked at, and must outlive them.

#pragma once

#include <memory>
#include <vector>

#include "kernels.h"

namespace kernels {

// Plain floats [n, m].
std::unique_ptr<Matrix> dense(int64_t n, int64_t m, const float* weights);

// One plane and its scales after the other; means and column_scales [1, m] may have no data.
std::unique_ptr<Matrix> sign_planes(int64_t n, int64_t m, int64_t group_size, const std::vector<Plane>& signs,
                                    const std::vector<Coefficients>& scales, Coefficients means,
                                    Coefficients column_scales);

// The tensors of layouts/split_planes.py, a row of W each (maps and scales of columns: one row); those that a spec does
// not have are left without data. Which columns are salient, and the scales of columns, are read once and for all.
struct SplitPlanes {
    Plane signs, zones, residual, salient;
    Coefficients scales, means, salient_scales, salient_means, column_scales, salient_column_scales;
};
std::unique_ptr<Matrix> split_planes(int64_t n, int64_t m, int64_t group_size, const SplitPlanes& from);

// The same of layouts/haar_planes.py; a codebook of ordinary columns has ``means_each`` means.
struct HaarPlanes {
    Plane signs, zones, salient, salient_signs, salient_zones;
    Coefficients scales, means, salient_scales, salient_means;
    int64_t means_each;
};
std::unique_ptr<Matrix> haar_planes(int64_t n, int64_t m, int64_t group_size, bool along_rows, const HaarPlanes& from);

// Codes of ``bits`` bits and, unless they are the middle code everywhere, zero points; rows as in layouts/fields.py.
std::unique_ptr<Matrix> integers(int64_t n, int64_t m, int64_t group_size, int64_t bits, Plane codes,
                                 Coefficients scales, Plane zeros);

// The tensors of layouts/structured.py; those that a spec does not have are left without data.
struct StructuredTensors {
    Plane signs, ranks, regions, salient;
    Coefficients scales, means, salient_scales, salient_means;
};
std::unique_ptr<Matrix> structured(int64_t n, int64_t m, int64_t group_size, int64_t keep, int64_t of, int64_t regions,
                                   const StructuredTensors& from);

// The tensors of layouts/partial.py: positions are bit planes of gaps of ``gap_bits``, or with 0 a bitmap.
struct PartialTensors {
    Plane signs, positions, codes;
    int64_t gap_bits, code_bits;
    const int32_t* ends;
    Coefficients scales, means, code_scales, code_offsets;
};
std::unique_ptr<Matrix> partial(int64_t n, int64_t m, int64_t group_size, const PartialTensors& from);

}  // namespace kernels
