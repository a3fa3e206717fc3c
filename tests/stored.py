"""What holds for everything that is stored, whatever its layout."""

import json

import torch

from signbit.layouts import Layout, describe, parse_spec


def unpadded(file: bytes) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file; how far a header is padded differs between writers."""
    end = 8 + int.from_bytes(file[:8], "little")
    return file[8:end].rstrip(b" "), file[end:]


def check_made_again(layout: Layout) -> None:
    """Its description, through JSON, and its tensors make the layout again; its itemised bytes are its tensors'."""
    kind, spec = parse_spec("m", json.loads(json.dumps(describe(layout))))
    assert (kind, spec) == (type(layout), layout.spec)
    stored = layout.state_dict()
    assert list(stored) == list(spec.tensors())
    again = kind(spec, dict(stored))
    again.check("m")
    assert torch.equal(again.dequantize(), layout.dequantize())
    assert sum(layout.items().values()) == sum(tensor.nbytes for tensor in stored.values())
