"""The best recipes by budget of stored bits, measured: the table of docs/frontier.md and what ``--bits`` chooses from.

    python benchmarks/frontier.py demo --calib train.txt --text test.txt [--text c4.jsonl] --out DIR [--budget 1.0 ...]
        [--recipe frontier-fast]

The recipe with each budget quantizes MODEL into DIR, or goes on where an earlier run of this command stopped; what is
finished is evaluated on the first 20 windows of 2048 tokens of each text. Results are kept in DIR/frontier.json, whose
rows of the recipe ``frontier`` are what signbit/recipes/frontier.json is to hold, and printed as a table.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import transformers

import signbit
from signbit.console import ConsoleProgress
from signbit.safetensors_file import write_text

BUDGETS = (0.55, 0.8, 1.0, 1.5, 2.3)


def measure(budget: float, original: dict[str, float], arguments: argparse.Namespace) -> dict[str, Any]:
    preset, changes = arguments.recipe, {"bits": budget}
    out, started = arguments.out / preset / f"{budget:g}", time.perf_counter()
    recipe = signbit.Recipe.load(preset, {"calib": arguments.calib, **changes})
    signbit.quantize(arguments.model, out, recipe, resume=True, progress=ConsoleProgress())
    minutes = (time.perf_counter() - started) / 60
    return {
        "budget": budget,
        "recipe": preset,
        "changes": changes,
        "stored": round(signbit.inspect(out)["bits_per_weight"], 4),
        "perplexity": perplexities(out, arguments),
        "original": original,
        "minutes": round(minutes, 1),
        "machine": platform.processor() or platform.machine(),
    }


def perplexities(model: str | Path, arguments: argparse.Namespace) -> dict[str, float]:
    scored = signbit.evaluate(model, perplexity=arguments.text, windows=20, progress=ConsoleProgress())
    return {Path(text).name: round(value, 2) for text, value in scored["perplexity"].items()}


def table(rows: list[dict[str, Any]]) -> str:
    texts = list(rows[0]["original"])
    lines = [
        ["budget", "recipe", "stored bits", *texts, "minutes"],
        ["---"] * (4 + len(texts)),
        ["original", "", "16", *(f"{rows[0]['original'][text]:,}" for text in texts), ""],
    ]
    for row in sorted(rows, key=lambda row: (row["recipe"], row["budget"])):
        found = [f"{row['perplexity'][text]:,}" for text in texts]
        lines.append([f"{row['budget']:g}", row["recipe"], f"{row['stored']:.3f}", *found, f"{row['minutes']:g}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--text", required=True, action="append", help="evaluation text; may be given more than once")
    parser.add_argument("--out", required=True, type=Path, help="where checkpoints and results are kept")
    parser.add_argument("--budget", type=float, nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--recipe", default="frontier", help="a preset with the key bits")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.out / "frontier.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
    done = {row["budget"] for row in rows if row["recipe"] == arguments.recipe}
    missing = [budget for budget in arguments.budget if budget not in done]
    if missing:
        original = rows[0]["original"] if rows else perplexities(arguments.model, arguments)
        for budget in missing:
            rows.append(measure(budget, original, arguments))
            write_text(kept, json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
