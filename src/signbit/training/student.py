"""The student: a packed checkpoint with latent weights in place of its matrices, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from signbit import checkpoint
from signbit.architectures import dense_weight, replace_module
from signbit.blockwise.linears import layer_errors
from signbit.errors import SignbitError
from signbit.layouts import Layout
from signbit.modules import QuantizedLinear
from signbit.report.quantization import LayerReport, QuantizationReport
from signbit.source import Source
from signbit.training.latent import LatentLinear, latent_of
from signbit.training.options import TrainingOptions
from signbit.training.snapshot import Snapshot

_NOTE = "trained: its output error is not known"


def make_student(
    start: Path, source: Source, options: TrainingOptions, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """The checkpoint ``start`` in float32, its linears latent; nothing else has gradients."""
    model, _ = checkpoint.load(start, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.requires_grad_(False)
    outer = checkpoint.read_quantization(start)["outer_modules"]
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear) and name not in outer:
            latent = _latent(name, module.packed, original_weight(source, name), module.bias, options)
            replace_module(model, name, latent.to(device))
    return model.to(device)


def pack_trained(
    start: Path, source: Source, options: TrainingOptions, snapshot: Snapshot
) -> Iterator[tuple[str, Layout, float]]:
    """(module name, packed matrix, |W - Q| / |W|) as a snapshot has them; one matrix in memory at a time."""
    for name, packed in checkpoint.read_layouts(start):
        weight = original_weight(source, name)
        latent = _latent(name, packed, weight, None, options)
        snapshot.restore(name, latent)
        trained = latent.pack()
        yield name, trained, layer_errors(weight, trained.dequantize(), None)[0]


def retrained_report(
    start: Path, source: Source, packed: dict[str, Layout], weight_errors: dict[str, float]
) -> QuantizationReport:
    """The report of ``start`` as it is after training. What the outputs are off by is not known any more."""
    report = QuantizationReport.read(start)
    before = {} if report is None else {layer.name: layer for layer in report.layers}
    layers = []
    for name, one in packed.items():
        old = before.get(name)
        layers.append(
            LayerReport(
                name=name,
                shape=list(one.shape),
                layout=one.kind,
                bits_per_weight=8 * sum(one.items().values()) / (one.shape[0] * one.shape[1]),
                nominal_bits_per_weight=one.nominal_bits,
                weight_error=weight_errors[name],
                output_error=None,
                damping=None if old is None else old.damping,
                notes=[*([] if old is None else [note for note in old.notes if note != _NOTE]), _NOTE],
            )
        )
    return QuantizationReport(source.name, source.fingerprint, layers, {} if report is None else report.unquantized)


def original_weight(source: Source, name: str) -> Tensor:
    """The weight [out, in] of a linear of the original model, float32."""
    linear = source.skeleton.get_submodule(name)
    return dense_weight(linear, source.tensor(f"{name}.weight")).float().contiguous()


def _latent(name: str, packed: Layout, weight: Tensor, bias: Tensor | None, options: TrainingOptions) -> LatentLinear:
    if tuple(weight.shape) != packed.shape:
        raise SignbitError(f"{name} is {list(weight.shape)} in the model and {list(packed.shape)} in the start")
    try:
        return latent_of(packed, weight, bias, options)
    except SignbitError as error:
        raise SignbitError(f"{name}: {error}") from error
