"""Are the figures of ``signbit eval`` those of lm-evaluation-harness by itself?

    python benchmarks/against_harness.py MODEL --task-data DIR [--limit 30] [--perplexity TEXT --windows 2]

MODEL, packed or not, is evaluated by signbit as it is stored. Then it is exported to a plain float32 directory, which
the harness opens by its path, with its own model class, task configurations and one question at a time; its rows are
read from the same files by what stands here, not by signbit's code. Perplexity is asked of the harness's model by the
windows of GPTQ's protocol, which no task of its own has. Needs signbit[eval].
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
from datasets import Dataset, DatasetDict, disable_progress_bars
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import signbit

FOLDERS = ("arc", "lambada", "piqa", "super_glue/boolq", "winogrande")
Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def piqa(data: Path) -> list[Row]:
    labels = (data / "piqa/dev-labels.lst").read_text().split()
    return [{**row, "label": int(label)} for row, label in zip(read(data / "piqa/dev.jsonl"), labels, strict=True)]


def boolq(data: Path) -> list[Row]:
    file = next(one for one in (data / "boolq/val.jsonl", data / "boolq/val.bool.jsonl") if one.is_file())
    return [{**row, "label": int(row["label"])} for row in read(file)]


def arc(name: str) -> Callable[[Path], list[Row]]:
    def rows(data: Path) -> list[Row]:
        return [
            {
                "question": row["question"]["stem"],
                "choices": {key: [one[key] for one in row["question"]["choices"]] for key in ("text", "label")},
                "answerKey": row["answerKey"],
            }
            for row in read(data / f"arc/ARC-{name}-Test.jsonl")
        ]

    return rows


TASKS: dict[str, Callable[[Path], list[Row]]] = {
    "piqa": piqa,
    "winogrande": lambda data: read(data / "winogrande/dev.jsonl"),
    "boolq": boolq,
    "arc_easy": arc("Easy"),
    "arc_challenge": arc("Challenge"),
    "lambada_openai": lambda data: read(data / "lambada/lambada_test.jsonl"),
}


def harness_tasks(lm: HFLM, data: Path, limit: int) -> dict[str, dict[str, float]]:
    """The harness's metrics by task."""
    root = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_defaults=False, include_path=[root / folder for folder in FOLDERS])

    def local(task: str) -> Row:
        rows = Dataset.from_list(TASKS[task](data)[:limit])
        splits = DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))
        return {"task": task, "custom_dataset": lambda **_: splits}

    tasks = manager.load({"group": "all", "task": [local(task) for task in TASKS]})["tasks"]
    with contextlib.redirect_stdout(sys.stderr):  # where the harness prints what it is doing
        found = lm_eval.evaluate(lm, {"tasks": tasks}, limit=limit)["results"]
    return {task: {key.removesuffix(",none"): value for key, value in found[task].items()} for task in TASKS}


def harness_perplexity(lm: HFLM, text: Path, seqlen: int, windows: int) -> float:
    tokens = lm.tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    cut = [tokens[start : start + seqlen] for start in range(0, windows * seqlen, seqlen)]
    asked = [(("", ""), window[:1], window[1:]) for window in cut]
    sums = [answer for answer, _ in lm._loglikelihood_tokens(asked, disable_tqdm=True, override_bs=1)]
    return math.exp(-sum(sums) / len(sums) / (seqlen - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--perplexity", type=Path)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=2048)
    options = parser.parse_args()
    disable_progress_bars()
    asked: dict[str, Any] = {"tasks": list(TASKS), "task_data": options.task_data, "limit": options.limit}
    if options.perplexity:
        asked |= {"perplexity": options.perplexity, "windows": options.windows, "seqlen": options.seqlen}
    with tempfile.TemporaryDirectory() as folder:
        ours = signbit.evaluate(options.model, **asked, device="cpu", cache=Path(folder) / "cache")
        signbit.export(options.model, Path(folder) / "dense", to="dense", dtype="float32")
        lm = HFLM(pretrained=str(Path(folder) / "dense"), dtype="float32", device="cpu", batch_size=1)
        theirs = harness_tasks(lm, options.task_data, options.limit)
        pairs = [
            (f"{task} {metric}", ours["tasks"][task][metric], value)
            for task, metrics in theirs.items()
            for metric, value in metrics.items()
            if isinstance(value, float) and metric in ours["tasks"][task]
        ]
        if options.perplexity:
            expected = harness_perplexity(lm, options.perplexity, options.seqlen, options.windows)
            pairs.append(("perplexity", ours["perplexity"][str(options.perplexity)], expected))
    print(f"{'':36} {'signbit':>14} {'harness':>14} {'relative':>10}")
    for name, found, expected in pairs:
        print(f"{name:36} {found:14.6f} {expected:14.6f} {abs(found - expected) / (abs(expected) or 1):10.1e}")


if __name__ == "__main__":
    main()
