"""Honest bits against what they buy: errors, perplexity, divergence and time of presets, and of departures from them.

    python benchmarks/pareto.py demo --calib valid.txt --text test.txt [--run RUN ...] [--seeds 0 1]

A RUN is a preset, or a preset with changes: "billm" or "billm feedback=column mean=false". By default all presets run.
Each is calibrated with 32 x 512 tokens, and evaluated on the first 20 windows of 2048: perplexity on all, divergence
from the original on the first 4. A row is added to the CSV, and printed, as each run ends; rows that are already there
are not run again. When all are done one table of all rows is printed and the CSV is drawn (pareto_plot.py). A run that
the model does not allow is left out with the reason, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers

import signbit
from pareto_plot import draw
from signbit.console import ConsoleProgress
from signbit.recipe import parse_overrides

ORIGINAL = "original"
FIELDS = [
    "run",
    "seed",
    "method",
    "bits_per_weight",
    "nominal_bits",
    "weight_error",
    "output_error",
    "perplexity",
    "log_perplexity",
    "kl",
    "top1_agreement",
    "seconds_forward",
    "seconds_rest",
    "phases",
]


def measure_original(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"run": ORIGINAL, **_perplexity(arguments.model, arguments), "kl": 0.0, "top1_agreement": 1.0}


def recipe_of(run: str, seed: int, arguments: argparse.Namespace) -> signbit.Recipe:
    preset, *changes = run.split()
    fields = {
        # Methods that look at no data are calibrated all the same, for the error of their outputs.
        "samples": arguments.samples,
        "seqlen": arguments.seqlen,
        **parse_overrides(changes),
        "calib": arguments.calib,
        "seed": seed,
    }
    return signbit.Recipe.load(preset, fields)


def measure(run: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantize and evaluate one run; its row."""
    recipe = recipe_of(run, seed, arguments)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "checkpoint"
        report = signbit.quantize(arguments.model, out, recipe, progress=ConsoleProgress())
        bits = signbit.inspect(out)
        scored = _perplexity(out, arguments)
        compared = signbit.evaluate(
            out,
            perplexity=[arguments.text],
            seqlen=arguments.window,
            windows=arguments.divergence_windows,
            against=arguments.model,
            progress=ConsoleProgress(),
        )
    divergence = compared["divergence"][arguments.text]
    forward = report.seconds.pop("forward", 0.0)
    return {
        "run": run,
        "seed": seed,
        "method": recipe.method.name,
        "bits_per_weight": round(bits["bits_per_weight"], 4),
        "nominal_bits": round(bits["nominal_bits_per_weight"], 4),
        "weight_error": round(report.mean_weight_error, 4),
        "output_error": None if report.mean_output_error is None else round(report.mean_output_error, 5),
        **scored,
        "kl": round(divergence["kl"], 4),
        "top1_agreement": round(divergence["top1_agreement"], 4),
        "seconds_forward": round(forward, 1),
        "seconds_rest": round(sum(report.seconds.values()), 1),
        "phases": " ".join(f"{key.replace(' ', '-')}={value:.1f}" for key, value in report.seconds.items()),
    }


def _perplexity(model: str | Path, arguments: argparse.Namespace) -> dict[str, float]:
    scored = signbit.evaluate(
        model,
        perplexity=[arguments.text],
        seqlen=arguments.window,
        windows=arguments.windows,
        progress=ConsoleProgress(),
    )
    perplexity = scored["perplexity"][arguments.text]
    return {"perplexity": round(perplexity, 2), "log_perplexity": round(math.log(perplexity), 3)}


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def append_row(path: Path, row: dict[str, Any]) -> None:
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[dict[str, str]]) -> str:
    """All rows in Markdown, fewest bits first."""
    shown = [field for field in FIELDS if field not in ("method", "phases")]
    ordered = sorted(rows, key=lambda row: float(row["bits_per_weight"] or math.inf))
    lines = [shown, ["---"] * len(shown), *([row[field] for field in shown] for row in ordered)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--csv", type=Path, default=Path("docs/pareto.csv"))
    parser.add_argument("--plot", type=Path, help="by default the CSV's name with .svg")
    parser.add_argument("--run", nargs="+", default=signbit.presets(), help="presets, or 'preset key=value ...'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in each")
    parser.add_argument("--windows", type=int, default=20, help="evaluation windows")
    parser.add_argument("--window", type=int, default=2048, help="tokens in each")
    parser.add_argument("--divergence-windows", type=int, default=4, help="windows compared with the original")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        for run in arguments.run:
            recipe_of(run, 0, arguments)
    except signbit.SignbitError as error:
        parser.error(str(error))
    done = {(row["run"], row["seed"]) for row in read_rows(arguments.csv)}
    if (ORIGINAL, "") not in done:
        append_row(arguments.csv, measure_original(arguments))
    refused = 0
    for run, seed in itertools.product(arguments.run, arguments.seeds):
        if (run, str(seed)) in done:
            continue
        try:
            row = measure(run, seed, arguments)
        except signbit.SignbitError as error:
            refused += 1
            print(f"{run}, seed {seed}: {error}", file=sys.stderr, flush=True)
            continue
        append_row(arguments.csv, row)
        print(row, flush=True)
    print(table(read_rows(arguments.csv)))
    draw(read_rows(arguments.csv), arguments.plot or arguments.csv.with_suffix(".svg"))
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
