"""What the parts of a training are worth: the same run with one thing changed at a time.

    python benchmarks/training_ablation.py MODEL START --recipe pb-llm-qat --calib TRAIN --text TEST --steps 100 \\
        --change scales=fixed scales=learned freeze_salient=false [--set lr=1e-4 ...] [--windows 4] [--csv FILE]

All runs start from the checkpoint START and see the same text. Prints for each its held-out perplexity at the start and
the end, and the finished checkpoint's perplexity on the first windows of TEST. Rows of runs that a CSV already has are
not run again. PB-LLM's claims (arXiv 2310.00034, section 3.3 and 3.4) are the changes above: the optimal scale against
scales that stay or are trained, and salient weights that are frozen against ones that are not.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import signbit
from signbit.console import ConsoleProgress
from signbit.recipe import Recipe, parse_overrides

FIELDS = ("run", "steps", "heldout_start", "heldout_end", "perplexity", "bits_per_weight")


def measure(changes: str, arguments: argparse.Namespace) -> dict[str, str]:
    """One row: ``changes`` are key=value pairs, separated by spaces."""
    fixed = {"start": arguments.start, "calib": arguments.calib, "steps": arguments.steps}
    overrides = {**fixed, **parse_overrides(arguments.set), **parse_overrides(changes.split())}
    progress = ConsoleProgress()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "trained"
        trained = signbit.train(arguments.model, out, Recipe.load(arguments.recipe, overrides), progress=progress)
        found = signbit.evaluate(out, perplexity=arguments.text, windows=arguments.windows, progress=progress)
        bits = signbit.inspect(out)["bits_per_weight"]
    heldout = trained.record.heldout
    figures = (arguments.steps, heldout[0][1], heldout[-1][1], found["perplexity"][arguments.text], bits)
    return dict(zip(FIELDS, (changes or "as it is", *(f"{figure:.6g}" for figure in figures)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("start")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--set", action="extend", nargs="+", default=[])
    parser.add_argument("--change", nargs="*", default=[])
    parser.add_argument("--csv", type=Path, default=Path("ablation.csv"))
    arguments = parser.parse_args()
    rows = list(csv.DictReader(arguments.csv.open(encoding="utf-8"))) if arguments.csv.exists() else []
    done = {row["run"] for row in rows}
    for changes in ["", *arguments.change]:
        if (changes or "as it is") in done:
            continue
        rows.append(measure(changes, arguments))
        with arguments.csv.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{row[field]:>16}" for field in FIELDS))


if __name__ == "__main__":
    main()
