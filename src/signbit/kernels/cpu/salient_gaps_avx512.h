// The salient weights of partial matrices, with AVX-512: from gaps to places, and their codes beside them.
//
// Places are prefix sums over 64 gaps at a time, and one byte holds them: they must be known modulo 64 only, or 128 where
// two windows are looked up together. What else is needed is where in the sequence of gaps each window begins. Gaps are
// shorter than a window, so each window, but those behind the last salient weight of a strip, has the end of one, and
// the windows' first gaps are simply those that end in another window than the one before.

#pragma once

#include "dots_avx512.h"
#include "partial.h"

namespace kernels {
namespace avx512 {

constexpr int64_t kDecoded = 512;  // integers that are decoded at a time: 64 bytes of each plane

// 512 integers from 8 * byte on, as bytes; ``odd`` makes 2 q + 1 of q. Planes are transposed, first whole bytes between
// vectors, so that 8 integers have a word of 64 bits, then bits within the words.
inline void integers_of_planes(const BitPlanes& planes, int64_t byte, bool odd, __m512i* out) {
    const int64_t left = greatest(least(planes.width - byte, 64), 0);
    const __mmask64 present = _bzhi_u64(~0ull, static_cast<unsigned>(left));
    // Word 8 l + c from 4 c + l, since unpacking goes by quarters of vectors.
    const __m512i row = _mm512_set1_epi64(0x000c000800040000), up = _mm512_set1_epi64(0x0010001000100010);
    const __m512i quarter = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
    const __m512i order = _mm512_add_epi16(_mm512_mask_add_epi64(row, 0xaa, row, up),
                                           _mm512_mullo_epi64(quarter, _mm512_set1_epi64(0x0001000100010001)));
    // The highest plane first: that is how vgf2p8affineqb has it.
    __m512i p[8];
#pragma GCC unroll 8
    for (int64_t i = 0; i < 8; i++) {
        const int64_t plane = 7 - i - odd;
        p[i] = _mm512_set1_epi8(plane < 0 ? -1 : 0);
        if (plane < 0 || plane >= planes.bits) continue;
        const uint8_t* bytes = planes.data + plane * planes.width + byte;
        p[i] = _mm512_permutexvar_epi16(order, _mm512_maskz_loadu_epi8(present, bytes));
        Avx512::prefetch_far(bytes + 1024);
    }
    __m512i twos[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        twos[i] = _mm512_unpacklo_epi8(p[2 * i], p[2 * i + 1]);
        twos[4 + i] = _mm512_unpackhi_epi8(p[2 * i], p[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        fours[i] = _mm512_unpacklo_epi16(twos[i], twos[i + 1]);
        fours[i + 1] = _mm512_unpackhi_epi16(twos[i], twos[i + 1]);
    }
    const __m512i unit = _mm512_set1_epi64(static_cast<long long>(0x8040201008040201));
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __m512i low = fours[i / 4 * 4 + i / 2 % 2], high = fours[i / 4 * 4 + 2 + i / 2 % 2];
        const __m512i eight = i % 2 ? _mm512_unpackhi_epi32(low, high) : _mm512_unpacklo_epi32(low, high);
        out[i] = _mm512_gf2p8affine_epi64_epi8(unit, eight, 0);
    }
}

// The gaps of a strip and what they lead to, decoded a little more than a row at a time.
class SalientGaps {
   public:
    SalientGaps(const Partial& w, int64_t strip) : w_(w), windows_(w.m / kDotWindow) {
        next_code_ = strip ? w.ends[2 * strip - 2] : 0;
        gap_ = strip ? w.ends[2 * strip - 1] : 0;
        end_ = w.ends[2 * strip + 1];
        codes_start_ = codes_end_ = next_code_ / 8 * 8;
        last_ = _mm512_set1_epi8(-1);
    }
    // The strip's first row, or the one behind that whose gaps end before ``first``.
    void next_row(int64_t first) {
        const bool begins = begun_ == 0;
        first_ = first;
        if (!begins) row_ += windows_;
        if (first_ > kKept) drop();
        while (begun_ <= row_ + windows_ && gap_ < end_) decode();
        for (; begun_ <= row_ + windows_; begun_++) begin_[begun_] = static_cast<uint8_t>(gaps_);
        if (begins) first_ = begin_[0];
    }
    // The first gap that ends in each of the row's windows, and behind them the next row's first, modulo 256; the first
    // of all is number first().
    const uint8_t* begin() const { return begin_ + row_; }
    int64_t first() const { return first_; }
    // Up to 32 of ``count`` gaps: the places in the strip that they end in, modulo 256, and 2 q + 1 of the salient weights
    // there, or 0.
    struct Some {
        __m256i place, code;
    };
    [[gnu::always_inline]] Some at(int64_t first, int64_t count) const {
        // Masks of AVX-512 take longer than this to come from a number.
        alignas(64) static constexpr uint8_t own[64] = {
            255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
            255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
        const auto load = [](const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); };
        return {load(place_ + first), _mm256_and_si256(load(code_ + first), load(own + 32 - least(count, 32)))};
    }

   private:
    static constexpr int64_t kKept = 2048, kMost = kKept + kMostDotColumns + 2 * kDecoded;

    // What was before this row, but for its place modulo 256.
    void drop() {
        const int64_t from = first_ / 256 * 256;
        for (int64_t i = from; i < gaps_; i += 64) {
            for (uint8_t* bytes : {place_, code_}) {
                _mm512_store_si512(bytes + i - from, _mm512_load_si512(bytes + i));
            }
        }
        first_ -= from;
        gaps_ -= from;
        begun_ -= row_;
        for (int64_t i = 0; i < begun_; i++) begin_[i] = begin_[row_ + i];
        row_ = 0;
    }
    void decode() {
        if (w_.gaps.bits < 6) decode<false>();
        else decode<true>();
    }
    // Wide: gaps of 6 bits, of which 8 may pass 256 columns, and 64 more than 32 windows.
    template <bool Wide>
    void decode() {
        while (codes_end_ < next_code_ + kDecoded) decode_codes();
        __m512i gaps[kDecoded / 64];
        const int64_t byte = gap_ / 8, count = least(kDecoded, end_ - 8 * byte);
        integers_of_planes(w_.gaps, byte, false, gaps);
        Cursor at{gaps_, begun_, next_code_ - codes_start_, last_};
        if (count == kDecoded && gap_ % 8 == 0) {
#pragma GCC unroll 8
            for (int64_t i = 0; i < kDecoded / 64; i++) add<Wide, true>(at, gaps[i], ~0ull);
        } else {
            __mmask64 there = ~0ull << gap_ % 8;  // not the strip before
            for (int64_t i = 0; 64 * i < count; i++, there = ~0ull) {
                const int64_t left = least(count - 64 * i, 64);
                add<Wide, false>(at, gaps[i], there & _bzhi_u64(~0ull, static_cast<unsigned>(left)));
            }
        }
        gaps_ += count;
        gap_ = 8 * byte + count;
        begun_ = at.begun;
        next_code_ = at.code + codes_start_;
        last_ = at.last;
    }
    // Where gaps, windows and codes are; out of memory, that stores might change for all the compiler knows.
    struct Cursor {
        int64_t gap, begun, code;
        __m512i last;
    };
    // 64 gaps, or with All unset those in the mask.
    template <bool Wide, bool All>
    [[gnu::always_inline]] void add(Cursor& to, __m512i gap, __mmask64 there) {
        const __m512i escape = _mm512_set1_epi8(static_cast<char>((1 << w_.gaps.bits) - 1)), one = _mm512_set1_epi8(1);
        // An escape passes so many columns, any other gap one more.
        __m512i steps = _mm512_min_epu8(_mm512_add_epi8(gap, one), escape);
        if (!All) steps = _mm512_maskz_mov_epi8(there, steps);
        const __m512i places = _mm512_add_epi8(to.last, prefix_sums<Wide>(steps));
        __mmask64 marks = _mm512_cmpneq_epi8_mask(gap, escape);
        if (!All) marks &= there;
        const __m512i crossed = _mm512_xor_si512(places, _mm512_sub_epi8(places, steps));
        add_windows<Wide>(to, _mm512_test_epi8_mask(crossed, _mm512_set1_epi8(static_cast<char>(-kDotWindow))));
        const __m512i codes = _mm512_loadu_si512(codes_ + (to.code & (2 * kDecoded - 1)));
        _mm512_store_si512(place_ + to.gap, places);
        _mm512_store_si512(code_ + to.gap, _mm512_maskz_expand_epi8(marks, codes));
        to.code += __builtin_popcountll(marks);
        to.gap += 64;
        to.last = _mm512_permutexvar_epi8(_mm512_set1_epi8(63), places);
    }
    // Modulo 256.
    template <bool Wide>
    static __m512i prefix_sums(__m512i bytes) {
        if (Wide) {
            bytes = _mm512_add_epi8(bytes, _mm512_slli_epi64(bytes, 8));
            bytes = _mm512_add_epi8(bytes, _mm512_slli_epi64(bytes, 16));
            bytes = _mm512_add_epi8(bytes, _mm512_slli_epi64(bytes, 32));
        } else {  // no byte overflows
            bytes = _mm512_mullo_epi64(bytes, _mm512_set1_epi64(0x0101010101010101));
        }
        // Of the words' sums, each word's to those behind it.
        const __m512i before = _mm512_setr_epi64(0, 0xff, 0xffff, 0xffffff, 0xffffffff, 0xffffffffff, 0xffffffffffff,
                                                 0xffffffffffffff);
        const __m512i sums = _mm512_permutexvar_epi8(_mm512_set1_epi64(0x3f372f271f170f07), bytes);
        const __m512i sum = _mm512_sad_epu8(_mm512_and_si512(sums, before), _mm512_setzero_si512());
        const __m512i lowest = _mm512_set_epi64(0x0808080808080808, 0, 0x0808080808080808, 0, 0x0808080808080808, 0,
                                                0x0808080808080808, 0);
        return _mm512_add_epi8(bytes, _mm512_shuffle_epi8(sum, lowest));
    }
    // Windows begin with the gaps in the mask, of the cursor's 64.
    template <bool Wide>
    [[gnu::always_inline]] void add_windows(Cursor& to, __mmask64 first) {
        alignas(64) static constexpr uint8_t numbers[64] = {
            0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
            22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
            44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
        const __m512i all = _mm512_add_epi8(_mm512_load_si512(numbers), _mm512_set1_epi8(static_cast<char>(to.gap)));
        const __m512i some = _mm512_maskz_compress_epi8(first, all);
        if (Wide) _mm512_storeu_si512(begin_ + to.begun, some);
        else _mm256_storeu_si256(reinterpret_cast<__m256i*>(begin_ + to.begun), _mm512_castsi512_si256(some));
        to.begun += __builtin_popcountll(first);
    }
    // Codes have two places in turn, and the first of them are also behind the last, to be read from any one on.
    void decode_codes() {
        __m512i codes[kDecoded / 64];
        integers_of_planes(w_.codes, codes_end_ / 8, true, codes);
        const int64_t to = (codes_end_ - codes_start_) & (2 * kDecoded - 1);
        for (int64_t i = 0; i < kDecoded / 64; i++) _mm512_store_si512(codes_ + to + 64 * i, codes[i]);
        if (to == 0) _mm512_store_si512(codes_ + 2 * kDecoded, codes[0]);
        codes_end_ += kDecoded;
    }

    const Partial& w_;
    int64_t windows_, gap_, end_, next_code_, codes_start_, codes_end_;
    int64_t row_ = 0, first_ = 0;     // the row's first window and gap
    int64_t gaps_ = 0, begun_ = 0;  // how many there are of gaps, and of windows begun
    __m512i last_;                  // where the last gap ended
    alignas(64) uint8_t place_[kMost], code_[kMost], codes_[2 * kDecoded + 64];
    uint8_t begin_[kStripRows * kMostDotColumns / kDotWindow + kDecoded + 64];
};

}  // namespace avx512
}  // namespace kernels
