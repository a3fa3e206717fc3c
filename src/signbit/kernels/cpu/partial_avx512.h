// Salient weights with AVX-512: 48 decoded at a time, 16 multiplied at a time.

#pragma once

#include "integers_avx512.h"
#include "partial.h"

namespace kernels {
namespace avx512 {

template <>
struct PartialOperations<Avx512> {
    // Up to 8 bits of 48 integers, as bytes.
    static __m512i bytes(const BitPlanes& planes, int64_t at, int64_t bits) {
        __m512i values = _mm512_setzero_si512();
        for (int64_t plane = 0; plane < bits; plane++) {
            const __m512i unit = _mm512_set1_epi8(static_cast<char>(1 << plane));
            values = _mm512_mask_add_epi8(values, bits_of_plane(planes, plane, at), values, unit);
        }
        return values;
    }
    static __m512i sixteen(__m512i bytes, int64_t part) {
        const __m128i parts[] = {_mm512_castsi512_si128(bytes), _mm512_extracti32x4_epi32(bytes, 1),
                                 _mm512_extracti32x4_epi32(bytes, 2)};
        return _mm512_cvtepu8_epi32(parts[part]);
    }

    static int64_t places(const BitPlanes& gaps, int64_t at, int64_t count, uint32_t& place, uint32_t* places) {
        const uint32_t escape = (1u << gaps.bits) - 1;
        const __m512i low = bytes(gaps, at, least(gaps.bits, 8)), none = _mm512_setzero_si512();
        const __m512i high = gaps.bits > 8 ? bytes({gaps.data + 8 * gaps.width, gaps.width, gaps.bits - 8}, at,
                                                   gaps.bits - 8) : none;
        const __m512i escapes = _mm512_set1_epi32(static_cast<int>(escape));
        int64_t found = 0;
#pragma GCC unroll 3
        for (int64_t part = 0; part < 3; part++) {
            const __mmask16 there = static_cast<__mmask16>((1u << greatest(0, least(16, count - 16 * part))) - 1);
            __m512i gap = sixteen(low, part);
            if (gaps.bits > 8) gap = _mm512_or_si512(gap, _mm512_slli_epi32(sixteen(high, part), 8));
            const __mmask16 marks = _mm512_mask_cmpneq_epi32_mask(there, gap, escapes);
            const __m512i steps = _mm512_mask_add_epi32(gap, marks, gap, _mm512_set1_epi32(1));
            __m512i sums = _mm512_maskz_mov_epi32(there, steps);
            sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, none, 15));
            sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, none, 14));
            sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, none, 12));
            sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, none, 8));
            sums = _mm512_add_epi32(sums, _mm512_set1_epi32(static_cast<int>(place)));
            const __m512i own = _mm512_sub_epi32(sums, _mm512_set1_epi32(1));
            _mm512_storeu_si512(places + found, _mm512_maskz_compress_epi32(marks, own));
            found += __builtin_popcount(marks);
            place = static_cast<uint32_t>(_mm_extract_epi32(_mm512_extracti32x4_epi32(sums, 3), 3));
        }
        return found;
    }

    static void codes(const BitPlanes& planes, int64_t at, int64_t, uint8_t* codes) {
        _mm512_storeu_si512(codes, bytes(planes, at, planes.bits));
    }

    class Sums {
       public:
        Sums(const Partial& w, const Activations& x) : w_(w), x_(x), groups_(w.ordinary.scales[0].per_row) {}

        void begin(int64_t row) {
            for (int64_t token = 0; token < x_.tokens; token++) sum_[token] = _mm512_setzero_ps();
            if (groups_ > kMostGroups) return;
            alignas(64) float scales[kMostGroups], means[kMostGroups];
            load(w_.code_scales, row, slope_);
            load(w_.code_offsets, row, offset_);
            load(w_.ordinary.scales[0], row, scales);
            load(w_.ordinary.means, row, means);
            for (int64_t i = 0; i < groups_; i += 16) {
                const __m512 slope = _mm512_load_ps(slope_ + i), scale = _mm512_load_ps(scales + i);
                _mm512_store_ps(middle_ + i, _mm512_fmsub_ps(slope, _mm512_set1_ps(0.5f), scale));
                _mm512_store_ps(offset_ + i, _mm512_sub_ps(_mm512_load_ps(offset_ + i), _mm512_load_ps(means + i)));
            }
        }
        void add(const SalientRow& salient) {
            const uint8_t* signs = w_.ordinary.signs[0].data + salient.row * w_.ordinary.signs[0].row_bytes;
            for (int64_t i = 0; i < salient.count; i += 16) {
                const __mmask16 there = static_cast<__mmask16>((1u << least(16, salient.count - i)) - 1);
                const __m512i column = _mm512_maskz_loadu_epi32(there, salient.column + i);
                const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(
                    reinterpret_cast<const __m128i*>(salient.code + i))));
                const __m512i word = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there,
                                                                 _mm512_srli_epi32(column, 5), signs, 4);
                const __m512i sign = _mm512_slli_epi32(_mm512_srlv_epi32(word, _mm512_and_si512(
                    column, _mm512_set1_epi32(31))), 31);
                __m512 slope, middle, offset;
                corrections(salient, i, column, there, slope, middle, offset);
                const __m512 size = _mm512_fmadd_ps(slope, code, middle);
                const __m512 value = _mm512_maskz_add_ps(there, _mm512_xor_ps(size, _mm512_castsi512_ps(sign)), offset);
                for (int64_t token = 0; token < x_.tokens; token++) {
                    const __m512 x =
                        _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, column, numbers(x_, token), 4);
                    sum_[token] = _mm512_fmadd_ps(value, x, sum_[token]);
                }
            }
        }
        float total(int64_t token) const { return _mm512_reduce_add_ps(sum_[token]); }

       private:
        static constexpr int64_t kMostGroups = 256;

        void load(const Coefficients& of, int64_t row, float* to) const {
            if (!of.data || of.per_row == 1) {
                float value = 0.0f;
                const int64_t width = of.type == Scalar::f32 ? 4 : 2;
                if (of.data) to_floats(static_cast<const char*>(of.data) + row * width, of.type, 1, &value);
                for (int64_t i = 0; i < groups_; i += 16) _mm512_store_ps(to + i, _mm512_set1_ps(value));
                return;
            }
            const int64_t width = of.type == Scalar::f32 ? 4 : 2;
            IntegerOperations<Avx512>::floats(static_cast<const char*>(of.data) + row * of.per_row * width, of.type,
                                              of.per_row, to);
        }
        void corrections(const SalientRow& salient, int64_t i, __m512i column, __mmask16 there, __m512& slope,
                         __m512& middle, __m512& offset) const {
            if (groups_ > kMostGroups) {
                alignas(64) float values[3][16];
                for (int64_t k = 0; k < least(16, salient.count - i); k++) {
                    const Correction own = salient.correction(salient.column[i + k] / w_.group_size);
                    values[0][k] = own.slope;
                    values[1][k] = own.middle;
                    values[2][k] = own.offset;
                }
                slope = _mm512_maskz_load_ps(there, values[0]);
                middle = _mm512_maskz_load_ps(there, values[1]);
                offset = _mm512_maskz_load_ps(there, values[2]);
                return;
            }
            if (groups_ == 1) {
                slope = _mm512_set1_ps(slope_[0]);
                middle = _mm512_set1_ps(middle_[0]);
                offset = _mm512_set1_ps(offset_[0]);
                return;
            }
            // The half keeps the quotient away from whole numbers, which its rounding must not cross.
            const __m512 at = _mm512_add_ps(_mm512_cvtepi32_ps(column), _mm512_set1_ps(0.5f));
            const __m512 per_column = _mm512_set1_ps(1.0f / static_cast<float>(w_.group_size));
            const __m512i group = _mm512_cvttps_epi32(_mm512_mul_ps(at, per_column));
            slope = of_groups(slope_, group);
            middle = of_groups(middle_, group);
            offset = of_groups(offset_, group);
        }
        __m512 of_groups(const float* table, __m512i group) const {
            if (groups_ > 32) return _mm512_i32gather_ps(group, table, 4);
            return _mm512_permutex2var_ps(_mm512_load_ps(table), group, _mm512_load_ps(table + 16));
        }

        const Partial& w_;
        const Activations& x_;
        int64_t groups_;
        alignas(64) float slope_[kMostGroups], middle_[kMostGroups], offset_[kMostGroups];
        __m512 sum_[kTokens];
    };
};

}  // namespace avx512
}  // namespace kernels
