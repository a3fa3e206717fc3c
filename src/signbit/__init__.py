"""signbit: one bit per weight, for real.

    signbit.quantize(model, out, recipe)   write a packed checkpoint
    signbit.train(model, out, recipe)      the same, with the packed weights trained
    signbit.load(directory)                (model, tokenizer), packed
    signbit.evaluate(model, ...)           perplexity, divergence from the original
    signbit.inspect(directory)             honest bits, itemised
    signbit.compare([model, ...], page)    all of this side by side, as one HTML page
    signbit.sweep(grid, out)               every recipe with every model of a YAML file
    signbit.export(model, out, to=...)     a plain Hugging Face model, or a .gguf file
    signbit.set_activations(model, "int8") round activations to 8 bits, for speed

Importing signbit registers it with transformers, so that ``AutoModelForCausalLM.from_pretrained`` loads its
checkpoints.
"""

from signbit import huggingface as _huggingface  # registers the quantizer; the only effect of importing signbit
from signbit.accounting import inspect
from signbit.checkpoint import load
from signbit.errors import SignbitError
from signbit.evaluation import evaluate
from signbit.exporting import export
from signbit.modules import set_activations
from signbit.pipeline import quantize
from signbit.recipe import Recipe, presets
from signbit.report.compare import compare
from signbit.sweeping.run import sweep
from signbit.training.run import export_snapshot, train
from signbit.version import __version__

__all__ = [
    "Recipe",
    "SignbitError",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "export_snapshot",
    "inspect",
    "load",
    "presets",
    "quantize",
    "set_activations",
    "sweep",
    "train",
]

del _huggingface
