"""The format, byte for byte: whoever changes what these matrices are stored as breaks every checkpoint there is.

The expected bytes were worked out by hand from docs/format.md, not printed by the code.
"""

import struct
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from signbit.layouts import IntegerRows, Layout, SignPlanes, SplitPlanes, describe
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
    }
    row = layout.dequantize()[0]
    assert row[:4].tolist() == [-1 + 0.125, 1 + 0.125, -1 + 0.125, 1 + 0.125]
    assert row[32:].tolist() == [2 + 3 - 1, -2 + 3 - 1]


def test_sign_planes_in_bfloat16() -> None:
    scales = torch.tensor([[[1.0], [2.0**20]]], dtype=torch.bfloat16)
    layout = SignPlanes.encode(NEGATIVE.unsqueeze(0), scales, None, group_size=0)
    assert stored(layout) == {"signs": SIGN_BYTES, "scales": "803f" + "8049"}
    assert describe(layout)["scale_dtype"] == "bfloat16"


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
    }
    assert layout.dequantize()[0, [0, 1, 2, 3, 32, 33]].tolist() == [-0.5, 3.5, -4.5, 1.5, 2.0, -3.0]
    assert layout.dequantize()[1, [0, 1, 33]].tolist() == [1.5, 0.5, 3.0]


def test_integer_rows() -> None:
    weight = torch.tensor([[-127.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.25, 31.75, -0.25]])
    layout = IntegerRows.quantize(weight, 8, "float16")
    assert stored(layout) == {"codes": "810001" + "000000" + "017fff", "scales": half(1, 0, 0.25)}
    assert describe(layout) == {"layout": "integer_rows", "shape": [3, 3], "bits": 8, "scale_dtype": "float16"}


def test_integer_rows_in_nibbles() -> None:
    # Even columns in the low nibble; -7 is 9, -1 is f.
    layout = IntegerRows.quantize(torch.tensor([[-7.0, 3.0, -1.0], [0.5, 3.5, -3.5]]), 4, "float16")
    assert stored(layout) == {"codes": "390f" + "7109", "scales": half(1, 0.5)}


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
    header += b" " * (-len(header) % 8)
    data = struct.pack("<2f", 1, -2) + bytes.fromhex("003c0038" + SIGN_BYTES)
    assert copy.read_bytes() == struct.pack("<Q", len(header)) + header + data
    assert copy.read_bytes() == safetensors.torch.save(tensors, metadata={"format": "pt"})
