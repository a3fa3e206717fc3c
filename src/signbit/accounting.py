"""Honest bits: what a checkpoint takes, counted from its files.

Bits per weight = 8 x bytes that belong to the quantized linear layers (every packed tensor: signs, masks, column maps,
scales, means, padding) / number of weights that they replace. Biases, norms and embeddings are not quantized linears;
they are in the other totals.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from signbit import checkpoint
from signbit.layouts import count_items, parse_spec
from signbit.report.quantization import QuantizationReport
from signbit.safetensors_file import StoredTensor
from signbit.source import open_source, resolve


def inspect(model: str | Path) -> dict[str, Any]:
    """Bits and bytes of MODEL, as ``signbit inspect --json`` prints them.

    For a model that is not a signbit checkpoint there is nothing quantized to list; its totals are those of its weights
    in their stored dtype.
    """
    path = resolve(str(model))
    if path.is_file() or not checkpoint.is_checkpoint(path):
        return _original(str(model))
    quantization = checkpoint.read_quantization(path)
    stored = checkpoint.check_tensors(path, quantization)
    report = QuantizationReport.read(path)
    reports = {layer.name: layer for layer in report.layers} if report else {}
    packed: dict[str, list[StoredTensor]] = {}
    for tensor in stored.values():
        owner, separator, _ = tensor.name.partition(".packed.")
        if separator:
            packed.setdefault(owner, []).append(tensor)
    layers: list[dict[str, Any]] = []
    items: dict[str, int] = {}
    weights, nominal = 0, 0.0
    row_bytes = 0
    for name, description in quantization["layers"].items():
        layout, spec = parse_spec(name, description)
        nbytes = sum(tensor.nbytes for tensor in packed[name])
        if name in quantization["outer_modules"]:  # embeddings and head
            row_bytes += nbytes
            continue
        count = math.prod(spec.shape)
        bits = layout(spec, device="meta").nominal_bits
        weights += count
        nominal += bits * count
        for item, size in count_items(spec).items():
            items[item] = items.get(item, 0) + size
        layer = {
            "name": name,
            **description,
            "bytes": nbytes,
            "bits_per_weight": 8 * nbytes / count,
            "nominal_bits_per_weight": bits,
        }
        if name in reports:
            layer |= {"weight_error": reports[name].weight_error, "output_error": reports[name].output_error}
        layers.append(layer)
    quantized = sum(layer["bytes"] for layer in layers)
    total = sum(tensor.nbytes for tensor in stored.values())
    outer = {f"{name}.weight" for name in quantization["outer_modules"]}
    embeddings = row_bytes + sum(tensor.nbytes for name, tensor in stored.items() if name in outer)
    return {
        "model": str(model),
        "method": quantization["method"],
        "format_version": quantization["format_version"],
        "bits_per_weight": 8 * quantized / weights if weights else None,
        "nominal_bits_per_weight": nominal / weights if weights else None,
        "quantized_weights": weights,
        "bytes": {
            "quantized": quantized,
            "embeddings": embeddings,
            "other": total - quantized - embeddings,
            "total": total,
            "files": sum(file.stat().st_size for file in {tensor.file for tensor in stored.values()}),
        },
        "items": items,
        "recipe": checkpoint.read_recipe(path),
        "layers": layers,
        "unquantized": report.unquantized if report else {},
    }


def _original(model: str) -> dict[str, Any]:
    source = open_source(model)
    try:
        skeleton, size = source.skeleton, source.dtype.itemsize
        sizes = {
            key: p.numel() * size for key, p in skeleton.named_parameters() if key not in skeleton.all_tied_weights_keys
        }
        names = {id(module): name for name, module in skeleton.named_modules()}
        outer = {
            f"{names.get(id(m))}.weight" for m in (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
        }
        total, embeddings = sum(sizes.values()), sum(nbytes for key, nbytes in sizes.items() if key in outer)
    finally:
        source.close()
    return {
        "model": model,
        "method": None,
        "bits_per_weight": None,
        "nominal_bits_per_weight": None,
        "quantized_weights": 0,
        "bytes": {"quantized": 0, "embeddings": embeddings, "other": total - embeddings, "total": total},
        "items": {},
        "layers": [],
        "unquantized": {},
    }
