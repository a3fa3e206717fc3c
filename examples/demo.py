"""The demo: SmolLM2-135M in 2.3 bits a weight, on text that it writes itself, with nothing downloaded.

    python examples/demo.py [DIRECTORY]

Two sign planes (``arb-llm-plus``), each block tuned as a whole, then all scales distilled. What one bit a weight does
to so small a model is in docs/frontier.md; it cannot be read.

Every step is what the command line does: ``signbit quantize demo``, ``signbit eval``, ``signbit inspect``,
``signbit generate``. It evaluates the original and the packed model on real English that every machine has, the
language reference inside Python, and on text that the original model writes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import transformers

import signbit
from signbit.console import ConsoleProgress, console, inspection_tables, quantization_table
from signbit.inference import generate

PROMPT = "Once upon a time, there was a"
# Rough seconds of each step on two cores, to say how much is left.
STEPS = {
    "quantize and tune the model, on 32 sequences of 256 tokens that it writes itself": 420,
    "evaluate the packed model against the original": 60,
    "let both continue a prompt": 40,
}


class Steps:
    """Announces each step with what is left after it."""

    def __init__(self) -> None:
        self._left = dict(STEPS)
        self._number = 0
        self._started = time.monotonic()

    def begin(self) -> None:
        self._number += 1
        name = next(iter(self._left))
        left = sum(self._left.values())
        del self._left[name]
        console.print(f"\nStep {self._number} of {len(STEPS)}: {name} (about {left / 60:.0f} min left)", style="bold")

    def end(self) -> None:
        console.print(f"\nDone in {time.monotonic() - self._started:.0f} s.")


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    progress, steps = ConsoleProgress(), Steps()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "smollm2-packed"
        english = Path(folder) / "python-language-reference.txt"
        english.write_text("\n\n".join(topics[key] for key in sorted(topics)), encoding="utf-8")

        steps.begin()
        text = {"calib": "self", "samples": 32, "seqlen": 256}
        tune = {"epochs": 3, "lr": 3e-4, "distill": 40, "distill_batch": 4}
        recipe = signbit.Recipe.load("arb-llm-plus", {**text, "embeddings": "int8", "tune": tune})
        report = signbit.quantize("demo", out, recipe, progress=progress)
        console.print(quantization_table(report))
        console.print(inspection_tables(signbit.inspect(out), per_layer=False)[0])

        steps.begin()
        sources = {str(english): "Python's language reference", "self": "text that the original writes"}
        options = {"perplexity": list(sources), "seqlen": 512, "windows": 4, "progress": progress}
        packed = signbit.evaluate(out, against="demo", **options)
        for source, name in sources.items():
            divergence = packed["divergence"][source]
            console.print(
                f"{name}: perplexity {packed['original_perplexity'][source]:.1f} -> "
                f"{packed['perplexity'][source]:,.0f}, KL {divergence['kl']:.2f} nats a token, "
                f"same top token {divergence['top1_agreement']:.1%}"
            )

        steps.begin()
        for title, model in (("original", "demo"), ("packed", str(out))):
            text = generate(model, PROMPT, max_tokens=40, temperature=0.6, seed=1)
            console.print(f"{title}: {PROMPT}{text}")
        if len(sys.argv) > 1:
            console.print(f"\nThe checkpoint is in {out}: signbit inspect {out}")
        steps.end()


if __name__ == "__main__":
    main()
