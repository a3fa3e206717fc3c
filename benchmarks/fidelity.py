"""What each preset, and each departure from it, is worth: errors, perplexity, honest bits and time on one model.

    python benchmarks/fidelity.py demo --calib valid.txt --text test.txt --out rows.csv [--seeds 0 1] [--only NAME ...]

Calibrates with 32 x 512 tokens, evaluates the first 20 windows of 2048. One row is added to the CSV, and printed, as
each run ends; rows that are already there are not run again.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
from pathlib import Path
from typing import Any

import transformers

import signbit
from signbit.console import ConsoleProgress

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "sign": ("sign", {}),
    "sign group 128": ("sign", {"group_size": 128}),
    "xnor": ("xnor", {}),
    "xnor 2 planes": ("xnor", {"planes": 2}),
    "billm": ("billm", {}),
    "billm-released": ("billm-released", {}),
    "billm, both searches on weights": ("billm", {"column_search": "weights"}),
    "billm, column search on weights only": ("billm-released", {"column_search": "weights"}),
    "billm, thresholds at fractions of max": ("billm", {"split_grid": "max", "split_candidates": 9}),
    "billm, magnitude salience": ("billm", {"salience": "magnitude"}),
    "billm, no feedback": ("billm", {"feedback": "none"}),
    "billm, block feedback": ("billm", {"feedback": "block"}),
    "billm, column feedback": ("billm", {"feedback": "column"}),
    "billm, no means": ("billm", {"mean": False}),
}
FIELDS = [
    "configuration",
    "seed",
    "bits_per_weight",
    "nominal_bits",
    "weight_error",
    "output_error",
    "perplexity",
    "log_perplexity",
    "seconds_forward",
    "seconds_rest",
    "phases",
]


def measure(model: str, name: str, seed: int, calib: str, text: str) -> dict[str, Any]:
    preset, changes = CONFIGURATIONS[name]
    fields = {**changes, "calib": calib, "samples": 32, "seqlen": 512, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "checkpoint"
        report = signbit.quantize(model, out, signbit.Recipe.load(preset, fields), progress=ConsoleProgress())
        bits = signbit.inspect(out)
        scored = signbit.evaluate(out, perplexity=[text], windows=20, progress=ConsoleProgress())
    perplexity = scored["perplexity"][text]
    forward = report.seconds.pop("forward", 0.0)
    return {
        "configuration": name,
        "seed": seed,
        "bits_per_weight": round(bits["bits_per_weight"], 4),
        "nominal_bits": round(bits["nominal_bits_per_weight"], 4),
        "weight_error": round(report.mean_weight_error, 4),
        "output_error": round(report.mean_output_error or math.nan, 5),
        "perplexity": round(perplexity, 2),
        "log_perplexity": round(math.log(perplexity), 3),
        "seconds_forward": round(forward, 1),
        "seconds_rest": round(sum(report.seconds.values()), 1),
        "phases": " ".join(f"{key.replace(' ', '-')}={value:.1f}" for key, value in report.seconds.items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    done = set()
    if arguments.out.is_file():
        with arguments.out.open(newline="") as stream:
            done = {(row["configuration"], int(row["seed"])) for row in csv.DictReader(stream)}
    for name in arguments.only:
        for seed in arguments.seeds:
            if (name, seed) in done:
                continue
            row = measure(arguments.model, name, seed, arguments.calib, arguments.text)
            new = not arguments.out.is_file()
            with arguments.out.open("a", newline="") as stream:
                writer = csv.DictWriter(stream, FIELDS)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
