// All layouts, and the table of what one instruction set offers for them.

#pragma once

#include "codebooks.h"
#include "decoder_steps.h"
#include "integers.h"
#include "partial.h"
#include "prepare.h"
#include "rounding_rows.h"
#include "sign_planes.h"
#include "structured.h"

namespace kernels {
namespace SIGNBIT_ISA {

template <class I>
constexpr Isa isa_of(const char* name, bool (*supported)()) {
    Isa isa{};
    isa.name = name;
    isa.supported = supported;
    isa.tile = Tile<I>::rows;
    isa.table_bytes[0] = I::template Sum<false>::table_bytes;
    isa.table_bytes[1] = I::template Sum<true>::table_bytes;
    isa.prepare[static_cast<int>(Form::tables)] = prepare<I>;
    isa.prepare[static_cast<int>(Form::numbers)] = prepare_numbers;
    isa.sign_planes[0] = sign_planes_rows<I, false>;
    isa.sign_planes[1] = sign_planes_rows<I, true>;
    isa.coded[0] = coded_rows<I, false>;
    isa.coded[1] = coded_rows<I, true>;
    isa.integers[0] = integers_rows<I, false>;
    isa.integers[1] = integers_rows<I, true>;
    isa.structured[0] = structured_rows<I, false>;
    isa.structured[1] = structured_rows<I, true>;
    isa.partial[0] = partial_rows<I, false>;
    isa.partial[1] = partial_rows<I, true>;
    isa.dense = dense_rows;
    isa.decoder = kDecoderSteps;
    isa.round_in_turn = round_in_turn;
    return isa;
}

}  // namespace SIGNBIT_ISA
}  // namespace kernels
