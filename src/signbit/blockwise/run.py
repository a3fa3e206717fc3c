"""One quantization, block by block.

    for each decoder block:   load it -> run it, collecting Hessians -> let the method decide on each linear ->
                              put the packed linears in -> run it again for the next block's input -> write it, free it

The quantized prefix feeds the next block, so later blocks see, and correct for, what earlier ones lost. In memory are
one block, the weights of the next, the activations of the calibration set and the Hessians of one block, never the
model.

With ``tune`` there is a second set of activations, of the original model, which say what each block is to give
(tuning/block.py); the block is tuned before it is run again.

Several processes go through this together. Each has all weights of the block, and its own calibration sequences
(calibrate.py) and linears (linears.py); the first writes the journal.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from signbit.blockwise.allocate import settle_options
from signbit.blockwise.calibrate import Activations, calibration_tokens, read_windows, record_inputs
from signbit.blockwise.job import Job
from signbit.blockwise.linears import BlockLinears
from signbit.blockwise.loading import BlockLoader, restore_block
from signbit.blockwise.outer import Outer, store_outer, unload_outer
from signbit.journal import FinishedBlock, block_name
from signbit.memory import return_free_memory
from signbit.methods.options import MethodOptions
from signbit.report.quantization import QuantizationReport
from signbit.timing import phase
from signbit.tuning.block import BlockTuner


class BlockwiseRun:
    """One quantization. Data flows through ``execute``; the rest are its steps."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.outer = Outer()
        self._windows: Tensor | None = None
        self._options: dict[str, MethodOptions] = {}
        self._activations: Activations | None = None

    def check(self, *, resuming: bool) -> None:
        """Refuse what can be seen to fail before any work is done, and before anything old is replaced."""
        self._windows = self.job.processes.first(partial(read_windows, self.job, resuming=resuming))
        self.job.check()

    def execute(self) -> QuantizationReport:
        job = self.job
        with phase("loading"):
            self.outer = store_outer(job)
        with BlockLoader(job) as loader:
            self._activations = self._first_activations(loader)
            self._options = settle_options(job, loader, self._activations)
            finished = self._work(loader)
        stored_otherwise = {f"{name}.weight" for name in self.outer.specs}
        return QuantizationReport(
            source=job.source.name,
            fingerprint=job.source.fingerprint,
            layers=[report for block in finished for report in block.reports],
            unquantized={key: why for key, why in job.unquantized.items() if key not in stored_otherwise},
            tuning=[block.tuning for block in finished if block.tuning],
        )

    def _first_activations(self, loader: BlockLoader) -> Activations | None:
        """What goes into the first block; None if the recipe calibrates on nothing."""
        job = self.job
        if job.recipe.common.samples == 0:
            return None
        tokens = calibration_tokens(job, self._windows)
        loader.load(0)
        activations = record_inputs(job, tokens)
        job.blocks[0].to("meta")
        unload_outer(job)
        return activations

    def _work(self, loader: BlockLoader) -> list[FinishedBlock]:
        """All blocks, the tensors of each only for as long as they are needed."""
        job, blocks = self.job, []
        done = job.processes.first(self._count_finished)
        with job.progress.task("quantizing blocks", len(job.blocks)) as task:
            for index, block in enumerate(job.blocks):
                if index < done:
                    finished = self._replay(index, loader, needed=done < len(job.blocks))
                else:
                    finished = self._quantize_block(index, loader)
                    if job.processes.is_first:
                        with phase("writing"):
                            job.journal.write_block(index, finished)
                finished.tensors.clear()
                blocks.append(finished)
                block.to("meta")
                return_free_memory()
                task.advance()
        return blocks

    def _count_finished(self) -> int:
        done = 0
        while done < len(self.job.blocks) and self.job.journal.has(block_name(done)):
            done += 1
        return done

    def _replay(self, index: int, loader: BlockLoader, *, needed: bool) -> FinishedBlock:
        """A block that is finished; ``needed``: what it makes of the calibration text, too."""
        activations = self._activations
        needed = needed and activations is not None
        finished = self.job.journal.read_block(index, tensors=needed)
        if activations is not None and needed:
            if activations.steps:
                loader.load(index)
                activations.original = self._original_outputs(index, activations)
                self.job.blocks[index].to("meta")
            restore_block(self.job, index, finished)
            activations.inputs.run(index, keep=True)
        return finished

    def _quantize_block(self, index: int, loader: BlockLoader) -> FinishedBlock:
        job, activations = self.job, self._activations
        block, prefix = job.block(index)
        with phase("loading"):
            loader.load(index)
        loader.expect(index + 1)
        targets = self._original_outputs(index, activations) if activations is not None else []
        linears = BlockLinears(job, index, self._options, tuning=bool(targets))
        if activations is not None:
            with linears.capture.watching(block):
                activations.inputs.run(index, keep=False)
        linears.quantize()
        tuning = None
        if activations is not None and activations.steps:
            tuning = self._tune_block(index, activations, targets, linears)
            linears.report_again()
        if activations is not None:
            activations.inputs.run(index, keep=True)
            activations.inputs.check_finite(prefix)
        parameters = dict(block.named_parameters())
        tensors = {
            f"{prefix}.{name}": tensor.to(job.storage) if name in parameters else tensor
            for name, tensor in block.state_dict().items()
        }
        return FinishedBlock(linears.layers, linears.reports(), tensors, tuning)

    def _original_outputs(self, index: int, activations: Activations) -> list[Tensor]:
        """What the original block makes of the original states, which are there if blocks are tuned."""
        with phase("forward"):
            return [activations.inputs.call(index, batch, states) for batch, states in enumerate(activations.original)]

    def _tune_block(
        self, index: int, activations: Activations, targets: list[Tensor], linears: BlockLinears
    ) -> tuple[float, float]:
        """Tune a quantized block; its error before and after."""
        job, options = self.job, self.job.recipe.common.tune
        assert options is not None  # there are steps
        tuner = BlockTuner(
            job.blocks[index],
            partial(activations.inputs.call, index),
            activations.inputs.hidden,
            targets,
            activations.steps,
            linears.weights,
            options,
            job.storage,
            job.processes,
        )
        with phase("tuning"):
            before, after = tuner.tune(seed=job.recipe.common.seed + index)
        activations.original = targets
        job.progress.note(f"{job.prefix}.{index}: error {before:.4f}, tuned {after:.4f}")
        return before, after
