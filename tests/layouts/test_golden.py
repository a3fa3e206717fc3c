"""The format, byte for byte: whoever changes what these matrices are stored as breaks every checkpoint there is.

The expected bytes were worked out by hand from docs/format.md, not printed by the code.
"""

import struct
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from signbit.layouts import (
    HaarPlanes,
    Integers,
    Layout,
    Partial,
    SignFactors,
    SignPlanes,
    SplitPlanes,
    Structured,
    describe,
)
from signbit.layouts.haar_planes import SalientPart
from signbit.safetensors_file import copy_tensors, read_header

# Negative: columns 0, 2 and 33 of the first row, 1 and 8 of the second.
NEGATIVE = torch.zeros(2, 34, dtype=torch.bool)
NEGATIVE[0, [0, 2, 33]] = True
NEGATIVE[1, [1, 8]] = True
SIGN_BYTES = "0500000002000000" + "0201000000000000"


def stored(layout: Layout) -> dict[str, str]:
    return {name: raw(tensor).hex() for name, tensor in layout.state_dict().items()}


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


def half(*values: float) -> str:
    return struct.pack(f"<{len(values)}e", *values).hex()


def test_sign_planes() -> None:
    # Two planes of 2 x 34, in groups of 32 columns; the second plane is all positive.
    scales = torch.tensor([[[1.0, 2.0], [0.5, 0.25]], [[0.125, 3.0], [4.0, 8.0]]], dtype=torch.float16)
    layout = SignPlanes.encode(
        negative=torch.stack([NEGATIVE, torch.zeros_like(NEGATIVE)]),
        scales=scales,
        means=torch.tensor([[0.0, -1.0], [1.5, -2.0]], dtype=torch.float16),
        group_size=32,
    )
    assert stored(layout) == {
        "signs": SIGN_BYTES + "00" * 16,
        "scales": "003c0040" + "00380034" + "00300042" + "00440048",
        "means": "000000bc" + "003e00c0",
    }
    assert describe(layout) == {
        "layout": "sign_planes",
        "shape": [2, 34],
        "planes": 2,
        "group_size": 32,
        "mean": True,
        "scale_dtype": "float16",
        "column_scales": False,
    }
    row = layout.dequantize()[0]
    assert row[:4].tolist() == [-1 + 0.125, 1 + 0.125, -1 + 0.125, 1 + 0.125]
    assert row[32:].tolist() == [2 + 3 - 1, -2 + 3 - 1]


def test_sign_planes_in_bfloat16() -> None:
    scales = torch.tensor([[[1.0], [2.0**20]]], dtype=torch.bfloat16)
    layout = SignPlanes.encode(NEGATIVE.unsqueeze(0), scales, None, group_size=0)
    assert stored(layout) == {"signs": SIGN_BYTES, "scales": "803f" + "8049"}
    assert describe(layout)["scale_dtype"] == "bfloat16"


def test_sign_factors() -> None:
    # One path of rank 2: U is 3 x 2, V is 2 x 34.
    outer = torch.tensor([[True, False], [False, True], [True, True]])
    layout = SignFactors.encode(
        out_negative=outer.unsqueeze(0),
        in_negative=NEGATIVE.unsqueeze(0),
        out_scales=torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float16),
        rank_scales=torch.tensor([[4.0, 0.25]], dtype=torch.float16),
        in_scales=None,
    )
    assert stored(layout) == {
        "out_signs": "01000000" + "02000000" + "03000000",
        "in_signs": SIGN_BYTES,
        "out_scales": half(1.0, 2.0, 0.5),
        "rank_scales": half(4.0, 0.25),
    }
    assert describe(layout) == {
        "layout": "sign_factors",
        "shape": [3, 34],
        "rank": 2,
        "paths": 1,
        "out_scales": True,
        "rank_scales": True,
        "in_scales": False,
        "scale_dtype": "float16",
    }
    # Column 0 of V is (-, +), column 1 (+, -), column 3 (+, +).
    assert layout.dequantize()[:, [0, 1, 3]].tolist() == [
        [4 + 0.25, -4 - 0.25, -4 + 0.25],
        [2 * (-4 - 0.25), 2 * (4 + 0.25), 2 * (4 - 0.25)],
        [0.5 * (4 - 0.25), 0.5 * (-4 + 0.25), 0.5 * (-4 - 0.25)],
    ]


def test_split_planes() -> None:
    # Column 33 is salient; in row 0 weights 1 and 2 are sparse and the residual of 33 is positive, in row 1 negative.
    second = torch.zeros(2, 34, dtype=torch.bool)
    second[0, [1, 2]] = True
    second[1, 33] = True
    salient = torch.zeros(34, dtype=torch.bool)
    salient[33] = True
    layout = SplitPlanes.encode(
        negative=NEGATIVE,
        second=second,
        salient=salient,
        scales=torch.tensor([[[1.0, 4.0], [2.0, 8.0]], [[0.5, 0.25], [1.0, 1.0]]], dtype=torch.float16),
        means=torch.tensor([[[0.5, -0.5], [0.0, 0.0]], [[1.0, 1.0], [2.0, 2.0]]], dtype=torch.float16),
        salient_scales=torch.tensor([[[3.0, 1.0]], [[2.0, 0.5]]], dtype=torch.float16),
        salient_means=torch.tensor([[-1.0], [1.5]], dtype=torch.float16),
        group_size=32,
    )
    assert stored(layout) == {
        "signs": SIGN_BYTES,
        "second": "0600000000000000" + "0000000002000000",
        "salient": "0000000002000000",
        "scales": half(1, 4, 2, 8) + half(0.5, 0.25, 1, 1),
        "means": half(0.5, -0.5, 0, 0) + half(1, 1, 2, 2),
        "salient_scales": half(3, 1) + half(2, 0.5),
        "salient_means": half(-1) + half(1.5),
    }
    assert describe(layout) == {
        "layout": "split_planes",
        "shape": [2, 34],
        "group_size": 32,
        "mean": True,
        "salient_columns": 1,
        "salient_groups": 1,
        "scale_dtype": "float16",
        "bitmap": False,
        "column_scales": False,
    }
    assert layout.dequantize()[0, [0, 1, 2, 3, 32, 33]].tolist() == [-0.5, 3.5, -4.5, 1.5, 2.0, -3.0]
    assert layout.dequantize()[1, [0, 1, 33]].tolist() == [1.5, 0.5, 3.0]


def test_haar_planes_along_rows() -> None:
    # Columns 33 and 1 are salient; weight 1 of row 0 is sparse, as is what column 33 lacks in row 1.
    second, beside = torch.zeros(2, 34, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)
    second[0, 1] = True
    beside[1, 1] = True
    salient = torch.zeros(34, dtype=torch.bool)
    salient[[1, 33]] = True
    one = torch.ones(2, 2, 2, 2)
    one[0, 0] = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    lacking = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.5, 0.25], [0.0, 16.0]]])
    layout = HaarPlanes.encode(
        axis="row",
        negative=NEGATIVE,
        second=second,
        scales=one.half(),
        means=torch.tensor([[[[0.5], [0.0]], [[0.0], [0.0]]], [[[0.0], [0.0]], [[0.0], [-1.0]]]]).half(),
        salient=SalientPart(salient, lacking.half(), torch.zeros(2, 2, 2).half(), ~beside, beside),
        group_size=32,
    )
    assert stored(layout) == {
        "signs": SIGN_BYTES,
        "second": "0200000000000000" + "0000000000000000",
        "scales": half(1, 2, 4, 8, 1, 1, 1, 1) + half(*[1] * 8),
        "means": half(0.5, 0, 0, 0) + half(0, 0, 0, -1),
        "salient": "0200000002000000",
        "salient_scales": half(1, 2, 3, 4) + half(0.5, 0.25, 0, 16),
        "salient_means": half(0, 0, 0, 0) * 2,
        "salient_signs": "03000000" + "01000000",
        "salient_second": "00000000" + "02000000",
    }
    assert describe(layout) == {
        "layout": "haar_planes",
        "shape": [2, 34],
        "axis": "row",
        "group_size": 32,
        "means": 1,
        "salient_columns": 2,
        "salient_groups": 2,
        "scale_dtype": "float16",
    }
    root = torch.tensor(0.5**0.5)
    # Low -1 + .5 and high 8 of row 0; column 1 lacks -1 in the low and -.5 in the high band of the two rows.
    assert layout.dequantize()[0, 0] == (-0.5 + 8) * root
    assert layout.dequantize()[0, 1] == (-0.5 - 8) * root + (-1 - 0.5) * root
    # Low 1 and high -1 of the second group; column 33 lacks -3 and 16.
    assert layout.dequantize()[0, 33] == (1 + 1) * root + (-3 + 16) * root


def test_haar_planes_along_columns() -> None:
    salient = torch.zeros(34, dtype=torch.bool)
    salient[2] = True
    layout = HaarPlanes.encode(
        axis="column",
        negative=NEGATIVE,
        second=NEGATIVE,
        scales=torch.tensor([[[[1.0, 2.0]], [[4.0, 8.0]]], [[[0.5, 0.25]], [[1.0, 1.0]]]]).half(),
        means=None,
        salient=SalientPart(salient, torch.tensor([[[3.0, 16.0]], [[5.0, 7.0]]]).half(), None),
        group_size=32,
    )
    assert stored(layout) == {
        "signs": SIGN_BYTES,
        "second": SIGN_BYTES,
        "scales": half(1, 2, 4, 8) + half(0.5, 0.25, 1, 1),
        "salient": "0400000000000000",
        "salient_scales": half(3, 16) + half(5, 7),
    }
    assert describe(layout) == {
        "layout": "haar_planes",
        "shape": [2, 34],
        "axis": "column",
        "group_size": 32,
        "means": 0,
        "salient_columns": 1,
        "salient_groups": 1,
        "scale_dtype": "float16",
    }
    root = torch.tensor(0.5**0.5)
    assert layout.dequantize()[:, 0].tolist() == [(-2 + 0.5) * root, (-2 - 0.5) * root]
    assert layout.dequantize()[:, 2].tolist() == [(-16 + 5) * root, (-16 - 5) * root]
    assert layout.dequantize()[:, 33].tolist() == [(-8 + 1) * root, (-8 - 1) * root]


def test_integers() -> None:
    # 3 bits: the two low bits of 34 columns in 3 words, then the high bits in 2.
    codes = torch.zeros(2, 34, dtype=torch.uint8)
    codes[0, :5] = torch.tensor([7, 1, 2, 4, 5])
    codes[0, 33] = 6
    codes[1, 8] = 3
    layout = Integers.encode(
        codes=codes,
        scales=torch.tensor([[1.0, 0.5], [0.25, 2.0]], dtype=torch.float16),
        zeros=torch.tensor([[4, 7], [0, 1]], dtype=torch.uint8),
        bits=3,
        group_size=32,
    )
    assert stored(layout) == {
        "codes": "270100000000000008000000" + "1900000002000000" + "000003000000000000000000" + "0000000000000000",
        "scales": half(1, 0.5) + half(0.25, 2),
        "zeros": "0c000000" + "03000000" + "04000000" + "00000000",
    }
    assert describe(layout) == {
        "layout": "integers",
        "shape": [2, 34],
        "bits": 3,
        "group_size": 32,
        "zeros": True,
        "scale_dtype": "float16",
    }
    assert layout.dequantize()[0, [0, 1, 2, 3, 4, 5, 32, 33]].tolist() == [3, -3, -2, 0, 1, -4, -3.5, -0.5]
    assert layout.dequantize()[1, [7, 8, 33]].tolist() == [0, 0.75, -2]


def test_symmetric_integers() -> None:
    codes = torch.tensor([[9, 0, 15], [8, 8, 8]], dtype=torch.uint8)
    layout = Integers.encode(codes, torch.tensor([[0.5], [0.0]], dtype=torch.float16), None, 4, 0)
    assert stored(layout) == {"codes": "090f0000" + "88080000", "scales": half(0.5, 0)}
    assert layout.dequantize().tolist() == [[0.5, -4, 3.5], [0, 0, 0]]


def test_sign_planes_with_scales_of_columns() -> None:
    column_scales = torch.ones(34, dtype=torch.float16)
    column_scales[[1, 33]] = torch.tensor([2.0, 0.5], dtype=torch.float16)
    scales = torch.tensor([[[1.0], [4.0]]], dtype=torch.float16)
    layout = SignPlanes.encode(NEGATIVE.unsqueeze(0), scales, None, group_size=0, column_scales=column_scales)
    assert stored(layout) == {
        "signs": SIGN_BYTES,
        "scales": half(1, 4),
        "column_scales": half(1, 2) + half(1) * 31 + half(0.5),
    }
    assert describe(layout)["column_scales"] is True
    assert layout.dequantize()[:, [0, 1, 33]].tolist() == [[-1, 2, -0.5], [4, -8, 2]]


def test_split_planes_with_two_salient_zones_and_scales_of_columns() -> None:
    # Columns 2 and 33 are salient; weights 1 and 2 of row 0 and 33 of row 1 are in the sparse zone. Residual signs are
    # a plane of two columns: negative at 33 in row 0, at 2 in row 1.
    second = torch.zeros(2, 34, dtype=torch.bool)
    second[0, [1, 2]] = True
    second[1, 33] = True
    salient = torch.zeros(34, dtype=torch.bool)
    salient[[2, 33]] = True
    columns = torch.ones(2, 34, dtype=torch.float16)
    columns[:, 1] = torch.tensor([2.0, 3.0])
    layout = SplitPlanes.encode(
        negative=NEGATIVE,
        second=second,
        salient=salient,
        scales=torch.tensor([[[1.0, 4.0]], [[0.5, 0.25]]], dtype=torch.float16),
        means=None,
        salient_scales=torch.tensor([[[[3.0, 1.0], [6.0, 2.0]]], [[[2.0, 0.5], [8.0, 4.0]]]], dtype=torch.float16),
        salient_means=None,
        group_size=0,
        residual=torch.tensor([[False, True], [True, False]]),
        column_scales=columns,
        salient_column_scales=torch.tensor([[[1.0, 2.0], [1.0, 4.0]], [[0.5, 1.0], [0.25, 1.0]]], dtype=torch.float16),
    )
    assert stored(layout) == {
        "signs": SIGN_BYTES,
        "second": "0600000000000000" + "0000000002000000",
        "salient": "0400000002000000",
        "scales": half(1, 4) + half(0.5, 0.25),
        "salient_scales": half(3, 1, 6, 2) + half(2, 0.5, 8, 4),
        "residual": "02000000" + "01000000",
        "column_scales": half(1, 2) + half(1) * 32 + half(1, 3) + half(1) * 32,
        "salient_column_scales": half(1, 2) + half(1, 4) + half(0.5, 1) + half(0.25, 1),
    }
    assert describe(layout) == {
        "layout": "split_planes",
        "shape": [2, 34],
        "group_size": 0,
        "mean": False,
        "salient_columns": 2,
        "salient_groups": 1,
        "scale_dtype": "float16",
        "bitmap": True,
        "column_scales": True,
    }
    # Row 0: -1; +4 x 3; sparse salient -6 x 0.5 + 2 x 0.25; concentrated salient -3 x 2 - 1 x 4.
    assert layout.dequantize()[0, [0, 1, 2, 33]].tolist() == [-1.0, 12.0, -2.5, -10.0]
    # Row 1: 0.5; -0.5 x 2; concentrated salient 2 x 1 - 0.5 x 1; sparse salient 8 x 1 + 4 x 1.
    assert layout.dequantize()[1, [0, 1, 2, 33]].tolist() == [0.5, -1.0, 1.5, 12.0]


def test_partial() -> None:
    # Salient: columns 2 and 33 of the first row, 1 of the second. Gaps 2, 30 and 1, in 2 bits: 2, ten escapes 3, 0, 1.
    salient = torch.zeros(2, 34, dtype=torch.bool)
    q = torch.zeros(2, 34, dtype=torch.uint8)
    for row, column, code in ((0, 2, 5), (0, 33, 0), (1, 1, 7)):
        salient[row, column] = True
        q[row, column] = code
    layout = Partial.encode(
        negative=NEGATIVE,
        scales=torch.tensor([[1.0, 2.0], [0.5, 0.25]], dtype=torch.float16),
        means=torch.tensor([[0.0, -1.0], [1.5, -2.0]], dtype=torch.float16),
        salient=salient,
        q=q,
        code_bits=4,
        code_scales=torch.tensor([[0.5], [2.0]], dtype=torch.float16),
        code_offsets=torch.tensor([[0.25], [-1.0]], dtype=torch.float16),
        group_size=32,
    )
    assert stored(layout) == {
        "signs": SIGN_BYTES,
        "scales": half(1, 2) + half(0.5, 0.25),
        "means": half(0, -1) + half(1.5, -2),
        "positions": "fe170000" + "ff070000",
        "ends": "030000000d000000",
        "codes": "05000000" + "04000000" + "05000000",
        "code_scales": half(0.5, 2),
        "code_offsets": half(0.25, -1),
    }
    assert describe(layout) == {
        "layout": "partial",
        "shape": [2, 34],
        "group_size": 32,
        "mean": True,
        "salient": 3,
        "gap_bits": 2,
        "gaps": 13,
        "code_bits": 4,
        "code_group_size": 0,
        "scale_dtype": "float16",
    }
    assert layout.dequantize()[0, [0, 1, 2, 32, 33]].tolist() == [-1, 1, -2.5, 1, 0]
    assert layout.dequantize()[1, [0, 1, 8, 33]].tolist() == [2, -16, 1, -1.75]


def test_partial_with_a_bitmap() -> None:
    # All positive weights are salient, with codes 0 but one.
    q = torch.zeros(2, 34, dtype=torch.uint8)
    q[0, 1] = 1
    coefficients = torch.tensor([[1.0], [2.0]], dtype=torch.float16)
    layout = Partial.encode(NEGATIVE, coefficients, None, ~NEGATIVE, q, 2, coefficients, None, group_size=0)
    assert stored(layout) == {
        "signs": SIGN_BYTES,
        "scales": half(1, 2),
        "positions": "faffffff01000000" + "fdfeffff03000000",
        "ends": "3f000000",
        "codes": "0100000000000000",
        "code_scales": half(1, 2),
    }
    assert (layout.spec.gap_bits, layout.spec.gaps, layout.spec.salient) == (0, 0, 63)
    assert layout.dequantize()[:, :3].tolist() == [[-1, 1.5, -1], [1, -2, 1]]


def test_structured() -> None:
    # 2 of 4 in rows of 10, so that the last cell has one kept weight here and one behind the edge; column 5 is salient.
    # Kept are columns 0 2, 5 6 and 9 of the first row (ranks 1, 2, 2), and 2 3, 4 7 and 8 of the second (5, 3, 1).
    kept, negative = torch.zeros(2, 10, dtype=torch.bool), torch.zeros(2, 10, dtype=torch.bool)
    kept[0, [0, 2, 5, 6, 9]] = True
    kept[1, [2, 3, 4, 7, 8]] = True
    negative[0, [0, 6]] = True
    negative[1, [3, 8]] = True
    region = torch.zeros(2, 10, dtype=torch.uint8)
    region[0, [2, 5, 9]] = torch.tensor([2, 1, 1], dtype=torch.uint8)  # at column 5: the residual is negative
    region[1, [2, 4, 8]] = torch.tensor([1, 2, 2], dtype=torch.uint8)
    salient = torch.zeros(10, dtype=torch.bool)
    salient[5] = True
    layout = Structured.encode(
        kept=kept,
        keep=2,
        of=4,
        negative=negative,
        region=region,
        salient=salient,
        scales=torch.tensor([[[1, 2, 4], [8, 16, 32]], [[0.5, 0.25, 0.125], [1, 1, 3]]], dtype=torch.float16),
        means=torch.tensor([[[0, 0, -1], [0, 0.5, 0]], [[0, 2, 0], [0, 0, 0]]], dtype=torch.float16),
        salient_scales=torch.tensor([[[3, 1]], [[5, 7]]], dtype=torch.float16),
        salient_means=torch.tensor([[0.5], [0]], dtype=torch.float16),
        group_size=8,
    )
    assert stored(layout) == {
        "signs": "09000000" + "12000000",
        "ranks": "91000000" + "5d000000",
        "regions": "60000000" + "b5000000",
        "scales": half(1, 2, 4, 8, 16, 32) + half(0.5, 0.25, 0.125, 1, 1, 3),
        "means": half(0, 0, -1, 0, 0.5, 0) + half(0, 2, 0, 0, 0, 0),
        "salient": "20000000",
        "salient_scales": half(3, 1) + half(5, 7),
        "salient_means": half(0.5) + half(0),
    }
    assert describe(layout) == {
        "layout": "structured",
        "shape": [2, 10],
        "keep": 2,
        "of": 4,
        "group_size": 8,
        "regions": 3,
        "mean": True,
        "salient_columns": 1,
        "salient_groups": 1,
        "scale_dtype": "float16",
    }
    assert layout.dequantize()[0].tolist() == [-1, 0, 3, 0, 0, 2.5, -1, 0, 0, 16.5]
    assert layout.dequantize()[1].tolist() == [0, 0, 2.25, -0.5, 0.125, 0, 0, 0.5, -3, 0]


def test_structured_with_one_and_two_regions() -> None:
    # 1 of 4 in rows of 4: the ranks of columns 0 and 3 are 0 and 3.
    kept = torch.tensor([[True, False, False, False], [False, False, False, True]])
    for regions in (1, 2):
        layout = Structured.encode(
            kept=kept,
            keep=1,
            of=4,
            negative=kept & torch.tensor([[True], [False]]),
            region=(kept & torch.tensor([[False], [True]])).to(torch.uint8) * (regions - 1),
            salient=torch.zeros(4, dtype=torch.bool),
            scales=torch.tensor([[[1, 2]], [[3, 4]]], dtype=torch.float16)[..., :regions],
            means=None,
            salient_scales=torch.zeros(2, 0, 2, dtype=torch.float16),
            salient_means=None,
            group_size=0,
        )
        maps = {} if regions == 1 else {"regions": "00000000" + "01000000"}
        scales = half(1, 3) if regions == 1 else half(1, 2, 3, 4)
        assert stored(layout) == {"signs": "0100000000000000", "ranks": "0000000003000000", **maps, "scales": scales}
        assert layout.dequantize().tolist() == [[-1, 0, 0, 0], [0, 0, 0, 2.0 + regions]]


def test_a_whole_file(tmp_path: Path) -> None:
    layout = SignPlanes.encode(
        NEGATIVE.unsqueeze(0), torch.tensor([[[1.0], [0.5]]], dtype=torch.float16), None, group_size=0
    )
    tensors = {f"q.packed.{name}": tensor for name, tensor in layout.state_dict().items()}
    tensors["norm.weight"] = torch.tensor([1.0, -2.0])
    source, copy = tmp_path / "source.safetensors", tmp_path / "copy.safetensors"
    safetensors.torch.save_file(tensors, source)
    copy_tensors(read_header(source)[0].values(), copy)
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"q.packed.scales":{"dtype":"F16","shape":[1,2,1],"data_offsets":[8,12]},'
        b'"q.packed.signs":{"dtype":"U8","shape":[1,2,8],"data_offsets":[12,28]}}'
    )
    # To a whole cache line, where the library stops at 8 bytes.
    library = header + b" " * (-len(header) % 8)
    header += b" " * (-(8 + len(header)) % 64)
    data = struct.pack("<2f", 1, -2) + bytes.fromhex("003c0038" + SIGN_BYTES)
    assert copy.read_bytes() == struct.pack("<Q", len(header)) + header + data
    librarys = struct.pack("<Q", len(library)) + library + data
    assert safetensors.torch.save(tensors, metadata={"format": "pt"}) == librarys
