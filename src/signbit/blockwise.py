"""One quantization, block by block.

    for each decoder block:   load it -> run it, collecting Hessians -> let the method decide on each linear ->
                              put the packed linears in -> run it again for the next block's input -> write it, free it

The quantized prefix feeds the next block, so later blocks see, and correct for, what earlier ones lost. At any time one
block, the activations of the calibration set and the Hessians of one block are in memory, never the model.

With ``tune`` there is a second set of activations, of the original model, which say what each block is to give
(tuning/block.py); the block is tuned before it is run again.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from signbit.architectures import (
    Linear,
    dense_shape,
    dense_weight,
    find_blocks,
    linears_of,
    replace_module,
    unquantized_parameters,
)
from signbit.budget.sensitivity import sensitivities
from signbit.budget.shares import share_out
from signbit.calibration.capture import BlockInputs, HessianCapture
from signbit.calibration.hessian import Factor, centered, factorize, quadratic
from signbit.calibration.self_text import write_tokens
from signbit.calibration.text import SELF, read_text
from signbit.calibration.tokens import check_seqlen, random_windows, tokenize
from signbit.errors import SignbitError
from signbit.finite import all_finite
from signbit.journal import FinishedBlock, Journal, block_name
from signbit.layouts import Layout, describe, parse_spec
from signbit.memory import return_free_memory
from signbit.methods.options import LinearSurvey, MethodOptions, Survey
from signbit.methods.rtn import integer_rows
from signbit.modules import QuantizedLinear, quantized_embedding
from signbit.parallel import side_by_side
from signbit.progress import Progress
from signbit.recipe import Recipe
from signbit.report.quantization import LayerReport, QuantizationReport
from signbit.source import Source, release, set_parameter
from signbit.timing import phase
from signbit.tuning.block import BlockTuner

# Tokens that go through a block at once: enough for full matrix speed, few enough that activations inside a block stay
# small beside its weights.
_TOKENS_PER_CALL = {"cpu": 4096, "cuda": 16384}
_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class _Calibration:
    """What calibration says about one linear input: its mean, and the Hessian of what varies around it if the mean's
    error is put right by a bias, else the Hessian of all."""

    mean: Tensor | None
    hessian: Tensor
    factor: Factor
    notes: list[str]


@dataclass(frozen=True)
class _Original:
    """What the errors of one linear are measured against: its weight, Hessian and mean input."""

    weight: Tensor
    hessian: Tensor | None
    mean: Tensor | None

    def errors(self, packed: Layout) -> tuple[float, float | None]:
        correction = packed.get_buffer("bias").float() if packed.spec.bias else None
        return layer_errors(self.weight, packed.dequantize(), self.hessian, self.mean, correction)


class BlockwiseRun:
    """One quantization. Data flows through ``execute``; the rest are its steps."""

    def __init__(
        self, source: Source, recipe: Recipe, journal: Journal, device: torch.device, progress: Progress
    ) -> None:
        self.source, self.recipe, self.journal = source, recipe, journal
        self.device, self.progress = device, progress
        self.model = source.skeleton
        self.prefix, self.blocks = find_blocks(self.model)
        dtype = recipe.common.dtype
        self.storage: torch.dtype = source.dtype if dtype == "auto" else getattr(torch, dtype)
        # CPUs compute in float32, which is as fast on most of them as 16 bits, and exact for all that is stored.
        self.compute = torch.float32 if device.type == "cpu" else self.storage
        self.outer_specs: dict[str, dict[str, Any]] = {}
        self.outer_modules: list[str] = []
        self.windows: Tensor | None = None
        # The original model's hidden states, and what its linears were, for as long as tuning needs them.
        self.original_states: list[Tensor] = []
        self.originals: dict[str, _Original] = {}
        self.options: dict[str, MethodOptions] = {}
        linears = {f"{self.prefix}.{i}.{name}" for i, block in enumerate(self.blocks) for name in linears_of(block)}
        self.example = min(linears)
        self.skipped = self._skipped(linears)
        self.unquantized = unquantized_parameters(self.model, linears - self.skipped.keys(), self.skipped)

    def check(self, *, resuming: bool) -> None:
        """Refuse what can be seen to fail before any work is done, and before anything old is replaced."""
        common = self.recipe.common
        if common.samples:
            check_seqlen(self.source.config, common.seqlen)
            if common.calib != SELF and not (resuming and self.journal.has("tokens")):
                with phase("calibration text"):
                    text = read_text(str(common.calib), "train")
                    tokens = tokenize(self.source.tokenizer, text, self.source.config)
                    self.windows = random_windows(tokens, common.samples, common.seqlen, common.seed)
        head = self.model.get_output_embeddings()
        if common.head != "keep" and (head is None or self._tied()):
            raise SignbitError("head: this model's head is tied to its embeddings: set embeddings instead")
        for pattern in common.skip:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in self.skipped):
                raise SignbitError(f"skip: {pattern!r} matches no linear layer, such as {self.example}")
        if len(self.skipped) == sum(len(linears_of(block)) for block in self.blocks):
            raise SignbitError("skip leaves no linear layer to quantize")

    def execute(self) -> QuantizationReport:
        with phase("loading"):
            self._store_outer()
        inputs = self._calibration_inputs()
        self.options = self._options_of_linears(inputs)
        if inputs is not None and self.recipe.common.tune is not None:
            self.original_states = list(inputs.hidden)
        done = 0
        while done < len(self.blocks) and self.journal.has(block_name(done)):
            done += 1
        reports: list[LayerReport] = []
        tuning: list[tuple[float, float]] = []
        with self.progress.task("quantizing blocks", len(self.blocks)) as task:
            for index, block in enumerate(self.blocks):
                if index < done:
                    replay = inputs is not None and done < len(self.blocks)
                    finished = self.journal.read_block(index, tensors=replay)
                    if inputs is not None and replay:
                        if self.original_states:
                            self._load_block(index, set(self._linears(index)))
                            self.original_states = self._original_outputs(index, inputs)
                            block.to("meta")
                        self._restore_block(index, finished)
                        inputs.run(index, keep=True)
                else:
                    finished = self._quantize_block(index, inputs)
                    with phase("writing"):
                        self.journal.write_block(index, finished)
                reports += finished.reports
                tuning += [finished.tuning] if finished.tuning else []
                block.to("meta")
                return_free_memory()
                task.advance()
        stored_otherwise = {f"{name}.weight" for name in self.outer_specs}
        return QuantizationReport(
            source=self.source.name,
            fingerprint=self.source.fingerprint,
            layers=reports,
            unquantized={key: why for key, why in self.unquantized.items() if key not in stored_otherwise},
            tuning=tuning,
        )

    def _skipped(self, linears: set[str]) -> dict[str, str]:
        """Linears that the recipe leaves out, with the reason."""
        return {
            name: f"left out by the recipe (skip: {pattern})"
            for name in linears
            for pattern in self.recipe.common.skip
            if fnmatch.fnmatchcase(name, pattern)
        }

    def _tied(self) -> bool:
        head = self.model.get_output_embeddings()
        names = {id(module): name for name, module in self.model.named_modules()}
        return head is not None and f"{names[id(head)]}.weight" in self.model.all_tied_weights_keys

    def _stored(self, name: str) -> Tensor:
        """A parameter that is kept, in the dtype that it is stored in."""
        tensor = self.source.tensor(name).to(self.storage)
        if not all_finite(tensor):
            raise SignbitError(f"{name} does not fit {self.storage}: use dtype=bfloat16 or float32")
        return tensor

    # What is outside the blocks ------------------------------------------------------------------------------------

    def _store_outer(self) -> None:
        """Write everything outside the blocks as it will be stored, and load what the base model needs of it."""
        embeddings, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        names = {id(module): name for name, module in self.model.named_modules()}
        common = self.recipe.common
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(self.device)
        codecs = [(embeddings, common.embeddings, "outer-embeddings")]
        if head is not None and not self._tied():
            codecs.append((head, common.head, "outer-head"))
        for module, codec, file in codecs:
            name = names[id(module)]
            self.outer_modules.append(name)
            tensors = {}
            if codec != "keep":
                packed = integer_rows(
                    self.source.tensor(f"{name}.weight"), _BITS[codec], self.recipe.options.scale_dtype
                )
                self.outer_specs[name] = describe(packed)
                tensors = {f"{name}.packed.{key}": value for key, value in packed.state_dict().items()}
                if module is embeddings:
                    replacement = quantized_embedding(module, packed, self.compute).to(self.device)
                    self.model.set_input_embeddings(replacement)
            for key, _ in module.named_parameters(recurse=False):
                if key != "weight" or codec == "keep":
                    tensors[f"{name}.{key}"] = self._stored(f"{name}.{key}")
            if not self.journal.has(file):
                self.journal.write(file, tensors)
            if module is embeddings and codec == "keep":
                set_parameter(module, "weight", tensors[f"{name}.weight"].to(self.device, self.compute))
        self._store_rest({names[id(module)] for module, _, _ in codecs})

    def _store_rest(self, stored: set[str]) -> None:
        """The remaining parameters outside the blocks: norms, position embeddings, projections."""
        tied = set(self.model.all_tied_weights_keys)
        tensors = {}
        for name, parameter in list(self.model.named_parameters()):
            inside = name.startswith(f"{self.prefix}.") or name.rpartition(".")[0] in stored or name in tied
            if not inside and parameter.device.type == "meta":
                tensors[name] = self._stored(name)
                set_parameter(self.model, name, tensors[name].to(self.device, self.compute))
        buffers = dict(self.model.named_buffers())
        for name in self.model.state_dict().keys() & buffers.keys():
            if not name.startswith(f"{self.prefix}.") and ".packed." not in name:
                tensors[name] = buffers[name]
        if not self.journal.has("outer-rest"):
            self.journal.write("outer-rest", tensors)

    # Calibration ---------------------------------------------------------------------------------------------------

    def _calibration_inputs(self) -> BlockInputs | None:
        """The first block's inputs; None if the recipe calibrates on nothing."""
        common = self.recipe.common
        if common.samples == 0:
            return None
        if not self.journal.has("tokens"):
            with phase("calibration text"):
                self.journal.write("tokens", {"tokens": self._calibration_tokens()})
        tokens = self.journal.read("tokens")["tokens"]
        # A batch is also a step of tuning.
        size = common.tune.batch if common.tune else max(1, _TOKENS_PER_CALL[self.device.type] // common.seqlen)
        inputs = BlockInputs(self.blocks)
        first = f"{self.prefix}.0"
        self.source.materialize(self.blocks[0], first, self.compute, self.device)
        with phase("forward"):
            inputs.record(self.model, list(tokens.split(size)), self.device)
        self.blocks[0].to("meta")
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            if module is not None:
                module.to("meta")
        return inputs

    def _calibration_tokens(self) -> Tensor:
        common = self.recipe.common
        if self.windows is not None:
            return self.windows
        self.progress.note(f"{self.source.name} writes its own calibration text: this loads the whole model once")
        writer = self._original_model().to(self.device)
        return write_tokens(writer, common.samples, common.seqlen, common.seed, self.progress)

    def _original_model(self) -> PreTrainedModel:
        """All of the original model, to be run as a whole."""
        model = AutoModelForCausalLM.from_config(self.source.config, dtype=self.compute)
        state = {name: self.source.weights[name] for name in model.state_dict() if name in self.source.weights}
        missing = set(model.load_state_dict(state, strict=False).missing_keys) - model.all_tied_weights_keys.keys()
        if missing:
            raise SignbitError(
                f"{self.source.name} cannot be run as a whole: its weights lack {min(missing)}; calibrate on a text "
                "file, and without budget"
            )
        model.tie_weights()
        return model.eval()

    def _options_of_linears(self, inputs: BlockInputs | None) -> dict[str, MethodOptions]:
        """Each linear's options, settled once a run: by the recipe's budget, or by what the method makes of them."""
        kept = self.journal.read_options()
        if kept is not None:
            try:
                options = {name: type(self.recipe.options)(**fields) for name, fields in kept.items()}
            except (AttributeError, TypeError, ValueError) as error:
                raise self.journal.damaged_options() from error
            if options.keys() != set(self._names()):
                raise self.journal.damaged_options()
            return options
        with phase("allocation"):
            allocated = self._within_budget(inputs) if self.recipe.common.budget else self._by_method(inputs)
        if allocated is None:
            return dict.fromkeys(self._names(), self.recipe.options)
        self.journal.write_options({name: one.model_dump(mode="json") for name, one in allocated.items()})
        return allocated

    def _names(self) -> list[str]:
        """The full names of all linears that are to be quantized, block by block."""
        return [f"{self.prefix}.{i}.{name}" for i in range(len(self.blocks)) for name in self._linears(i)]

    def _by_method(self, inputs: BlockInputs | None) -> dict[str, MethodOptions] | None:
        allocated = self.recipe.method.allocate(self._survey(inputs), self.recipe.options)
        if allocated is None:
            return None
        return {f"{self.prefix}.{i}.{name}": one for i, one in enumerate(allocated) for name in self._linears(i)}

    def _within_budget(self, inputs: BlockInputs | None) -> dict[str, MethodOptions]:
        budget, common = self.recipe.common.budget, self.recipe.common
        assert budget is not None and inputs is not None  # the recipe says so
        tokens = self.journal.read("tokens")["tokens"][: budget.samples].long()
        original = self._original_model().to(self.device)
        linears = {name: original.get_submodule(name) for name in self._names()}
        self.progress.note("measuring how sensitive predictions are to each linear: this loads the whole model once")
        sensitive = sensitivities(original, linears, tokens, common.seed)
        del original, linears
        return_free_memory()

        def surveyed() -> Iterator[tuple[str, LinearSurvey]]:
            with self.progress.task("trying values in blocks", len(self.blocks)) as task:
                for index, block in enumerate(self._survey(inputs)(inputs=True)):
                    for name, linear in block.items():
                        yield f"{self.prefix}.{index}.{name}", linear
                    task.advance()

        return share_out(surveyed(), sensitive, self.recipe.method, self.recipe.options, budget, common.damping)

    def _survey(self, calibration: BlockInputs | None) -> Survey:
        def survey(*, inputs: bool) -> Iterator[dict[str, LinearSurvey]]:
            original = calibration if inputs else None
            # Blocks run here are the original ones: afterwards all begins again with what goes into the first.
            hidden = [] if original is None else list(original.hidden)
            for index, block in enumerate(self.blocks):
                linears = self._linears(index)
                self._load_block(index, set(linears))
                capture = HessianCapture(dict(linears))
                if original is not None:
                    with capture.watching(block):
                        original.run(index, keep=True)
                yield {
                    name: LinearSurvey(
                        weight=dense_weight(linear, linear.weight).float(),
                        hessian=None if original is None else self._hessian(capture, name, linear),
                    )
                    for name, linear in linears.items()
                }
                release(block)
                return_free_memory()
            if original is not None:
                original.hidden = hidden

        return survey

    def _hessian(self, capture: HessianCapture, name: str, linear: Linear) -> Tensor:
        accumulator = capture.hessians.get(capture.leader.get(name, name))
        if accumulator is None:
            return torch.eye(dense_shape(linear)[1], device=self.device)
        return accumulator.hessian()

    # Blocks --------------------------------------------------------------------------------------------------------

    def _quantize_block(self, index: int, inputs: BlockInputs | None) -> FinishedBlock:
        block, prefix = self.blocks[index], f"{self.prefix}.{index}"
        linears = self._linears(index)
        with phase("loading"):
            self._load_block(index, set(linears))
        targets = [] if inputs is None or not self.original_states else self._original_outputs(index, inputs)
        capture = HessianCapture(dict(linears))
        if inputs is not None:
            with capture.watching(block):
                inputs.run(index, keep=False)
        layers, reports = {}, []
        for name, (packed, report) in self._quantize_linears(index, linears, capture, inputs is not None):
            replace_module(block, name, QuantizedLinear(packed, linears[name].bias))
            layers[report.name] = describe(packed)
            reports.append(report)
        tuning = None
        if inputs is not None and targets:
            tuning = self._tune_block(index, inputs, targets)
            reports = [self._report_again(report) for report in reports]
        if inputs is not None:
            inputs.run(index, keep=True)
            inputs.check_finite(prefix)
        return FinishedBlock(layers, reports, self._stored_tensors(block, prefix), tuning)

    def _original_outputs(self, index: int, inputs: BlockInputs) -> list[Tensor]:
        """What the original block makes of the original states."""
        with phase("forward"):
            return [inputs.call(index, batch, states) for batch, states in enumerate(self.original_states)]

    def _tune_block(self, index: int, inputs: BlockInputs, targets: list[Tensor]) -> tuple[float, float]:
        """Tune a quantized block; its error before and after."""
        options = self.recipe.common.tune
        assert options is not None
        prefix = f"{self.prefix}.{index}."
        weights = {name.removeprefix(prefix): original.weight for name, original in self.originals.items()}
        tuner = BlockTuner(
            self.blocks[index], partial(inputs.call, index), inputs.hidden, targets, weights, options, self.storage
        )
        with phase("tuning"):
            before, after = tuner.tune(seed=self.recipe.common.seed + index)
        self.original_states = targets
        self.progress.note(f"{self.prefix}.{index}: error {before:.4f}, tuned {after:.4f}")
        return before, after

    def _report_again(self, report: LayerReport) -> LayerReport:
        """The report of a linear that was tuned."""
        linear = self.model.get_submodule(report.name)
        assert isinstance(linear, QuantizedLinear)
        with phase("errors"):
            weight_error, output_error = self.originals.pop(report.name).errors(linear.packed)
        return dataclasses.replace(report, weight_error=weight_error, output_error=output_error)

    def _quantize_linears(
        self, index: int, linears: dict[str, Linear], capture: HessianCapture, calibrated: bool
    ) -> Iterator[tuple[str, tuple[Layout, LayerReport]]]:
        """What becomes of each linear of a block, by its name in it; their weights are gone afterwards."""
        prefix = f"{self.prefix}.{index}"

        def quantize(names: list[str]) -> list[tuple[Layout, LayerReport]]:
            calibration = self._calibration_of(capture, prefix, names[0]) if calibrated else None
            results = []
            for name in names:
                linear = linears[name]
                full = f"{prefix}.{name}"
                results.append(self._quantize_linear(full, linear, calibration, self.options[full]))
                set_parameter(linear, "weight", torch.empty_like(linear.weight, device="meta"))  # free it now
            return results

        # Linears that share an input one after the other, so that their factor is needed once and not for long.
        groups = capture.by_input()
        largest_first = sorted(groups, key=lambda names: -sum(linears[name].weight.numel() for name in names))
        found = side_by_side([partial(quantize, names) for names in largest_first], self.device)
        results = {names[0]: results for names, results in zip(largest_first, found, strict=True)}
        for names in groups:
            yield from zip(names, results[names[0]], strict=True)

    def _quantize_linear(
        self, name: str, linear: Linear, calibration: _Calibration | None, options: MethodOptions
    ) -> tuple[Layout, LayerReport]:
        weight = dense_weight(linear, linear.weight).float().contiguous()
        factor = None if calibration is None else calibration.factor
        try:
            packed = self.recipe.method.quantize(weight, factor, options)
        except SignbitError as error:
            raise SignbitError(f"{name}: {error}") from error
        with phase("errors"):
            hessian = None if calibration is None else calibration.hessian
            mean = None if calibration is None else calibration.mean
            quantized = packed.dequantize()
            wanted = weight if factor is None else weight * ~factor.dead
            if bool(((quantized.abs().amax(1) == 0) & (wanted.abs().amax(1) > 0)).any()):
                raise SignbitError(f"{name}: scales are too small for {packed.kind} to hold: use scale_dtype=bfloat16")
            if mean is not None:
                packed = packed.with_bias((weight - quantized) @ mean)
            weight_error, output_error = layer_errors(weight, quantized, hessian, mean)
            if self.original_states:
                self.originals[name] = _Original(weight, hessian, mean)
        return packed, LayerReport(
            name=name,
            shape=list(packed.shape),
            layout=packed.kind,
            bits_per_weight=8 * sum(packed.items().values()) / weight.numel(),
            nominal_bits_per_weight=packed.nominal_bits,
            weight_error=weight_error,
            output_error=output_error,
            damping=None if factor is None else factor.damping,
            notes=options.notes(weight.shape[1]) + ([] if calibration is None else calibration.notes),
        )

    def _calibration_of(self, capture: HessianCapture, prefix: str, name: str) -> _Calibration:
        notes = []
        accumulator = capture.hessians.pop(name, None)
        if accumulator is None:
            notes.append("no calibration token reached it: quantized with the identity as Hessian")
            width = dense_shape(self.model.get_submodule(f"{prefix}.{name}"))[1]
            hessian, mean = torch.eye(width, device=self.device), torch.zeros(width, device=self.device)
        else:
            hessian, mean = accumulator.hessian(), accumulator.mean()
        if not all_finite(hessian):
            raise SignbitError(f"the input of {prefix}.{name} contains NaN or infinite values on the calibration text")
        corrected = self.recipe.common.bias_correction
        if corrected:
            hessian = centered(hessian, mean)
        with phase("factorization"):
            try:
                factor = factorize(hessian, self.recipe.common.damping)
            except SignbitError as error:
                raise SignbitError(f"{prefix}.{name}: {error}") from error
        if factor.damping > self.recipe.common.damping:
            notes.append(f"damping raised to {factor.damping:g}")
        if factor.dead.any():
            notes.append(f"{int(factor.dead.sum())} inputs are always zero")
        return _Calibration(mean if corrected else None, hessian, factor, notes)

    def _load_block(self, index: int, quantized: set[str]) -> None:
        """Weights to be quantized come as they are; what stays is rounded to its storage dtype first."""
        prefix = f"{self.prefix}.{index}"
        block = self.blocks[index]
        for name, _ in list(block.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            full = f"{prefix}.{name}"
            tensor = self.source.tensor(full) if owner in quantized and leaf == "weight" else self._stored(full)
            set_parameter(block, name, tensor.to(device=self.device, dtype=self.compute, copy=True))

    def _linears(self, index: int) -> dict[str, Linear]:
        """The linears of a block that are to be quantized, by their name in it."""
        linears = linears_of(self.blocks[index])
        return {name: one for name, one in linears.items() if f"{self.prefix}.{index}.{name}" not in self.skipped}

    def _stored_tensors(self, block: nn.Module, prefix: str) -> dict[str, Tensor]:
        parameters = dict(block.named_parameters())
        return {
            f"{prefix}.{name}": tensor.to(self.storage) if name in parameters else tensor
            for name, tensor in block.state_dict().items()
        }

    def _restore_block(self, index: int, finished: FinishedBlock) -> None:
        """The block as it was when it was finished."""
        block, prefix = self.blocks[index], f"{self.prefix}.{index}"
        for full, description in finished.layers.items():
            layout, spec = parse_spec(full, description)
            tensors = {key: finished.tensors[f"{full}.packed.{key}"] for key in spec.tensors()}
            bias = finished.tensors.get(f"{full}.bias")
            packed = layout(spec, tensors).to(self.device)
            if bias is not None:
                bias = bias.to(self.device, self.compute)
            replace_module(block, full.removeprefix(f"{prefix}."), QuantizedLinear(packed, bias))
        for name, parameter in list(block.named_parameters()):
            if parameter.device.type == "meta":
                set_parameter(block, name, finished.tensors[f"{prefix}.{name}"].to(self.device, self.compute))


def layer_errors(
    weight: Tensor,
    quantized: Tensor,
    hessian: Tensor | None,
    mean: Tensor | None = None,
    correction: Tensor | None = None,
) -> tuple[float, float | None]:
    """|W - Q| / |W|, and tr(D H D^T) / tr(W H W^T) with D = W - Q; 0 for a layer of zeros.

    mean: what H was taken around, if the error of the mean has been put right; by exactly D mean, or by ``correction``.
    """
    difference = weight - quantized
    norm = float(weight.norm())
    weight_error = float(difference.norm()) / norm if norm else 0.0
    if hessian is None:
        return weight_error, None
    power, error = quadratic(weight, hessian), quadratic(difference, hessian)
    if mean is not None:
        power += 2 * float((weight @ mean).square().sum())
        if correction is not None:
            error += 2 * float((difference @ mean - correction).square().sum())
    return weight_error, error / power if power else 0.0
